"""A made-up population whose preferences are known.

Each user has a taste and each item a character, both standard normal vectors, and each item an appeal to all. The true
preference of a user for an item is their scaled product plus the appeal, of about unit variance over pairs. Items were
*shown* by another rule, the logging policy: a softmax of the item's popularity, which has nothing to do with its
appeal, plus a little of the user's preference. A learner that copies the log therefore recommends popular items, and
one that corrects for the logging policy can find better ones.

A user depends on the seed, the number of items and the user's own number alone: the first 100 users of 10,000 are the
users of a population of 100. Items are therefore ordered by how often the logging policy shows them in expectation, not
by their count in one population.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.catalogue import Catalogue
from common.errors import DataError
from simulations.datasets.interactions import Interactions
from simulations.datasets.storage import zeros

WIDTH = 8
"""Numbers in a taste and in a character."""
SHORTEST, LONGEST = 10, 60
"""Interactions of a user; fewer if there are not so many items."""

_APPEAL_SHARE = 0.3  # of the variance of preferences; the rest is personal
_POPULARITY = 1.5  # standard deviation of the popularity part of the logging policy's logits
_PREFERENCE_IN_LOG = 0.3  # weight of the true preference in those logits
_RATING_NOISE = 0.5  # standard deviation, where preferences have about 1
_START, _START_SPAN, _MEAN_GAP = 1_500_000_000, 365 * 86_400, 86_400  # seconds

_BLOCK = 256  # users made together, always as many; some 5 MB per array and 5,000 items
_ITEMS, _USERS = 2, 3  # set the generators apart from others made from the same seed


@dataclass(frozen=True)
class Preferences:
    """The truth behind a synthetic population of N users and A items.

    Attributes:
        tastes: (N, WIDTH) float32, one row per user.
        characters: (A, WIDTH) float32, one row per item of the catalogue.
        appeal: (A,) float32, what is liked about an item by everyone.
    """

    tastes: np.ndarray
    characters: np.ndarray
    appeal: np.ndarray

    def scores(self, users: np.ndarray | slice) -> np.ndarray:
        """(B, A) float32 true preferences of B users, given by index, mask or slice; mean about 0, variance about 1."""
        personal = np.float32(np.sqrt((1 - _APPEAL_SHARE) / WIDTH))
        scores: np.ndarray = (personal * self.tastes[users]) @ self.characters.T + self.appeal
        return scores


def synthetic(
    users: int, items: int, *, seed: int, rating_range: tuple[float, float] = (0.5, 5.0)
) -> tuple[Interactions, Preferences]:
    """Make `users` ≥ 1 histories over `items` ≥ 1 items.

    A history has SHORTEST to LONGEST different items at increasing times. Ratings are the half-stars inside
    `rating_range`, about equally frequent over all pairs, and rise with the true preference up to noise. Public of an
    item is which two traits are its most pronounced, and whether it has more or less of them than others.

    Users are made block by block, straight into arrays that are memory-mapped where they are large.

    Raises:
        DataError: `rating_range` holds no half-star, or the cache folder has no room for the arrays.
    """
    lowest, highest = int(np.ceil(2 * rating_range[0])), int(np.floor(2 * rating_range[1]))
    if lowest > highest:
        low, high = rating_range
        raise DataError(f"Expected data.rating_range={low:g},{high:g} to hold a multiple of 0.5.")

    generator = np.random.default_rng([seed, _ITEMS])
    popularity = _POPULARITY * generator.standard_normal(items, np.float32)
    appeal = np.float32(np.sqrt(_APPEAL_SHARE)) * generator.standard_normal(items, np.float32)
    characters = generator.standard_normal((items, WIDTH), np.float32)
    order = np.argsort(-(popularity + _PREFERENCE_IN_LOG * appeal), kind="stable")
    popularity, appeal, characters = popularity[order], appeal[order], characters[order]

    blocks = range(-(-users // _BLOCK))
    lengths = np.concatenate([_begin(seed, number, items)[2] for number in blocks])[:users]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tastes = zeros((users, WIDTH), np.float32)
    user_ids = zeros((users,), f"U{len(str(users - 1))}")
    flat = [zeros((int(offsets[-1]),), kind) for kind in (np.int32, np.float32, np.int64)]

    def make(number: int) -> None:
        generator, own_tastes, own_lengths = _begin(seed, number, items)
        scores = Preferences(own_tastes, characters, appeal).scores(slice(None))
        columns = _histories(generator, scores, popularity, lowest, highest)
        first, last = number * _BLOCK, min((number + 1) * _BLOCK, users)
        tastes[first:last] = own_tastes[: last - first]
        user_ids[first:last] = np.arange(first, last).astype(np.str_)
        counts = np.arange(columns[0].shape[1]) < own_lengths[: last - first, None]
        for whole, column in zip(flat, columns, strict=True):
            whole[offsets[first] : offsets[last]] = column[: last - first][counts]

    # numpy gives its lock back while it computes, and a block depends on nothing but its number.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(make, blocks):
            pass  # so that what was raised is raised here

    ids = np.arange(items).astype(np.str_)
    catalogue = Catalogue(ids, np.array([f"Item {name}" for name in ids.tolist()]), labels_of(characters))
    interactions = Interactions(
        offsets=offsets, items=flat[0], ratings=flat[1], timestamps=flat[2], user_ids=user_ids, catalogue=catalogue
    )
    return interactions, Preferences(tastes, characters, appeal)


def _begin(seed: int, number: int, items: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """The generator of a block of users, their tastes, and how long their histories are."""
    generator = np.random.default_rng([seed, _USERS, number])
    tastes = generator.standard_normal((_BLOCK, WIDTH), np.float32)
    lengths = generator.integers(SHORTEST, LONGEST, _BLOCK, endpoint=True)
    return generator, tastes, np.minimum(lengths, items)


def labels_of(characters: np.ndarray) -> np.ndarray:
    """(A,) what is public of items with (A, f) characters: their two strongest traits, and which way each goes."""
    strongest = np.argsort(-np.abs(characters), axis=1, kind="stable")[:, :2]
    upwards = np.take_along_axis(characters, strongest, 1) > 0
    names = np.char.add(np.where(upwards, "more of ", "less of "), strongest.astype(str))
    return np.array(["|".join(row) for row in names.tolist()])


def _histories(
    generator: np.random.Generator, scores: np.ndarray, popularity: np.ndarray, lowest: int, highest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let the logging policy show items to a block of users, and the users rate them in `lowest`..`highest` halves.

    Returns:
        Items, ratings and timestamps, each (B, LONGEST), or (B, A) if that is fewer: as for the longest histories.
    """
    users, items = scores.shape
    places = min(LONGEST, items)

    # The items whose exponential clocks ring first are a draw without replacement, in the order of drawing.
    clocks = generator.standard_exponential(scores.shape, np.float32)
    clocks *= np.exp(-popularity - np.float32(_PREFERENCE_IN_LOG) * scores)
    shown = np.argpartition(clocks, places - 1, axis=1)[:, :places]
    shown = np.take_along_axis(shown, np.argsort(np.take_along_axis(clocks, shown, 1), axis=1), 1)

    noise = _RATING_NOISE * generator.standard_normal(shown.shape, np.float32)
    liking = (np.take_along_axis(scores, shown, 1) + noise) / np.sqrt(1 + _RATING_NOISE**2)
    share = (1 + np.tanh(0.85 * liking)) / 2  # near the normal distribution function: about uniform in [0, 1]
    halves = np.minimum(lowest + np.floor(share * (highest - lowest + 1)), highest)

    gaps = 1 + generator.exponential(_MEAN_GAP, shown.shape).astype(np.int64)
    start = _START + generator.integers(_START_SPAN, size=(users, 1))
    return shown.astype(np.int32), (halves / 2).astype(np.float32), start + np.cumsum(gaps, axis=1)
