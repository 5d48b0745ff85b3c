"""Masks: a key expanded to a vector of residues modulo 2^bits, and added to or taken from a sum.

PRG(key) is the key stream of AES-256 in counter mode from the zero counter, read as little-endian numbers of the lane,
which is uint16 or uint32. 2^bits divides the lane's modulus, so sums may wrap in the lane: one ``& (2**bits - 1)`` at
the end gives the sum modulo 2^bits.

Tests: ``tests/unit/test_secagg_masks.py`` (NIST SP 800-38A, F.5.5; masks cancel; shards are pieces of the whole).
"""

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Lanes: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]

KEY_BYTES = 32

_AES_BLOCK = 16  # bytes
_ZEROS = memoryview(bytes(1 << 18))  # what is encrypted, a tile at a time: of 64 … 512 KiB the fastest
_ADD = {1: np.add, -1: np.subtract}


def lane(bits: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The type that residues modulo 2^`bits` are summed in; `bits` from 2 to 32. Raises :class:`ValueError`."""
    if not 2 <= bits <= 32:
        raise ValueError(f"Expected bits={bits} from 2 to 32.")
    return np.dtype(np.uint16) if bits <= 16 else np.dtype(np.uint32)


def in_lanes(residues: NDArray[np.uint32], bits: int) -> Lanes:
    """A copy of residues modulo 2^`bits` in their lane."""
    return residues.astype(np.uint16) if lane(bits) == np.uint16 else residues.copy()


def add_masks(total: Lanes, masks: Iterable[tuple[bytes, int]], start: int = 0) -> None:
    """total += Σ sign · PRG(key)[start : start + len(total)], in place and wrapping.

    All masks pass over one tile of the total before the next tile, so that the total stays in the cache.

    Args:
        total: (n,) lanes; may be a shard of a longer vector.
        masks: a key of 32 bytes, for this vector alone, and its sign, 1 or -1.
        start: where in the vector the shard begins, in lanes.

    Raises:
        ValueError: total is not of a lane's type, a key has another length, a sign or start is not possible;
            the total is as it was.
    """
    if total.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"Expected a total of {total.dtype} to be of uint16 or uint32.")
    if start < 0:
        raise ValueError(f"Expected start={start} to be at least 0.")
    streams = [(_key_stream(key, start * total.itemsize), _ADD[_checked(sign)]) for key, sign in masks]
    size = min(len(total), len(_ZEROS) // total.itemsize)
    tile = np.empty(size, total.dtype.newbyteorder("<"))  # its own in each call, for threads
    for begin in range(0, len(total), max(size, 1)):
        part = total[begin : begin + size]
        mask = tile[: len(part)]
        zeros, content = _ZEROS[: mask.nbytes], mask.view(np.uint8).data
        for stream, add in streams:
            stream.update_into(zeros, content)
            add(part, mask, out=part)


def _checked(sign: int) -> int:
    if sign not in _ADD:
        raise ValueError(f"Expected sign={sign} to be 1 or -1.")
    return sign


def _key_stream(key: bytes, offset: int) -> CipherContext:
    """The key stream from byte `offset` on."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {len(key)} bytes to be {KEY_BYTES} bytes long.")
    block, rest = divmod(offset, _AES_BLOCK)
    stream = Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(_AES_BLOCK, "big"))).encryptor()
    stream.update(bytes(rest))
    return stream
