"""Stochastic rounding: unbiased, and the norm bound that privacy rests on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.randomness import seeded_stream
from common.privacy.rounding import DEVICE_BETA, conditional_round, rounded_norm, stochastic_round

SIZES = st.integers(1, 300)


@given(st.floats(-1e6, 1e6), st.integers(0))
def test_it_rounds_to_one_of_the_two_neighbours(value: float, seed: int) -> None:
    q = stochastic_round(np.full(64, value), seeded_stream(seed))
    assert q.dtype == np.int64
    assert (np.abs(q - value) < 1 + 1e-9).all()


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 2.9, -7.5, 1234.001, -5.0])
def test_it_is_unbiased(value: float) -> None:
    q = stochastic_round(np.full(200_000, value), seeded_stream(0, "unbiased"))
    part = value - math.floor(value)
    assert q.mean() == pytest.approx(value, abs=5 * math.sqrt(part * (1 - part) / len(q)))


def test_integers_stay() -> None:
    x = np.array([-3.0, 0.0, 1e9])
    assert stochastic_round(x, seeded_stream(0)).tolist() == [-3, 0, 10**9]


@given(SIZES, st.floats(0, 100), st.integers(0))
def test_the_integer_norm_bound_always_holds(size: int, norm: float, seed: int) -> None:
    x = seeded_stream(seed, "x").uniform(size) - 0.5
    x *= norm / max(float(np.linalg.norm(x)), 1e-9)
    bound = math.floor(rounded_norm(norm, size, DEVICE_BETA) ** 2)
    q = conditional_round(x, bound, seeded_stream(seed, "w"))
    assert sum(int(value) ** 2 for value in q) <= bound
    assert (np.abs(q - x) < 1 + 1e-9).all()


@given(SIZES, st.integers(0))
def test_the_bound_holds_for_a_norm_that_is_too_large_or_nothing_is_returned(size: int, seed: int) -> None:
    x = 3 * seeded_stream(seed, "x").uniform(size)
    bound = int(np.dot(x, x))
    try:
        q = conditional_round(x, bound, seeded_stream(seed, "w"))
    except PrivacyError:
        return
    assert sum(int(value) ** 2 for value in q) <= bound


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9])
def test_a_try_succeeds_with_probability_one_minus_beta(part: float) -> None:
    x = np.full(256, part)
    bound = math.floor(rounded_norm(float(np.linalg.norm(x)), len(x), DEVICE_BETA) ** 2)
    tries = [stochastic_round(x, seeded_stream(seed, "tries")) for seed in range(500)]
    assert np.mean([int(np.dot(q, q)) <= bound for q in tries]) >= 1 - DEVICE_BETA


def test_the_bound_is_the_smaller_of_the_two() -> None:
    assert rounded_norm(0.0, 4, DEVICE_BETA) == pytest.approx(math.sqrt(2))
    assert rounded_norm(10.0, 1, 1e-12) == 11.0
    assert rounded_norm(1305.0, 1 << 17, DEVICE_BETA) / 1305 == pytest.approx(1.01, abs=1e-4)


def test_vectors_rounded_with_the_same_words_differ_by_a_stochastic_rounding() -> None:
    x, v = seeded_stream(1, "x").uniform(100_000) * 100, np.full(100_000, 0.3)
    moved = stochastic_round(x + v, seeded_stream(1, "w")) - stochastic_round(x, seeded_stream(1, "w"))
    assert set(moved.tolist()) == {0, 1}
    assert moved.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 100_000))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31)])
def test_what_does_not_fit_is_refused(value: float) -> None:
    x = np.array([0.0, value])
    with pytest.raises(PrivacyError, match="2\\^31"):
        stochastic_round(x, seeded_stream(0))
    with pytest.raises(PrivacyError, match="2\\^31"):
        conditional_round(x, 2**62, seeded_stream(0))


def test_an_impossible_bound_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"norm=10\.0 to round to at most 3"):
        conditional_round(np.array([6.0, 8.0]), 9, seeded_stream(0))
