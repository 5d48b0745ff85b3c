"""Poisson sampling: independent coins of one rate for all devices, drawn in time and memory of those that come up.

Up to 2^18 devices flip one coin after the other. More are taken in blocks of L, a power of two: the smallest for which
there are at most 2^18 blocks or, if less, the largest for which a block has an eighth of a head on average. How
many heads a block has is Binomial(L, q), by inverse transform: X is the number of j ≥ 1 with U < P(X ≥ j), for U a
uniform number of 256 bits, of which the first 64 decide but for one block in 2^58 or fewer. Which devices they are is a
uniform subset of the block: places of log₂ L random bits, and those that coincide are drawn again, which treats all
places alike. So many of L places, chosen uniformly, are L independent coins. The last block is drawn whole, and what
lies beyond the last device is dropped.

Guarantee: the coins of up to 2^33 blocks are within :data:`TOTAL_VARIATION` = 2^-216 of exactly independent ones of
exactly the rate (a float64 is a rational number), given uniform words. A block has fewer than 64 probabilities that are
not below 2^-256; each is cut by 2^-256 at most, 150 decimal digits are computed with, and the tail that is left out is
smaller still. By what :mod:`common.privacy.skellam` says of such distances a round loses less than 10^-25 of δ for any
ε ≤ 90, for which the unused part of its DELTA_LOSS has room. Tests: ``tests/unit/test_sampling.py``.
"""

from decimal import Decimal, localcontext
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from common.privacy.randomness import Stream

TOTAL_VARIATION = 2.0**-216
"""Distance between the law of a round's coins and that of exactly independent ones."""

_BLOCKS = 1 << 18  # milliseconds
_HEADS = 1 / 8  # of a block on average, at most: two in a block, which may coincide, are rare
_BITS, _WORD = 256, 64
_DIGITS = 150


def poisson_sample(rate: float, n: int, stream: Stream) -> NDArray[np.int64]:
    """The devices of 0 … `n`−1 whose coin of probability `rate` in [0, 1] came up, ascending.

    Reads one word of the stream for each block, at most 2^18 or 16 for an expected head, and then one for each head.
    """
    size = _block(rate, n)
    thresholds = _thresholds(rate, size)
    if not thresholds:
        return np.zeros(0, np.int64)
    leading = np.array([threshold >> (_BITS - _WORD) for threshold in thresholds], np.uint64)
    words = stream.words(-(-n // size))
    blocks = np.flatnonzero(words <= leading[-1])
    below = np.searchsorted(leading, words[blocks])
    heads = len(thresholds) - below
    for hit in np.flatnonzero(leading.take(below, mode="clip") == words[blocks]):
        heads[hit] = _resolve(thresholds, int(words[blocks[hit]]), stream)
    devices, missing = np.zeros(0, np.int64), heads
    while missing.any():
        of = np.repeat(blocks, missing)
        places = (stream.words(len(of)) & np.uint64(size - 1)).astype(np.int64)
        devices = np.sort(np.concatenate([devices, of * size + places]))
        devices = devices[np.append(True, devices[1:] > devices[:-1])]
        missing = heads - np.bincount(np.searchsorted(blocks, devices // size), minlength=len(blocks))
    return devices[devices < n]


def _block(rate: float, n: int) -> int:
    """L, a power of two."""
    size = 1
    while n > size * _BLOCKS and 2 * size * rate <= _HEADS:
        size *= 2
    return size


@lru_cache(maxsize=16)
def _thresholds(rate: float, size: int) -> list[int]:
    """P(X ≥ j) · 2^256 for X ~ Binomial(`size`, `rate`), ascending, that is from the largest j down to 1; no zeros.

    Certainty is 2^256 − 1.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        q = Decimal(rate)
        above, thresholds = Decimal(1), list[int]()
        for j in range(size):
            above -= comb(size, j) * (q**j if j else 1) * (1 - q) ** (size - j)  # decimal knows no 0⁰
            threshold = int(above * (1 << _BITS))
            if threshold <= 0:
                break
            thresholds.append(min(threshold, (1 << _BITS) - 1))
    return thresholds[::-1]


def _resolve(thresholds: list[int], word: int, stream: Stream) -> int:
    """How many thresholds are above U, for a U whose first word is the leading one of a threshold."""
    for extra in stream.words(_BITS // _WORD - 1):
        word = word << _WORD | int(extra)
    return sum(word < threshold for threshold in thresholds)
