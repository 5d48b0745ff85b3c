"""Adaptive clipping: C follows a quantile of the norms of updates, which the members tell in one noisy coordinate.

Source: Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive clipping" (NeurIPS 2021),
algorithm 1, with both of its releases in one.

Behind its update, clipped to C, each member sends one coordinate more, +C/10 if the update's norm was at most C and
−C/10 if it was above: whichever it is, the whole has a norm of at most √1.01·C (:func:`joint`). That is the `clip` of
the round's :class:`~common.privacy.encoding.Encoding`: the two are rotated, rounded, noised and masked as one vector.

What it costs (unit: one user; adjacencies of :mod:`common.privacy.accounting`): z is relative to the sensitivity of the
whole, so that z, q, the number of releases and both ε are those of a fixed clip, with √1.01 = 1.005 times the noise on
the update. C of a round is computed from earlier releases, and composition is adaptive; in the integer units in which
noise is added V and Δ₂ are those of the first round, whatever C is (:func:`at`).
Tests: ``tests/unit/test_adaptive_clip.py``.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.privacy.clipping import clip_factor
from common.privacy.encoding import Encoding
from common.privacy.rounding import norm
from common.settings import CLIP_RANGE, PrivacySettings, Settings

SHARE = 0.1
"""Size of the coordinate, over C."""

_JOINT = math.sqrt(1 + SHARE**2)
_HAIR = 1e-12


@dataclass(frozen=True)
class AdaptiveClip:
    """How C goes from round to round.

    Attributes:
        first: C of the first round.
        quantile: γ, the share of updates that C is to bring within it.
        learning_rate: η.
        lowest, highest: where C stays whatever the noise says; a device refuses more than the highest.
    """

    first: float
    quantile: float
    learning_rate: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, settings: Settings) -> "AdaptiveClip | None":
        """That of a run; None where C is fixed."""
        privacy = settings.privacy
        if not privacy.clip_quantile:
            return None
        first, highest = privacy.clip_norm, settings.largest_clip
        return cls(first, privacy.clip_quantile, privacy.clip_learning_rate, first / CLIP_RANGE, highest)

    def following(self, clip: float, share: float) -> float:
        """C·exp(−η(b̃ − γ)): C of the round after one with `clip` that released the noisy `share` within it."""
        log = math.log(clip) - self.learning_rate * (share - self.quantile)
        anywhere = math.exp(min(log, math.log(self.highest) + 1))  # without an overflow
        return min(max(anywhere, self.lowest), self.highest)  # exactly: devices refuse whatever is above


def joint(clip: float) -> float:
    """√1.01·C: the bound on an update clipped to C, with the coordinate behind it."""
    return _JOINT * clip


def clip_of(encoding: Encoding) -> float:
    """C of a round whose encoding bounds the whole vector: the inverse of :func:`joint`."""
    return encoding.clip / _JOINT


def sent(privacy: PrivacySettings, dimension: int) -> tuple[int, float]:
    """How many numbers a device with d shared parameters sends, and their bound in the first round."""
    if not privacy.clip_quantile:
        return dimension, privacy.clip_norm
    return dimension + 1, joint(privacy.clip_norm)


def at(first: Encoding, clip: float) -> Encoding:
    """The first round's encoding with another C > 0.

    Guarantee: its Δ₂, in integer units, is at most the first one's, and V is the same, so that its z is at least the
    first one's. Test: ``test_every_clip_has_the_noise_of_the_first``.
    """
    bound = joint(clip)
    # A hair below, so that no rounding of s·C to a float raises Δ₂.
    return replace(first, clip=bound, scale=first.scale * first.clip * (1 - _HAIR) / bound)


def within(norms: ArrayLike, clip: float) -> NDArray[np.int64]:
    """1 for every norm of at most C and −1 for every other: what the coordinate says, in units of C/10."""
    return np.where(np.asarray(norms, np.float64) <= clip, 1, -1)


def with_its_bit(update: NDArray[np.float32], clip: float) -> NDArray[np.float64]:
    """(d+1,) what one device sends, before rotation: (d,) its update clipped to C, and whether it had to be.

    Guarantee: its norm is at most √1.01·C, up to the rounding of floats; in integers the encoding asserts it.
    Test: ``test_one_user_moves_the_sum_by_the_sensitivity_at_most``.
    """
    values = update.astype(np.float64)
    length = norm(values)
    return np.append(values * clip_factor(length, clip), SHARE * clip * within(length, clip))


def share_within(total: float, clip: float, expected: float) -> float:
    """b̃: the noisy share of updates whose norm was at most C, from the coordinate's released sum.

    Of n members with a share p within, the sum is (2p − 1)n·C/10 plus noise. How many n were is not released, so the
    expected cohort m = qN takes its place: b̃ = 1/2 + sum/(2m·C/10), of mean p since E n = m. Its standard deviation by
    noise is :func:`share_noise`, half of what 0 and C/10 would give at the same bound, and by coins √((1−q)/m)/2. So b̃
    may lie outside of [0, 1]. Test: ``test_the_share_has_the_stated_noise_and_no_bias``.
    """
    return 0.5 + total / (2 * SHARE * clip * expected)


def share_noise(noise_multiplier: float, expected: float) -> float:
    """Standard deviation of b̃ by noise of z: 5.02 z/m, for an expected cohort of m."""
    return _JOINT * noise_multiplier / (2 * SHARE * expected)
