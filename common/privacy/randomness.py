"""Streams of uniform 64-bit words from AES-256 in counter mode.

Two kinds of stream, told apart by where the key comes from:

- :func:`system_stream` is **private**: a fresh key from the operating system, known to nobody else. What it drives
  (noise, rounding) protects a user.
- :func:`seeded_stream` is **public**: whoever knows the seed and the labels knows every word. It is for signs that
  all parties share, for sampling in a simulation and for tests; noise from it protects nobody.

Tests: ``tests/unit/test_randomness.py`` (vectors of NIST SP 800-38A, F.5.5; distinct labels, distinct keys).
"""

import hashlib
import operator
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32
_TILE = bytes(1 << 16)  # zeros to encrypt; the tile and its key stream stay in the L2 cache


class Stream:
    """The key stream of AES-256-CTR as words; reading advances it. Not thread-safe.

    The words are the key stream cut into 8-byte little-endian pieces: ``words(3)`` then ``words(5)`` is ``words(8)``.
    A key has 32 bytes and serves one stream; `counter` is the initial counter block. Raises :class:`ValueError`.
    """

    def __init__(self, key: bytes, counter: bytes = bytes(16)) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {len(key)} bytes to be {KEY_BYTES} bytes long.")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def words(self, n: int) -> NDArray[np.uint64]:
        """`n` independent words, uniform on [0, 2^64)."""
        content = bytearray(8 * n)
        view = memoryview(content)
        for start in range(0, len(view), len(_TILE)):
            piece = view[start : start + len(_TILE)]
            self._encryptor.update_into(_TILE[: len(piece)], piece)
        return np.frombuffer(content, "<u8").astype(np.uint64, copy=False)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """`n` independent multiples of 2^-53, uniform on [0, 1); one word each."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def system_stream() -> Stream:
    """A private stream: its key comes from ``os.urandom`` and is kept nowhere else."""
    return Stream(os.urandom(KEY_BYTES))


def seeded_stream(seed: int, *labels: int | str) -> Stream:
    """The public stream of a seed and a path of labels, such as ``seeded_stream(seed, "signs", round)``.

    The key is the SHA-256 of an encoding in which every part carries its type and length, so that no two different
    paths share one: neither ``("a", "b")`` and ``("ab",)`` nor ``(1,)`` and ``("1",)``.
    """
    digest = hashlib.sha256(b"fedtopk stream")
    for part in (seed, *labels):
        kind, text = (b"s", part) if isinstance(part, str) else (b"i", str(operator.index(part)))
        content = text.encode("utf-8")
        digest.update(kind + len(content).to_bytes(8, "big") + content)
    return Stream(digest.digest())
