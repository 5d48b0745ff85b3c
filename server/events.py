"""The event log of a run: what happened, when, in the order in which it was committed."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sqlalchemy import insert, select

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
        return [Event(row.id, row.time, row.kind, row.round, json.loads(row.fields)) for row in rows]


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
        text = json.dumps(_plain(fields), allow_nan=False, ensure_ascii=False)
        row = {"time": self._clock(), "kind": kind, "round": round, "fields": text}
        with self._store.transaction() as connection:
            connection.execute(insert(event_table).values(row))


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
