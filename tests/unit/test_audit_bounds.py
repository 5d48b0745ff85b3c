"""The bounds of the audits: exact cases, published figures, and their error on mechanisms whose ε is known."""

import math

import numpy as np
import pytest

from simulations.audits.bounds import (
    CONFIDENCE,
    area,
    epsilon_bound,
    error_of_each,
    guesses_bound,
    guesses_p_value,
    hits_p_value,
    largest_bound,
    mean_interval,
    rate_interval,
    true_positives,
)

ERROR = error_of_each(CONFIDENCE)


def test_guesses_against_randomised_response_are_binomial() -> None:
    assert guesses_p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.55347, abs=1e-5)
    assert guesses_p_value(3, 3, 3, 0.0, 0.0) == pytest.approx(1 / 8)
    assert guesses_p_value(3, 3, 0, 0.0, 0.0) == 1


@pytest.mark.parametrize(
    ("coins", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_reproduces_the_figures_of_its_article(
    coins: int, guesses: int, right: int, delta: float, published: float
) -> None:
    assert guesses_bound(coins, guesses, right, delta, 0.05) == pytest.approx(published, abs=2e-3)


def test_a_larger_delta_or_fewer_right_guesses_never_raise_the_bound() -> None:
    bounds = [guesses_bound(1000, 200, right, 1e-6, ERROR) for right in range(120, 201, 10)]
    assert bounds == sorted(bounds)
    assert guesses_bound(1000, 200, 190, 1e-4, ERROR) <= guesses_bound(1000, 200, 190, 0.0, ERROR)
    assert guesses_bound(1000, 0, 0, 1e-6, ERROR) == 0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_exceeds_the_truth_as_seldom_as_it_says(epsilon: float) -> None:
    """Randomised response, whose guesses are right with the probability that ε allows: the worst case. The surest
    guesses are any, so that each choice of how many is at its own error."""
    generator, error, trials = np.random.default_rng(0), 0.1, 120
    wrong = 0
    for _ in range(trials):
        present = generator.random(1024) < 0.5
        kept = generator.random(1024) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(present == kept, 1.0, 0.0) + generator.random(1024) / 2
        wrong += epsilon_bound([scores], present, 0.0, error).epsilon > epsilon
    assert rate_interval(wrong, trials, ERROR)[0] <= error


def test_the_bound_has_power() -> None:
    present = np.random.default_rng(0).random(4096) < 0.5
    assert epsilon_bound([present.astype(float)], present, 1e-9, ERROR).epsilon > 4
    assert epsilon_bound([present.astype(float)], present, 1e-9, ERROR).epsilon <= largest_bound(4096, 1, 1e-9, ERROR)


def test_a_rate_has_the_interval_of_clopper_and_pearson() -> None:
    assert rate_interval(0, 10, 0.025) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    low, high = rate_interval(5, 10, 0.025)
    assert (low, high) == pytest.approx((0.187086, 0.812914), abs=1e-6)


def test_a_mean_of_one_value_is_anything() -> None:
    assert mean_interval(np.array([1.0]), ERROR) == (-math.inf, math.inf)
    low, high = mean_interval(np.array([1.0, 2.0, 3.0]), 0.025)
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_hits_by_chance_by_enumeration() -> None:
    """Two devices that read 1 of 3 items: both guesses are right with 1/9, at least one with 5/9."""
    assert hits_p_value(2, [1, 1], 3) == pytest.approx(1 / 9)
    assert hits_p_value(1, [1, 1], 3) == pytest.approx(5 / 9)
    assert hits_p_value(0, [1, 1], 3) == pytest.approx(1)


def test_the_area_by_hand() -> None:
    assert area(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, True, False])) == 1
    assert area(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_true_positives_at_a_false_rate() -> None:
    scores = np.concatenate([np.arange(100.0), [98.5, 99.5, 50.0]])
    positive = np.arange(103) >= 100
    assert true_positives(scores, positive, 0.01) == (1, 3)
