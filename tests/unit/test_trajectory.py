"""Rewards, windows and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from common.trajectory import Trajectories, pad, rewards_of, window_starts

quick = settings(max_examples=60, deadline=None)
CHANCE = 1e-3


def starts(seed: int = 0, round_: int = 0, devices: int = 2000, length: int = 100, window: int = 10) -> np.ndarray:
    return window_starts(seed, round_, np.arange(devices), np.full(devices, length), window)


def lists(trajectories: Trajectories) -> list[list[list[float]]]:
    return [values.tolist() for values in (trajectories.items, trajectories.rewards, trajectories.returns)]


@quick
@given(st.floats(-100, 100), st.floats(0.01, 100))
def test_rating_range_maps_onto_minus_five_to_five(low: float, width: float) -> None:
    ends = rewards_of(np.array([low, low + width, low + width / 2]), (low, low + width))
    assert ends.dtype == np.float32
    assert ends == pytest.approx([-5, 5, 0], abs=1e-5)


def test_half_stars_map_as_declared() -> None:
    ratings = np.arange(0.5, 5.5, 0.5)
    assert rewards_of(ratings, (0.5, 5.0)) == pytest.approx(5 * (ratings - 2.75) / 2.25, abs=1e-6)


def test_equal_ratings_have_equal_rewards_in_every_shape() -> None:
    assert rewards_of(np.full((2, 3), 4, np.float32), (1, 5)).tolist() == [[2.5] * 3] * 2
    assert rewards_of(np.empty(0), (1, 5)).shape == (0,)


@pytest.mark.parametrize("places", [1, 2, 7, 91])
def test_windows_are_uniform_over_the_places_where_they_fit(places: int) -> None:
    window = 10
    drawn = starts(seed=3, round_=5, devices=20_000, length=window + places - 1, window=window)
    counts = np.bincount(drawn, minlength=places)
    assert len(counts) == places
    assert chisquare(counts).pvalue > CHANCE if places > 1 else counts[0] == 20_000


@pytest.mark.parametrize("length", [0, 1, 9, 10])
def test_short_history_is_its_own_window(length: int) -> None:
    assert not starts(length=length, window=10).any()


@quick
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 3000)), min_size=1, max_size=20),
    st.integers(1, 300),
)
def test_window_fits_and_a_device_draws_it_alone(
    seed: int, round_: int, population: list[tuple[int, int]], window: int
) -> None:
    devices, lengths = (np.array(column, dtype=np.int64) for column in zip(*population, strict=True))
    batch = window_starts(seed, round_, devices, lengths, window)
    assert ((batch >= 0) & (batch + np.minimum(window, lengths) <= lengths)).all()
    alone = [
        window_starts(seed, round_, devices[at : at + 1], lengths[at : at + 1], window)[0] for at in range(len(devices))
    ]
    assert batch.tolist() == alone


def test_rounds_devices_and_seeds_draw_independently() -> None:
    base = starts(length=13, devices=20_000)
    others = (starts(length=13, devices=20_000, round_=1), starts(length=13, devices=20_000, seed=1), np.roll(base, 1))
    for other in others:
        table = np.zeros((4, 4))
        np.add.at(table, (base, other), 1)
        assert chi2_contingency(table).pvalue > CHANCE


def test_same_seed_and_round_draw_the_same() -> None:
    assert (starts(seed=4, round_=2) == starts(seed=4, round_=2)).all()


def test_another_seed_is_not_the_same_rounds_in_another_order() -> None:
    mine, other = ({tuple(starts(seed, round_, devices=20)) for round_ in range(4)} for seed in (0, 1))
    assert not mine & other


histories = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6)


@quick
@given(histories, st.sampled_from([0, 0.25, 0.5, 0.75, 0.99]))
def test_pad_equals_a_slow_loop(users: list[list[int]], support_fraction: float) -> None:
    flat = np.array([item for user in users for item in user], dtype=np.int32)
    lengths = np.array([len(user) for user in users])
    first = np.cumsum(lengths) - lengths
    batch = pad(flat, flat / 2, flat / 4, first, lengths, support_fraction)

    steps = max([1, *map(len, users)])
    expected = [[float(item) for item in user] + [0.0] * (steps - len(user)) for user in users]
    assert lists(batch) == [[[item / share for item in row] for row in expected] for share in (1, 2, 4)]
    assert batch.lengths.tolist() == [len(user) for user in users]
    assert batch.support.tolist() == [int(len(user) * support_fraction) for user in users]
    assert len(batch) == len(users)
    assert [values.dtype for values in (batch.items, batch.rewards, batch.returns)] == [
        torch.int64,
        torch.float32,
        torch.float32,
    ]


def test_pad_reads_only_the_stretches() -> None:
    values = np.arange(100)
    batch = pad(values, values, values, np.array([97, 10]), np.array([3, 1]), support_fraction=0.5)
    assert batch.items.tolist() == [[97, 98, 99], [10, 0, 0]]
    assert batch.support.tolist() == [1, 0]


def test_devices_without_a_history_are_padding_alone() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    batch = pad(nothing, nothing, nothing, np.zeros(2, np.int64), np.zeros(2, np.int64), support_fraction=0.25)
    assert lists(batch) == [[[0], [0]]] * 3
    assert batch.lengths.tolist() == batch.support.tolist() == [0, 0]


def test_empty_batch_is_a_batch() -> None:
    values, nothing = np.arange(5), np.zeros(0, dtype=np.int64)
    assert len(pad(values, values, values, nothing, nothing, support_fraction=0.25)) == 0


@pytest.mark.parametrize("support_fraction", [0.25, 0.5, 0.58, 0.9])
def test_some_of_every_history_is_left_for_the_update(support_fraction: float) -> None:
    lengths = np.arange(1, 200)
    batch = pad(np.arange(200), np.zeros(200), np.zeros(200), np.zeros(199, np.int64), lengths, support_fraction)
    assert (batch.lengths - batch.support >= 1).all()
    assert (batch.support.numpy() <= support_fraction * lengths + 1e-9).all()
