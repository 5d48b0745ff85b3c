"""Commands to a run: given once, answered once, and obeyed between two rounds."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import Aborted, Conflict
from server.controls import CONFIRMED, Action, Controls, read_commands, request
from server.events import Events
from server.store import Store, open_store, open_store_read_only


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as store:
        yield store


def controls_of(store: Store) -> Controls:
    return Controls(store, Events(store, lambda: 5.0), lambda: 7.0, lambda seconds: None)


def never() -> bool:
    return False


def answers(store: Store) -> list[str | None]:
    return [command.answer for command in read_commands(store)]


def test_nothing_asked_goes_on(store: Store) -> None:
    assert controls_of(store).between_rounds(3, never) is None
    assert controls_of(store).between_rounds(3, lambda: True) == "stopped"


@pytest.mark.parametrize(("action", "end"), [("stop", "stopped"), ("abort", "aborted")])
def test_ends(store: Store, tmp_path: Path, action: Action, end: str) -> None:
    assert request(tmp_path, action, 0, "test", lambda: 1.0) == 1
    assert controls_of(store).between_rounds(3, never) == end
    (command,) = read_commands(store)
    assert (command.answer, command.answered_at, command.time) == (CONFIRMED, 7.0, 1.0)
    (event,) = Events(store, lambda: 0.0).read(kinds=["command"])
    assert event.round == 3 and event.fields["action"] == action and event.fields["origin"] == "test"


def test_pause_waits_for_resume(store: Store, tmp_path: Path) -> None:
    request(tmp_path, "pause", 0, "test")
    naps = 0

    def nap(seconds: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 3:
            assert answers(store) == [CONFIRMED]
            request(tmp_path, "resume", 1, "test")

    assert Controls(store, Events(store, lambda: 0.0), sleep=nap).between_rounds(1, never) is None
    assert naps == 3 and answers(store) == [CONFIRMED, CONFIRMED]


def test_what_makes_no_sense_is_refused(store: Store, tmp_path: Path) -> None:
    request(tmp_path, "resume", 0, "test")
    assert controls_of(store).between_rounds(1, never) is None
    assert answers(store) == ["it is not paused"]


def test_abort_comes_first(store: Store, tmp_path: Path) -> None:
    request(tmp_path, "stop", 0, "test")
    request(tmp_path, "abort", 1, "test")
    controls = controls_of(store)
    with pytest.raises(Aborted):
        controls.expect_no_abort()
    assert controls.between_rounds(1, never) == "aborted"
    controls.refuse("the run had ended", 1)
    assert answers(store) == ["the run had ended", CONFIRMED]


def test_an_answer_is_never_overwritten(store: Store, tmp_path: Path) -> None:
    request(tmp_path, "stop", 0, "test")
    controls = controls_of(store)
    (waiting,) = read_commands(store)
    controls.between_rounds(1, never)
    controls._answer(waiting, "another answer", 2)
    assert answers(store) == [CONFIRMED]


def test_two_operators(store: Store, tmp_path: Path) -> None:
    """Of many who ask after the same view, one is heard."""
    outcomes: list[str] = []

    def ask() -> None:
        try:
            request(tmp_path, "pause", 0, "test")
            outcomes.append("given")
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["conflict"] * 7 + ["given"]
    with open_store_read_only(tmp_path) as reader:
        assert [command.action for command in read_commands(reader)] == ["pause"]


def test_an_older_store_gets_the_table(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE commands")
    with open_store(tmp_path) as store:
        assert read_commands(store) == []
