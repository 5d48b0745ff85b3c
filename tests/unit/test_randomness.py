"""Streams of words: the published AES vectors, and keys that never coincide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.randomness import Stream, seeded_stream, system_stream

PATHS = st.tuples(st.integers(), st.lists(st.integers() | st.text(alphabet=st.characters(codec="utf-8")), max_size=3))


def test_words_are_those_of_nist_sp_800_38a_f_5_5() -> None:
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    words = Stream(key, bytes(range(0xF0, 0x100))).words(8)
    assert words.dtype == np.uint64
    assert (words ^ np.frombuffer(plain, "<u8")).astype("<u8").tobytes() == cipher


@given(st.lists(st.integers(0, 20_000), max_size=4))
def test_a_stream_goes_on_where_it_was_left(sizes: list[int]) -> None:
    stream = seeded_stream(1, "a")
    pieces = [stream.words(size) for size in sizes]
    assert np.array_equal(np.concatenate([np.empty(0, np.uint64), *pieces]), seeded_stream(1, "a").words(sum(sizes)))


def test_uniform_is_the_leading_53_bits_of_each_word() -> None:
    words, uniform = seeded_stream(2).words(50_000), seeded_stream(2).uniform(50_000)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert [int(number * 2**53) for number in uniform[:100]] == [int(word) >> 11 for word in words[:100]]
    counts = np.histogram(uniform, 100, (0, 1))[0]
    assert ((counts - 500.0) ** 2 / 500).sum() < 150  # chi², 99 degrees of freedom: p = 7e-4


def test_system_streams_differ() -> None:
    assert not np.array_equal(system_stream().words(4), system_stream().words(4))


def test_a_seeded_stream_is_the_same_in_every_process() -> None:
    assert seeded_stream(7, "signs", 3).words(1)[0] == 12179109721348635779


@given(PATHS, PATHS)
def test_different_labels_are_different_streams(
    one: tuple[int, list[int | str]], other: tuple[int, list[int | str]]
) -> None:
    same = np.array_equal(seeded_stream(one[0], *one[1]).words(2), seeded_stream(other[0], *other[1]).words(2))
    assert same == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a", "b"), ("ab",)), ((1,), ("1",)), ((1, 2), (12,)), ((), ("",)), (("", "a"), ("a", "")), ((-1,), ("-1",))],
)
def test_labels_that_look_alike_are_different_streams(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert not np.array_equal(seeded_stream(0, *one).words(2), seeded_stream(0, *other).words(2))


def test_numpy_integers_are_integers() -> None:
    assert np.array_equal(seeded_stream(3, 4).words(2), seeded_stream(3, int(np.int64(4))).words(2))
    assert np.array_equal(seeded_stream(3, 4).words(2), seeded_stream(3, np.int64(4)).words(2))  # type: ignore[arg-type]


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Stream(bytes(16))
