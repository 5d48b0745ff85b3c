"""What the probability of an item is normalised over: all items, ones drawn for the round, or a device's own.

Draws are shared by all devices of a round; public, and without any relation to anybody's data.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Negatives:
    """Items drawn once a round and shared by all devices; public, and without any relation to their data.

    Attributes:
        ids: (m',) int64, unique, ascending.
        log_weights: (m',) float32, log(c_j / (m Q_j)).
        column: (A,) int64, where an item stands in `ids`, or -1.
        log_expected: (A,) float32, log(m Q_j) of every item.
        contrast: whether they serve noise contrast instead of the sampled softmax.
    """

    ids: Tensor
    log_weights: Tensor
    column: Tensor
    log_expected: Tensor
    contrast: bool = False

    def expanded(self, log_factor: float) -> "Negatives":
        """Of a sample of the items, in which each stands for exp(`log_factor`) others."""
        return replace(self, log_weights=self.log_weights + log_factor, log_expected=self.log_expected - log_factor)


@dataclass(frozen=True)
class InBatch:
    """A device's own other logged items stand in for draws; they never leave it.

    Attributes:
        log_q: (A,) float32, log of the probability with which each item is logged.
    """

    log_q: Tensor

    def expanded(self, log_factor: float) -> "InBatch":
        """As :meth:`Negatives.expanded`."""
        return InBatch(self.log_q - log_factor)


Candidates = Negatives | InBatch | None
"""What log π is normalised over; None: all items."""


def log_uniform(items: int) -> np.ndarray:
    """(A,) probabilities Q(k) = log((k+2)/(k+1)) / log(A+1) of items ordered by falling frequency."""
    k = np.arange(items, dtype=np.float64)
    return np.asarray(np.log1p(1 / (k + 1)) / np.log(items + 1))


def draw_negatives(
    probability: np.ndarray, draws: int, generator: np.random.Generator, contrast: bool = False
) -> Negatives:
    """Draw `draws` items with replacement by their (A,) probabilities and merge the repeated ones."""
    drawn = np.searchsorted(np.cumsum(probability), generator.random(draws), side="right")
    return _negatives(np.minimum(drawn, len(probability) - 1), probability, contrast)


def take_turns(items: int, draws: int, round_: int, seed: int, contrast: bool = False) -> Negatives:
    """The `draws` negatives of a round, from 1, when every item has its turn before any has another one.

    Rounds cut a sequence of random permutations of the A items into pieces. In each round every item is expected
    draws/A times, as when drawn uniformly, so that nothing changes in expectation; but what one round leaves out the
    next ones bring, and the error of several rounds falls much faster than that of independent draws.
    """
    places = np.arange((round_ - 1) * draws, round_ * draws)
    passes, within = np.divmod(places, items)
    permutations = {
        int(turn): np.random.default_rng([seed, int(turn)]).permutation(items) for turn in np.unique(passes)
    }
    drawn = np.concatenate([permutations[turn][within[passes == turn]] for turn in permutations])
    return _negatives(drawn, np.full(items, 1 / items), contrast)


def every_item(items: int) -> Negatives:
    """All A items, each once: the full softmax, for items that are a sample themselves."""
    return _negatives(np.arange(items), np.full(items, 1 / items), False)


def _negatives(drawn: np.ndarray, probability: np.ndarray, contrast: bool) -> Negatives:
    items, draws = len(probability), len(drawn)
    ids, counts = np.unique(drawn, return_counts=True)
    column = np.full(items, -1, dtype=np.int64)
    column[ids] = np.arange(len(ids))
    log_expected = np.log(draws * probability)
    return Negatives(
        torch.from_numpy(ids),
        torch.from_numpy((np.log(counts) - log_expected[ids]).astype(np.float32)),
        torch.from_numpy(column),
        torch.from_numpy(log_expected.astype(np.float32)),
        contrast,
    )
