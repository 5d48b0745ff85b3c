"""Randomised Hadamard transform: y = H · diag(signs) · x, with H orthonormal of size 2^m.

It spreads an update evenly over its coordinates, so that a small modulus fits them all. It is orthonormal: norms,
and with them the sensitivity, are those of x. The signs are public (one draw a round, the same for every device);
no guarantee rests on them. Results depend on the machine's BLAS, but not on its number of threads.

Tests: ``tests/unit/test_rotation.py`` (orthogonal, linear, inverse, equal to ``scipy.linalg.hadamard``).
"""

from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from common.privacy.randomness import Stream

Real = TypeVar("Real", np.float32, np.float64)

_RADIX = 32
_ROWS = 64  # of one product: too few for the BLAS to share it out, so that threads change neither results nor time


def padded(dimension: int) -> int:
    """The smallest power of two ≥ `dimension` ≥ 1."""
    return 1 << (dimension - 1).bit_length()


def random_signs(dimension: int, stream: Stream) -> NDArray[np.float32]:
    """Independent fair signs ±1 for :func:`rotate`, one for each coordinate of the padded vector."""
    size = padded(dimension)
    bits = np.unpackbits(stream.words(-(-size // 64)).view(np.uint8))[:size]
    return 1 - 2 * bits.astype(np.float32)


def rotate(x: NDArray[Real], signs: NDArray[np.float32]) -> NDArray[Real]:
    """x (d,) padded with zeros to (2^m,) = the shape of `signs` (from :func:`random_signs`), then rotated."""
    y = np.zeros(len(signs), x.dtype)
    np.multiply(x, signs[: len(x)], out=y[: len(x)])
    return _hadamard(y)


def unrotate(y: NDArray[Real], signs: NDArray[np.float32], dimension: int) -> NDArray[Real]:
    """The inverse of :func:`rotate`: y (2^m,) to x (dimension,)."""
    x: NDArray[Real] = _hadamard(y)[:dimension]
    return x * signs[:dimension].astype(x.dtype)


def _hadamard(x: NDArray[Real]) -> NDArray[Real]:
    """Orthonormal Walsh–Hadamard transform of (2^m,): one product with a small matrix for every five index bits.

    Each pass transforms the leading bits and leaves them last, so that after all passes every bit is back in place.
    """
    left = x.size
    y = x
    while left > 1:
        radix = min(left, _RADIX)
        rows = min(x.size // radix, _ROWS)
        y = y.reshape(radix, -1, rows).transpose(1, 2, 0) @ _matrix(radix).astype(x.dtype)
        left //= radix
    return y.reshape(x.shape) * x.dtype.type(x.size**-0.5)


@cache
def _matrix(radix: int) -> NDArray[np.int8]:
    """Hadamard matrix of ±1 in Sylvester's order."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < radix:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
