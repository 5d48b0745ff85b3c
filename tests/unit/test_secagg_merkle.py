"""Merkle trees: published vectors, the recursive definition of RFC 9162, and proofs that were tampered with."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.merkle import HASH_BYTES, Tree, verify

# The reference leaves of Certificate Transparency, and the roots of the first 0, 1, … 8 of them.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

trees = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


def leaves_of(n: int) -> list[bytes]:
    return [index.to_bytes(2, "big") for index in range(n)]


def split_point(n: int) -> int:
    """The largest power of two below n."""
    return 1 << (n - 1).bit_length() - 1


def head(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, section 2.1.1."""
    if len(leaves) <= 1:
        return hashlib.sha256(b"".join(b"\0" + leaf for leaf in leaves)).digest()
    k = split_point(len(leaves))
    return hashlib.sha256(b"\1" + head(leaves[:k]) + head(leaves[k:])).digest()


def path(index: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 9162, section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    k = split_point(len(leaves))
    if index < k:
        return [*path(index, leaves[:k]), head(leaves[k:])]
    return [*path(index - k, leaves[k:]), head(leaves[:k])]


def way(index: int, n: int) -> str:
    """The turns from a leaf to the root: what a proof depends on."""
    if n == 1:
        return ""
    k = split_point(n)
    return way(index, k) + "L" if index < k else way(index - k, n - k) + "R"


def test_roots_are_the_published_ones() -> None:
    assert [Tree(LEAVES[:n]).root.hex() for n in range(9)] == ROOTS


@given(st.lists(st.binary(max_size=8), max_size=40))
def test_roots_and_proofs_follow_the_definition(leaves: list[bytes]) -> None:
    tree = Tree(leaves)
    assert tree.root == head(leaves)
    for index, leaf in enumerate(leaves):
        proof = tree.proof(index)
        assert proof == b"".join(path(index, leaves))
        assert verify(tree.root, leaf, index, len(leaves), proof)


@given(trees, st.data())
def test_any_flipped_bit_fails(place: tuple[int, int], data: st.DataObject) -> None:
    n, index = place
    tree = Tree(leaves_of(n))
    parts = [tree.root, leaves_of(n)[index], tree.proof(index)]
    part = data.draw(st.sampled_from([i for i, content in enumerate(parts) if content]))
    content = bytearray(parts[part])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    parts[part] = bytes(content)
    root, leaf, proof = parts
    assert not verify(root, leaf, index, n, proof)


@given(trees, st.integers(-2, 90), st.integers(-2, 90))
def test_another_place_fails_unless_the_way_to_the_root_is_the_same(place: tuple[int, int], i: int, m: int) -> None:
    n, index = place
    tree = Tree(leaves_of(n))
    leaf, proof = leaves_of(n)[index], tree.proof(index)
    assert verify(tree.root, leaf, i, n, proof) == (i == index)
    assert verify(tree.root, leaf, index, m, proof) == (index < m and way(index, m) == way(index, n))


def test_a_proof_alone_does_not_fix_n() -> None:
    tree = Tree(leaves_of(5))
    assert [n for n in range(20) if verify(tree.root, leaves_of(5)[0], 0, n, tree.proof(0))] == [5, 6, 7, 8]
    assert [n for n in range(20) if verify(tree.root, leaves_of(5)[4], 4, n, tree.proof(4))] == [5]


@given(trees, st.binary(min_size=1, max_size=2 * HASH_BYTES), st.integers(1, 2 * HASH_BYTES))
def test_longer_and_shorter_proofs_fail(place: tuple[int, int], more: bytes, fewer: int) -> None:
    n, index = place
    tree = Tree(leaves_of(n))
    leaf, proof = leaves_of(n)[index], tree.proof(index)
    assert not verify(tree.root, leaf, index, n, proof + more)
    assert not proof or not verify(tree.root, leaf, index, n, proof[:-fewer])


def test_an_inner_node_is_no_leaf() -> None:
    tree = Tree(leaves_of(4))
    inner = tree.proof(2)[HASH_BYTES:]  # of leaves 0 and 1
    pair = b"".join(Tree([leaf]).root for leaf in leaves_of(2))
    assert inner == hashlib.sha256(b"\1" + pair).digest()
    assert not verify(tree.root, pair, 0, 2, tree.proof(0)[HASH_BYTES:])


@pytest.mark.parametrize("index", [-1, 3])
def test_indices_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"index={index}"):
        Tree(leaves_of(3)).proof(index)
