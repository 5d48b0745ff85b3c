"""Stochastic rounding to integers, plain and conditioned on the norm that privacy rests on.

Source: Kairouz, Liu and Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation" (ICML 2021), conditional randomised rounding.
"""

import math

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.randomness import Stream

DEVICE_BETA = math.exp(-0.5)
"""β of a device: the bound of :func:`rounded_norm` holds in at least 1 − β = 39 % of the tries."""

_FRACTION_BITS = 32
_LIMIT = 2.0**31  # of a coordinate, so that 32 bits of fraction fit int64, and of a norm, so that its square does
_TRIES = 128


def rounded_norm(norm: float, size: int, beta: float) -> float:
    """A bound on ‖q‖₂, for q the stochastic rounding of x ∈ R^size with ‖x‖₂ ≤ `norm`.

    It is exceeded with probability at most `beta`, and the smaller of two: norm + √size, which always holds, and
    √(norm² + size/4 + √(2 ln(1/β)) (norm + √size/2)).
    """
    spread = math.sqrt(-2 * math.log(beta))
    likely = math.sqrt(norm**2 + size / 4 + spread * (norm + math.sqrt(size) / 2))
    return min(norm + math.sqrt(size), likely)


def norm(x: NDArray[np.float64]) -> float:
    """‖x‖₂ of (d,), in the same order of operations whatever the number of threads, unlike the BLAS's, whose idle
    threads would also go on spinning."""
    return math.sqrt(np.einsum("i,i", x, x))


def stochastic_round(x: NDArray[np.float64], stream: Stream) -> NDArray[np.int64]:
    """⌊x + w⌋ with w uniform on [0, 1): each coordinate goes up with the probability of its fractional part.

    Exact integer arithmetic on x (d,) truncated to multiples of 2^-32, so that E q = x within 2^-32. Half a word of
    the stream for each coordinate. Raises :class:`PrivacyError` if a coordinate is not finite or ≥ 2^31.

    Two vectors x and x + v rounded with the same w differ by the stochastic rounding of v: with w' the fractional
    part of x + w, itself uniform, the difference is ⌊w' + v⌋.
    """
    largest = max(x.max(), -x.min())
    if not largest < _LIMIT:
        raise PrivacyError(f"Expected every scaled coordinate to be below 2^31, got {largest}.")
    fixed = (x * 2.0**_FRACTION_BITS).astype(np.int64)
    fixed += stream.words(-(-len(x) // 2)).view(np.uint32)[: len(x)]
    fixed >>= _FRACTION_BITS
    return fixed


def conditional_round(x: NDArray[np.float64], squared_bound: int, stream: Stream) -> NDArray[np.int64]:
    """The stochastic rounding q of x (d,), conditioned on ‖q‖₂² ≤ `squared_bound`; tries until it holds.

    Guarantee: the returned q satisfies the bound, in exact integer arithmetic, whatever x and the stream are.
    Test: ``test_rounding.py::test_the_integer_norm_bound_always_holds``.

    With the square of :func:`rounded_norm` as the bound, a try succeeds with probability at least 1 − β, so that the
    expected number of tries is at most 1/(1 − β) = 2.6. Raises :class:`PrivacyError` after 128 failures, which
    happens with probability below 1e-27 unless ‖x‖₂ exceeds the norm that the bound was computed for.
    """
    length = norm(x)
    if not length + math.sqrt(len(x)) < _LIMIT:
        raise PrivacyError(f"Expected the scaled update's norm={length} to be below 2^31.")
    for _ in range(_TRIES):
        q = stochastic_round(x, stream)
        if int(np.dot(q, q)) <= squared_bound:
            return q
    raise PrivacyError(f"Expected the scaled update's norm={length} to round to at most {math.isqrt(squared_bound)}.")
