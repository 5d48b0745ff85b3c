"""The synthetic population: its histories are sound, its users independent of their number, its truth in its data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.settings import DataSettings
from simulations.datasets import load
from simulations.datasets.interactions import Interactions
from simulations.datasets.synthetic import LONGEST, SHORTEST, Preferences, synthetic


@pytest.fixture(scope="module")
def made() -> tuple[Interactions, Preferences]:
    return synthetic(2000, 300, seed=1)


def logged(data: Interactions, truth: Preferences) -> np.ndarray:
    """(E,) true preference of each interaction."""
    users = np.repeat(np.arange(data.users), data.lengths())
    preferences: np.ndarray = truth.scores(slice(None))[users, data.items]
    return preferences


@settings(max_examples=15)
@given(st.integers(1, 400), st.sampled_from([1, 7, 60, 61, 200]), st.integers(0, 2**40))
def test_histories_are_sound(users: int, items: int, seed: int) -> None:
    data, truth = synthetic(users, items, seed=seed)
    lengths = data.lengths()
    assert (data.users, len(data.catalogue), len(data.user_ids)) == (users, items, users)
    assert lengths.min() >= min(SHORTEST, items)
    assert lengths.max() <= min(LONGEST, items)
    assert data.offsets[-1] == len(data.items) == len(data.ratings) == len(data.timestamps)
    assert all(len(set(data.items[user].tolist())) == user.stop - user.start for user in data.slices())
    assert all((np.diff(data.timestamps[user]) > 0).all() for user in data.slices())
    assert (data.timestamps >= 0).all()
    assert data.items.min() >= 0
    assert data.items.max() < items
    assert set(data.ratings.tolist()) <= {star / 2 for star in range(1, 11)}
    kinds = [data.offsets.dtype, data.items.dtype, data.ratings.dtype, data.timestamps.dtype]
    assert kinds == [np.int64, np.int32, np.float32, np.int64]
    assert len(set(data.catalogue.ids.tolist())) == items
    assert truth.scores(np.array([users - 1, 0])).shape == (2, items)


@pytest.mark.parametrize("users", [1, 256, 257, 700])
def test_a_user_does_not_depend_on_how_many_there_are(users: int, made: tuple[Interactions, Preferences]) -> None:
    many, truth = made
    few, part = synthetic(users, 300, seed=1)
    for name in ("items", "ratings", "timestamps"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[: many.offsets[users]])
    np.testing.assert_array_equal(few.offsets, many.offsets[: users + 1])
    np.testing.assert_array_equal(part.tastes, truth.tastes[:users])
    np.testing.assert_array_equal(part.appeal, truth.appeal)


def test_the_seed_decides() -> None:
    one, again, other = (synthetic(20, 100, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.items, again.items)
    np.testing.assert_array_equal(one.ratings, again.ratings)
    assert one.items.tolist() != other.items.tolist()


def test_lengths_vary_over_their_whole_range(made: tuple[Interactions, Preferences]) -> None:
    assert set(made[0].lengths().tolist()) == set(range(SHORTEST, LONGEST + 1))


def test_preferences_have_the_stated_scale(made: tuple[Interactions, Preferences]) -> None:
    scores = made[1].scores(slice(None))
    assert abs(scores.mean()) < 0.1
    assert 0.8 < scores.var() < 1.2


def test_ratings_rise_with_preference(made: tuple[Interactions, Preferences]) -> None:
    data, truth = made
    preferences = logged(data, truth)
    assert np.corrcoef(data.ratings, preferences)[0, 1] > 0.7
    means = [preferences[data.ratings == star].mean() for star in np.unique(data.ratings)]
    assert (np.diff(means) > 0).all()


def test_the_log_shows_popular_items_more_than_liked_ones(made: tuple[Interactions, Preferences]) -> None:
    data, truth = made
    counts = np.bincount(data.items, minlength=300)
    assert np.corrcoef(np.arange(300), np.log1p(counts))[0, 1] < -0.9  # the catalogue is ordered by popularity
    assert counts[:30].sum() > 0.25 * counts.sum()
    assert abs(np.corrcoef(counts, truth.appeal)[0, 1]) < 0.35
    assert 0 < logged(data, truth).mean() < 0.5
    best = np.sort(truth.scores(slice(0, 100)), axis=1)[:, -10:]
    assert best.mean() > 1.5  # what a perfect recommender would show


@pytest.mark.parametrize(
    ("allowed", "stars"), [((1, 5), range(2, 11)), ((0, 1), range(3)), ((-1.2, 0.4), range(-2, 1)), ((3, 3.4), [6])]
)
def test_ratings_keep_to_the_range(allowed: tuple[float, float], stars: range) -> None:
    assert set(synthetic(100, 50, seed=0, rating_range=allowed)[0].ratings.tolist()) == {star / 2 for star in stars}


def test_a_range_without_a_half_star() -> None:
    with pytest.raises(DataError, match=r"Expected data.rating_range=0.1,0.4 to hold a multiple of 0.5\."):
        synthetic(1, 1, seed=0, rating_range=(0.1, 0.4))


def test_settings() -> None:
    data = load(DataSettings(source="synthetic", users=30, items=0), seed=4)
    assert (data.users, len(data.catalogue)) == (30, 1000)
    np.testing.assert_array_equal(data.items, synthetic(30, 1000, seed=4)[0].items)
    assert load(DataSettings(source="synthetic", items=20), seed=0).users == 1000
