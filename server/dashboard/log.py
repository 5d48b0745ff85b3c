"""Searches a run's log."""

from sqlalchemy import String, cast, func, select

from server.dashboard.course import KINDS
from server.events import Event, event_of
from server.run_folder import RunFolder
from server.store import event_table, open_store_read_only


def search(folder: RunFolder, text: str, most: int) -> list[Event]:
    """The newest `most` events whose line holds the text, newest first; Latin letters in either case.

    A line is an event's time (UTC), its kind, ``round 7``, and its fields as JSON without quotes and colons, such as
    ``stage upload, attempt 1``. Raises :class:`RunError`.
    """
    event = event_table.c
    moment, round_ = func.datetime(event.time, "unixepoch"), " round " + cast(event.round, String) + " "
    fields = func.replace(func.replace(event.fields, '"', ""), ":", "")
    line = moment + " " + event.kind + func.coalesce(round_, " ") + fields
    holds = func.instr(func.lower(line), func.lower(text)) > 0
    query = select(event_table).where(event.kind.in_(KINDS), holds).order_by(event.id.desc()).limit(most)
    with open_store_read_only(folder.path) as store, store.transaction() as connection:
        return [event_of(row) for row in connection.execute(query)]
