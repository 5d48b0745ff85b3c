"""The world: fitted to what was planted, of the asked-for shape; its choices and values hold against enumeration."""

from itertools import product

import numpy as np
import pytest
from handmade import interactions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.catalogue import Catalogue
from common.errors import DataError, SettingsError
from simulations.datasets.interactions import Interactions
from simulations.datasets.synthetic import synthetic
from simulations.environment import World, choose, fit_world, lowest, slate_value

PROBABILITIES = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 4)), elements=st.floats(0, 1))


@pytest.fixture(scope="module")
def data() -> Interactions:
    return synthetic(400, 300, seed=3)[0]


@pytest.fixture(scope="module")
def world(data: Interactions) -> World:
    return fit_world(data, 2000, 250, seed=0)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


# The choice model


@given(PROBABILITIES)
def test_slate_values_are_those_of_the_enumerated_outcomes(likes: np.ndarray) -> None:
    value = slate_value(likes)
    for row, first, mean, consumed in zip(likes, *value, strict=True):
        outcomes = {
            liked: np.prod([p if yes else 1 - p for p, yes in zip(row, liked, strict=True)])
            for liked in product([False, True], repeat=len(row))
        }
        assert first == pytest.approx(sum(chance for liked, chance in outcomes.items() if liked[0]))
        assert mean == pytest.approx(sum(chance * np.mean(liked) for liked, chance in outcomes.items()))
        assert consumed == pytest.approx(sum(chance for liked, chance in outcomes.items() if any(liked)))


def test_users_consume_the_first_item_that_they_like() -> None:
    row = np.array([0.3, 0.0, 0.5, 0.8])
    positions = choose(np.tile(row, (40_000, 1)), np.random.default_rng(0))
    expected = {-1: 0.7 * 0.5 * 0.2, 0: 0.3, 1: 0.0, 2: 0.7 * 0.5, 3: 0.7 * 0.5 * 0.8}
    for position, chance in expected.items():
        assert (positions == position).mean() == pytest.approx(chance, abs=4 * np.sqrt(chance / 40_000))
    certain = choose(np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), np.random.default_rng(0))
    np.testing.assert_array_equal(certain, [0, 1, -1])


@given(hnp.arrays(np.float64, (3, 7), elements=st.integers(0, 4).map(float)), st.integers(1, 7))
def test_lowest(scores: np.ndarray, size: int) -> None:
    columns = lowest(scores, size)
    np.testing.assert_array_equal(np.take_along_axis(scores, columns, 1), np.sort(scores, axis=1)[:, :size])
    assert all(len(set(row)) == size for row in columns.tolist())


# The world's shape


@pytest.mark.parametrize(
    ("share", "rate", "users", "items"), [(0.7, 0.2, 2000, 250), (0.0, 0.5, 300, 40), (1.0, 0.05, 2000, 800)]
)
def test_preferences_are_as_asked(data: Interactions, share: float, rate: float, users: int, items: int) -> None:
    world = fit_world(data, users, items, seed=1, personal_share=share, base_rate=rate)
    assert (world.users, world.items) == (users, items)
    assert world.likes(slice(0, 7)).dtype == np.float32
    assert abs(world.likes(slice(None)).mean() - rate) < 0.03 * rate
    preferences = world.preferences(slice(None))
    assert abs(preferences.mean()) < 0.05
    assert abs(preferences.var() - 1) < 0.07
    assert abs(preferences.var(axis=0).mean() - share) < 0.07  # over users: what is personal
    assert abs(world.appeal.var() - (1 - share)) < 1e-4
    assert (np.diff(world.popularity) <= 0).all()


def test_a_flat_world_is_the_base_rate_everywhere(data: Interactions) -> None:
    likes = fit_world(data, 3, 5, seed=0, scale=0, base_rate=0.3).likes(slice(None))
    np.testing.assert_allclose(likes, 0.3, rtol=1e-6)


@pytest.mark.parametrize("users", [1, 256, 257, 700])
def test_a_user_does_not_depend_on_how_many_there_are(data: Interactions, world: World, users: int) -> None:
    few = fit_world(data, users, 250, seed=0)
    np.testing.assert_array_equal(few.tastes, world.tastes[:users])
    np.testing.assert_allclose(few.likes(slice(None)), world.likes(slice(0, users)), rtol=1e-5)


def test_no_two_users_coincide_and_the_seed_decides(data: Interactions, world: World) -> None:
    assert len(np.unique(world.tastes[:, 0], axis=0)) == world.users
    other = fit_world(data, 20, 250, seed=1)
    assert not np.isclose(other.tastes, world.tastes[:20]).any()


def test_users_by_index_mask_or_slice(world: World) -> None:
    index, mask = np.array([2, 5]), np.isin(np.arange(world.users), [2, 5])
    np.testing.assert_array_equal(world.likes(index), world.likes(mask))
    np.testing.assert_array_equal(world.likes(index), world.likes(slice(2, 6, 3)))


def test_likes_of_picks_from_likes(world: World) -> None:
    users, items = np.array([3, 1]), np.array([[0, 7, 9], [249, 0, 1]])
    full = world.likes(users)
    np.testing.assert_allclose(world.likes_of(users, items), np.take_along_axis(full, items, 1), rtol=1e-5)
    np.testing.assert_allclose(world.likes_of(users, items[0]), full[:, items[0]], rtol=1e-5)


def test_nothing_beats_the_best(world: World) -> None:
    users = slice(0, 100)
    likes = world.likes(users)
    best = np.take_along_axis(likes, world.best_slates(users, 10), 1)
    np.testing.assert_allclose(best, -np.sort(-likes, axis=1)[:, :10], rtol=1e-5)
    mean = world.likes(slice(None)).mean(axis=0)
    np.testing.assert_allclose(world.mean_likes(), mean, rtol=1e-4)
    np.testing.assert_array_equal(world.best_ranking(10), np.argsort(-mean)[:10])
    popular, ranking = (world.likes_of(users, items).mean() for items in (np.arange(10), world.best_ranking(10)))
    assert likes.mean() < ranking < best.mean()
    assert popular < ranking


@pytest.mark.parametrize("link", [-1.0, -0.5, 0.0, 0.6, 1.0])
def test_popularity_is_linked_to_appeal_as_asked(data: Interactions, link: float) -> None:
    world = fit_world(data, 1, 250, seed=0, popularity_link=link)
    kept = fit_world(data, 1, 250, seed=0, popularity_link=None)
    assert abs(correlation(world.popularity, world.appeal) - link) < 0.15
    np.testing.assert_array_equal(np.sort(world.popularity), np.sort(kept.popularity))


def test_popularity_is_the_data_sets_own(data: Interactions) -> None:
    world = fit_world(data, 1, 250, seed=0, popularity_link=None)
    counts = -np.sort(-np.bincount(data.items))[:250]
    np.testing.assert_allclose(world.popularity, np.log(counts), rtol=1e-6)


# Drift


def test_tastes_without_drift_stay(world: World) -> None:
    np.testing.assert_array_equal(world.likes(slice(0, 5)), world.likes(slice(0, 5), time=1000.0))


def test_drifting_tastes_keep_their_distribution_and_forget(data: Interactions, world: World) -> None:
    drifting = fit_world(data, 2000, 250, seed=0, drift=0.5)
    start = drifting.tastes_at(slice(None))
    np.testing.assert_array_equal(start, world.tastes_at(slice(None)))
    for time in (0.2, 1.0, 2.0, 10.0):
        tastes = drifting.tastes_at(slice(None), time)
        assert abs(tastes.mean()) < 0.02
        assert abs(tastes.var() - 1) < 0.03
        assert abs(drifting.likes(slice(None), time).mean() - 0.2) < 0.01
        assert abs((tastes * start).mean() - np.exp(-0.5 * time)) < 0.03
    np.testing.assert_array_equal(drifting.tastes_at(np.array([7]), 3.0)[0], drifting.tastes_at(slice(None), 3.0)[7])
    two = drifting.likes_of(np.array([7]), np.array([3, 4]), 3.0)
    np.testing.assert_allclose(two, drifting.likes(slice(7, 8), 3.0)[:, 3:5], rtol=1e-5)


# The fit


def planted(users: int, items: int, each: int, mean_taste: float = 0.0) -> tuple[Interactions, np.ndarray, np.ndarray]:
    """Ratings of two factors and an appeal with a little noise; (A,) appeal and (A, 2) characters."""
    generator = np.random.default_rng(0)
    tastes, characters = mean_taste + generator.standard_normal((users, 2)), generator.standard_normal((items, 2))
    appeal = 0.7 * generator.standard_normal(items)
    shown = np.sort(np.argsort(generator.random((users, items)), axis=1)[:, :each], axis=1)
    ratings = appeal[shown] + np.einsum("uf,ukf->uk", tastes, characters[shown])
    ratings += 0.3 * generator.standard_normal(shown.shape)
    ids = np.arange(items).astype(np.str_)
    made = Interactions(
        offsets=np.arange(0, users * each + 1, each),
        items=shown.ravel().astype(np.int32),
        ratings=ratings.ravel().astype(np.float32),
        timestamps=np.tile(np.arange(each), users),
        user_ids=np.arange(users).astype(np.str_),
        catalogue=Catalogue(ids, ids),
    )
    return made, appeal, characters


def test_a_planted_world_is_recovered() -> None:
    made, appeal, characters = planted(500, 80, 40)
    world = fit_world(made, 1000, 80, seed=0, popularity_link=None)
    order = np.argsort(-np.bincount(made.items), kind="stable")
    assert correlation(world.appeal, appeal[order]) > 0.97
    directions = characters[order] / np.linalg.norm(characters[order], axis=1, keepdims=True)
    found = world.characters / np.sqrt(0.7)
    assert correlation(found @ found.T, directions @ directions.T) > 0.9
    spectrum = np.linalg.eigvalsh(np.cov(world.preferences(slice(None)).T))[::-1]
    assert spectrum[:2].sum() > 0.9 * spectrum.sum()


def test_what_all_tastes_share_is_appeal() -> None:
    made, appeal, characters = planted(500, 80, 40, mean_taste=1.0)
    world = fit_world(made, 5, 80, seed=0, popularity_link=None)
    order = np.argsort(-np.bincount(made.items), kind="stable")
    assert correlation(world.appeal, (appeal + characters.sum(axis=1))[order]) > 0.99


def test_more_items_than_the_data_set_has() -> None:
    made, _, _ = planted(300, 40, 20)
    world = fit_world(made, 10, 200, seed=0)
    assert len(np.unique(world.characters, axis=0)) == 200
    assert world.popularity.max() < np.log(made.users) + 2


def test_items_that_never_occur_are_not_fitted_and_pairs_may_repeat() -> None:
    made = interactions([[4, 4, 2], [2, 0]], items=6)
    made.ratings[:] = [1, 2, 3, 4, 5]
    world = fit_world(made, 4, 9, seed=0, popularity_link=None)
    assert np.isfinite(world.likes(slice(None))).all()
    one = fit_world(made, 1, 1, seed=0)
    assert one.likes(slice(None)).shape == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"users": 0}, "users=0 ≥ 1"),
        ({"items": 0}, "items=0 ≥ 1"),
        ({"personal_share": 1.5}, r"personal_share=1.5 in \[0, 1\]"),
        ({"base_rate": 0}, r"base_rate=0 in \(0, 1\)"),
        ({"scale": -1}, "scale=-1 ≥ 0"),
        ({"drift": float("nan")}, "drift=nan ≥ 0"),
        ({"popularity_link": -2}, r"popularity_link=-2 in \[-1, 1\]"),
    ],
)
def test_bad_arguments(data: Interactions, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"^Expected {message}\.$"):
        fit_world(data, **{"users": 5, "items": 5, "seed": 0} | arguments)  # type: ignore[arg-type]


def test_slates_longer_than_the_catalogue(world: World) -> None:
    with pytest.raises(SettingsError, match=r"^Expected size=251 in \[1, 250\]\.$"):
        world.best_ranking(251)


def test_ratings_that_say_nothing() -> None:
    with pytest.raises(DataError, match="Expected different ratings to fit a world to, got 3 that do not differ"):
        fit_world(interactions([[0, 1], [2]], items=3), 5, 5, seed=0)
    with pytest.raises(DataError, match="got 0"):
        fit_world(interactions([[]], items=3), 5, 5, seed=0)
