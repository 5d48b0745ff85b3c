"""What is held out, what the history for it is, and that nothing leaks from one into the other."""

from typing import get_args

import numpy as np
import pytest
from handmade import interactions
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from simulations.datasets.interactions import Interactions
from simulations.splits import Kind, Protocol, split

KINDS: tuple[Kind, ...] = get_args(Kind)
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def histories(data: Interactions) -> list[list[int]]:
    return [data.items[user].tolist() for user in data.slices()]


def test_leave_last_out() -> None:
    cut = split(interactions([[0, 1, 2, 3], [4, 5], [], [6, 6, 6]], items=7), "leave-last-out")
    assert histories(cut.train) == [[0, 1], [4, 5], [], [6]]
    assert histories(cut.history("validation")) == [[0, 1], [4, 5], [], [6]]
    assert histories(cut.history("test")) == [[0, 1, 2], [4, 5], [], [6, 6]]
    assert cut.targets("validation").users.tolist() == cut.targets("test").users.tolist() == [0, 3]
    assert cut.targets("validation").items.tolist() == [2, 6]
    assert cut.targets("test").items.tolist() == [3, 6]
    assert cut.left_out == 2
    assert cut.notes == ("2 of 4 users have fewer than 3 interactions: they train and are not evaluated.",)


def test_nothing_to_say_if_everybody_is_evaluated() -> None:
    cut = split(interactions([[0, 1, 2]], items=3), "leave-last-out")
    assert cut.left_out == 0
    assert cut.notes == ()


def test_time_split() -> None:
    # Twenty interactions at moments 0 to 19: validation from moment 16 on, test from moment 18 on.
    data = interactions(
        [list(range(13)), [13, 14, 15, 16], [17, 18], [19]],
        items=20,
        times=[[*range(10), 16, 18, 19], [10, 11, 12, 17], [13, 14], [15]],
    )
    cut = split(data, "time-split")
    assert histories(cut.train) == [list(range(10)), [13, 14, 15], [17, 18], [19]]
    assert cut.validation.users.tolist() == [0, 1]
    assert cut.validation.items.tolist() == [10, 16]
    assert histories(cut.history("test")) == [list(range(11)), [13, 14, 15, 16], [17, 18], [19]]
    assert cut.test.users.tolist() == [0]
    assert cut.test.items.tolist() == [11]
    assert cut.left_out == 3
    assert cut.notes[0].startswith("3 of 4 users have no interaction before or none after")


def test_time_split_needs_a_history_before_the_target() -> None:
    # Validation from moment 15 on, test from moment 17 on: only the first user starts before the validation.
    data = interactions([[0] * 16, [1, 1], [2, 2]], items=3, times=[range(16), [16, 17], [15, 18]])
    cut = split(data, "time-split")
    assert histories(cut.train) == [[0] * 15, [], []]
    assert cut.validation.users.tolist() == [0]
    assert cut.test.users.tolist() == [1, 2]
    assert histories(cut.history("test"))[1:] == [[1], [2]]


def moments(data: Interactions) -> list[int]:
    times: list[int] = data.timestamps[data.places(np.arange(data.users))].tolist()
    return times


def test_a_history_is_a_view() -> None:
    """However many interactions there are, none is copied."""
    data = interactions([[0, 1, 2, 3], [4, 5, 6]], items=7, times=[[5, 6, 7, 8], [1, 2, 3]])
    history = split(data, "leave-last-out").history("test")
    assert moments(history) == [5, 6, 7, 1, 2]
    assert history.counts().tolist() == [1, 1, 1, 0, 1, 1, 0]
    for name in ("offsets", "items", "ratings", "timestamps", "user_ids", "catalogue"):
        assert getattr(history, name) is getattr(data, name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("population", [[], [[]], [[0], [1, 0], []]])
def test_nobody_to_evaluate(protocol: Protocol, population: list[list[int]]) -> None:
    with pytest.raises(DataError, match=f"to evaluate by {protocol}, found none among {len(population)} users"):
        split(interactions(population, items=2, times=[[7] * len(user) for user in population]), protocol)


@given(
    st.lists(st.lists(st.integers(0, 30), max_size=8).map(sorted), min_size=1, max_size=8), st.sampled_from(PROTOCOLS)
)
def test_no_leakage(times: list[list[int]], protocol: Protocol) -> None:
    # Every interaction is an item of its own, so that items say where each interaction went.
    items = iter(range(64))
    data = interactions([[next(items) for _ in user] for user in times], items=64, times=times)
    try:
        cut = split(data, protocol)
    except DataError:
        return

    whole = histories(data)
    for kind in KINDS:
        before = histories(cut.history(kind))
        targets = cut.targets(kind)
        assert (np.diff(targets.users) > 0).all()
        for user, item in zip(targets.users, targets.items, strict=True):
            position = whole[user].index(item)
            assert position > 0
            assert before[user] == whole[user][:position]
    trained = histories(cut.train)
    assert all(train == user[: len(train)] for train, user in zip(trained, whole, strict=True))
    if protocol == "leave-last-out":
        for user, validation, test in zip(cut.test.users, cut.validation.items, cut.test.items, strict=True):
            assert [*trained[user], validation, test] == whole[user]
        assert sum(map(len, trained)) == sum(map(len, whole)) - 2 * len(cut.test.users)
    else:
        held_out = {int(data.timestamps[item]) for item in cut.validation.items}
        tested = {int(data.timestamps[item]) for item in cut.test.items}
        assert max(moments(cut.train)) < min(held_out) <= max(held_out) < min(tested)
        assert max(moments(cut.history("test"))) < min(tested)


def test_a_limited_split_keeps_everything_but_the_targets_it_does_not_draw() -> None:
    whole = split(interactions([[0, 1, 2, 3]] * 50, items=4), "leave-last-out")
    few = whole.limited(7, seed=1)
    assert len(few.test.users) == len(few.validation.users) == 7
    assert set(few.test.users) <= set(whole.test.users) and (np.diff(few.test.users) > 0).all()
    assert np.array_equal(few.test.items, whole.test.items[few.test.users])
    assert few.train is whole.train and "7 of the 50 test users" in few.notes[-1]
    assert np.array_equal(whole.limited(7, seed=1).test.users, few.test.users)
    assert not np.array_equal(whole.limited(7, seed=2).test.users, few.test.users)
    for most in (0, 50, 1000):
        assert whole.limited(most, seed=1).notes == whole.notes
        assert np.array_equal(whole.limited(most, seed=1).test.users, whole.test.users)
