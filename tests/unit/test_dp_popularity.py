"""DP popularity: how far one user moves the histogram, and the noise on it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.catalogue import Catalogue
from common.settings import load_settings
from simulations.datasets.interactions import Interactions
from simulations.dp_popularity import bounded_counts, release_popularity

ITEMS = 6


def interactions(histories: list[list[int]], items: int = ITEMS) -> Interactions:
    lengths, flat = [len(own) for own in histories], [item for own in histories for item in own]
    ids = np.arange(items).astype(np.str_)
    return Interactions(
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        items=np.array(flat, np.int32),
        ratings=np.full(len(flat), 5, np.float32),
        timestamps=np.arange(len(flat)),
        user_ids=np.arange(len(histories)).astype(np.str_),
        catalogue=Catalogue(ids=ids, titles=ids),
    )


def test_a_users_counts_are_scaled_to_the_unit_ball() -> None:
    found = bounded_counts(interactions([[0, 0, 0, 1, 1, 1, 1], [2], []]))
    np.testing.assert_allclose(found, [3 / 5, 4 / 5, 1, 0, 0, 0], rtol=1e-12)


def test_the_histories_stay_as_they_are() -> None:
    histories = interactions([[3, 1, 3, 0], [2, 0, 2]])
    bounded_counts(histories)
    assert histories.items.tolist() == [3, 1, 3, 0, 2, 0, 2]
    assert histories.offsets.tolist() == [0, 4, 7]


@given(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=30), min_size=1, max_size=8), st.data())
def test_one_user_moves_the_sum_by_at_most_1(histories: list[list[int]], data: st.DataObject) -> None:
    """The sensitivity that the release is accounted for, whatever the user has and whoever the others are."""
    leaves = data.draw(st.integers(0, len(histories) - 1))
    others = [own for user, own in enumerate(histories) if user != leaves]
    without = bounded_counts(interactions(others)) if others else np.zeros(ITEMS)
    moved = np.linalg.norm(bounded_counts(interactions(histories)) - without)
    assert moved == pytest.approx(1 if histories[leaves] else 0, abs=1e-9)


def test_the_noise_is_that_of_the_account() -> None:
    """Standard deviation z at C = 1, up to the 1 % by which rounding inflates the sensitivity; ε as asked for."""
    items, users = 4096, 50
    histories = interactions([[0]] * users, items)
    settings = load_settings(None, ["privacy.target_epsilon=1", "training.rounds=7", "privacy.delta=1e-5"])
    release = release_popularity(settings, histories)
    z = release.privacy["noise_multiplier"]
    noise = release.counts - bounded_counts(histories)
    assert np.std(noise) == pytest.approx(1.005 * z, rel=5 / np.sqrt(2 * items))
    assert abs(noise.mean()) < 5 * z / np.sqrt(items)
    assert release.privacy["releases"] == 1
    assert 0.98 < release.privacy["epsilon_model"] <= 1
    assert z == pytest.approx(3.7304, rel=0.01)  # of the analytic Gaussian mechanism (Balle and Wang 2018)


def test_noise_is_drawn_afresh_unless_it_is_asked_to_be_seeded() -> None:
    histories = interactions([[0, 1], [2]])
    settings = load_settings(None, ["privacy.delta=1e-5"])
    one, other = (release_popularity(settings, histories).counts for _ in range(2))
    assert not np.array_equal(one, other)
    seeded = load_settings(None, ["privacy.delta=1e-5", "privacy.randomness=seeded"])
    one, other = (release_popularity(seeded, histories).counts for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_timestamps_and_ratings_play_no_part() -> None:
    histories = interactions([[0, 1], [2]])
    changed = replace(histories, ratings=-histories.ratings, timestamps=histories.timestamps[::-1])
    np.testing.assert_array_equal(bounded_counts(histories), bounded_counts(changed))
