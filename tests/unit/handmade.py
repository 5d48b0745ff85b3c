"""Interactions written by hand, for tests."""

from collections.abc import Sequence

import numpy as np

from common.catalogue import Catalogue
from simulations.datasets.interactions import Interactions


def interactions(
    histories: Sequence[Sequence[int]], items: int, times: Sequence[Sequence[int]] | None = None
) -> Interactions:
    """Each user's items, oldest first, over a catalogue of `items`; times count 0, 1, 2, … unless given."""
    lengths = [len(history) for history in histories]
    names = np.array([f"item {item}" for item in range(items)])
    times = times if times is not None else [range(length) for length in lengths]
    return Interactions(
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        items=np.array([item for history in histories for item in history], dtype=np.int32),
        ratings=np.full(sum(lengths), 5, dtype=np.float32),
        timestamps=np.array([moment for user in times for moment in user], dtype=np.int64),
        user_ids=np.array([f"user {user}" for user in range(len(histories))]),
        catalogue=Catalogue(names, names),
    )
