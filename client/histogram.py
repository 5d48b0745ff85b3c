"""What a device sends in a round that counts: how often it met each item (:mod:`common.popularity`).

Guarantees (``tests/unit/test_popularity_start.py``):
    - whatever a device holds, its vector has a joint L2 norm of C, or 0 where it holds nothing;
    - it does not depend on the order of what it holds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.popularity import histogram_blocks
from common.settings import Settings
from common.trajectory import HIGHEST_REWARD, Trajectories


@dataclass(frozen=True)
class Histograms:
    """Of B devices, as :class:`client.local_update.Gradients`.

    Attributes:
        values: (B, l) sparse float64, each row of norm C or 0.
    """

    values: Tensor

    def norms(self) -> Tensor:
        """(B,) float64."""
        return _norms(self.values)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """(l,) float64: sums of counts that all have the same sign grow, and float32 would lose a device in them."""
        return self.values.T @ weights.double()


def histograms_of(settings: Settings, windows: Trajectories, items: int, clip: float) -> Histograms:
    """The histograms of B devices' windows, of norm `clip`, or 1 where there is no clip."""
    real = torch.arange(windows.items.shape[1]) < windows.lengths.unsqueeze(-1)
    device, step = real.nonzero(as_tuple=True)
    place = windows.items[device, step]
    count = torch.ones(len(place), dtype=torch.float64)
    length = items
    if histogram_blocks(settings) == 2:
        liked = windows.rewards[device, step].double().clamp(min=0) / HIGHEST_REWARD
        count = torch.cat([count, liked - settings.objective.critic_start])
        device, place, length = device.repeat(2), torch.cat([place, items + place]), 2 * items
    counts = torch.sparse_coo_tensor(torch.stack([device, place]), count, (len(windows), length)).coalesce()
    factor = (clip if math.isfinite(clip) else 1.0) / _norms(counts).clamp(min=1)  # that of any event is at least 1
    return Histograms(counts * factor.unsqueeze(-1))


def _norms(rows: Tensor) -> Tensor:
    squares = rows.values().square()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, rows.indices()[0], squares).sqrt()
