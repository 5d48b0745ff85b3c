"""Secret sharing: the field against slow products, any t shares reconstruct, and t − 1 fit every secret."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import AggregationError
from common.privacy.randomness import seeded_stream
from common.secagg.shamir import MAX_SHARES, _product, _tables, combine, lagrange, split

POLYNOMIAL = 1 << 16 | 1 << 12 | 1 << 3 | 1 << 1 | 1

symbols = st.integers(0, MAX_SHARES)


def times(a: int, b: int) -> int:
    """The product in the field: carry-less multiplication, then the remainder."""
    product = 0
    for bit in range(16):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(30, 15, -1):
        product ^= (POLYNOMIAL << (bit - 16)) * (product >> bit & 1)
    return product


def to_power(a: int, exponent: int) -> int:
    result = 1
    for bit in bin(exponent)[2:]:
        result = times(times(result, result), a if bit == "1" else 1)
    return result


def randomness(threshold: int, size: int) -> bytes:
    return os.urandom((threshold - 1) * size)


def value(coefficients: list[int], x: int) -> int:
    """A polynomial at x, lowest coefficient first (Horner)."""
    result = 0
    for coefficient in reversed(coefficients):
        result = times(result, x) ^ coefficient
    return result


def test_slow_products_are_right() -> None:
    """By hand: x · x^15 = x^16 = x^12 + x^3 + x + 1, and (x + 1)^2 = x^2 + 1."""
    assert times(2, 0x8000) == 0x100B
    assert times(3, 3) == 5
    assert times(0x8000, 0x8000) == to_power(2, 30)


def test_2_generates_the_field() -> None:
    """Its order is 65,535 = 3 · 5 · 17 · 257 and no proper divisor, so the polynomial is primitive."""
    assert to_power(2, MAX_SHARES) == 1
    assert all(to_power(2, MAX_SHARES // prime) != 1 for prime in (3, 5, 17, 257))


def test_tables_list_the_powers_of_2() -> None:
    log, exp = _tables().log, _tables().exp
    np.testing.assert_array_equal(np.sort(exp[:MAX_SHARES]), np.arange(1, 1 << 16))
    np.testing.assert_array_equal(exp[log[1:]], np.arange(1, 1 << 16))
    np.testing.assert_array_equal(exp[MAX_SHARES : 2 * MAX_SHARES], exp[:MAX_SHARES])
    assert not exp[2 * MAX_SHARES :].any()
    assert [int(exp[power]) for power in (0, 1, 16, 12345)] == [to_power(2, power) for power in (0, 1, 16, 12345)]


@given(st.lists(st.integers(1, MAX_SHARES), min_size=1, max_size=4), st.data())
def test_products_are_those_of_the_field(left: list[int], data: st.DataObject) -> None:
    right = data.draw(st.lists(symbols, min_size=len(left), max_size=len(left)))
    expected = 0
    for a, b in zip(left, right, strict=True):
        expected ^= times(a, b)
    found = _product(_tables().log[left][None], np.array(right, np.uint16)[:, None])
    assert found.tolist() == [[expected]]


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_shares_are_values_of_the_polynomial(data: st.DataObject, threshold: int, pairs: int) -> None:
    secret = data.draw(st.binary(min_size=2 * pairs, max_size=2 * pairs))
    random = data.draw(st.binary(min_size=len(secret) * (threshold - 1), max_size=len(secret) * (threshold - 1)))
    shares = split(secret, threshold + 3, threshold, random)
    assert shares.shape == (threshold + 3, 2 * pairs) and shares.dtype == np.uint8
    rows = np.frombuffer(secret + random, "<u2").reshape(threshold, pairs)
    for r, share in enumerate(shares):
        expected = [value(column.tolist(), r + 1) for column in rows.T]
        assert np.frombuffer(share.tobytes(), "<u2").tolist() == expected


@given(st.data(), st.integers(1, 40), st.integers(0, 20), st.integers(0, 32))
def test_any_threshold_of_shares_give_the_secret(data: st.DataObject, threshold: int, more: int, pairs: int) -> None:
    secret = data.draw(st.binary(min_size=2 * pairs, max_size=2 * pairs))
    shares = split(secret, threshold + more, threshold, randomness(threshold, len(secret)))
    kept = data.draw(st.permutations(range(threshold + more)))[: data.draw(st.integers(threshold, threshold + more))]
    assert combine([r + 1 for r in kept], [shares[r].tobytes() for r in kept], threshold) == secret


def test_only_the_first_shares_count() -> None:
    shares = [share.tobytes() for share in split(b"secret", 5, 3, randomness(3, 6))]
    assert combine([1, 2, 3, 4], [*shares[:3], b"wrong!"], 3) == b"secret"
    assert combine([1, 2, 4, 3], [*shares[:2], b"wrong!", shares[2]], 3) != b"secret"


@pytest.mark.parametrize(("shares", "threshold"), [(276, 176), (MAX_SHARES, 2)])
def test_more_shares_than_a_byte_can_number(shares: int, threshold: int) -> None:
    secret = os.urandom(4)
    content = split(secret, shares, threshold, randomness(threshold, 4))
    last = range(shares - threshold, shares)
    assert combine([r + 1 for r in last], [content[r].tobytes() for r in last], threshold) == secret


@pytest.mark.parametrize("shares", [0, 1])
def test_a_cohort_without_dropouts_may_deal_fewer_shares_than_the_threshold(shares: int) -> None:
    assert split(b"ab", shares, 2, b"cd").shape == (shares, 2)


@given(st.data(), st.integers(2, 8))
@settings(max_examples=50, deadline=None)
def test_fewer_shares_fit_every_secret_alike(data: st.DataObject, threshold: int) -> None:
    """For each secret, exactly one choice of coefficients gives the t − 1 shares seen: uniform coefficients make all
    secrets equally likely. Shown by building the choice: interpolation through the candidate, at 0, and the shares."""
    shares = split(b"\1\2", 2 * threshold, threshold, randomness(threshold, 2))
    seen = data.draw(st.permutations(range(2 * threshold)))[: threshold - 1]
    candidate = data.draw(st.binary(min_size=2, max_size=2))
    points = {0: int.from_bytes(candidate, "little")}
    points |= {r + 1: int.from_bytes(shares[r].tobytes(), "little") for r in seen}

    coefficients = [0] * threshold  # of the sum of value · ∏ (X − y) / (x − y)
    for x, height in points.items():
        basis, denominator = [height], 1
        for y in points.keys() - {x}:
            basis = [times(b, y) ^ a for a, b in zip([0, *basis], [*basis, 0], strict=True)]
            denominator = times(denominator, x ^ y)
        inverse = to_power(denominator, MAX_SHARES - 1)
        basis = [times(b, inverse) for b in basis]
        coefficients = [a ^ b for a, b in zip(coefficients, basis, strict=True)]
    random = np.array(coefficients[1:], "<u2").tobytes()

    again = split(candidate, 2 * threshold, threshold, random)
    np.testing.assert_array_equal(again[seen], shares[seen])


def test_fewer_shares_of_one_secret_are_uniform() -> None:
    """Two shares at t = 3, each and together, for 20,000 choices of coefficients for one secret."""
    secret = b"\1\2" * 20_000
    random = seeded_stream(0, "shares").words(len(secret) // 4).astype("<u8").tobytes()
    first, second, *_ = split(secret, 3, 3, random)
    for content in (first, second, first ^ second):
        assert stats.chisquare(np.bincount(content, minlength=256)).pvalue > 1e-4


@given(st.lists(st.integers(1, MAX_SHARES), min_size=1, max_size=8, unique=True))
def test_weights_are_those_of_lagrange(xs: list[int]) -> None:
    for x, weight in zip(xs, lagrange(xs)[0], strict=True):
        denominator, numerator = 1, 1
        for y in set(xs) - {x}:
            numerator, denominator = times(numerator, y), times(denominator, x ^ y)
        assert times(int(_tables().exp[weight]), denominator) == numerator


@pytest.mark.parametrize(
    ("secret", "shares", "threshold", "random", "message"),
    [
        (b"ab", 2, 0, 0, "threshold=0 ≥ 1"),
        (b"ab", -1, 1, 0, "shares=-1"),
        (b"ab", 1 << 16, 2, 2, "shares=65536"),
        (b"abc", 3, 2, 3, "even length"),
        (b"ab", 3, 2, 1, "1 random bytes to be 2"),
    ],
)
def test_impossible_splits_are_refused(secret: bytes, shares: int, threshold: int, random: int, message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        split(secret, shares, threshold, bytes(random))


@pytest.mark.parametrize(
    ("xs", "shares", "threshold", "message"),
    [
        ([1], [b"ab"], 2, "to be 2 or more"),
        ([1], [b"ab", b"ab"], 1, "at 1 points"),
        ([], [], 0, "to be 0 or more"),
        ([1, 1], [b"ab", b"ab"], 2, "different"),
        ([0, 1], [b"ab", b"ab"], 2, "different"),
        ([1, 65536], [b"ab", b"ab"], 2, "different"),
        ([1, 2], [b"ab", b"abcd"], 2, "one even length"),
        ([1, 2], [b"abc", b"abc"], 2, "one even length"),
    ],
)
def test_shares_that_do_not_fit_are_refused(xs: list[int], shares: list[bytes], threshold: int, message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        combine(xs, shares, threshold)
