"""The event log of a run: what happened, when, in the order in which it was committed.

Each event's digest covers it and the digest of the one before it: :mod:`server.verification` says what that shows.
"""

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from common.secagg.identity import digest
from common.secagg.wire import numbers
from server.store import Store, event_table

OPENED = "opened"
"""Kind of the event that tells what a run is of: sizes, and what its figures of privacy follow from."""


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Attributes:
        id: 1, 2, … in the order of commits.
        time: seconds since the epoch, by the clock of the process that recorded it.
        kind: what happened, such as ``round``.
        round: the round it belongs to, if any.
        fields: the rest, as JSON knows it.
    """

    id: int
    time: float
    kind: str
    round: int | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class Head:
    """The end of a log: it stands for the whole of it.

    Attributes:
        events: how many there are.
        digest: hexadecimal, of the last one, and so of all.
    """

    events: int
    digest: str


START = Head(0, "0" * 64)


def clips_of(events: Iterable[Event]) -> list[list[float]]:
    """Rounds, each with its C, where it adapts; of a round that a crash made necessary again, the newest."""
    rounds = {event.round or 0: event.fields for event in events if event.kind == "round"}
    return [[number, rounds[number]["clip"]] for number in sorted(rounds) if "clip" in rounds[number]]


class EventReader:
    """Reads the log of a store, which may be open read-only."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, after_id: int = 0, kinds: Collection[str] | None = None) -> list[Event]:
        """Events with ``id > after_id``, in order; only those of ``kinds`` if given.

        Guarantee: following the log by passing the last id seen misses no event and shows none twice, also while
        another process records (tests/unit/test_events.py::test_follow_while_recording).
        """
        query = select(event_table).where(event_table.c.id > after_id).order_by(event_table.c.id)
        if kinds is not None:
            query = query.where(event_table.c.kind.in_(kinds))
        with self._store.transaction() as connection:
            rows = connection.execute(query).all()
        return [event_of(row) for row in rows]

    @property
    def origin(self) -> str:
        """The first event's digest, which tells this log from every other one; empty for an empty log."""
        with self._store.transaction() as connection:
            return connection.execute(select(event_table.c.digest).where(event_table.c.id == 1)).scalar() or ""

    @property
    def head(self) -> Head:
        """The end of the log as it is now."""
        with self._store.transaction() as connection:
            return _head(connection)


class Events(EventReader):
    """Records events, and reads them. Nothing is ever changed or removed."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        super().__init__(store)
        self._clock = clock

    def record(self, kind: str, round: int | None = None, **fields: Any) -> None:
        """Append one event, durably.

        ``fields`` hold strings, numbers (numpy's too), booleans, None, and lists and mappings of these; anything else
        raises :class:`TypeError`. Numbers that JSON lacks are kept as ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``,
        which Python's ``float`` and JavaScript's ``Number`` both read (tests/unit/test_events.py::test_non_finite).
        Raises :class:`RunError` if the log cannot be written to.
        """
        with self._store.transaction() as connection:
            append(connection, self._clock(), kind, round, **fields)


def event_of(row: Row[Any]) -> Event:
    """An event as it stands in its table. Raises :class:`ValueError` where its fields are no JSON."""
    return Event(row.id, row.time, row.kind, row.round, json.loads(row.fields))


def append(connection: Connection, time: float, kind: str, round: int | None = None, **fields: Any) -> None:
    """Append one event within a transaction, so that it stands together with what else is written there."""
    text = json.dumps(_plain(fields), allow_nan=False, ensure_ascii=False)
    head = following(_head(connection), time, kind, round, text)
    row = {"id": head.events, "time": time, "kind": kind, "round": round, "fields": text, "digest": head.digest}
    connection.execute(insert(event_table).values(row))


def following(head: Head, time: float, kind: str, round: int | None, fields: str) -> Head:
    """The end of the log once this event is appended. Raises :class:`ValueError` for what can be no event."""
    number = head.events + 1
    try:
        start = numbers("Qdq", number, time, -1 if round is None else round)
        content = (bytes.fromhex(head.digest), start, kind.encode(), fields.encode())
    except (struct.error, AttributeError, TypeError, UnicodeError) as error:
        raise ValueError(f"event {number}: {error}") from None
    return Head(number, digest("event", *content).hex())


def _head(connection: Connection) -> Head:
    last = select(event_table.c.id, event_table.c.digest).order_by(event_table.c.id.desc()).limit(1)
    row = connection.execute(last).first()
    return START if row is None else Head(row.id, row.digest)


def _plain(value: Any) -> Any:
    """The same value in JSON's own types."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise TypeError(f"Expected the field of an event to be JSON, not {type(value).__name__}.")
