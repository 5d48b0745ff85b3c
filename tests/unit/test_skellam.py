"""Skellam noise: the table against exact moments and scipy, draws against the law, and sums of shares."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.errors import PrivacyError
from common.privacy.encoding import Encoding
from common.privacy.randomness import Stream, seeded_stream
from common.privacy.skellam import DELTA_LOSS, TOTAL_VARIATION, _resolve, _thresholds, skellam

VARIANCES = (0.01, 0.7, 3.0, 40.0, 1234.5)


class Words(Stream):
    """A stream that returns the given words."""

    def __init__(self, words: list[int]) -> None:
        self.left = words

    def words(self, n: int) -> NDArray[np.uint64]:
        taken, self.left = self.left[:n], self.left[n:]
        return np.array(taken, np.uint64)


def table(variance: float) -> dict[int, Fraction]:
    """The probabilities that the thresholds stand for, as exact fractions."""
    thresholds = [0, *_thresholds(variance), 1 << 256]
    last = len(thresholds) // 2 - 1
    steps = enumerate(pairwise(thresholds), start=-last)
    return {k: Fraction(high - low, 1 << 256) for k, (low, high) in steps}


def moment(law: dict[int, Fraction], power: int) -> Fraction:
    return sum((k**power * probability for k, probability in law.items()), Fraction())


def chi_squared(draws: NDArray[np.int64], variance: float) -> float:
    """p-value of draws against Skellam(variance), in bins of at least 20 expected."""
    edge = math.ceil(8 * math.sqrt(variance)) + 8
    support = np.arange(-edge, edge + 1)
    bins = np.unique(np.floor(40 * stats.skellam.cdf(support, variance / 2, variance / 2)), return_index=True)[1]
    expected = np.add.reduceat(stats.skellam.pmf(support, variance / 2, variance / 2), bins) * len(draws)
    found = np.add.reduceat(np.bincount(np.clip(draws, -edge, edge) + edge, minlength=len(support)), bins)
    return float(stats.chisquare(found, expected * len(draws) / expected.sum()).pvalue)


@pytest.mark.parametrize("variance", VARIANCES)
def test_table_is_the_law_of_scipy(variance: float) -> None:
    law = table(variance)
    found = np.array([float(probability) for probability in law.values()])
    expected = stats.skellam.pmf(list(law), variance / 2, variance / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("variance", VARIANCES)
def test_table_has_the_exact_moments(variance: float) -> None:
    v, law = Fraction(variance), table(variance)
    assert moment(law, 0) == 1
    assert moment(law, 1) == 0
    assert abs(moment(law, 2) - v) < Fraction(1, 2**220)
    assert abs(moment(law, 4) - (3 * v**2 + v)) < Fraction(1, 2**200)
    assert abs(moment(law, 6) - (15 * v**3 + 15 * v**2 + v)) < Fraction(1, 2**180)


@pytest.mark.parametrize("variance", VARIANCES)
def test_table_is_symmetric_and_ends_where_the_mass_does(variance: float) -> None:
    thresholds = _thresholds(variance)
    assert thresholds == sorted(thresholds)
    assert all(low + high == 1 << 256 for low, high in zip(thresholds, reversed(thresholds), strict=True))
    assert 0 < thresholds[0] < 1 << 24


@pytest.mark.parametrize("variance", [0.01, 0.7, 40.0, 1e4])
def test_draws_follow_the_law(variance: float) -> None:
    draws = skellam(variance, 200_000, seeded_stream(0, "draws"))
    assert chi_squared(draws, variance) > 1e-3
    deviation = math.sqrt((2 * variance**2 + variance) / len(draws))  # of the mean square
    assert np.mean(draws**2) == pytest.approx(variance, abs=4 * deviation)
    assert abs(np.mean(draws)) < 4 * math.sqrt(variance / len(draws))


def test_the_largest_and_the_smallest_variances() -> None:
    draws = skellam(1e9, 50_000, seeded_stream(1))
    assert np.mean(draws.astype(float) ** 2) == pytest.approx(1e9, rel=0.03)
    for variance in (0.0, 5e-324, 1e-80):
        assert not skellam(variance, 1000, seeded_stream(1)).any()


@given(st.sampled_from(VARIANCES), st.data())
@settings(deadline=None)
def test_every_word_is_decided_with_256_bits(variance: float, data: st.DataObject) -> None:
    """Words at, next to and away from a threshold; those at one take three more, in order."""
    thresholds = _thresholds(variance)
    near = data.draw(st.lists(st.tuples(st.sampled_from(thresholds), st.integers(-1, 1)), min_size=1, max_size=5))
    first = [min(max((threshold >> 192) + step, 0), 2**64 - 1) for threshold, step in near]
    first += data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=5))
    more = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=3 * len(first), max_size=3 * len(first)))

    expected, left = [], list(more)
    for word in first:
        extra, left = (left[:3], left[3:]) if word in {t >> 192 for t in thresholds} else ([0, 0, 0], left)
        u = word << 192 | extra[0] << 128 | extra[1] << 64 | extra[2]
        expected.append(sum(threshold <= u for threshold in thresholds) - len(thresholds) // 2)
    stream = Words(first + more)
    assert skellam(variance, len(first), stream).tolist() == expected
    assert stream.left == left


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_last_bit_decides_on_a_boundary(variance: float) -> None:
    threshold = _thresholds(variance)[len(_thresholds(variance)) // 2]  # P(X ≤ 0)
    for u, expected in ((threshold - 1, 0), (threshold, 1)):
        words = [u >> shift & (2**64 - 1) for shift in (192, 128, 64, 0)]
        assert skellam(variance, 1, Words(words)).tolist() == [expected]
        assert _resolve(variance, words[0], Words(words[1:])) == expected + len(_thresholds(variance)) // 2


@given(st.integers(0, 3000), st.data(), st.floats(0.01, 1e8), st.floats(0.1, 1.0))
def test_shares_and_top_up_add_up_to_the_target(n: int, data: st.DataObject, variance: float, honest: float) -> None:
    """The variances do, and independent Skellam variables add theirs: their sum is Skellam of the target."""
    survivors = data.draw(st.integers(0, n))
    encoding = Encoding(16, 1.0, 100.0, 32, variance, honest)
    top_up = encoding.top_up(n, survivors)
    assert top_up >= 0
    shares = survivors * encoding.share(n) if n else 0.0
    assert shares + top_up == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize(("n", "survivors"), [(0, 0), (1, 0), (1, 1), (5, 3), (10, 10), (30, 27)])
def test_the_sum_of_shares_and_top_up_follows_the_law_of_the_target(n: int, survivors: int) -> None:
    encoding = Encoding(16, 1.0, 100.0, 32, 50.0, 0.8)
    variances = [encoding.top_up(n, survivors), *[encoding.share(n)] * survivors] if n else [encoding.top_up(0, 0)]
    draws = [skellam(variance, 100_000, seeded_stream(2, n, i)) for i, variance in enumerate(variances)]
    assert chi_squared(np.sum(draws, axis=0), 50.0) > 1e-3


def test_the_loss_of_delta_covers_2_to_the_33_draws() -> None:
    assert (1 + math.exp(90)) * 2.0**33 * TOTAL_VARIATION <= DELTA_LOSS


@pytest.mark.parametrize("variance", [-1.0, math.nan, math.inf, 2.0**37])
def test_a_variance_out_of_range_is_refused(variance: float) -> None:
    with pytest.raises(PrivacyError, match="variance="):
        skellam(variance, 1, seeded_stream(0))
