"""Deliberately broken systems, which the audits must catch: each is one step of the sum done wrong.

A flaw comes between the round loop and the devices (:class:`simulations.audits.system.Flawed`) and changes what the
round is computed with. No setting leads here.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from common.offer import Offer

Flaw = Callable[[Offer, np.ndarray, np.ndarray], tuple[Offer, np.ndarray]]
"""From the offer, the members that the coins drew, and (N,) how many examples each device has over the average, to
the offer and the members that the sum is formed with. A member that is listed k times weighs k."""


def as_it_is(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """No flaw."""
    return offer, members


def without_noise(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """No noise at all: what an attack must succeed on, or it says nothing."""
    return _with_variance(offer, 0.0), members


def a_tenth_of_the_noise(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """z is a tenth of what the ledger accounts for."""
    return _with_variance(offer, offer.encoding.variance / 100), members


def without_clipping(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """Updates are summed at whatever norm they have."""
    return _with_privacy(offer, clip_norm=math.inf), members


def without_sampling(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """Everybody takes part in every round, while ε claims amplification by the coins."""
    return offer, np.arange(len(examples))


def weighted_by_examples(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """A device counts by its examples, as in federated averaging, after its clip."""
    weights = np.maximum(1, np.rint(examples[members])).astype(np.int64)
    return offer, np.repeat(members, weights)


def with_seeded_noise(offer: Offer, members: np.ndarray, examples: np.ndarray) -> tuple[Offer, np.ndarray]:
    """The noise follows from the seed in the public settings."""
    return _with_privacy(offer, randomness="seeded"), members


BROKEN: dict[str, Flaw] = {
    "noise × 0.1": a_tenth_of_the_noise,
    "clip off": without_clipping,
    "sampling off": without_sampling,
    "weight by examples": weighted_by_examples,
    "seeded noise": with_seeded_noise,
}
"""By name."""


def _with_variance(offer: Offer, variance: float) -> Offer:
    return replace(offer, encoding=replace(offer.encoding, variance=variance))


def _with_privacy(offer: Offer, **changes: Any) -> Offer:
    privacy = offer.settings.privacy.model_copy(update=changes)
    return replace(offer, settings=offer.settings.model_copy(update={"privacy": privacy}))
