"""The privacy ledger: how often the run has spent, written ahead of the spending.

It counts; what the counts mean in ε is :mod:`common.privacy.accounting`'s business. One attempt at a round goes ::

    attempt = ledger.reserve(round)        before anything else of the round
    ledger.uploaded(round, attempt)        before the first device is asked for its upload; not if none will be
    …the sum…                              ε_server is spent from here on, whether or not the round completes
    ledger.released(round, attempt)        before anything that depends on the sum leaves the server,
                                           except one durable checkpoint of this very round

and a process that starts again calls ``ledger.reconcile(round of the newest checkpoint)`` first.

Each step is also an event of the same transaction, from which alone the ledger can be counted again
(:mod:`server.verification`).

A round that released nothing may be tried again on the same reservation, since whoever sees the models saw none; the
devices that uploaded to an attempt are out of it all the same, so ε_server counts every such attempt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeGuard

from sqlalchemy import ColumnElement, Connection, func, insert, or_, select, update

from common.errors import BudgetExceeded, RunError
from server.events import append
from server.store import Store, ledger_table

State = Literal["reserved", "uploaded", "released"]


@dataclass(frozen=True)
class Entry:
    """One attempt at a round.

    Attributes:
        round, attempt: the key; the attempts at a round are 1, 2, …
        noise_multiplier: z, in units of the clip norm, at least 0.
        rate: q in (0, 1], with which each device takes part.
        reserved_at, uploaded_at, released_at: seconds since the epoch, or None for a state that was not marked.
    """

    round: int
    attempt: int
    noise_multiplier: float
    rate: float
    reserved_at: float
    uploaded_at: float | None
    released_at: float | None

    @property
    def state(self) -> State:
        """The furthest state that was marked."""
        if self.released_at is not None:
            return "released"
        return "uploaded" if self.uploaded_at is not None else "reserved"


class LedgerReader:
    """Reads the ledger of a store, which may be open read-only."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(self) -> list[Entry]:
        """Every attempt ever reserved, ordered by round and attempt."""
        query = select(ledger_table).order_by(ledger_table.c.round, ledger_table.c.attempt)
        with self._store.transaction() as connection:
            return [Entry(*row) for row in connection.execute(query)]

    @property
    def model_releases(self) -> int:
        """How many releases ε_model is to be computed for.

        Every released attempt, and the newest attempt of each round even if it is not marked: the process may have
        died between the release and the mark.
        Guarantee: never less than the number of releases, at whatever points the process died
        (tests/unit/test_ledger.py::test_charges_cover_what_happened, ::test_sigkill).
        """
        with self._store.transaction() as connection:
            return _count(connection, _charged())

    @property
    def attempts(self) -> int:
        """How often coins were flipped, whether or not anybody uploaded then."""
        with self._store.transaction() as connection:
            return connection.execute(select(func.count()).select_from(ledger_table)).scalar_one()

    @property
    def server_uploads(self) -> int:
        """How many attempts ε_server is to be computed for: those that devices uploaded to. Same guarantee."""
        with self._store.transaction() as connection:
            return _count(connection, ledger_table.c.uploaded_at.is_not(None))


class Ledger(LedgerReader):
    """Writes the ledger of one run. Every change is durable when its method returns.

    Args:
        store: open for writing.
        noise_multiplier: z of every release of this run.
        rate: q of every release of this run.
        allowed_releases: how many releases the budget allows; None for no limit.
        repeatable: whether a round that is run again releases the very same numbers (seeded randomness). It then tells
            nobody anything new, and is not charged again.
        once: whether a round may be released once and no more, since other rounds' noise depends on its own
            (:mod:`common.privacy.tree`).
        budget: that budget in words for the one who hits it, such as ``ε_model=8 at δ=1e-05``.
        clock: seconds since the epoch.

    Raises :class:`RunError` if the run was begun with another ``noise_multiplier`` or ``rate``: a count of unlike
    releases would mean nothing.
    """

    def __init__(
        self,
        store: Store,
        *,
        noise_multiplier: float,
        rate: float,
        allowed_releases: int | None,
        budget: str,
        repeatable: bool,
        once: bool = False,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(store)
        self._noise_multiplier = noise_multiplier
        self._rate = rate
        self._allowed_releases = allowed_releases
        self._budget = budget
        self._repeatable = repeatable
        self._once = once
        self._clock = clock
        self._check_mechanism()

    def reserve(self, round: int) -> int:
        """Charge ``round`` before it starts and return the number of the attempt: 1, or one more than the last one.

        The reservation of an earlier attempt that released nothing passes to the new one, which then costs nothing;
        after one that did release, the new one is charged in addition. Earlier attempts can't be marked any more.
        Raises :class:`BudgetExceeded`, with nothing written, if that would be more than ``allowed_releases``, and
        :class:`RunError` if the round was released and may be only once
        (tests/unit/test_ledger.py::test_a_round_with_correlated_noise_is_released_once).
        """
        with self._store.transaction() as connection:
            newest = _newest(connection, round)
            if self._repeats(newest):
                return newest.attempt
            if self._once and newest is not None and newest.state == "released":
                raise RunError(
                    f"Expected round {round} not to be released yet: its noise is correlated with that of other "
                    "rounds, and a second release of it would uncover updates. The run ends here."
                )
            spent = _count(connection, _charged())
            needed = spent if newest is not None and newest.state != "released" else spent + 1
            if self._allowed_releases is not None and needed > self._allowed_releases:
                raise BudgetExceeded(
                    f"Expected round {round} to fit the privacy budget: {self._budget} allows "
                    f"{self._allowed_releases} releases, and {spent} are spent."
                )
            attempt = 1 if newest is None else newest.attempt + 1
            mechanism, now = {"noise_multiplier": self._noise_multiplier, "rate": self._rate}, self._clock()
            entry = {"round": round, "attempt": attempt, "reserved_at": now, **mechanism}
            connection.execute(insert(ledger_table).values(entry))
            append(connection, now, "reserved", round, attempt=attempt, **mechanism)
        return attempt

    def uploaded(self, round: int, attempt: int) -> None:
        """Mark that devices upload: ε_server is charged. Raises :class:`RunError` unless it is newly reserved."""
        self._mark(round, attempt, "uploaded", allowed=("reserved",))

    def released(self, round: int, attempt: int) -> None:
        """Mark that the sum is released. Raises :class:`RunError` if it already is, or a newer attempt took over.

        An attempt without uploads is released too: an empty roster releases noise.
        """
        self._mark(round, attempt, "released", allowed=("reserved", "uploaded"))

    def reconcile(self, checkpoint_round: int) -> None:
        """After a restart from the checkpoint of ``checkpoint_round`` (0: none), mark what it holds as released.

        No count changes; but running such a round again is from now on charged in addition.
        Raises :class:`RunError` if the ledger does not know that round: then it is not the ledger of this checkpoint,
        and whatever it counts is too little.
        """
        table = ledger_table
        with self._store.transaction() as connection:
            if checkpoint_round > 0 and _newest(connection, checkpoint_round) is None:
                raise RunError(
                    f"Expected the privacy ledger to know round {checkpoint_round} of the newest checkpoint: "
                    "events.sqlite was removed or belongs to another run."
                )
            is_open = (table.c.round <= checkpoint_round, table.c.released_at.is_(None), _is_newest())
            keys, now = select(table.c.round, table.c.attempt).where(*is_open).order_by(table.c.round), self._clock()
            for round, attempt in connection.execute(keys).all():
                append(connection, now, "released", round, attempt=attempt)
            connection.execute(update(table).where(*is_open).values(released_at=now))

    def _mark(self, round: int, attempt: int, state: State, allowed: tuple[State, ...]) -> None:
        with self._store.transaction() as connection:
            newest = _newest(connection, round)
            if self._repeats(newest):
                return
            if newest is None or newest.attempt != attempt or newest.state not in allowed:
                found = "not reserved" if newest is None else f"{newest.state} in attempt {newest.attempt}"
                raise RunError(
                    f"Expected round {round} to be {' or '.join(allowed)} in attempt {attempt} before it is {state} "
                    f"there; it is {found}."
                )
            key, now = (ledger_table.c.round == round, ledger_table.c.attempt == attempt), self._clock()
            connection.execute(update(ledger_table).where(*key).values({f"{state}_at": now}))
            append(connection, now, state, round, attempt=attempt)

    def _repeats(self, newest: Entry | None) -> TypeGuard[Entry]:
        return self._repeatable and newest is not None and newest.state == "released"

    def _check_mechanism(self) -> None:
        columns = (ledger_table.c.noise_multiplier, ledger_table.c.rate)
        with self._store.transaction() as connection:
            used = connection.execute(select(*columns).distinct()).all()
        for noise_multiplier, rate in used:
            # The noise multiplier may come from a numerical search: its last digits are no difference.
            alike = math.isclose(noise_multiplier, self._noise_multiplier) and math.isclose(rate, self._rate)
            if not alike:
                raise RunError(
                    f"Expected noise_multiplier={self._noise_multiplier} and rate={self._rate} to be "
                    f"{noise_multiplier} and {rate}, with which this run's privacy ledger was begun."
                )


def _is_newest() -> ColumnElement[bool]:
    """Whether no later attempt at the same round took over the reservation."""
    other = ledger_table.alias()
    newest = select(func.max(other.c.attempt)).where(other.c.round == ledger_table.c.round)
    return ledger_table.c.attempt == newest.correlate(ledger_table).scalar_subquery()


def _charged() -> ColumnElement[bool]:
    return or_(ledger_table.c.released_at.is_not(None), _is_newest())


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).select_from(ledger_table).where(condition)).scalar_one()


def _newest(connection: Connection, round: int) -> Entry | None:
    attempts = select(ledger_table).where(ledger_table.c.round == round)
    row = connection.execute(attempts.order_by(ledger_table.c.attempt.desc()).limit(1)).first()
    return None if row is None else Entry(*row)
