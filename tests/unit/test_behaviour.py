"""Logging policies: their propensities are exact, their logs obey them, and estimators that use them are unbiased."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from common.errors import SettingsError
from simulations.behaviour import (
    LIKED,
    NOT_LIKED,
    Division,
    Log,
    Mixture,
    Policy,
    Softmax,
    divide,
    log_events,
    popular,
    skewed,
    uniform,
)
from simulations.datasets.synthetic import synthetic
from simulations.environment import World, fit_world

ITEMS = 40


@pytest.fixture(scope="module")
def world() -> World:
    return fit_world(synthetic(300, 60, seed=3)[0], 600, ITEMS, seed=0)


@pytest.fixture(scope="module", params=["uniform", "popular", "skewed", "mixture", "division"])
def policy(request: pytest.FixtureRequest, world: World) -> Policy:
    both = [uniform(world), skewed(world, preference=2.0, epsilon=0.1)]
    policies: dict[str, Policy] = {
        "uniform": uniform(world),
        "popular": popular(world, 1.5),
        "skewed": skewed(world),
        "mixture": Mixture(both, [0.4, 0.6]),
        "division": divide(world, both, [0.4, 0.6], seed=0),
    }
    return policies[request.param]


def users_of(log: Log) -> np.ndarray:
    """(E,) whose event each is."""
    return np.repeat(np.arange(log.interactions.users), log.interactions.lengths())


def fixed(*rows: list[float]) -> Softmax:
    """A policy with these probabilities, a row per user."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(rows, np.float32))
    return Softmax(lambda users, _: logits[users])


def tiny(users: int, items: int) -> World:
    return fit_world(synthetic(30, 20, seed=0)[0], users, items, seed=0, base_rate=0.4)


# Policies


def test_probabilities_are_positive_and_sum_to_one(world: World, policy: Policy) -> None:
    shares = policy.probabilities(np.array([5, 0, 599]), 0.0)
    assert shares.shape == (3, ITEMS)
    assert shares.dtype == np.float32
    assert (shares > 0).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(policy.probabilities(np.array([599]), 0.0)[0], shares[2], rtol=1e-5)


def test_what_the_policies_show(world: World) -> None:
    users = np.arange(50)
    np.testing.assert_allclose(uniform(world).probabilities(users, 0.0), 1 / ITEMS, rtol=1e-6)
    counts = np.exp(world.popularity)
    np.testing.assert_allclose(popular(world).probabilities(users, 0.0)[7], counts / counts.sum(), rtol=1e-5)
    weights = counts**0.5 * np.exp(2 * world.preferences(users))
    expected = 0.9 * weights / weights.sum(axis=1, keepdims=True) + 0.1 / ITEMS
    np.testing.assert_allclose(skewed(world, 0.5, 2.0, 0.1).probabilities(users, 0.0), expected, rtol=1e-4)


def test_scores_may_be_large_and_forbid_items() -> None:
    shares = Softmax(lambda users, _: np.array([[1e4, 1e4, -np.inf]])).probabilities(np.array([0]), 0.0)
    np.testing.assert_array_equal(shares, [[0.5, 0.5, 0]])


def test_a_mixture_is_the_weighted_sum_and_a_division_one_of_them(world: World) -> None:
    users = np.array([4, 2, 3])
    parts = [uniform(world), popular(world, 2.0)]
    one, other = (part.probabilities(users, 0.0) for part in parts)
    np.testing.assert_allclose(Mixture(parts, [0.25, 0.75]).probabilities(users, 0.0), 0.25 * one + 0.75 * other)
    divided = Division(parts, np.array([0, 0, 1, 0, 1])).probabilities(users, 0.0)
    np.testing.assert_array_equal(divided, np.stack([other[0], other[1], one[2]]))


def test_a_division_follows_its_weights_and_not_the_number_of_users(world: World) -> None:
    parts = [uniform(world), popular(world), skewed(world)]
    divided = divide(world, parts, [0.2, 0.0, 0.8], seed=1).parts
    assert set(divided.tolist()) == {0, 2}
    assert abs((divided == 0).mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / world.users)
    np.testing.assert_array_equal(divide(tiny(20, 5), parts, [0.2, 0.0, 0.8], seed=1).parts, divided[:20])


# Logs


def test_logs_are_sound(world: World, policy: Policy) -> None:
    lengths = np.arange(world.users) % 7
    log = log_events(world, policy, lengths, seed=2)
    data = log.interactions
    np.testing.assert_array_equal(data.lengths(), lengths)
    assert len(data.items) == len(data.ratings) == len(data.timestamps) == len(log.propensities) == lengths.sum()
    assert set(data.ratings.tolist()) == {LIKED, NOT_LIKED}
    assert len(data.catalogue) == ITEMS
    kinds = [data.offsets.dtype, data.items.dtype, data.ratings.dtype, data.timestamps.dtype, log.propensities.dtype]
    assert kinds == [np.int64, np.int32, np.float32, np.int64, np.float32]
    assert all((np.diff(data.timestamps[user]) > 0).all() for user in data.slices())
    shares = policy.probabilities(np.arange(world.users), 0.0)
    np.testing.assert_allclose(log.propensities, shares[users_of(log), data.items], rtol=1e-5)


def test_logged_frequencies_match_the_propensities(world: World, policy: Policy) -> None:
    users = np.arange(world.users)
    items = log_events(world, policy, 50, seed=3).interactions.items
    counts = np.bincount(items, minlength=ITEMS)
    expected = 50 * policy.probabilities(users, 0.0).sum(axis=0, dtype=np.float64)
    # Users differ, so that the counts vary less than the multinomial's: the test errs towards passing.
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_one_users_frequencies_match_hers() -> None:
    rows = [[0.5, 0.25, 0.25, 0.0], [0.01, 0.01, 0.08, 0.9]]
    log = log_events(tiny(2, 4), fixed(*rows), 20_000, seed=0)
    for user, row in zip(log.interactions.slices(), rows, strict=True):
        counts = np.bincount(log.interactions.items[user], minlength=4)
        seen = np.array(row) > 0
        assert counts[~seen].sum() == 0
        assert stats.chisquare(counts[seen], 20_000 * np.array(row)[seen]).pvalue > 1e-3


def test_likes_follow_the_world() -> None:
    world = tiny(2, 4)
    log = log_events(world, uniform(world), 20_000, seed=1)
    likes = world.likes(slice(None))
    users = users_of(log)
    for user in range(2):
        for item in range(4):
            liked = log.liked[(users == user) & (log.interactions.items == item)]
            chance = likes[user, item]
            assert abs(liked.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / len(liked))


def test_weighting_by_propensities_recovers_another_policys_value(world: World, policy: Policy) -> None:
    log = log_events(world, policy, 100, seed=7)
    users = users_of(log)
    likes = world.likes(slice(None)).astype(np.float64)
    for target in (uniform(world), skewed(world, 0.0, 0.5, 0.2)):
        shares = target.probabilities(np.arange(world.users), 0.0).astype(np.float64)
        terms = shares[users, log.interactions.items] / log.propensities * log.liked
        error = terms.std() / np.sqrt(len(terms))
        assert abs(terms.mean() - (shares * likes).sum(axis=1).mean()) < 4 * error


@pytest.mark.parametrize("slate_size", [1, 3])
def test_a_users_log_depends_on_neither_the_others_nor_its_length(slate_size: int) -> None:
    few, many = tiny(3, 10), tiny(600, 10)
    short = log_events(few, skewed(few), 4, seed=5, slate_size=slate_size)
    long = log_events(many, skewed(many), 9, seed=5, slate_size=slate_size)
    for one, other in zip(short.interactions.slices(), long.interactions.slices(), strict=False):
        matching = slice(other.start, other.start + one.stop - one.start)
        np.testing.assert_array_equal(short.interactions.items[one], long.interactions.items[matching])
        np.testing.assert_array_equal(short.liked[one], long.liked[matching])
        np.testing.assert_array_equal(short.interactions.timestamps[one], long.interactions.timestamps[matching])
    other_seed = log_events(few, skewed(few), 4, seed=6, slate_size=slate_size)
    assert other_seed.interactions.items.tolist() != short.interactions.items.tolist()


def test_nobody_is_shown_anything() -> None:
    world = tiny(3, 4)
    log = log_events(world, uniform(world), 0, seed=0)
    assert len(log.interactions.items) == 0
    np.testing.assert_array_equal(log.interactions.offsets, np.zeros(4))


def test_tastes_drift_within_a_log() -> None:
    world = fit_world(synthetic(300, 60, seed=3)[0], 400, 30, seed=0, drift=0.1)
    keen = Softmax(lambda users, time: 4 * world.preferences(users, time))
    log = log_events(world, keen, 5, seed=0, start=3.0, pace=20.0)
    users, step = users_of(log), np.tile(np.arange(5), world.users)
    for at in range(5):
        chosen = step == at
        shares = keen.probabilities(np.arange(world.users), 3.0 + 20.0 * at)
        rows = users[chosen], log.interactions.items[chosen]
        np.testing.assert_allclose(log.propensities[chosen], shares[rows], rtol=1e-4)
        likes = world.likes(slice(None), 3.0 + 20.0 * at)[rows]
        assert abs(log.liked[chosen].mean() - likes.mean()) < 4 * likes.std() / 20 + 0.08
    days = (log.interactions.timestamps - 1_500_000_000) / 86_400
    np.testing.assert_allclose(days, 3.0 + 20.0 * step, atol=1e-3)


# Slates


def test_slates_are_drawn_one_after_the_other() -> None:
    shares = np.array([0.6, 0.25, 0.1, 0.05])
    world = fit_world(synthetic(30, 20, seed=0)[0], 1, 4, seed=0, scale=0, base_rate=1e-6)  # looks at all, likes none
    log = log_events(world, fixed(shares.tolist()), 8_000, seed=0, slate_size=3)
    assert not log.liked.any()
    slates, propensities = log.interactions.items.reshape(-1, 3), log.propensities.reshape(-1, 3)
    expected = {}
    for order in permutations(range(4), 3):
        left = 1 - np.cumsum(shares[list(order)]) + shares[list(order)]
        conditional = shares[list(order)] / left
        rows = (slates == order).all(axis=1)
        np.testing.assert_allclose(propensities[rows], np.tile(conditional, (rows.sum(), 1)), rtol=1e-5)
        expected[order] = (rows.sum(), conditional.prod())
    counts, chances = zip(*expected.values(), strict=True)
    assert sum(counts) == 8_000
    assert stats.chisquare(counts, 8_000 * np.array(chances)).pvalue > 1e-3


def test_users_look_until_they_like() -> None:
    world = tiny(50, 10)
    log = log_events(world, uniform(world), 200, seed=0, slate_size=4)
    ends = np.flatnonzero(log.liked)
    assert (log.interactions.lengths() <= 800).all()
    np.testing.assert_allclose(log.propensities[ends[:-1] + 1], 0.1, rtol=1e-5)  # whatever follows opens a slate
    opening = np.isclose(log.propensities, 0.1)
    assert opening.sum() == 50 * 200
    likes = world.likes(slice(None))
    chance = likes[users_of(log), log.interactions.items]
    assert abs(log.liked.mean() - chance.mean()) < 4 * 0.5 / np.sqrt(len(chance))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": -1}, "lengths=-1 ≥ 0"),
        ({"slate_size": 5}, r"slate_size=5 in \[1, 4\]"),
        ({"slate_size": 0}, r"slate_size=0 in \[1, 4\]"),
        ({"pace": -0.5}, "pace=-0.5 ≥ 0"),
    ],
)
def test_bad_logs(arguments: dict[str, float], message: str) -> None:
    world = tiny(2, 4)
    with pytest.raises(SettingsError, match=rf"^Expected {message}\.$"):
        log_events(world, uniform(world), **{"lengths": 1, "seed": 0} | arguments)  # type: ignore[arg-type]


def test_bad_policies(world: World) -> None:
    with pytest.raises(SettingsError, match=r"^Expected epsilon=1.5 in \[0, 1\]\.$"):
        skewed(world, epsilon=1.5)
    for weights in ([1.0], [0.5, 0.4], [1.5, -0.5], []):
        with pytest.raises(SettingsError, match=r"^Expected weights=\[.*\] to be 2 numbers ≥ 0 of sum 1\.$"):
            Mixture([uniform(world), popular(world)], weights)
