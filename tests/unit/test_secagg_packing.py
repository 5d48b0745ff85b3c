"""Residues as bytes: there and back, and nothing but exact lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.secagg.masks import lane
from common.secagg.packing import pack, packed_bytes, unpack

WIDTHS = [16, 20, 32]


@given(st.data(), st.sampled_from(WIDTHS))
def test_residues_come_back(data: st.DataObject, bits: int) -> None:
    residues = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50)), lane(bits))
    content = pack(residues, bits)
    found = unpack(content, len(residues), bits)
    assert len(content) == packed_bytes(len(residues), bits)
    assert found.dtype == lane(bits)
    assert np.array_equal(found, residues)


@given(st.binary(max_size=100), st.sampled_from(WIDTHS))
def test_content_has_one_reading(content: bytes, bits: int) -> None:
    content = content[: len(content) // 20 * 20]
    assert pack(unpack(content, len(content) * 8 // bits, bits), bits) == content


@pytest.mark.parametrize(
    ("bits", "content"),
    [(16, "0100feff"), (20, "0100e0ffff"), (32, "01000000feffffff")],
)
def test_bytes_are_little_endian(bits: int, content: str) -> None:
    assert pack(np.array([1, 2**bits - 2], lane(bits)), bits).hex() == content


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1001])
def test_the_largest_residues_come_back(count: int, bits: int) -> None:
    residues = np.full(count, 2**bits - 1, lane(bits))
    assert np.array_equal(unpack(pack(residues, bits), count, bits), residues)


@given(st.sampled_from(WIDTHS), st.integers(0, 200) | st.integers(2**15 - 3, 2**15 + 3))  # 2^14 pairs are a tile
def test_vectors_of_any_length_come_back(bits: int, count: int) -> None:
    residues = np.random.default_rng(count).integers(0, 2**bits, count, dtype=lane(bits))
    assert np.array_equal(unpack(pack(residues, bits), count, bits), residues)


def test_strided_residues_are_packed_as_their_copies_are() -> None:
    for bits in WIDTHS:
        residues = np.arange(22, dtype=lane(bits))[::2]
        assert pack(residues, bits) == pack(residues.copy(), bits)


@pytest.mark.parametrize("bits", [16, 32])
def test_whole_lanes_are_read_without_a_copy(bits: int) -> None:
    content = bytes(packed_bytes(8, bits))
    assert np.shares_memory(unpack(content, 8, bits), np.frombuffer(content, np.uint8))


@pytest.mark.parametrize(("bits", "count", "length"), [(16, 3, 6), (20, 3, 10), (20, 4, 10), (32, 3, 12), (20, 0, 0)])
@pytest.mark.parametrize("surplus", [-1, 1, 5])
def test_another_length_is_refused(bits: int, count: int, length: int, surplus: int) -> None:
    found = max(length + surplus, 0)
    if found != length:
        with pytest.raises(ProtocolError, match=f"{found} bytes to be {length}:"):
            unpack(bytes(found), count, bits)


@given(st.integers(1, 2**20 - 1))
def test_padding_other_than_zero_is_refused(padding: int) -> None:
    content = pack(np.array([1, 2, 3, padding], np.uint32), 20)
    with pytest.raises(ProtocolError, match=f"padding {padding} "):
        unpack(content, 3, 20)


@pytest.mark.parametrize("bits", [0, 2, 15, 17, 24, 31, 33])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} "):
        packed_bytes(4, bits)
    with pytest.raises(ValueError, match=f"bits={bits} "):
        pack(np.zeros(4, np.uint32), bits)
    with pytest.raises(ValueError, match=f"bits={bits} "):
        unpack(bytes(16), 4, bits)


def test_residues_of_another_lane_are_refused() -> None:
    with pytest.raises(ValueError, match="uint32 to be of uint16"):
        pack(np.zeros(4, np.uint32), 16)


def test_a_residue_beyond_its_width_is_refused() -> None:
    with pytest.raises(ValueError, match="1048576"):
        pack(np.array([0, 2**20, 0], np.uint32), 20)
