"""ε of both observers against published and independent values, monotonicity, and the search for z."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.accounting import (
    EXCESS_LIMIT,
    contributions,
    default_delta,
    effective_multiplier,
    epsilon_model,
    epsilon_model_pld,
    epsilon_server,
    noise_multiplier_for,
    releases_within,
    skellam_excess,
    threshold_delta,
)
from common.privacy.encoding import Encoding
from common.privacy.epsilon_curve import epsilon_model_of_many


def test_epsilon_model_of_a_known_case_by_both_accountants() -> None:
    assert epsilon_model(1.0, 0.05, 200, 1e-5) == pytest.approx(4.77, abs=0.02)
    assert epsilon_model_pld(1.0, 0.05, 200, 1e-5) == pytest.approx(epsilon_model(1.0, 0.05, 200, 1e-5), abs=0.015)


@pytest.mark.parametrize(
    ("z", "rate", "releases", "delta"),
    [(0.6, 0.01, 100, 1e-6), (2.0, 0.3, 50, 1e-4), (1.0, 0.5, 1, 1e-3), (5.0, 0.999, 20, 1e-8)],
)
def test_the_two_accountants_agree(z: float, rate: float, releases: int, delta: float) -> None:
    prv = epsilon_model(z, rate, releases, delta)
    assert prv == pytest.approx(epsilon_model_pld(z, rate, releases, delta), abs=0.02)


def test_epsilon_model_at_its_edges() -> None:
    assert epsilon_model(1.0, 0.1, 0, 1e-5) == epsilon_model_pld(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon_model(0.0, 0.1, 1, 1e-5) == math.inf
    assert epsilon_model(1e3, 0.1, 3, 0.4) == 0
    assert epsilon_model(2.0, 1.0, 4, 1e-5) == pytest.approx(epsilon_server(2.0, 1.0, 4, 1e-5), rel=1e-9)


@pytest.mark.parametrize(("z", "releases", "delta"), [(0.1, 300, 1e-5), (1e-6, 10, 1e-5), (3.0, 1000, 1e-15)])
def test_where_prv_cannot_an_upper_bound_stands_in(z: float, releases: int, delta: float) -> None:
    bound = epsilon_model(z, 0.5, releases, delta)
    assert math.isfinite(bound)
    assert bound > epsilon_model(z, 0.5, releases // 2, delta) > 30


def test_the_stand_in_is_above_what_the_other_accountant_finds() -> None:
    assert 300 > epsilon_model(0.3, 0.1, 300, 1e-5) > epsilon_model_pld(0.3, 0.1, 300, 1e-5) > 200


@pytest.mark.parametrize(
    ("z", "rate", "at_most", "delta"),
    [(1.5, 0.01, 2000, 1e-6), (0.5, 0.1, 50, 1e-5), (2.0, 1.0, 9, 1e-5), (0.3, 0.1, 300, 1e-5), (3.0, 0.5, 9, 1e-15)],
)
def test_epsilon_of_many_is_that_of_each(z: float, rate: float, at_most: int, delta: float) -> None:
    """Also without sampling, and where the tables for all of them would be too large or wrong."""
    for releases in (1, at_most):
        alone = epsilon_model(z, rate, releases, delta)
        assert epsilon_model_of_many(z, rate, releases, delta, at_most) == pytest.approx(alone, abs=1e-4)
    assert epsilon_model_of_many(z, rate, 0, delta, at_most) == 0


def test_epsilon_model_falls_with_noise_and_grows_with_everything_else() -> None:
    epsilon = epsilon_model(1.0, 0.05, 100, 1e-5)
    assert epsilon_model(1.1, 0.05, 100, 1e-5) < epsilon
    assert epsilon_model(1.0, 0.06, 100, 1e-5) > epsilon
    assert epsilon_model(1.0, 0.05, 110, 1e-5) > epsilon
    assert epsilon_model(1.0, 0.05, 100, 1e-6) > epsilon


@pytest.mark.parametrize(
    ("users", "cohort", "target", "expected"),
    [(610, 61, 2, 4.71), (6040, 604, 8, 1.90), (138_493, 20_000, 4, 5.37), (1_000_000, 20_000, 8, 0.80)],
)
def test_the_noise_for_a_target_is_that_of_the_table(users: int, cohort: int, target: float, expected: float) -> None:
    """The table of facts/privacy.md, for 1,000 rounds; certified, and within 1 % of the smallest."""
    delta, rate = default_delta(users), cohort / users
    z = noise_multiplier_for(target, rate, 1000, delta)
    assert z == pytest.approx(expected, rel=0.05)
    assert epsilon_model(z / math.sqrt(1 + EXCESS_LIMIT), rate, 1000, delta) <= target
    assert epsilon_model(0.99 * z, rate, 1000, delta) > target


def test_noise_for_a_target_at_its_edges() -> None:
    assert noise_multiplier_for(8.0, 0.1, 0, 1e-5) == 0
    z = noise_multiplier_for(3.0, 1.0, 4, 1e-5)
    assert epsilon_model(z / math.sqrt(1 + EXCESS_LIMIT), 1.0, 4, 1e-5) <= 3 < epsilon_model(0.99 * z, 1.0, 4, 1e-5)
    for target in (0.01, 101.0, math.nan):
        with pytest.raises(PrivacyError, match="target_epsilon"):
            noise_multiplier_for(target, 0.1, 10, 1e-5)


def test_a_target_that_was_solved_for_allows_all_its_releases() -> None:
    """With the encoding's own κ_s."""
    z = noise_multiplier_for(8.0, 0.1, 200, 1e-5)
    effective = effective_multiplier(Encoding.choose(5000, 1.0, z, 100, 0.8))
    assert effective < z
    assert releases_within(8.0, effective, 0.1, 1e-5, 200) == 200


@pytest.mark.parametrize(("z", "rate", "budget"), [(1.0, 0.05, 4.0), (2.0, 0.1, 1.0), (1.0, 1.0, 8.0)])
def test_releases_within_a_budget_are_as_many_as_it_allows(z: float, rate: float, budget: float) -> None:
    releases = releases_within(budget, z, rate, 1e-5, 1000)
    assert epsilon_model(z, rate, releases, 1e-5) <= budget < epsilon_model(z, rate, releases + 1, 1e-5)
    assert releases_within(budget, z, rate, 1e-5, releases) == releases


def test_releases_within_too_small_a_budget_are_none() -> None:
    assert releases_within(1.0, 0.5, 0.1, 1e-5, 100) == 0
    assert releases_within(1.0, 0.0, 0.1, 1e-5, 100) == 0
    assert releases_within(1.0, 0.5, 0.1, 1e-5, 0) == 0


@pytest.mark.parametrize(
    ("rate", "rounds", "most"), [(0.1, 1000, 150), (0.5, 3, 3), (1.0, 7, 7), (0.01, 1000, 26), (0.5, 0, 0)]
)
def test_contributions(rate: float, rounds: int, most: int) -> None:
    assert contributions(rate, rounds) == most


@pytest.mark.parametrize(
    ("users", "cohort", "z", "expected"), [(6040, 604, 1.9, 53), (138_493, 5000, 1.01, 83), (10**6, 20_000, 0.8, 88)]
)
def test_epsilon_server_of_known_cases(users: int, cohort: int, z: float, expected: float) -> None:
    most = contributions(cohort / users, 1000)
    assert epsilon_server(z, 0.8, most, default_delta(users)) == pytest.approx(expected, rel=0.02)


@given(st.floats(0.1, 50), st.floats(0.1, 1), st.integers(1, 500), st.floats(1e-12, 0.1))
@settings(deadline=None)
def test_epsilon_server_is_that_of_the_gaussian(z: float, honest: float, most: int, delta: float) -> None:
    """δ(ε) of a Gaussian of multiplier s is Φ(1/2s − εs) − e^ε Φ(−1/2s − εs) (Balle and Wang, 2018)."""

    def log_phi(x: float) -> float:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2) if x > -35 else -(x**2) / 2 - math.log(-x * 2.5066282746)

    s, epsilon = z * math.sqrt(honest / most), epsilon_server(z, honest, most, delta)
    spent = math.exp(log_phi(1 / (2 * s) - epsilon * s)) - math.exp(epsilon + log_phi(-1 / (2 * s) - epsilon * s))
    assert spent == pytest.approx(delta, rel=1e-3) or (epsilon == 0 and spent <= delta)
    assert epsilon_server(z, honest, most + 1, delta) >= epsilon


def test_epsilon_server_at_its_edges() -> None:
    assert epsilon_server(1.0, 0.8, 0, 1e-5) == 0
    assert epsilon_server(0.0, 0.8, 1, 1e-5) == math.inf


def test_the_excess_of_skellam_is_that_of_the_formula() -> None:
    encoding = Encoding(1000, 1.0, 100.0, 16, 1e6, 0.5)
    squared, mu = encoding.squared_bound, 1e6 * 0.5
    l1 = min(math.sqrt(1024 * squared), squared)
    ratios = [
        min(((2 * a - 1) * squared + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu)) / (a * squared / (2 * mu))
        for a in range(2, 257)
    ]
    assert skellam_excess(encoding) == pytest.approx(max(ratios), rel=1e-12)
    assert effective_multiplier(encoding) == pytest.approx(encoding.noise_multiplier / math.sqrt(1 + max(ratios)))


@given(st.integers(1, 2**20), st.floats(0.05, 20), st.floats(0.5, 1))
@settings(deadline=None)
def test_chosen_encodings_are_nearly_gaussian(dimension: int, z: float, honest: float) -> None:
    assert skellam_excess(Encoding.choose(dimension, 1.0, z, 100, honest, 32)) <= 1.01e-4


def test_noise_that_is_not_nearly_gaussian_is_refused() -> None:
    with pytest.raises(PrivacyError, match="excess="):
        skellam_excess(Encoding(1000, 1.0, 10.0, 16, 100.0, 0.8))
    with pytest.raises(PrivacyError, match=r"variance=0\.0"):
        skellam_excess(Encoding(1000, 1.0, 10.0, 16, 0.0, 0.8))


def test_default_delta() -> None:
    assert default_delta(6040) == pytest.approx(6040**-1.1)
    assert default_delta(1) == 0.5
    with pytest.raises(PrivacyError, match="users=0"):
        default_delta(0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1.0, 0.1, 1, 1e-5), "noise_multiplier=-1"),
        ((math.nan, 0.1, 1, 1e-5), "noise_multiplier=nan"),
        ((1.0, 0.0, 1, 1e-5), "0.0"),
        ((1.0, 1.1, 1, 1e-5), "1.1"),
        ((1.0, 0.1, -1, 1e-5), "releases=-1"),
        ((1.0, 0.1, 1, 0.0), "delta=0.0"),
        ((1.0, 0.1, 1, 1.0), "delta=1.0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: tuple[float, float, int, float], named: str) -> None:
    for function in (epsilon_model, epsilon_model_pld, epsilon_server):
        with pytest.raises(PrivacyError, match=named):
            function(*arguments)


def test_a_minimum_cohort_costs_what_the_pivotal_user_can_do() -> None:
    """With one other always drawn and a minimum of two, a user decides in every release whether the other is summed."""
    assert threshold_delta(1, 0.5, 10, 100, 8.0) == 0
    assert threshold_delta(2, 1.0, 2, 3, 0.0) == pytest.approx(2 * 3)
    assert threshold_delta(3, 0.1, 671, 400, 8.0) < 1e-20
    assert threshold_delta(3, 0.1, 40, 400, 8.0) > 1
