"""Residues as bytes: 2 bytes each at 16 bits, 4 at 32, and 5 for a pair at 20; all little-endian.

At 20 bits the first of a pair is the low half of the 40-bit number; the missing partner of an odd last one is 0.

Tests: ``tests/unit/test_secagg_packing.py``.
"""

from collections.abc import Iterator

import numpy as np

from common.errors import ProtocolError
from common.secagg.masks import Lanes, lane

_PAIR = np.dtype([("low", "<u4"), ("high", "u1")])  # 40 bits: a + 2^20 b
_LOW = np.uint32(2**20 - 1)
_TILE = 1 << 14  # pairs; whole vectors of intermediate results would cost more in page faults than in arithmetic


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` residues take. Raises :class:`ValueError` where `bits` is not 16, 20 or 32."""
    _check(bits)
    return (count + 1) // 2 * _PAIR.itemsize if bits == 20 else count * bits // 8


def pack(residues: Lanes, bits: int) -> bytes:
    """The bytes of residues (n,) in lanes of `bits`.

    Raises:
        ValueError: `bits` is not 16, 20 or 32, the residues are not in its lanes, or not below 2^bits.
    """
    _check(bits)
    if residues.dtype != lane(bits):
        raise ValueError(f"Expected residues of {residues.dtype} to be of {lane(bits)} at {bits} bits.")
    if bits != 20:
        return residues.astype(residues.dtype.newbyteorder("<"), copy=False).tobytes()
    if residues.max(initial=0) > _LOW:
        raise ValueError(f"Expected the residue {residues.max()} to be below 2^20.")
    whole, odd = divmod(len(residues), 2)
    pairs = np.zeros(whole + odd, _PAIR)
    first, second, low, high = residues[::2], residues[1::2], pairs["low"], pairs["high"]
    for tile in _tiles(whole):
        low[tile] = first[tile] | second[tile] << 20
        high[tile] = second[tile] >> 12
    if odd:
        low[-1] = residues[-1]
    return pairs.tobytes()


def unpack(content: bytes | memoryview, count: int, bits: int) -> Lanes:
    """The `count` residues that were packed, in lanes of `bits`: a read-only view of the content where it can be.

    Raises:
        ProtocolError: the content has another length, or padding that is not 0.
        ValueError: `bits` is not 16, 20 or 32.
    """
    length = packed_bytes(count, bits)
    if len(content) != length:
        raise ProtocolError(f"Expected {len(content)} bytes to be {length}: {count} residues of {bits} bits.")
    if bits == 16:
        return np.frombuffer(content, "<u2").astype(np.uint16, copy=False)
    if bits == 32:
        return np.frombuffer(content, "<u4").astype(np.uint32, copy=False)
    pairs = np.frombuffer(content, _PAIR)
    residues = np.empty(2 * len(pairs), np.uint32)
    first, second, low, high = residues[::2], residues[1::2], pairs["low"], pairs["high"]
    for tile in _tiles(len(pairs)):
        first[tile] = low[tile] & _LOW
        second[tile] = low[tile] >> 20 | high[tile].astype(np.uint32) << 12
    if residues[count:].any():
        raise ProtocolError(f"Expected the padding {residues[count]} after {count} residues of 20 bits to be 0.")
    return residues[:count]


def _check(bits: int) -> None:
    if bits not in (16, 20, 32):
        raise ValueError(f"Expected bits={bits} to be 16, 20 or 32.")


def _tiles(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _TILE, count)) for begin in range(0, count, _TILE))
