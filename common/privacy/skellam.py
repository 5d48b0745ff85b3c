"""Skellam noise: the difference of two Poisson variables of mean v/2; integer, symmetric, of variance v.

The sum of independent Skellam variables is Skellam with the sum of their variances, so whichever devices survive a
round, the sum of their shares and the server's top-up is exactly Skellam of the target variance
(test: ``test_skellam.py::test_shares_and_top_up_add_up_to_the_target``).

Sampling is inverse transform: X is the smallest k with U < P(X ≤ k), for U a uniform number of 256 bits. The first
64 bits decide unless they equal the leading 64 bits of one of the thresholds P(X ≤ k), which happens to one draw in
2^40 or fewer; then three more words complete U and the comparison is made with all 256 bits.

Guarantee: one draw is within :data:`TOTAL_VARIATION` = 2^-230 of Skellam(v) in total variation, given uniform words.
For v ≤ 2^36 there are fewer than 2^24 thresholds. Rounding each one to a multiple of 2^-256 moves 2^-232 at most, the
two truncated tails hold less than 2^-254, and the errors of the recurrence and of its normalisation (64 guard bits)
stay below 2^-270. Tests: ``test_skellam.py::test_table_*``, by exact moments and against scipy.

What that costs: if N draws of a run were exact, the run would be (ε, δ)-private, so with the table it is
(ε, δ + (1 + e^ε) N 2^-230)-private. :data:`DELTA_LOSS` is that loss for one release.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.randomness import Stream

TOTAL_VARIATION = 2.0**-230
"""Distance between the law of one draw and the exact Skellam law."""

DELTA_LOSS = 1e-20
"""What one release of up to 2^33 draws (coordinates × devices) loses of δ for any ε ≤ 90: (1 + e^90) 2^33 2^-230."""

MAX_VARIANCE = 2.0**36

_BITS = 256  # of a threshold
_GUARD = 64  # further bits of the recurrence's integers
_TAIL = 260 * math.log(2)  # −ln of the mass beyond either end of the table
_RECIPROCAL = 320  # bits after the point of 2/v: as if v were changed by 2^-287 at most
_CELL_BITS = 18


def skellam(variance: float, n: int, stream: Stream) -> NDArray[np.int64]:
    """`n` independent Skellam variables of `variance` in [0, 2^36]; zeros for 0.

    One word of the stream each, three more on a boundary hit. The table of a variance is kept for the next call.
    Raises :class:`PrivacyError` for a variance out of range.
    """
    if not 0 <= variance <= MAX_VARIANCE:
        raise PrivacyError(f"Expected the noise's variance={variance} to be in [0, 2^36]: lower the scale or z.")
    if variance == 0:
        return np.zeros(n, np.int64)
    table = _table(variance)
    words = stream.words(n)
    below: NDArray[np.int64] = table.cells[words >> np.uint64(64 - _CELL_BITS)].astype(np.int64)
    undecided = np.flatnonzero(below < 0)
    found = np.searchsorted(table.leading, words[undecided])
    below[undecided] = found
    for hit in undecided[table.leading.take(found, mode="clip") == words[undecided]]:
        below[hit] = _resolve(variance, int(words[hit]), stream)
    return below - len(table.leading) // 2


@dataclass(frozen=True, slots=True)
class _Table:
    """The thresholds P(X ≤ k) for k = −K … K−1, cut to their leading 64 bits, and an index to them.

    `leading` is sorted. `cells` has one entry for each value of a word's top 18 bits: how many thresholds lie below
    such a word, or −1 where that depends on the rest of the word.
    """

    leading: NDArray[np.uint64]
    cells: NDArray[np.int32]


@lru_cache(maxsize=16)
def _table(variance: float) -> _Table:
    leading = np.array([threshold >> (_BITS - 64) for threshold in _thresholds(variance)], np.uint64)
    cell = np.arange(1 << _CELL_BITS, dtype=np.uint64) << np.uint64(64 - _CELL_BITS)
    first = np.searchsorted(leading, cell, side="left")
    after = np.append(first[1:], len(leading))
    return _Table(leading, np.where(first == after, first, -1).astype(np.int32))


def _resolve(variance: float, word: int, stream: Stream) -> int:
    """How many thresholds are ≤ U, for a U whose first word is the leading one of a threshold."""
    for extra in stream.words(_BITS // 64 - 1):
        word = word << 64 | int(extra)
    return bisect_right(_thresholds(variance), word)


def _thresholds(variance: float) -> list[int]:
    """P(X ≤ k) · 2^256 for k = −K … K−1, rounded down below the median and up above it, without zeros and ones.

    P(X = k) = e^-v I_|k|(v), with I the modified Bessel function. Miller's algorithm: from 0 and a seed far out, the
    recurrence I_{k−1} = I_{k+1} + (2k/v) I_k, run downwards, tends to I up to a factor, and e^v = I_0 + 2 Σ I_k gives
    the factor (Abramowitz and Stegun 9.6.26, 9.6.37). Integers throughout.
    """
    numerator, denominator = variance.as_integer_ratio()
    factor = (denominator << (_RECIPROCAL + 1)) // numerator
    above, here, tail = 0, 1 << _GUARD, 0
    tails = []  # Σ_{j≥k} I_j for k = K … 1
    for k in range(_last(variance), 0, -1):
        tail += here
        tails.append(tail)
        above, here = here, above + (k * factor * here >> _RECIPROCAL)
    total = here + 2 * tail
    lower = [threshold for tail in tails if (threshold := (tail << _BITS) // total)]
    return lower + [(1 << _BITS) - threshold for threshold in reversed(lower)]


def _last(variance: float) -> int:
    """The smallest K ≥ 1 for which Chernoff's bound on P(X > K) is below 2^-260."""

    def exponent(k: int) -> float:
        inverse = variance / k
        return k * (math.asinh(k / variance) - 1 / (inverse + math.hypot(inverse, 1)))

    high = 1
    while exponent(high) < _TAIL:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exponent(middle) < _TAIL else (low, middle)
    return high
