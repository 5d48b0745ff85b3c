"""Masks: the published AES vectors, masks that cancel, shards that are pieces of the whole."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.secagg.masks import Lanes, add_masks, lane

KEY = bytes(range(32))
LANES = st.sampled_from([lane(16), lane(32)])
LENGTHS = st.integers(0, 200) | st.sampled_from([2**16 - 1, 2**16, 2**16 + 1, 2**17 + 1, 2**18 + 3])  # around a tile
MASKS = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([1, -1])), max_size=3)


def expected_mask(key: bytes, counter: bytes, n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> Lanes:
    content = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(n * dtype.itemsize))
    return np.frombuffer(content, dtype.newbyteorder("<"))


def mask(key: bytes, n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32], start: int = 0) -> Lanes:
    total = np.zeros(n, dtype)
    add_masks(total, [(key, 1)], start)
    return total


def numbers(n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> Lanes:
    return np.random.default_rng(n).integers(0, 2 ** (8 * dtype.itemsize), n, dtype=dtype)


def test_the_lane_is_the_narrowest_that_holds_a_residue() -> None:
    assert [lane(bits) for bits in (2, 16, 17, 20, 32)] == [np.uint16] * 2 + [np.uint32] * 3


@pytest.mark.parametrize("bits", [-1, 1, 33])
def test_other_widths_have_no_lane(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} "):
        lane(bits)


def test_a_mask_is_the_key_stream_of_nist_sp_800_38a_f_5_5() -> None:
    """Its counter begins at f0f1…ff rather than 0, far beyond any vector: `start` still reaches it."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    stream = "0bdf7df1591716335e9a8b15c860c5025a6e699d536119065433863c8f657b94"  # the output blocks 1 and 2
    counter = int.from_bytes(range(0xF0, 0x100), "big")
    for dtype in (lane(16), lane(32)):
        found = mask(key, 32 // dtype.itemsize, dtype, counter * 16 // dtype.itemsize)
        assert found.astype(dtype.newbyteorder("<")).tobytes().hex() == stream


@given(st.binary(min_size=32, max_size=32), LENGTHS, LANES)
def test_a_mask_is_the_key_stream_from_the_zero_counter(
    key: bytes, n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]
) -> None:
    assert np.array_equal(mask(key, n, dtype), expected_mask(key, bytes(16), n, dtype))


@given(MASKS, LENGTHS, LANES)
def test_masks_wrap_in_the_lane(
    masks: list[tuple[bytes, int]], n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]
) -> None:
    total = numbers(n, dtype)
    expected = total.astype(np.int64)
    for key, sign in masks:
        expected += sign * expected_mask(key, bytes(16), n, dtype).astype(np.int64)
    add_masks(total, masks)
    assert np.array_equal(total, expected % 2 ** (8 * dtype.itemsize))


@given(MASKS, LENGTHS, LANES, st.integers(0, 2**40))
def test_a_mask_and_its_opposite_cancel(
    masks: list[tuple[bytes, int]], n: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32], start: int
) -> None:
    total = numbers(n, dtype)
    add_masks(total, masks, start)
    add_masks(total, [(key, -sign) for key, sign in masks], start)
    assert np.array_equal(total, numbers(n, dtype))


@pytest.mark.parametrize("bits", [2, 15, 16, 17, 20, 31, 32])
def test_masks_cancel_modulo_2_to_the_bits_though_only_the_sum_is_reduced(bits: int) -> None:
    reduced = lane(bits).type(2**bits - 1)
    one, other = numbers(1000, lane(bits)) & reduced, numbers(1001, lane(bits))[:1000] & reduced
    uploads = one.copy(), other.copy()
    add_masks(uploads[0], [(KEY, 1)])
    add_masks(uploads[1], [(KEY, -1)])
    total = (uploads[0] & reduced) + (uploads[1] & reduced)
    assert np.array_equal(total & reduced, (one.astype(np.int64) + other) % 2**bits)


@given(st.lists(st.integers(0, 400), max_size=5), LANES, st.integers(0, 40))
def test_shards_are_pieces_of_the_whole(
    cuts: list[int], dtype: np.dtype[np.uint16] | np.dtype[np.uint32], start: int
) -> None:
    masks = [(KEY, 1), (KEY[::-1], -1)]
    whole = np.zeros(400, dtype)
    add_masks(whole, masks, start)
    shards = np.zeros(400, dtype)
    edges = [0, *sorted(cuts), 400]
    for begin, end in pairwise(edges):
        add_masks(shards[begin:end], masks, start + begin)
    assert np.array_equal(shards, whole)


def test_threads_do_not_disturb_each_other() -> None:
    expected = mask(KEY, 2**18, lane(32))
    with ThreadPoolExecutor(4) as pool:
        assert all(
            np.array_equal(found, expected) for found in pool.map(lambda _: mask(KEY, 2**18, lane(32)), range(8))
        )


def test_a_masked_vector_of_zeros_looks_uniform() -> None:
    counts: NDArray[np.intp] = np.bincount(mask(KEY, 2**17, lane(16)).view(np.uint8), minlength=256)
    assert ((counts - 1024.0) ** 2 / 1024).sum() < 330  # chi², 255 degrees of freedom: p = 1e-3


@given(st.integers(0, 255))
def test_a_key_that_differs_in_one_bit_is_another_mask(bit: int) -> None:
    other = (int.from_bytes(KEY, "big") ^ 1 << bit).to_bytes(32, "big")
    differing = mask(KEY, 256, lane(16)).view(np.uint8) != mask(other, 256, lane(16)).view(np.uint8)
    assert differing.mean() > 0.95  # 255 of 256 bytes


@pytest.mark.parametrize(
    ("masks", "start", "message"),
    [
        ([(KEY, 1), (bytes(16), 1)], 0, "16 bytes"),
        ([(KEY, 1), (b"", 1)], 0, "0 bytes"),
        ([(KEY, 1), (KEY, 0)], 0, "sign=0"),
        ([(KEY, 1)], -1, "start=-1"),
    ],
)
def test_what_is_no_mask_leaves_the_total_as_it_was(masks: list[tuple[bytes, int]], start: int, message: str) -> None:
    total = numbers(8, lane(16))
    with pytest.raises(ValueError, match=message):
        add_masks(total, masks, start)
    assert np.array_equal(total, numbers(8, lane(16)))


def test_a_total_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        add_masks(np.zeros(4, np.int64), [])  # type: ignore[arg-type]
