"""Where interactions come from; :func:`load` is the one way in."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from common.settings import DataSettings
from simulations.datasets import files, movielens, movielens_small, synthetic
from simulations.datasets.interactions import Interactions

SYNTHETIC_SIZE = 1000
"""Users and items of `synthetic` where the settings say 0."""


def load(settings: DataSettings, *, seed: int) -> Interactions:
    """The interactions that the settings name.

    Args:
        seed: makes the population of `synthetic`; orders interactions with equal timestamps of the other sources.

    Raises:
        DataError: the source is missing, damaged or holds something that is no interaction.
        MissingDependency: a parquet file without pyarrow.
    """
    match settings.source:
        case "movielens-small":
            return movielens_small.read(settings, seed=seed)
        case "movielens":
            return movielens.read(settings, seed=seed)
        case "csv":
            return files.read(settings, seed=seed)
        case "synthetic":
            users, items = settings.users or SYNTHETIC_SIZE, settings.items or SYNTHETIC_SIZE
            return synthetic.synthetic(users, items, seed=seed, rating_range=settings.rating_range)[0]


def available() -> dict[str, str]:
    """Each `data.source` and what it reads, on one line."""
    return {
        "movielens-small": "MovieLens small of 2016: 671 users, 100,004 ratings, 9,066 movies; a download of 50 MB.",
        "movielens": "A folder or zip from GroupLens at data.path: latest-small, 20M, 25M, 32M, 1M, 10M or 100K.",
        "csv": "A .csv, .csv.gz or .parquet file at data.path, its columns named by data.columns.*.",
        "synthetic": "A made-up population with known preferences: data.users users and data.items items.",
    }


def summary(interactions: Interactions) -> dict[str, Any]:
    """Figures about a data set, ready for JSON.

    Returns:
        ``users``, ``items`` and ``interactions`` are counts; ``shortest``, ``median`` and ``longest`` are of the
        users' histories; ``density`` is interactions per pair of user and item; ``first`` and ``last`` are ISO dates in
        UTC. What no users or no interactions leave undefined is absent.
    """
    lengths, times = interactions.lengths(), interactions.timestamps
    figures: dict[str, Any] = {
        "users": interactions.users,
        "items": len(interactions.catalogue),
        "interactions": len(times),
    }
    if len(lengths):
        figures |= {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        }
    if len(times):
        first, last = (datetime.fromtimestamp(int(time), UTC).isoformat() for time in (times.min(), times.max()))
        density = len(times) / (interactions.users * len(interactions.catalogue))
        figures |= {"density": density, "first": first, "last": last}
    return figures
