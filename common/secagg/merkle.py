"""Merkle trees: one hash that stands for a list, and short proofs that a leaf is at a place in it.

The tree of RFC 9162, section 2.1 (that of RFC 6962) with SHA-256. Leaves and inner nodes are hashed with different
prefixes, so that neither passes for the other; the last node of a level of odd length moves up as it is.

A proof holds for every n that gives the leaf the same way to the root (leaf 0 of 5 and of 8, for one): whoever relies
on n signs or derives it along with the root. Tests: ``tests/unit/test_secagg_merkle.py``.
"""

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


class Tree:
    """The tree over `leaves`; the root of none is the hash of nothing."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        level = [_leaf(leaf) for leaf in leaves]
        self._levels = [level]  # the root's, last
        while len(level) > 1:
            above = [_node(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
            level = above + level[2 * len(above) :]
            self._levels.append(level)
        self.root = level[0] if level else hashlib.sha256().digest()

    def proof(self, index: int) -> bytes:
        """The siblings on the way from a leaf to the root, 32 bytes each. Raises :class:`IndexError`."""
        if not 0 <= index < len(self._levels[0]):
            raise IndexError(f"Expected index={index} to be in [0, {len(self._levels[0])}).")
        return b"".join(
            level[sibling] for height, level in enumerate(self._levels) if (sibling := index >> height ^ 1) < len(level)
        )


def verify(root: bytes, leaf: bytes, index: int, n: int, proof: bytes) -> bool:
    """Whether `proof` shows that `leaf` is number `index` of the `n` leaves under `root`."""
    if not 0 <= index < n or len(proof) % HASH_BYTES:
        return False
    siblings = [proof[start : start + HASH_BYTES] for start in range(0, len(proof), HASH_BYTES)]
    node, used = _leaf(leaf), 0
    while n > 1:
        if index ^ 1 < n:
            if used == len(siblings):
                return False
            node = _node(siblings[used], node) if index & 1 else _node(node, siblings[used])
            used += 1
        index, n = index >> 1, (n + 1) >> 1
    return used == len(siblings) and node == root


def _leaf(content: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + content).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
