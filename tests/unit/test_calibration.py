"""Calibration figures against hand-computed values, enumeration and what noise alone must give."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.calibration import cross_entropy, expected_calibration_error, kl_divergence
from common.errors import DataError

TRUE, ESTIMATED = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
quick = settings(max_examples=60, deadline=None)


def softmaxes(random: np.random.Generator, rows: int, items: int) -> np.ndarray:
    odds = np.exp(random.standard_normal((rows, items)))
    return odds / odds.sum(1, keepdims=True)


# Expected calibration error


def test_error_by_hand() -> None:
    predicted, outcomes = [0.9, 0.1, 0.8, 0.3], [1, 0, 0, 1]
    # Low bin {0.1, 0.3}: mean 0.2 against 0.5. High bin {0.8, 0.9}: mean 0.85 against 0.5.
    assert expected_calibration_error(predicted, outcomes, bins=2) == pytest.approx((0.3 + 0.35) / 2)
    assert expected_calibration_error(predicted, outcomes, bins=1) == pytest.approx(0.525 - 0.5)
    assert expected_calibration_error(predicted, outcomes, bins=4) == pytest.approx((0.1 + 0.1 + 0.8 + 0.7) / 4)
    assert expected_calibration_error([0.3], [1], bins=10) == pytest.approx(0.7)


def test_certain_and_right_is_perfect_and_certain_and_wrong_the_worst() -> None:
    outcomes = np.array([0, 1, 1, 0, 1])
    assert expected_calibration_error(outcomes, outcomes) == 0
    assert expected_calibration_error(1 - outcomes, outcomes) == 1


def test_bins_have_equal_mass() -> None:
    # Predictions that are all tiny but two: equal widths would hide that the middle third is wrong.
    predicted = np.concatenate([np.linspace(1e-6, 2e-6, 10), np.linspace(1e-4, 2e-4, 10), np.linspace(0.4, 0.5, 10)])
    outcomes = np.repeat([0, 1, 0], 10)
    found = expected_calibration_error(predicted, outcomes, bins=3)
    assert found == pytest.approx((1.5e-6 + (1 - 1.5e-4) + 0.45) / 3)


@quick
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans()), min_size=1), st.integers(1, 12))
def test_order_of_events_and_ties_do_not_matter(events: list[tuple[float, bool]], bins: int) -> None:
    predicted, outcomes = np.array(events).T
    found = expected_calibration_error(predicted, outcomes, bins=bins)
    assert 0 <= found <= 1
    order = np.lexsort((outcomes, predicted))
    for one in (order, order[::-1]):
        assert expected_calibration_error(predicted[one], outcomes[one], bins=bins) == pytest.approx(found)
    if len(set(predicted)) == 1:
        assert found == pytest.approx(abs(outcomes.mean() - predicted[0]))


def test_error_of_right_predictions_is_what_noise_gives() -> None:
    random, n, bins = np.random.default_rng(0), 4000, 10
    found, theory = [], []
    for _ in range(300):
        predicted = random.random(n)
        found.append(expected_calibration_error(predicted, random.random(n) < predicted, bins=bins))
        spread = np.sqrt((np.sort(predicted) * (1 - np.sort(predicted))).reshape(bins, -1).mean(1))
        theory.append(math.sqrt(2 * bins / (math.pi * n)) * spread.mean())
    assert abs(np.mean(found) - np.mean(theory)) < 4 * np.std(found) / math.sqrt(300) + 0.01 * np.mean(theory)


def test_error_of_predictions_that_are_off_by_a_constant_is_that_constant() -> None:
    random, n = np.random.default_rng(1), 200_000
    truth = 0.2 + 0.6 * random.random(n)
    found = expected_calibration_error(truth + 0.15, random.random(n) < truth)
    assert found == pytest.approx(0.15, abs=4 * 0.5 / math.sqrt(n))


def test_beta_by_item_is_calibrated_and_a_sharpened_one_is_not() -> None:
    random, rows, items = np.random.default_rng(2), 5000, 8
    beta = softmaxes(random, rows, items)
    actions = (random.random((rows, 1)) > np.cumsum(beta, axis=1)).sum(1).clip(max=items - 1)
    chosen = np.eye(items)[actions]
    sharp = beta**2 / (beta**2).sum(1, keepdims=True)
    noise = 4 * math.sqrt(2 * 10 / (math.pi * beta.size)) * 0.33
    assert expected_calibration_error(beta.ravel(), chosen.ravel()) < noise
    assert expected_calibration_error(sharp.ravel(), chosen.ravel()) > 3 * noise


# Cross-entropy and KL


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    # A log in which every action occurs exactly as often as β says.
    actions = np.repeat([0, 1, 2], [5, 3, 2])
    entropy, divergence = -TRUE @ np.log(TRUE), TRUE @ np.log(TRUE / ESTIMATED)
    assert cross_entropy(TRUE[actions]) == pytest.approx(entropy)
    assert cross_entropy(ESTIMATED[actions]) == pytest.approx(entropy + divergence)
    assert kl_divergence(TRUE[actions], ESTIMATED[actions]) == pytest.approx(divergence)
    assert kl_divergence(TRUE[actions], TRUE[actions]) == 0


@quick
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_empirical_frequencies_have_the_least_cross_entropy(seed: int, items: int) -> None:
    random = np.random.default_rng(seed)
    actions = random.integers(items, size=50)
    frequencies = np.bincount(actions, minlength=items) / 50
    (other,) = softmaxes(random, 1, items)
    assert cross_entropy(frequencies[actions]) <= cross_entropy(other[actions]) + 1e-12
    assert kl_divergence(frequencies[actions], other[actions]) >= -1e-12


def test_sampled_divergence_has_no_bias() -> None:
    random = np.random.default_rng(3)
    logs = random.choice(3, size=(2000, 50), p=TRUE)
    found = np.array([kl_divergence(TRUE[log], ESTIMATED[log]) for log in logs])
    exact = TRUE @ np.log(TRUE / ESTIMATED)
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([], []), "Expected at least 1 event, found 0."),
        (lambda: expected_calibration_error([0.5, 1.5], [0, 1]), "Expected predicted[1]=1.5 in [0, 1]."),
        (lambda: expected_calibration_error([0.5, 0.5], [0, 0.5]), "Expected outcomes[1]=0.5 to be 0 or 1."),
        (lambda: expected_calibration_error([0.5, 0.5], [0]), "Expected outcomes of shape (2,), not (1,)."),
        (lambda: expected_calibration_error([0.5], [1], bins=0), "Expected bins=0 ≥ 1."),
        (lambda: cross_entropy([0.5, 0]), "Expected estimated[1]=0.0 in (0, 1]."),
        (lambda: cross_entropy([]), "Expected at least 1 event, found 0."),
        (lambda: kl_divergence([math.nan], [0.5]), "Expected true[0]=nan in (0, 1]."),
        (lambda: kl_divergence([0.5], [0.5, 0.5]), "Expected estimated of shape (1,), not (2,)."),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message
