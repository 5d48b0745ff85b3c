"""Logged interactions of a population, in the one form that all sources are brought to."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from common.catalogue import Catalogue

_BLOCK = 2**22
"""Interactions looked at together where all are: some hundred megabytes."""


@dataclass(frozen=True)
class Interactions:
    """Histories of N users over A catalogue items, compressed by user, each oldest first.

    Histories that are cut short share their arrays with the whole ones, which may be memory-mapped: between the users'
    interactions there may be others that do not count. Which do, :meth:`slices` and :meth:`places` say.

    Attributes:
        offsets: (N+1,) int64; user u's interactions begin at ``offsets[u]``, before those of the next one.
        items: (E,) int32 catalogue indices in [0, A).
        ratings: (E,) float32 in the declared rating range.
        timestamps: (E,) int64 seconds, non-decreasing within a user.
        user_ids: (N,) strings, the users' names in the source, in natural order.
        catalogue: the items.
        kept: (N,) int64, how many of each user's interactions count, the oldest ones; None: all.
    """

    offsets: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    user_ids: np.ndarray
    catalogue: Catalogue
    kept: np.ndarray | None = None

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """(N,) number of interactions of each user, possibly 0."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.offsets) if self.kept is None else self.kept

    def first(self, lengths: np.ndarray) -> Self:
        """The same users' first interactions, as many as (N,) `lengths` ≤ those now; nothing is copied."""
        return replace(self, kept=lengths)

    def slices(self) -> Iterator[slice]:
        """Each user's slice of the flat arrays, in order."""
        for start, length in zip(self.offsets[:-1], self.lengths(), strict=True):
            yield slice(int(start), int(start + length))

    def places(self, users: np.ndarray) -> np.ndarray:
        """Where in the flat arrays the interactions of (B,) users are, user after user."""
        lengths = self.lengths()[users]
        # Counts on within a user and jumps to the start of the next one.
        jumps = self.offsets[users] - (np.cumsum(lengths) - lengths)
        return np.asarray(np.repeat(jumps, lengths) + np.arange(lengths.sum()))

    def blocks(self) -> Iterator[np.ndarray]:
        """All users, in consecutive blocks of some million interactions."""
        cuts = np.searchsorted(self.offsets[:-1], np.arange(0, max(int(self.offsets[-1]), 1), _BLOCK))
        for start, stop in zip(cuts, [*cuts[1:], self.users], strict=True):
            yield np.arange(start, stop)

    def counts(self) -> np.ndarray:
        """(A,) how often each item occurs."""
        counts = np.zeros(len(self.catalogue), np.int64)
        for users in self.blocks():
            counts += np.bincount(self.items[self.places(users)], minlength=len(counts))
        return counts
