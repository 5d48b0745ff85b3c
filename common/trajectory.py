"""Padded batches of logged interactions: what one round's local computation reads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LOWEST_REWARD, HIGHEST_REWARD = -5.0, 5.0


@dataclass(frozen=True)
class Trajectories:
    """Windows of B users' histories, each padded on the right to T steps.

    Attributes:
        items: (B, T) int64 logged items, oldest first; 0 where padded.
        rewards: (B, T) float32, in [-5, 5] for ratings in the declared range; 0 where padded.
        returns: (B, T) float32 discounted sums of this user's own rewards from each step on.
        lengths: (B,) int64, number of real steps, 0 to T.
        support: (B,) int64, number of leading steps that adapt the user embedding; the others make the update.
    """

    items: Tensor
    rewards: Tensor
    returns: Tensor
    lengths: Tensor
    support: Tensor

    def __len__(self) -> int:
        return self.items.shape[0]


def rewards_of(ratings: np.ndarray, rating_range: tuple[float, float]) -> np.ndarray:
    """Map ratings linearly from the declared range to rewards in [-5, 5], float32 of the same shape."""
    low, high = rating_range
    unit = (np.asarray(ratings, dtype=np.float64) - low) / (high - low)
    return np.asarray(LOWEST_REWARD + unit * (HIGHEST_REWARD - LOWEST_REWARD), dtype=np.float32)


def window_starts(seed: int, round_: int, devices: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    """Where each device's window begins: uniform over the places at which a full window fits.

    A device draws its own start from (seed, round, device) alone, so a batch of thousands and a batch of one agree.

    Args:
        devices: (B,) int64 device numbers.
        lengths: (B,) int64 lengths of the histories.
    """
    # SplitMix64 (Steele et al. 2014), chained over the three numbers: a stateless draw that vectorises.
    bits = _mix(np.full(len(devices), seed, dtype=np.uint64))
    for word in (np.uint64(round_), devices.astype(np.uint64)):
        bits = _mix(bits ^ word)
    places = np.maximum(lengths - window, 0).astype(np.uint64) + np.uint64(1)
    return np.asarray(_mix(bits) % places, dtype=np.int64)


def _mix(bits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(bits ^ (bits >> np.uint64(31)))


def pad(
    items: np.ndarray,
    rewards: np.ndarray,
    returns: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    support_fraction: float,
) -> Trajectories:
    """Gather B stretches of flat arrays into one padded batch.

    Args:
        items, rewards, returns: (E,) flat arrays of interactions.
        starts, lengths: (B,) first interaction and number of interactions of each stretch.
        support_fraction: share of each stretch, rounded down, that is support.
    """
    steps = np.arange(max(int(lengths.max(initial=0)), 1))
    real = steps < lengths[:, None]
    flat = np.where(real, starts[:, None] + steps, 0)

    def gather(values: np.ndarray, dtype: type) -> Tensor:
        if not len(values):
            return torch.from_numpy(np.zeros(flat.shape, dtype))
        return torch.from_numpy(np.where(real, values[flat], 0).astype(dtype))

    return Trajectories(
        items=gather(items, np.int64),
        rewards=gather(rewards, np.float32),
        returns=gather(returns, np.float32),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        support=torch.from_numpy(np.floor(lengths * support_fraction + 1e-9).astype(np.int64)),
    )
