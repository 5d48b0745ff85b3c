"""The estimators against enumeration, theory and a thousand repetitions of a fully known problem.

Tolerances are four standard errors of the repetitions or more; only the claims of no bias are held to two, with the
one fixed seed.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.errors import DataError
from common.ope import (
    MINIMUM_ESS,
    Column,
    Estimate,
    LoggedEvents,
    direct_method,
    doubly_robust,
    inclusion_probability,
    ips,
    share_of_list,
    snips,
)

quick = hypothesis_settings(max_examples=60, deadline=None)
STATES, ITEMS, EVENTS, REPETITIONS, CAP, SHIFT = 4, 100, 10_000, 1000, 3.0, 5.0


# A problem of which everything is known: 4 equally likely states, 100 items, a click or none.


@dataclass(frozen=True)
class Problem:
    """β, π, the chance of a click and a model of it that is wrong, each (states, items)."""

    beta: Column
    pi: Column
    clicks: Column
    wrong: Column

    @property
    def value(self) -> float:
        return float((self.pi * self.clicks).sum(1).mean())

    def log(self, n: int, random: np.random.Generator) -> tuple[Column, Column, Column]:
        """(n,) states, logged actions and rewards."""
        states = random.integers(STATES, size=n)
        # One table of the four distributions, each shifted by its state: inverting it draws an action of any state.
        ladder = (np.cumsum(self.beta, axis=1) + np.arange(STATES)[:, None]).ravel()
        actions = np.searchsorted(ladder, states + random.random(n) * (1 - 1e-12)) - states * ITEMS
        return states, actions, (random.random(n) < self.clicks[states, actions]).astype(np.float64)


@pytest.fixture(scope="module")
def problem() -> Problem:
    random = np.random.default_rng(0)

    def policy(width: float) -> Column:
        odds = np.exp(width * random.standard_normal((STATES, ITEMS)))
        return odds / odds.sum(1, keepdims=True)

    clicks = random.beta(1, 3, (STATES, ITEMS))
    return Problem(policy(0.7), policy(0.7), clicks, random.random((STATES, ITEMS)))


@pytest.fixture(scope="module")
def repeated(problem: Problem) -> dict[str, list[Estimate]]:
    """Every estimator on each of a thousand logs."""
    random = np.random.default_rng(1)
    found: dict[str, list[Estimate]] = {}
    for _ in range(REPETITIONS):
        states, actions, rewards = problem.log(EVENTS, random)
        b, p = problem.beta[states, actions], problem.pi[states, actions]
        events, shifted = LoggedEvents(rewards, b), LoggedEvents(rewards + SHIFT, b)
        models = {"exact": problem.clicks, "wrong": problem.wrong}
        expected = {name: (problem.pi * q).sum(1)[states] for name, q in models.items()}
        estimates = {
            "ips": ips(events, p),
            "capped ips": ips(events, p, cap=CAP),
            "snips": snips(events, p),
            "shifted ips": ips(shifted, p),
            "shifted snips": snips(shifted, p),
            **{
                f"dr, {name} model": doubly_robust(events, p, expected[name], q[states, actions])
                for name, q in models.items()
            },
        }
        for name, estimate in estimates.items():
            found.setdefault(name, []).append(estimate)
    return found


def values(estimates: list[Estimate]) -> Column:
    return np.array([estimate.value for estimate in estimates])


def standard_error(sample: Column) -> float:
    return float(sample.std(ddof=1) / math.sqrt(len(sample)))


def coverage(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([estimate.ci95[0] <= truth <= estimate.ci95[1] for estimate in estimates]))


def near_95_percent(share: float, repetitions: int) -> bool:
    return abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / repetitions)


@pytest.mark.parametrize("name", ["ips", "dr, exact model", "dr, wrong model"])
def test_ips_and_doubly_robust_have_no_bias(name: str, problem: Problem, repeated: dict[str, list[Estimate]]) -> None:
    found = values(repeated[name])
    assert abs(found.mean() - problem.value) < 2 * standard_error(found)


def test_a_cap_lowers_the_value_by_what_it_cuts_off(problem: Problem, repeated: dict[str, list[Estimate]]) -> None:
    ratio = problem.pi / problem.beta
    cut_off = float((problem.beta * (ratio - np.minimum(ratio, CAP)) * problem.clicks).sum(1).mean())
    found = values(repeated["capped ips"])
    assert cut_off > 0.01
    assert abs(found.mean() - (problem.value - cut_off)) < 4 * standard_error(found)
    assert found.std() < values(repeated["ips"]).std()


def test_snips_has_a_bias_of_order_one_over_n(problem: Problem, repeated: dict[str, list[Estimate]]) -> None:
    weights = problem.pi / problem.beta
    theory = -(problem.beta * weights**2 * (problem.clicks - problem.value)).sum(1).mean() / EVENTS
    found = values(repeated["snips"])
    assert abs(found.mean() - problem.value - theory) < 4 * standard_error(found)


def test_snips_bias_by_enumeration_halves_as_n_doubles() -> None:
    # Two items: the number of events that log the first is binomial, so the mean over all logs is a finite sum.
    beta, pi, rewards = np.array([0.6, 0.4]), np.array([0.3, 0.7]), np.array([1.0, 3.0])
    weights, value = pi / beta, float(pi @ rewards)
    theory = -float(beta @ (weights**2 * (rewards - value)))
    for n, tolerance in ((50, 0.1), (100, 0.05), (200, 0.025)):
        mean = 0.0
        for first in range(n + 1):
            actions = np.repeat([0, 1], [first, n - first])
            chance = math.comb(n, first) * beta[0] ** first * beta[1] ** (n - first)
            mean += chance * snips(LoggedEvents(rewards[actions], beta[actions]), pi[actions]).value
        assert n * (mean - value) == pytest.approx(theory, rel=tolerance)


def test_snips_is_steadier_than_ips_under_shifted_rewards(repeated: dict[str, list[Estimate]]) -> None:
    assert values(repeated["shifted snips"]).std() < 0.2 * values(repeated["shifted ips"]).std()
    assert values(repeated["shifted snips"]) == pytest.approx(values(repeated["snips"]) + SHIFT)


def test_doubly_robust_with_a_right_model_is_steadier_than_ips(repeated: dict[str, list[Estimate]]) -> None:
    assert values(repeated["dr, exact model"]).std() < 0.95 * values(repeated["ips"]).std()


@pytest.mark.parametrize("name", ["ips", "snips", "dr, exact model", "dr, wrong model", "shifted ips"])
def test_intervals_cover_the_truth_95_times_in_100(
    name: str, problem: Problem, repeated: dict[str, list[Estimate]]
) -> None:
    truth = problem.value + SHIFT * name.startswith("shifted")
    assert near_95_percent(coverage(repeated[name], truth), REPETITIONS)
    errors = [estimate.standard_error for estimate in repeated[name]]
    assert np.mean(errors) == pytest.approx(values(repeated[name]).std(), rel=4 / math.sqrt(2 * REPETITIONS))


def test_propensities_estimated_by_frequency_are_consistent(problem: Problem) -> None:
    random = np.random.default_rng(2)

    def repeat(n: int) -> Column:
        found = []
        for _ in range(100):
            states, actions, rewards = problem.log(n, random)
            counts = np.zeros((STATES, ITEMS))
            np.add.at(counts, (states, actions), 1)
            frequencies = counts / counts.sum(1, keepdims=True)
            events = LoggedEvents(rewards, frequencies[states, actions])
            found.append(snips(events, problem.pi[states, actions]).value)
        return np.array(found) - problem.value

    few, many = repeat(2000), repeat(20_000)
    for errors in (few, many):
        # What no event shows is lost: at most the probability, under π, of items that were not logged.
        assert abs(errors.mean()) < 4 * standard_error(errors) + 1e-3
    # Ten times the events: √10 = 3.2 in theory. Each deviation is known to 7 %, their ratio to 10 %.
    assert 2 < few.std() / many.std() < 5


# Exact small cases


def test_every_estimator_by_hand() -> None:
    events = LoggedEvents(np.array([1.0, 0.0, 4.0]), np.array([0.5, 0.25, 0.5]))
    target = [0.25, 0.5, 0.5]  # weights 0.5, 2, 1
    assert ips(events, target).value == pytest.approx(4.5 / 3)
    assert ips(events, target, cap=0.5).value == pytest.approx(2.5 / 3)
    assert snips(events, target).value == pytest.approx(4.5 / 3.5)
    assert snips(events, target, cap=1).value == pytest.approx(4.5 / 2.5)
    assert direct_method(events, [1, 2, 6]).value == pytest.approx(3)
    # Residuals −1, −1, 1.
    assert doubly_robust(events, target, [1, 2, 6], [2, 1, 3]).value == pytest.approx(3 + (-0.5 - 2 + 1) / 3)
    assert doubly_robust(events, target, [1, 2, 6], [2, 1, 3], cap=1).value == pytest.approx(3 - 0.5 / 3)
    found = ips(events, target)
    assert found.standard_error == pytest.approx(np.std([0.5, 0, 4], ddof=1) / math.sqrt(3))
    assert found.ci95 == pytest.approx((1.5 - 1.959964 * found.standard_error, 1.5 + 1.959964 * found.standard_error))
    assert found.effective_sample_size == pytest.approx(3.5**2 / 5.25)
    assert found.n == 3
    assert direct_method(events, [1, 2, 6]).effective_sample_size == 3


def mean_over_logs(beta: Column, n: int, estimate: Callable[[Column], float]) -> float:
    """An estimate's expectation: over every one of the Aⁿ logs, by its probability."""
    logs = [np.array(log) for log in itertools.product(range(len(beta)), repeat=n)]
    return math.fsum(float(beta[log].prod()) * estimate(log) for log in logs)


def test_expectations_over_every_log() -> None:
    beta, pi = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    rewards, wrong = np.array([1.0, -2.0, 4.0]), np.array([3.0, 0.0, -1.0])
    value, modelled = float(pi @ rewards), float(pi @ wrong)

    def events(log: Column) -> LoggedEvents:
        return LoggedEvents(rewards[log], beta[log])

    def robust(log: Column) -> float:
        return doubly_robust(events(log), pi[log], np.full(len(log), modelled), wrong[log]).value

    assert mean_over_logs(beta, 4, lambda log: ips(events(log), pi[log]).value) == pytest.approx(value)
    assert mean_over_logs(beta, 4, robust) == pytest.approx(value)
    capped = float(np.minimum(pi, 1.5 * beta) @ rewards)
    assert mean_over_logs(beta, 4, lambda log: ips(events(log), pi[log], cap=1.5).value) == pytest.approx(capped)
    # The square of the standard error is, on average, the variance of the mean of four.
    variance = float(beta @ (pi / beta * rewards - value) ** 2) / 4
    squared = mean_over_logs(beta, 4, lambda log: ips(events(log), pi[log]).standard_error ** 2)
    assert squared == pytest.approx(variance)


# Identities


@st.composite
def logs(draw: st.DrawFn) -> tuple[LoggedEvents, Column]:
    n = draw(st.integers(2, 20))
    column = st.lists(st.floats(0.01, 1), min_size=n, max_size=n).map(np.array)
    rewards = draw(st.lists(st.floats(-5, 5), min_size=n, max_size=n).map(np.array))
    users = draw(st.none() | st.lists(st.integers(-3, 3), min_size=n, max_size=n).map(np.array))
    return LoggedEvents(rewards, draw(column), users), draw(column)


def same(first: Estimate, second: Estimate, shift: float = 0) -> bool:
    if math.isinf(first.standard_error):
        return math.isinf(second.standard_error) and first.value + shift == pytest.approx(second.value, abs=1e-9)
    return (first.value + shift, first.standard_error) == pytest.approx(
        (second.value, second.standard_error), rel=1e-9, abs=1e-9
    )


@quick
@given(logs(), st.floats(-5, 5))
def test_doubly_robust_is_the_direct_method_where_the_model_is_exact(
    log: tuple[LoggedEvents, Column], first: float
) -> None:
    events, target = log
    expected = np.linspace(first, 1, len(target))
    assert same(doubly_robust(events, target, expected, events.rewards), direct_method(events, expected))


@quick
@given(logs(), st.floats(0.1, 50))
def test_doubly_robust_is_ips_without_a_model(log: tuple[LoggedEvents, Column], cap: float) -> None:
    events, target = log
    nothing = np.zeros(len(target))
    assert same(doubly_robust(events, target, nothing, nothing, cap=cap), ips(events, target, cap=cap))


@quick
@given(logs(), st.floats(-5, 5), st.floats(0.1, 50))
def test_snips_moves_with_a_constant_and_stays_within_the_rewards(
    log: tuple[LoggedEvents, Column], constant: float, cap: float
) -> None:
    events, target = log
    moved = LoggedEvents(events.rewards + constant, events.propensities, events.users)
    found = snips(events, target, cap=cap)
    assert same(found, snips(moved, target, cap=cap), constant)
    assert events.rewards.min() - 1e-9 <= found.value <= events.rewards.max() + 1e-9


@quick
@given(logs(), st.floats(0.01, 1))
def test_snips_does_not_see_the_scale_of_the_weights(log: tuple[LoggedEvents, Column], scale: float) -> None:
    events, target = log
    assert same(snips(events, target), snips(events, target * scale))


@quick
@given(logs())
def test_effective_sample_size_is_between_one_and_the_number_of_users(log: tuple[LoggedEvents, Column]) -> None:
    events, target = log
    independent = len(target) if events.users is None else len(np.unique(events.users))
    assert 1 - 1e-9 <= ips(events, target).effective_sample_size <= independent + 1e-9
    alone = LoggedEvents(events.rewards, events.propensities)
    assert ips(alone, events.propensities).effective_sample_size == pytest.approx(len(target))  # all weights are 1


# Users


@quick
@given(logs(), st.randoms(use_true_random=False))
def test_users_of_one_event_are_independent_events(log: tuple[LoggedEvents, Column], random: object) -> None:
    events, target = log
    users = np.array(random.sample(range(-50, 50), len(target)))  # type: ignore[attr-defined]
    own, plain = (LoggedEvents(events.rewards, events.propensities, each) for each in (users, None))
    for estimator in (ips, snips):
        assert same(estimator(own, target), estimator(plain, target))


def test_copies_of_events_tell_nothing_new() -> None:
    random = np.random.default_rng(3)
    rewards, b, p = random.random(300), 0.1 + 0.9 * random.random(300), random.random(300)
    copied = LoggedEvents(np.tile(rewards, 7), np.tile(b, 7), np.tile(np.arange(300), 7))
    for estimator in (ips, snips):
        once, often = estimator(LoggedEvents(rewards, b), p), estimator(copied, np.tile(p, 7))
        assert same(once, often)
        assert often.effective_sample_size == pytest.approx(once.effective_sample_size)
        assert often.warning == once.warning


def test_intervals_cover_where_a_users_events_repeat(problem: Problem) -> None:
    random, repetitions, users = np.random.default_rng(4), 600, 2000
    robust: dict[str, list[Estimate]] = {"ips": [], "snips": []}
    naive: list[Estimate] = []
    for _ in range(repetitions):
        # A user's history: one event, seen 1 to 7 times.
        copies = np.repeat(np.arange(users), random.integers(1, 8, users))
        states, actions, rewards = (each[copies] for each in problem.log(users, random))
        b, p = problem.beta[states, actions], problem.pi[states, actions]
        events = LoggedEvents(rewards, b, copies)
        robust["ips"].append(ips(events, p))
        robust["snips"].append(snips(events, p))
        naive.append(ips(LoggedEvents(rewards, b), p))
    for estimates in robust.values():
        assert near_95_percent(coverage(estimates, problem.value), repetitions)
    assert coverage(naive, problem.value) < 0.75


# Slates


@pytest.mark.parametrize("slate_size", [1, 2, 3])
def test_ips_by_inclusion_is_the_expected_sum_over_a_slates_items(slate_size: int) -> None:
    beta, pi = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.05, 0.15, 0.2, 0.6])
    rewards = np.array([1.0, 2.0, -1.0, 5.0])
    value = math.fsum(
        float(pi[list(slate)].prod()) * rewards[list(set(slate))].sum()
        for slate in itertools.product(range(4), repeat=slate_size)
    )
    alpha = inclusion_probability(pi, slate_size)
    assert alpha @ rewards == pytest.approx(value)
    found = mean_over_logs(beta, 2, lambda log: ips(LoggedEvents(rewards[log], beta[log]), alpha[log]).value)
    assert found == pytest.approx(value)


def test_inclusion_is_exact_at_its_ends() -> None:
    assert inclusion_probability([0, 1], 5).tolist() == [0, 1]
    assert inclusion_probability([1e-18], 10) == pytest.approx(np.array([1e-17]), rel=1e-12)
    assert inclusion_probability([0.2, 0.7], 1) == pytest.approx(np.array([0.2, 0.7]))


def test_ips_by_share_is_the_mean_over_a_fixed_list() -> None:
    beta, rewards, shown = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 2.0, -1.0, 5.0]), np.array([3, 1])

    def estimate(log: Column) -> float:
        lists = np.tile(shown, (len(log), 1))
        return ips(LoggedEvents(rewards[log], beta[log]), share_of_list(log, lists)).value

    assert mean_over_logs(beta, 3, estimate) == pytest.approx(rewards[shown].mean())


def test_share_of_list() -> None:
    lists = np.array([[2, 0, -1, -1], [1, 2, 3, 4], [0, 1, 2, 3], [-1, -1, -1, -1]])
    assert share_of_list([0, 0, 3, 1], lists).tolist() == [0.25, 0, 0.25, 0]
    assert share_of_list([-1], [[-1, 2]]).tolist() == [0]


# Warnings and refusals


def test_a_log_far_from_the_policy_is_warned_of() -> None:
    propensities = np.full(5000, 0.9)
    propensities[:12] = 1e-6
    events, target = LoggedEvents(np.ones(5000), propensities), np.full(5000, 0.5)
    expected = (
        "ESS 12 of 5,000: the estimate is dominated by few logs; lower the cap or collect logs closer to the policy."
    )
    assert ips(events, target).warning == expected
    assert snips(events, target).warning == expected
    assert doubly_robust(events, target, target, target).warning == expected
    assert ips(events, target, cap=1).warning is None
    assert direct_method(events, target).warning is None


def test_too_few_independent_logs_are_warned_of() -> None:
    events = LoggedEvents(np.ones(200), np.ones(200), np.arange(200) % 7)
    expected = f"Only 7 independent logs: the interval is unsafe; collect at least {MINIMUM_ESS}."
    assert ips(events, np.ones(200)).warning == expected
    assert ips(LoggedEvents(np.ones(200), np.ones(200)), np.ones(200)).warning is None


@pytest.mark.parametrize("users", [None, np.array([4])])
def test_one_event_has_no_finite_interval(users: np.ndarray | None) -> None:
    found = ips(LoggedEvents(np.array([2.0]), np.array([0.5]), users), [0.25])
    assert found.value == 1
    assert found.standard_error == math.inf
    assert found.ci95 == (-math.inf, math.inf)


def test_a_policy_that_takes_no_logged_action() -> None:
    events = LoggedEvents(np.ones(3), np.ones(3))
    found = ips(events, [0, 0, 0])
    assert (found.value, found.effective_sample_size) == (0, 0)
    with pytest.raises(DataError, match="Expected some target > 0"):
        snips(events, [0, 0, 0])


@pytest.mark.parametrize(
    ("rewards", "propensities", "users", "message"),
    [
        ([], [], None, "Expected at least 1 logged event, found 0."),
        ([1, 2, 3, 4], [1, 1, 1, 0], None, "Expected propensities[3]=0.0 in (0, 1]."),
        ([1, 2], [1, 1.5], None, "Expected propensities[1]=1.5 in (0, 1]."),
        ([1, 2], [math.nan, 1], None, "Expected propensities[0]=nan in (0, 1]."),
        ([1, math.inf], [1, 1], None, "Expected rewards[1]=inf finite."),
        ([1, 2], [1], None, "Expected propensities of shape (2,), not (1,)."),
        ([[1, 2]], [1, 1], None, "Expected rewards of shape (2,), not (1, 2)."),
        ([1, 2], [1, 1], [3], "Expected users of integers, of shape (2,), not int64 of (1,)."),
        ([1, 2], [1, 1], [0.5, 1], "Expected users of integers, of shape (2,), not float64 of (2,)."),
    ],
)
def test_bad_events_are_named(rewards: list, propensities: list, users: list | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        LoggedEvents(rewards, propensities, users)
    assert str(caught.value) == message


EVENT = LoggedEvents(np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ips(EVENT, [0.5, -0.1]), "Expected target[1]=-0.1 in [0, 1]."),
        (lambda: snips(EVENT, [0.5, 1.1]), "Expected target[1]=1.1 in [0, 1]."),
        (lambda: ips(EVENT, 0.5), "Expected target of shape (2,), not ()."),
        (lambda: ips(EVENT, [1, 1], cap=0), "Expected cap=0 > 0."),
        (lambda: snips(EVENT, [1, 1], cap=math.nan), "Expected cap=nan > 0."),
        (lambda: direct_method(EVENT, [1, math.inf]), "Expected expected[1]=inf finite."),
        (lambda: doubly_robust(EVENT, [1, 1], [1, 1], [math.nan, 1]), "Expected predicted[0]=nan finite."),
        (lambda: doubly_robust(EVENT, [1, 1], [1], [1, 1]), "Expected expected of shape (2,), not (1,)."),
        (lambda: inclusion_probability([0.5], 0), "Expected slate_size=0 ≥ 1."),
        (lambda: inclusion_probability([2], 1), "Expected probabilities[0]=2.0 in [0, 1]."),
        (
            lambda: share_of_list([1, 2], [[1, 2]] * 3),
            "Expected lists of integers, of shape (2, 3), not int64 of (3, 2).",
        ),
        (lambda: share_of_list([1, 2], [1, 2]), "Expected lists of integers, of shape (2, 1), not int64 of (2,)."),
        (lambda: share_of_list([0.5], [[1]]), "Expected actions of integers, of shape (1,), not float64 of (1,)."),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value) == message
