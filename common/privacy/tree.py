"""`privacy.mechanism = tree`: noise that is correlated between rounds, for which nobody's sampling is trusted.

A model after t rounds follows from the prefix sums of the rounds' sums x_1 … x_t. Noise that a later round takes back
costs them nothing. So a round releases its sum with noise N_t, where CN = Z is independent noise, and C⁻¹ has small
prefix sums: the matrix mechanism for A = (AC⁻¹)·C, A the matrix of prefix sums (Denisov, McMahan, Rush, Smith and
Thakurta, "Improved differential privacy for SGD via optimal private linear operators on adaptive streams", NeurIPS
2022). C is lower-triangular, Toeplitz and banded: the first b coefficients c_k of (1 − x)^(−1/2) (Kalinin and Lampert,
"Banded square root matrix factorization for differentially private model training", NeurIPS 2024), in multiples of
2^-16.

==================  ===========================================================================================
who observes        what holds
==================  ===========================================================================================
a reader of models  Unit: one user. Adjacency: a user is added or removed. Sensitivity: a user takes part once in s ≥ b
                    rounds, hence in T rounds κ = ⌈T/s⌉ times at most, and moves Cx by √κ·S (:attr:`Tree.sensitivity`).
                    All T releases together are one Gaussian of noise multiplier z/√κ: there is no sampling, no coin
                    to be kept secret, and no composition beyond κ.
                    Tests: ``test_tree.py::test_sensitivity_by_every_pattern_of_participation``,
                    ``::test_a_user_moves_what_the_noise_hides_by_no_more_than_the_sensitivity``.
the server          No ε at all: it adds the noise itself, and knows the sums without.
==================  ===========================================================================================

In integers. With N_t = Z_t − ⌊Σ_{k=1}^{b−1} c_k N_{t−k} + w_t⌋, Z_t Skellam of variance V and w_t uniform on [0, 1), a
round releases x_t + N_t, x_t the integer sum of the cohort's encoded updates.

Proof. N does not depend on data. Let a user's update v ∈ Z^n, ‖v‖₂ ≤ Δ₂, come or go in round t. Given the releases so
far, it moves that of round t by v, and that of round t + k, k < b, by ⌊y + w⌋ − ⌊y − c_k v + w⌋, for some y: the
stochastic rounding of c_k v, since w is fresh. Outside of a set of w of probability β (:data:`BAND_BETA`, charged to δ
for each release) its norm is at most B_k = :func:`~common.privacy.rounding.rounded_norm` of c_k Δ₂. Rounds of one user
are s ≥ b apart, so that at most one of its updates moves a round: the squares of all moves sum up to κS², with
S² = Δ₂² + Σ_k B_k². Skellam noise of one variance composes over such moves, adaptively, as a Gaussian does over the sum
of their squares, but for the excess that is charged (:func:`common.privacy.accounting.excess`). Reducing mod 2^bits
comes after all this: a sum that wraps costs utility, never privacy. ∎

Conditions, each with who holds it: one release a round, ever (:mod:`server.ledger`); turns that do not depend on data
(:mod:`server.sampling`), at least s rounds apart, which each real device enforces by its own ledger
(:mod:`client.guard`); noise that nobody else knows (:mod:`server.noise_key`).
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from common.errors import PrivacyError
from common.privacy.accounting import EXCESS_LIMIT, excess
from common.privacy.encoding import (
    INFLATION,
    INFLATION_LIMIT,
    NOISE_STD,
    WIDTHS,
    Encoding,
    largest_reach,
)
from common.privacy.randomness import Stream
from common.privacy.rounding import rounded_norm
from common.privacy.skellam import MAX_VARIANCE, skellam

BAND_BETA = 1e-20
"""Probability with which a rounding in the noise's recurrence moves a release by more than its bound."""

LONGEST_BAND = 32
"""Most coefficients: a server holds b − 1 vectors of noise, and adds so many in each round."""

_UNIT = 16  # bits after the point of a coefficient
_ENOUGH = 1.01  # of the smallest error: a shorter band is worth so much
_FAST_VARIANCE = 2.0**29  # up to which a million draws take a tenth of a second, and a second or more beyond


@dataclass(frozen=True, slots=True)
class Tree:
    """The mechanism of one run. Unit, adjacency and sensitivity: as the module says.

    Attributes:
        encoding: of the devices' updates; they carry no noise, its variance is 0.
        coefficients: c_0 … c_{b−1} in units of 2^-16, the first one 2^16.
        separation: s ≥ b, rounds from one turn of a device to its next.
        variance: V of each coordinate of Z_t, in squared integer units.

    Raises :class:`PrivacyError` where they are none.
    """

    encoding: Encoding
    coefficients: tuple[int, ...]
    separation: int
    variance: float

    def __post_init__(self) -> None:
        b = len(self.coefficients)
        for holds, expected in (
            (b >= 1 and self.coefficients[0] == 1 << _UNIT, "the first coefficient to be 1"),
            (all(0 <= a <= 1 << _UNIT for a in self.coefficients), "coefficients in [0, 1]"),
            (b <= self.separation, f"a band of {b} to be at most the separation={self.separation} of a user's rounds"),
            (self.encoding.variance == 0, "updates without noise of their own"),
            (0 < self.variance < math.inf, f"variance={self.variance} > 0"),
        ):
            if not holds:
                raise PrivacyError(f"Expected {expected}.")

    @classmethod
    def choose(
        cls,
        unit: Encoding,
        noise_multiplier: float,
        cohort: float,
        separation: int,
        rounds: int,
        bits: int = 0,
    ) -> "Tree":
        """Band, scale and width for noise of multiplier z > 0.

        The band is :func:`best_band`. Scale and width are chosen as :meth:`Encoding.choose` does: the first of 16, 20
        and 32 bits in which a cohort's sum and six standard deviations of N_t fit, at the scale where all roundings
        inflate S by 1 % over that of real numbers, or at a smaller one, which fits or whose noise is drawn fast, while
        they inflate it by ≤ 10 %.

        Args:
            unit: dimension, clip, honest part and kind; its scale and width are not looked at.
            cohort: expected members of a round.
            rounds: T.
            bits: the width that was asked for; 0: any.

        Raises :class:`PrivacyError` if none fits.
        """
        band = best_band(separation, rounds)
        exact = math.sqrt(sum(a * a for a in band)) / (1 << _UNIT)
        spread = math.sqrt(float(np.sum(_inverse(band, rounds) ** 2)))  # of N_t over that of Z_t

        def at(reach: float) -> Tree:
            encoding = replace(unit, scale=reach / unit.clip, variance=0.0)
            tree = cls(encoding, band, separation, 1.0)
            return replace(tree, variance=(noise_multiplier * tree.sensitivity) ** 2)

        def load(tree: Tree) -> float:
            height = cohort * tree.encoding.scale * unit.clip / math.sqrt(unit.padded)
            return height + 6 * spread * math.sqrt(tree.variance)

        def inflated(limit: float) -> float:
            return largest_reach(lambda reach: at(reach).sensitivity > (1 + limit) * exact * reach)

        def below(variance: float) -> float:
            return largest_reach(lambda reach: at(reach).variance < variance)

        least = max(NOISE_STD / (noise_multiplier * exact), inflated(INFLATION_LIMIT))
        wanted = min(max(least, min(inflated(INFLATION), below(_FAST_VARIANCE))), below(MAX_VARIANCE))
        for width in [bits] if bits else WIDTHS:

            def fits(reach: float, width: int = width) -> bool:
                return load(at(reach)) < 2.0 ** (width - 1)

            reach = min(wanted, largest_reach(fits))
            if reach >= least:
                tree = at(reach)
                return replace(tree, encoding=replace(tree.encoding, bits=width))
        raise PrivacyError(
            f"Expected {width} bits to hold a cohort of {cohort:g} with noise_multiplier={noise_multiplier:g} and a "
            "band of correlated noise: allow more aggregation.bits, or lower training.cohort_rate or the noise."
        )

    @property
    def squares(self) -> tuple[float, ...]:
        """Δ₂², B_1², …, B_{b−1}²: what one update of a user moves the release of each round by, squared."""
        own = self.encoding.sensitivity
        lags = (rounded_norm(a * own / (1 << _UNIT), self.encoding.padded, BAND_BETA) for a in self.coefficients[1:])
        return (float(self.encoding.squared_bound), *(bound**2 for bound in lags))

    @property
    def sensitivity(self) -> float:
        """S: how far, in L2 and integer units, one update of one user moves Cx, roundings included."""
        return math.sqrt(sum(self.squares))

    @property
    def noise_multiplier(self) -> float:
        """z = √V / S: of one update of a user."""
        return math.sqrt(self.variance) / self.sensitivity

    @property
    def effective_multiplier(self) -> float:
        """z/√(1 + κ_s): the Gaussian's that stands for it. Raises :class:`PrivacyError` for κ_s ≥ 1e-3."""
        most = max(excess(self.variance, square, self.encoding.padded) for square in self.squares)
        if most >= EXCESS_LIMIT:
            raise PrivacyError(
                f"Expected the Skellam noise's excess={most:.3g} over the Gaussian < {EXCESS_LIMIT}: raise "
                "privacy.noise_multiplier."
            )
        return self.noise_multiplier / math.sqrt(1 + most)

    @property
    def delta_loss(self) -> float:
        """What each release loses of δ."""
        return self.encoding.delta_loss + BAND_BETA


def participations(rounds: int, separation: int) -> int:
    """κ = ⌈T/s⌉: how often a user who takes part once in s rounds does so in T ≥ 0 rounds, at most."""
    return -(-rounds // separation)


def coefficients(band: int) -> tuple[int, ...]:
    """c_0 … c_{b−1} of (1 − x)^(−1/2), c_k = c_{k−1}(2k − 1)/(2k), each the nearest multiple of 2^-16, in that unit."""
    values = [1.0]
    for k in range(1, band):
        values.append(values[-1] * (2 * k - 1) / (2 * k))
    return tuple(round(value * (1 << _UNIT)) for value in values)


def error_of_sums(band: tuple[int, ...], rounds: int) -> float:
    """Root mean square error of the T prefix sums per coordinate, for z·Δ₂ = 1: ‖c‖₂·√(Σ_{k<T} (T − k) g_k² / T).

    g_k are the coefficients of A·C⁻¹, which is lower-triangular and Toeplitz, too: its row t has g_0 … g_{t−1}. For
    b = 1, noise that is independent in each round, it is √((T + 1)/2). Kalinin and Lampert 2024.
    """
    sums = np.cumsum(_inverse(band, rounds)) ** 2
    return _norm(band) * math.sqrt(float(np.dot(np.arange(rounds, 0, -1), sums)) / rounds)


def error_of_total(band: tuple[int, ...], rounds: int) -> float:
    """The same of the last prefix sum alone: ‖c‖₂·√(Σ_{k<T} g_k²); for b = 1, √T."""
    return _norm(band) * math.sqrt(float(np.sum(np.cumsum(_inverse(band, rounds)) ** 2)))


def best_band(separation: int, rounds: int) -> tuple[int, ...]:
    """The shortest band of at most min(s, T, 32) coefficients whose :func:`error_of_sums` is within 1 % of the best."""
    bands = [coefficients(b) for b in range(1, min(separation, rounds, LONGEST_BAND) + 1)]
    errors = [error_of_sums(band, rounds) for band in bands]
    return next(band for band, error in zip(bands, errors, strict=True) if error <= _ENOUGH * min(errors))


class Key(Protocol):
    """Where the key of a run's noise is kept."""

    def read(self) -> bytes:
        """The 32 bytes. Who has them can take all noise away."""

    def erase(self) -> None:
        """Forget them: no noise is needed any more."""


class CorrelatedNoise:
    """N_t for t = 1, 2, …: integers (2^m,) that follow from a secret key and nothing else.

    Guarantee: the noise of a round is always the same, whatever process asks for it and however often; the words that
    it is drawn from are those of no other round (``test_tree.py::test_the_noise_of_a_round_is_always_the_same``).

    Args:
        key: read when noise is first needed.
    """

    def __init__(self, tree: Tree, key: Key) -> None:
        self._tree = tree
        self._key = key
        self._secret = b""
        self._past: list[NDArray[np.int32]] = []  # the newest first, at most b − 1, and at least one
        self._round = 0

    def of(self, round_: int) -> NDArray[np.int64]:
        """N_t of round t ≥ 1. The next one costs b − 1 additions; another one, all rounds up to it."""
        if round_ < self._round:
            self._past, self._round = [], 0
        self._secret = self._secret or self._key.read()
        while self._round < round_:
            self._advance()
        return self._past[0].astype(np.int64)

    def end(self) -> None:
        """Erase the key: the run has ended."""
        self._key.erase()

    def _advance(self) -> None:
        tree = self._tree
        self._round += 1
        # Of 2^128 counters each round has 2^64 to itself.
        stream = Stream(self._secret, self._round.to_bytes(8, "big") + bytes(8))
        noise = skellam(tree.variance, tree.encoding.padded, stream)
        if len(tree.coefficients) > 1:
            size = len(noise)
            taken = stream.words(-(-size // 4)).view(np.uint16)[:size].astype(np.int64)
            for a, past in zip(tree.coefficients[1:], self._past, strict=False):
                taken += np.int64(a) * past
            noise -= taken >> _UNIT
        self._past = [noise.astype(np.int32), *self._past][: max(1, len(tree.coefficients) - 1)]


def _norm(band: tuple[int, ...]) -> float:
    return math.hypot(*band) / (1 << _UNIT)


def _inverse(band: tuple[int, ...], rounds: int) -> NDArray[np.float64]:
    """(T,) the first coefficients of C⁻¹."""
    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    found: NDArray[np.float64] = lfilter([1.0], np.array(band) / (1 << _UNIT), impulse)
    return found
