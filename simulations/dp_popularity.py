"""Popularity under the same budget: how often each item was interacted with, released once with noise.

What a recommender without a model costs in privacy, and reaches: the baseline that a private model has to beat.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from common.offer import Offer
from common.privacy.budget import make_budget
from common.privacy.clipping import clip_factor
from common.privacy.encoding import release_central
from common.settings import Settings
from simulations.datasets.interactions import Interactions


class Release(NamedTuple):
    """What was released, and what it cost."""

    counts: np.ndarray
    """(A,) float64, the noisy sum of the users' bounded counts."""
    privacy: dict[str, Any]
    """As of :meth:`common.privacy.budget.Budget.statement`."""


def release_popularity(settings: Settings, histories: Interactions) -> Release:
    """One release of the histogram over all items, at the run's `privacy.target_epsilon` and δ.

    Guarantee: unit one user, added or removed; a user moves the sum by at most 1 in L2 norm, and the noise is that of a
    run with one round of all devices at C = 1. Tests: ``tests/unit/test_dp_popularity.py``.
    """
    once = settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"rounds": 1, "cohort_rate": 1.0}),
            "privacy": settings.privacy.model_copy(update={"clip_norm": 1.0, "noise_multiplier": 0.0}),
        }
    )
    budget = make_budget(once, histories.users, len(histories.catalogue))
    offer = Offer(1, 1, {}, budget.encoding, once)
    counts = release_central(bounded_counts(histories), offer.encoding, offer.signs, offer.stream("popularity"))
    return Release(counts, budget.statement(1, 1))


def bounded_counts(histories: Interactions) -> np.ndarray:
    """(A,) float64 sum over users of their (A,) counts, each scaled down to an L2 norm of at most 1."""
    total = np.zeros(len(histories.catalogue))
    for users in histories.blocks():
        items, lengths = histories.items[histories.places(users)], histories.lengths()[users]
        begins = np.concatenate([[0], np.cumsum(lengths)])
        counts = sparse.csr_array((np.ones(len(items)), items, begins), (len(users), len(total)))
        counts.sum_duplicates()
        total += clip_factor(np.sqrt(counts.multiply(counts).sum(axis=1)), 1.0) @ counts
    return total
