"""The event log: append-only, valid JSON, and nothing missed by whoever follows it."""

import json
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from common.errors import RunError
from server.events import Event, EventReader, Events, _plain
from server.store import Store, event_table, open_store, open_store_read_only


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as store:
        yield store


@pytest.fixture
def events(store: Store) -> Events:
    ticks = count(100)
    return Events(store, clock=lambda: float(next(ticks)))


def test_records_in_order(events: Events) -> None:
    events.record("started", devices=610)
    events.record("round", 1, loss=0.5, cohort=[3, 4], note="ε")
    assert events.read() == [
        Event(1, 100.0, "started", None, {"devices": 610}),
        Event(2, 101.0, "round", 1, {"loss": 0.5, "cohort": [3, 4], "note": "ε"}),
    ]


def test_reads_a_part(events: Events) -> None:
    for round in (1, 2, 3):
        events.record("round", round)
        events.record("evaluation", round)
    assert [event.id for event in events.read(after_id=4)] == [5, 6]
    assert [event.id for event in events.read(after_id=1, kinds=["round"])] == [3, 5]
    assert [event.id for event in events.read(kinds=("round", "evaluation"))] == [1, 2, 3, 4, 5, 6]
    assert events.read(kinds=[]) == []
    assert events.read(after_id=6) == []


def test_non_finite(events: Events, store: Store) -> None:
    events.record("round", 1, loss=float("nan"), cap=[float("inf"), -float("inf")], critic={"loss": np.float32("nan")})
    with store.transaction() as connection:
        text = connection.execute(select(event_table.c.fields)).scalar_one()
    fields = json.loads(text, parse_constant=pytest.fail)
    assert fields == {"loss": "NaN", "cap": ["Infinity", "-Infinity"], "critic": {"loss": "NaN"}}
    assert float(fields["cap"][1]) == -float("inf")


def test_numbers_of_numpy(events: Events) -> None:
    events.record("round", 1, members=np.int64(7), loss=np.float32(0.5), done=True, missing=None)
    assert events.read()[0].fields == {"members": 7, "loss": 0.5, "done": True, "missing": None}


def test_refuses_what_is_not_json(events: Events) -> None:
    with pytest.raises(TypeError, match="Path"):
        events.record("started", folder=Path("run"))
    assert events.read() == []


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_fields_are_always_valid_json(value: object) -> None:
    json.loads(json.dumps(_plain(value), allow_nan=False), parse_constant=pytest.fail)


def test_reader_of_a_live_run(events: Events, tmp_path: Path) -> None:
    with open_store_read_only(tmp_path) as live:
        reader = EventReader(live)
        events.record("round", 1)
        assert reader.read() == events.read()
        with pytest.raises(RunError):
            Events(live, clock=lambda: 0.0).record("round", 2)


def test_follow_while_recording(events: Events, tmp_path: Path) -> None:
    def record() -> None:
        for round in range(20):
            events.record("round", round)

    writers = [threading.Thread(target=record) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen: list[int] = []
    with open_store_read_only(tmp_path) as live:
        reader = EventReader(live)
        while len(seen) < 40:
            alive = any(writer.is_alive() for writer in writers)
            new = reader.read(after_id=seen[-1] if seen else 0)
            seen += [event.id for event in new]
            assert alive or new
    for writer in writers:
        writer.join()
    assert seen == list(range(1, 41))
