"""Poisson sampling: the law of the coins, their independence, and what they cost."""

import tracemalloc
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.privacy import sampling
from common.privacy.randomness import Stream, seeded_stream, system_stream
from common.privacy.sampling import _block, _thresholds, poisson_sample


class Words(Stream):
    """A stream that returns the given words."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, n: int) -> NDArray[np.uint64]:
        taken, self.left = self.left[:n], self.left[n:]
        return np.array(taken, np.uint64)


@pytest.mark.parametrize(("rate", "heads"), [(0.9, 1 / 8), (0.03, 1 / 8), (0.3, 1.0), (0.5, 4.0), (0.1, 2.0)])
def test_coins_are_independent_and_of_the_rate(rate: float, heads: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 2^8 outcomes of 8 neighbours, 100,000 times, by chi-square; also of blocks with many heads."""
    monkeypatch.setattr(sampling, "_HEADS", heads)
    monkeypatch.setattr(sampling, "_BLOCKS", 1)
    groups = 100_000
    coins = np.zeros((groups, 8), np.int64)
    coins.reshape(-1)[poisson_sample(rate, coins.size, seeded_stream(1, str(rate)))] = 1
    outcomes = np.bincount(coins @ (1 << np.arange(8)), minlength=256)
    fallen = np.array([int(outcome).bit_count() for outcome in range(256)])
    expected = groups * rate**fallen * (1 - rate) ** (8 - fallen)
    common = expected >= 10
    found = np.append(outcomes[common], outcomes[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue > 1e-9


def test_pairs_anywhere_in_a_block_are_independent() -> None:
    """Of 2^6 devices in a block: pairs that fall together, by their distance."""
    rate, n = 0.0015, 2**24
    size = _block(rate, n)
    assert size == 64
    coins = np.zeros(n, bool)
    coins[poisson_sample(rate, n, seeded_stream(2))] = True
    for distance in (1, 2, 5, 31, 63, 64, 1000):
        together = int(np.count_nonzero(coins[:-distance] & coins[distance:]))
        assert stats.binomtest(together, n - distance, rate**2).pvalue > 1e-9
    by_place = coins.reshape(-1, size).sum(axis=0)
    assert stats.chisquare(by_place).pvalue > 1e-9
    by_block = np.bincount(coins.reshape(-1, size).sum(axis=1), minlength=5)[:5]
    assert (
        stats.chisquare(by_block[:4], stats.binom.pmf(range(4), size, rate) * n / size, sum_check=False).pvalue > 1e-9
    )


def test_system_coins_fall_with_the_rate_in_large_populations() -> None:
    for rate, n in ((1e-4, 10**8), (0.01, 10**6), (0.4, 10**4)):
        members = poisson_sample(rate, n, system_stream())
        assert stats.binomtest(len(members), n, rate).pvalue > 1e-9
        assert members.dtype == np.int64 and (np.diff(members) > 0).all()
        assert members.min() >= 0 and members.max() < n
        assert stats.kstest(members / n, "uniform").pvalue > 1e-9


@given(st.floats(1e-12, 1), st.integers(18, 24))
def test_thresholds_are_the_binomial_law(rate: float, doublings: int) -> None:
    size, exact = _block(rate, 1 << doublings), Fraction(rate)
    assert size * rate <= 1 / 8 or size == 1
    above, found = Fraction(1), _thresholds(rate, size)[::-1]
    assert len(found) < 64
    for j in range(size):
        above -= comb(size, j) * exact**j * (1 - exact) ** (size - j)
        threshold = found[j] if j < len(found) else 0
        assert 0 <= above - Fraction(threshold, 1 << 256) <= Fraction(1, 1 << 256)


def test_a_word_on_a_threshold_is_decided_by_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCKS", 1)
    assert _block(0.03, 4) == 4
    least = _thresholds(0.03, 4)[-1]  # P(X ≥ 1)
    for u, heads in ((least - 1, [2]), (least, []), (least + 1, [])):
        words = [u >> shift & 2**64 - 1 for shift in (192, 128, 64, 0)]
        assert poisson_sample(0.03, 4, Words(*words, 6)).tolist() == heads


def test_places_that_coincide_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_HEADS", 2.0)
    monkeypatch.setattr(sampling, "_BLOCKS", 1)
    assert _block(0.25, 8) == 8
    three = _thresholds(0.25, 8)[-3] >> 192
    assert poisson_sample(0.25, 8, Words(three - 1, 5, 13, 2, 5, 0)).tolist() == [0, 2, 5]


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_rates_at_the_ends(n: int) -> None:
    assert poisson_sample(1.0, n, system_stream()).tolist() == list(range(n))
    assert poisson_sample(0.0, n, system_stream()).tolist() == []
    assert poisson_sample(5e-324, n, system_stream()).tolist() == []
    assert poisson_sample(0.5, 0, system_stream()).tolist() == []


@pytest.mark.parametrize(("rate", "n"), [(0.1, 671), (0.001875, 160_000), (1e-5, 2**18), (0.99, 10**6)])
def test_few_or_dense_coins_are_flipped_one_by_one(rate: float, n: int) -> None:
    """So that a cohort of a seed is what it was when all coins were."""
    one_by_one = np.flatnonzero(seeded_stream(3).uniform(n) < rate)
    np.testing.assert_array_equal(poisson_sample(rate, n, seeded_stream(3)), one_by_one)


@pytest.mark.parametrize("n", [10**6, 10**9, 2**50])
def test_work_and_memory_are_those_of_the_members(n: int) -> None:
    tracemalloc.start()
    try:
        members = poisson_sample(10_000 / n, n, system_stream())
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert 9_000 < len(members) < 11_000
