"""What the operator asks of a run, and what the run answers: the table of commands.

A command is added by a compare-and-set on the newest one, so that of two operators who act on the same view one is told
that the other was faster. The round loop answers it, once; neither is ever changed afterwards.

==========  ==========================================================================================
command     what the run does
==========  ==========================================================================================
``pause``   waits after the round under way
``resume``  goes on
``stop``    ends after the round under way; ``--resume`` goes on with it
``abort``   drops the round under way, of which nothing is released, and ends for good
==========  ==========================================================================================
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sqlalchemy import func, insert, inspect, select, update

from common.errors import Aborted, Conflict
from server.events import Events
from server.store import Store, command_table, open_store_for_commands

Action = Literal["pause", "resume", "stop", "abort"]
ACTIONS: tuple[Action, ...] = get_args(Action)
CONFIRMED = "confirmed"
COMMAND = "command"
"""Kind of the event that tells of an answer."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Command:
    """One request.

    Attributes:
        id: 1, 2, … in the order of commits.
        time: seconds since the epoch.
        origin: who asked, for the log.
        answered_at, answer: when the run answered and what: ``confirmed``, or why not; None until then.
    """

    id: int
    time: float
    action: Action
    origin: str
    answered_at: float | None
    answer: str | None


def read_commands(store: Store) -> list[Command]:
    """All commands ever given, in their order; none of a run that knew no commands. Raises :class:`RunError`."""
    with store.transaction() as connection:
        if not inspect(connection).has_table(command_table.name):
            return []
        return [Command(*row) for row in connection.execute(select(command_table).order_by(command_table.c.id))]


def request(folder: Path, action: Action, expected: int, origin: str, clock: Callable[[], float] = time.time) -> int:
    """Add a command to the run in `folder`, if `expected` is the id of its newest one (0: none); the new id.

    Raises :class:`Conflict` where it is not, with nothing written (tests/unit/test_controls.py::test_two_operators).
    """
    with open_store_for_commands(folder) as store, store.transaction() as connection:
        newest = connection.execute(select(func.max(command_table.c.id))).scalar_one() or 0
        if newest != expected:
            raise Conflict(f"Expected command {expected} to be the newest one; {newest} came in between. Look again.")
        row = {"id": newest + 1, "time": clock(), "action": action, "origin": origin}
        connection.execute(insert(command_table).values(row))
    return newest + 1


class Controls:
    """The run's side: obeys, and answers.

    Guarantees (tests/unit/test_controls.py): every command is answered once, in the table and in the log of events; an
    abort takes precedence over whatever else is asked.
    """

    def __init__(
        self,
        store: Store,
        events: Events,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._events = events
        self._clock = clock
        self._sleep = sleep
        self._paused = False

    def between_rounds(self, round_: int, should_stop: Callable[[], bool]) -> Literal["stopped", "aborted"] | None:
        """Do what is asked after `round_` rounds, and wait while paused. How the run is to end, if it is to."""
        while True:
            for command in self._unanswered():
                if command.action == "abort" or command.action == "stop":
                    self._answer(command, CONFIRMED, round_)
                    return "aborted" if command.action == "abort" else "stopped"
                pausing = command.action == "pause"
                already = "it is paused already" if pausing else "it is not paused"
                self._answer(command, already if pausing == self._paused else CONFIRMED, round_)
                self._paused = pausing
            if should_stop():
                return "stopped"
            if not self._paused:
                return None
            self._sleep(_POLL_SECONDS)

    def expect_no_abort(self) -> None:
        """Raise :class:`Aborted` if an abort waits for its answer, which :meth:`between_rounds` then gives."""
        if any(command.action == "abort" for command in self._unanswered()):
            raise Aborted("Expected no abort: the operator broke the round off.")

    def refuse(self, reason: str, round_: int) -> None:
        """Answer whatever waits with the same reason why not."""
        for command in self._unanswered():
            self._answer(command, reason, round_)

    def _unanswered(self) -> list[Command]:
        """Aborts first."""
        query = select(command_table).where(command_table.c.answered_at.is_(None))
        with self._store.transaction() as connection:
            waiting = [Command(*row) for row in connection.execute(query.order_by(command_table.c.id))]
        return sorted(waiting, key=lambda command: command.action != "abort")

    def _answer(self, command: Command, answer: str, round_: int) -> None:
        key = (command_table.c.id == command.id, command_table.c.answered_at.is_(None))
        with self._store.transaction() as connection:
            connection.execute(update(command_table).where(*key).values(answered_at=self._clock(), answer=answer))
        told = {"action": command.action, "origin": command.origin, "asked": command.time, "answer": answer}
        self._events.record(COMMAND, round_, command=command.id, **told)
