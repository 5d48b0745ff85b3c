"""A population's ledger for life: what all runs over the same users have spent together.

A folder with an event log of its own (:mod:`server.events`), one event for each change of what a run is charged::

    others = population.others(run)               a new run's noise is found for what they leave of the target
    population.charge(run, …, settled=False)      before its first round: all that it may spend at most
    …the run…
    population.charge(run, …, settled=True)       at its end: what it has spent

A run that dies, or is never gone on with, stays charged with its most. One process at a time may hold the ledger: runs
over one population come one after another.

Unit: one user, the most exposed one, who was there in every run. Guarantee: what the ledger shows is never less than
what was spent, wherever a process dies (tests/unit/test_population_ledger.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.privacy.budget import Spending
from server.events import Event, Events
from server.store import Store, open_store

BEGUN, CHARGED = "population ledger", "charged"


class PopulationLedger:
    """The ledger in an open store."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._events = Events(store, clock)
        first = next(iter(self._events.read()), None)
        if first is None:
            self._events.record(BEGUN)
        elif first.kind != BEGUN:
            raise RunError("Expected --ledger to be a folder of its own: this one holds a run.")

    @property
    def origin(self) -> str:
        """Which ledger this is."""
        return self._events.origin

    def others(self, run: str) -> Spending:
        """What all runs but this one have spent, or may still spend."""
        charges = charges_of(self._events.read(kinds=[CHARGED]))
        return sum((spending for name, spending in charges.items() if name != run), Spending())

    def charge(self, run: str, spending: Spending, delta: float, *, settled: bool) -> dict[str, Any]:
        """Charge a run with this in place of what it was charged with.

        Returns what all of them have spent at δ, and where this ledger ends now.
        """
        total = (self.others(run) + spending).statement(delta)
        self._events.record(
            CHARGED,
            run=run,
            history=spending.history,
            server=spending.server,
            delta_loss=spending.delta_loss,
            settled=settled,
            total=total,
        )
        return total | {"log": asdict(self._events.head)}


def charges_of(events: list[Event]) -> dict[str, Spending]:
    """What each run is charged with, by the newest of its charges among the events of a population's ledger."""
    return {
        event.fields["run"]: Spending(
            tuple((float(z), float(rate), int(releases)) for z, rate, releases in event.fields["history"]),
            float(event.fields["server"]),
            float(event.fields["delta_loss"]),
        )
        for event in events
    }


@contextmanager
def open_population(folder: Path) -> Iterator[PopulationLedger]:
    """The ledger in a folder, which is made where it is missing.

    Raises :class:`RunError` while another process has it, or where the folder holds something else.
    """
    with open_store(folder) as store:
        yield PopulationLedger(store, time.time)
