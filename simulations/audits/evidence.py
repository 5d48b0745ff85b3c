"""Which items an update betrays: the rows of the input table that it moves, and the biases that it raises."""

import numpy as np
import torch

from common.model import HEADS, shapes, unflatten
from common.settings import Settings
from common.trajectory import Trajectories


def items_moved(update: np.ndarray, settings: Settings, items: int) -> np.ndarray:
    """(A,) how far each item is moved by an update or a sum of updates (d,) in a way that only reading or logging it
    moves it: the norm of its input embedding's gradient, and its bias's gradient where that raises it.
    """
    expected = shapes(settings, items)
    parts = unflatten(torch.from_numpy(update), expected)
    head = next(HEADS[head] for head in ("behaviour", "frequency", "policy", "critic") if head in settings.heads)
    raised = (-parts[head][:, -1]).clamp(min=0)
    if "items.embedding" in expected:
        raised = raised + parts["items.embedding"].norm(dim=1)
    return raised.numpy()


def items_read(windows: Trajectories, device: int, items: int) -> np.ndarray:
    """(A,) bool, which items are in the window of one of the devices."""
    read = np.zeros(items, bool)
    read[windows.items[device, : int(windows.lengths[device])].numpy()] = True
    return read
