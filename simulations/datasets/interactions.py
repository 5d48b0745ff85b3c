"""Logged interactions of a population, in the one form that all sources are brought to."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.catalogue import Catalogue


@dataclass(frozen=True)
class Interactions:
    """Histories of N users over A catalogue items, compressed by user, each oldest first.

    Attributes:
        offsets: (N+1,) int64; user u's interactions are ``offsets[u]:offsets[u+1]``.
        items: (E,) int32 catalogue indices in [0, A).
        ratings: (E,) float32 in the declared rating range.
        timestamps: (E,) int64 seconds, non-decreasing within a user.
        user_ids: (N,) strings, the users' names in the source, in natural order.
        catalogue: the items.
    """

    offsets: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    user_ids: np.ndarray
    catalogue: Catalogue

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """(N,) number of interactions of each user, possibly 0."""
        return np.diff(self.offsets)

    def slices(self) -> Iterator[slice]:
        """Each user's slice of the flat arrays, in order."""
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield slice(int(start), int(stop))
