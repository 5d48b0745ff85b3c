"""From one device's update to integers on the wire, and from their sum to the released vector.

One device: clip to C → rotate → scale by s → round, norm bound asserted → add its share of the noise → mod 2^bits.
The server: add residues mod 2^bits → top the noise up → lift to [−2^(bits−1), 2^(bits−1)) → unscale → unrotate.
Reducing mod 2^bits comes after the noise: a sum that wraps costs utility, never privacy.

Formal guarantees (unit: one user; Δ₂ = :attr:`Encoding.sensitivity` in integer units):

=====================  ============================================================================================
who observes           what holds
=====================  ============================================================================================
a reader of the model  Every release is the integer sum plus Skellam of variance V, whatever the cohort: n members,
                       one or none. Adding or removing a user moves the sum by at most Δ₂.
                       Tests: ``test_encoding.py::test_the_released_variance_is_the_same_for_every_cohort``,
                       ``test_rounding.py::test_the_integer_norm_bound_always_holds``.
the server             The sum it sees before its own top-up carries noise of variance ≥ V·honest that neither it
                       nor devices that collude with it know, as long as at most ⌊γn⌋ devices collude and ⌊δn⌋ drop
                       out (honest = 1 − γ − δ). Replacing a member's update by zero moves the sum by at most Δ₂.
                       Test: ``test_encoding.py::test_the_honest_part_is_at_least_its_share``.
a reader of a central  As the first row, but the bound Δ₂ fails with probability β = 1e-20 a release, charged to δ:
release                :func:`release_central`. Test: ``test_encoding.py::test_central_sensitivity``.
=====================  ============================================================================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.clipping import clip_factor
from common.privacy.randomness import Stream
from common.privacy.rotation import padded, rotate, unrotate
from common.privacy.rounding import DEVICE_BETA, conditional_round, norm, rounded_norm, stochastic_round
from common.privacy.skellam import DELTA_LOSS, skellam

CENTRAL_BETA = 1e-20
"""Probability with which one user moves a central release by more than the sensitivity."""

CENTRAL_SLACK = 1e-4
"""How much of C the floating-point sum behind a central release may err by when one user comes or goes."""

WIDTHS = (16, 20, 32)
"""Bits of a coordinate on the wire, the ones that are tried in this order."""

INFLATION, INFLATION_LIMIT = 0.01, 0.10
"""Of the sensitivity by rounding: aimed at, and tolerated for a narrower wire."""

NOISE_STD = 150.0
"""Of the honest noise, in integer units, from which on Skellam is the Gaussian to 1e-4."""

LARGEST_REACH = 2.0**30
"""Of s·C, so that norms stay below 2^31."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What clipping, noise, wire format and ledger must agree on. Raises :class:`PrivacyError` out of range."""

    dimension: int
    """d ≥ 1, coordinates of what a user sends, before padding: an update, and what is charged with it."""
    clip: float
    """C > 0, finite: bound on the L2 norm of all that one user sends."""
    scale: float
    """s > 0: integer units in one unit of the update."""
    bits: int
    """Width of a residue, 2 … 32."""
    variance: float
    """V = (zΔ₂)² ≥ 0 of every released coordinate, in squared integer units; 0: no noise."""
    honest: float
    """1 − γ − δ, in (0, 1]: the part of a roster that neither colludes nor drops out."""
    central: bool = False
    """Whether the sum is known in the clear and noised once (:func:`release_central`)."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("dimension", self.dimension >= 1, "≥ 1"),
            ("clip", 0 < self.clip < math.inf, "positive and finite"),
            ("scale", 0 < self.scale * self.clip <= LARGEST_REACH, "positive and scale·clip ≤ 2^30"),
            ("bits", 2 <= self.bits <= 32, "from 2 to 32"),
            ("variance", 0 <= self.variance < math.inf, "≥ 0 and finite"),
            ("honest", 0 < self.honest <= 1, "in (0, 1]"),
        ):
            if not holds:
                raise PrivacyError(f"Expected the encoding's {name}={getattr(self, name)} to be {expected}.")

    @classmethod
    def choose(
        cls,
        dimension: int,
        clip: float,
        noise_multiplier: float,
        cohort: float,
        honest: float,
        bits: int = 0,
        *,
        central: bool = False,
    ) -> "Encoding":
        """Scale and width for noise of std z·Δ₂ and an expected cohort of `cohort` = qN > 0 members.

        With noise: the first of 16, 20 and 32 bits (or the width asked for) in which the sum of a cohort and six
        standard deviations of noise fit, cohort·s·C/√2^m + 6zΔ₂ < 2^(bits−1), at the scale where rounding inflates
        the sensitivity by 1 %; or at the largest scale that fits, while the inflation stays ≤ 10 %. Where z or d is
        small the scale is larger, so that Skellam noise stays close to the Gaussian.

        Without noise (z = 0): 32 bits (or the width asked for) at the largest scale that leaves room for a sum eight
        times as high as if it were spread evenly; the rounding error is then about that of float32.

        Raises :class:`PrivacyError` if no width fits, or a value is out of range.
        """
        if not 0 <= noise_multiplier < math.inf:
            raise PrivacyError(f"Expected privacy.noise_multiplier={noise_multiplier} to be ≥ 0 and finite.")
        if not 0 < cohort < math.inf:
            raise PrivacyError(f"Expected the expected cohort={cohort} to be > 0 and finite.")
        if not 0 < clip < math.inf:
            raise PrivacyError(f"Expected privacy.clip_norm={clip} to be > 0 and finite.")
        unit = cls(dimension, clip, 1 / clip, 32, 0.0, honest, central)

        def at(reach: float) -> Encoding:
            return replace(unit, scale=reach / clip)

        def load(reach: float) -> float:
            height = cohort * reach / math.sqrt(unit.padded)
            return height + 6 * noise_multiplier * at(reach).sensitivity if noise_multiplier else 8 * height

        def fitting(width: int) -> float:
            return largest_reach(lambda reach: load(reach) < 2.0 ** (width - 1))

        def inflated(limit: float) -> float:
            return largest_reach(lambda reach: at(reach).sensitivity > (1 + limit) * reach)

        wanted, least = LARGEST_REACH, 0.0
        if noise_multiplier:
            gaussian = NOISE_STD / (noise_multiplier * math.sqrt(honest))
            wanted, least = max(gaussian, inflated(INFLATION)), max(gaussian, inflated(INFLATION_LIMIT))
        for width in [bits] if bits else WIDTHS if noise_multiplier else WIDTHS[-1:]:
            reach = min(wanted, fitting(width))
            if reach >= least:
                chosen = replace(at(reach), bits=width)
                return replace(chosen, variance=(noise_multiplier * chosen.sensitivity) ** 2)
        raise PrivacyError(
            f"Expected {width} bits to hold a cohort of {cohort:g} with noise_multiplier={noise_multiplier:g}: "
            f"allow more aggregation.bits, or lower training.cohort_rate or the noise."
        )

    @property
    def padded(self) -> int:
        """2^m ≥ d, coordinates of a rotated update."""
        return padded(self.dimension)

    @property
    def squared_bound(self) -> int:
        """⌊Δ₂²⌋: what the squared L2 norm of an encoded update before noise may be, in integer units."""
        reach = self.scale * self.clip
        if self.central:
            return math.floor(rounded_norm(reach * (1 + CENTRAL_SLACK), self.padded, CENTRAL_BETA) ** 2)
        return math.floor(rounded_norm(reach, self.padded, DEVICE_BETA) ** 2)

    @property
    def sensitivity(self) -> float:
        """Δ₂: how far, in L2 and integer units, one user can move the sum."""
        return math.sqrt(self.squared_bound)

    @property
    def noise_multiplier(self) -> float:
        """z = √V / Δ₂, up to the last bit of a float."""
        return math.sqrt(self.variance) / self.sensitivity

    @property
    def delta_loss(self) -> float:
        """What each release loses of δ: β in the central kind, and what the table of the noise costs (1e-20)."""
        return DELTA_LOSS + (CENTRAL_BETA if self.central else 0.0)

    def share(self, n: int) -> float:
        """Variance that each device of a roster of n ≥ 1 adds: V·honest/⌈honest·n⌉."""
        if n < 1:
            raise PrivacyError(f"Expected the roster's size={n} ≥ 1.")
        return self.variance * self.honest / max(1, math.ceil(round(self.honest * n, 9)))  # .7000000001·10 is 7

    def top_up(self, n: int, survivors: int) -> float:
        """Variance missing from V when `survivors` of a roster of n added their shares; V for an empty roster."""
        if not 0 <= survivors <= n:
            raise PrivacyError(f"Expected survivors={survivors} to be in 0 … {n}.")
        return max(0.0, self.variance - survivors * self.share(n)) if n else self.variance


def encode(
    update: NDArray[np.float32] | NDArray[np.float64],
    encoding: Encoding,
    n: int,
    signs: NDArray[np.float32],
    rounding: Stream,
    noise: Stream,
) -> NDArray[np.uint32]:
    """What one device of a realised roster of `n` sends (or masks): (d,) floats to (2^m,) residues mod 2^bits.

    `signs` are the round's public ones; `rounding` and `noise` must be private streams on a real device. The update
    is clipped to C here, whether or not it was before: in floats before the rotation, for its float32 arithmetic, and
    after it, for the rounding, whose norm bound is asserted in integers. Raises :class:`PrivacyError` for an update
    that is not finite or not of the encoding's dimension.
    """
    values = _checked(update, encoding, signs)
    values *= clip_factor(norm(values), encoding.clip)
    rotated = rotate(values.astype(np.float32), signs).astype(np.float64)
    rotated *= encoding.scale * clip_factor(norm(rotated), encoding.clip)
    integers = conditional_round(rotated, encoding.squared_bound, rounding)
    integers += skellam(encoding.share(n), encoding.padded, noise)
    return _residues(integers, encoding.bits)


def add_residues(total: NDArray[np.uint32], residues: NDArray[np.uint32], bits: int) -> None:
    """total += residues mod 2^bits, in place; both hold numbers below 2^bits."""
    np.add(total, residues, out=total)
    np.bitwise_and(total, np.uint32((1 << bits) - 1), out=total)


def top_up_noise(encoding: Encoding, n: int, survivors: int, stream: Stream) -> NDArray[np.uint32]:
    """Residues (2^m,) that the server adds to the sum of `survivors` of a roster of `n` before it is released.

    They bring the noise to exactly V, also for an empty roster. The server keeps them, and `stream`, to itself.
    """
    return _residues(skellam(encoding.top_up(n, survivors), encoding.padded, stream), encoding.bits)


def decode(total: NDArray[np.integer[Any]], encoding: Encoding, signs: NDArray[np.float32]) -> NDArray[np.float64]:
    """The sum of the updates (d,) from the sum (2^m,) of their residues, reduced mod 2^bits or not.

    It is what was encoded, within the rounding and the noise, if it did not wrap around 2^bits.
    """
    lifted = total.astype(np.int64) & ((1 << encoding.bits) - 1)
    lifted -= (lifted >> (encoding.bits - 1)) << encoding.bits
    return unrotate(lifted / encoding.scale, signs, encoding.dimension)


def release_central(
    total: NDArray[np.float64],
    encoding: Encoding,
    signs: NDArray[np.float32],
    stream: Stream,
    noise: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """The release (d,) of a sum (d,) of clipped updates that is known in the clear: rotated, rounded and noised once.

    Guarantee: adding or removing a user, whose clipped update is v with ‖v‖ ≤ C, gives what Skellam noise of variance
    V on a sum of sensitivity Δ₂ gives, with δ larger by β = 1e-20 for each release (:attr:`Encoding.delta_loss`).

    Proof. Let x be the rotated and scaled sum, and q = ⌊x + w⌋ its rounding, w uniform on [0, 1) in each coordinate.
    With the user and the same w it is q + D, D = ⌊x + v + w⌋ − ⌊x + w⌋ = ⌊w' + v⌋ with w' the fractional part of
    x + w, uniform too: D is distributed as the stochastic rounding of v, independently in each coordinate. So outside
    a set of w of probability β, ‖D‖₂ ≤ Δ₂ (:func:`common.privacy.rounding.rounded_norm`), and there, for each w, the
    noised q and q + D are as private as the mechanism of sensitivity Δ₂. The distance between two mixtures with the
    same weights is at most the mixture of the distances (joint quasi-convexity), and the exceptional set adds β to δ.
    Nothing is conditioned on the bound, which nobody could check without knowing v.

    The sum may be off by float errors as long as one user moves it by at most C(1 + 1e-4), which Δ₂ allows for; that
    includes the float64 rotation and the 32-bit grid of the rounding.

    Args:
        noise: (2^m,) what is added in place of noise of variance V (:mod:`common.privacy.tree`).

    Raises :class:`PrivacyError` for an encoding that is not central, a sum that is not finite or of another dimension.
    """
    if not encoding.central:
        raise PrivacyError("Expected an encoding chosen with central=True: its sensitivity holds without conditioning.")
    rotated = rotate(_checked(total, encoding, signs), signs)
    integers = stochastic_round(rotated * encoding.scale, stream)
    integers += skellam(encoding.variance, encoding.padded, stream) if noise is None else noise
    return unrotate(integers / encoding.scale, signs, encoding.dimension)


def _checked(
    values: NDArray[np.float32] | NDArray[np.float64], encoding: Encoding, signs: NDArray[np.float32]
) -> NDArray[np.float64]:
    """A float64 copy of `values`, if they are finite and fit the encoding, and the signs do."""
    if values.shape != (encoding.dimension,):
        raise PrivacyError(f"Expected an update of shape {values.shape} to be of shape ({encoding.dimension},).")
    if signs.shape != (encoding.padded,):
        raise PrivacyError(f"Expected signs of shape {signs.shape} to be of shape ({encoding.padded},).")
    if not np.isfinite(values).all():
        raise PrivacyError(f"Expected every value of an update to be finite, got {values[~np.isfinite(values)][0]}.")
    return values.astype(np.float64)


def _residues(integers: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    return (integers & ((1 << bits) - 1)).astype(np.uint32)


def largest_reach(holds: Callable[[float], bool]) -> float:
    """The largest s·C ≤ 2^30 that `holds`, for what holds below some point only."""
    low, high = 2.0**-20, LARGEST_REACH
    if holds(high):
        return high
    while high > low * (1 + 1e-12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
