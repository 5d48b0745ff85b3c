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
    """Of B devices, as :class:`client.local_update.Gradients`: E numbers that are not 0.

    Attributes:
        shape: (B, l).
        devices, places: (E,) int64, whose they are, and where in a vector.
        values: (E,) float64.
    """

    shape: tuple[int, int]
    devices: Tensor
    places: Tensor
    values: Tensor

    def norms(self) -> Tensor:
        """(B,) float64."""
        squares = torch.zeros(self.shape[0], dtype=torch.float64)
        return squares.index_add_(0, self.devices, self.values.square()).sqrt()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """(l,) float64: numbers that all have the same sign add up, and float32 would lose a device in their sum."""
        total = torch.zeros(self.shape[1], dtype=torch.float64)
        return total.index_add_(0, self.places, self.values * weights.double()[self.devices])


def histograms_of(settings: Settings, windows: Trajectories, items: int, clip: float) -> Histograms:
    """The histograms of B devices' windows, of norm `clip`, or 1 where there is no clip."""
    real = torch.arange(windows.items.shape[1]) < windows.lengths.unsqueeze(-1)
    device, step = real.nonzero(as_tuple=True)
    place, length = windows.items[device, step], items * histogram_blocks(settings)
    count = torch.ones(len(place), dtype=torch.float64)
    if length > items:
        liked = windows.rewards[device, step].double().clamp(min=0) / HIGHEST_REWARD
        count = torch.cat([count, liked - settings.objective.critic_start])
        device, place = device.repeat(2), torch.cat([place, items + place])
    cells, cell = torch.unique(device * length + place, return_inverse=True)
    sums = torch.zeros(len(cells), dtype=torch.float64).index_add_(0, cell, count)
    counts = Histograms((len(windows), length), cells // length, cells % length, sums)
    factor = (clip if math.isfinite(clip) else 1.0) / counts.norms().clamp(min=1)  # any event's count is at least 1
    return Histograms(counts.shape, counts.devices, counts.places, sums * factor[counts.devices])
