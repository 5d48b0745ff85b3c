"""The privacy ledger: whatever happens, it never shows less than was spent."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BudgetExceeded, RunError
from server.ledger import Entry, Ledger, LedgerReader
from server.store import Store, open_store, open_store_read_only


def make_ledger(
    store: Store,
    allowed: int | None = None,
    noise_multiplier: float = 1.5,
    repeatable: bool = False,
    once: bool = False,
) -> Ledger:
    ticks = count(100)
    return Ledger(
        store,
        noise_multiplier=noise_multiplier,
        rate=0.1,
        allowed_releases=allowed,
        budget="ε_model=8 at δ=1e-05",
        repeatable=repeatable,
        once=once,
        clock=lambda: float(next(ticks)),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as store:
        yield store


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return make_ledger(store)


def counts(ledger: LedgerReader) -> tuple[int, int]:
    return ledger.model_releases, ledger.server_uploads


def test_one_round(ledger: Ledger) -> None:
    assert counts(ledger) == (0, 0)
    assert ledger.reserve(1) == 1
    assert counts(ledger) == (1, 0)
    ledger.uploaded(1, 1)
    assert counts(ledger) == (1, 1)
    ledger.released(1, 1)
    assert counts(ledger) == (1, 1)
    assert ledger.entries() == [Entry(1, 1, 1.5, 0.1, 100.0, 101.0, 102.0)]


def test_states(ledger: Ledger) -> None:
    states = []
    for step in (ledger.reserve, lambda round: ledger.uploaded(round, 1), lambda round: ledger.released(round, 1)):
        step(1)
        states += [entry.state for entry in ledger.entries()]
    assert states == ["reserved", "uploaded", "released"]


def test_empty_roster_releases_without_uploads(ledger: Ledger) -> None:
    ledger.released(1, ledger.reserve(1))
    assert counts(ledger) == (1, 0)


def test_a_round_with_correlated_noise_is_released_once(store: Store) -> None:
    ledger = make_ledger(store, once=True)
    assert (ledger.reserve(1), ledger.reserve(1)) == (1, 2)  # nothing was released: the same noise serves again
    ledger.uploaded(1, 2)
    ledger.released(1, 2)
    ledger.reserve(2)
    before = ledger.entries()
    with pytest.raises(RunError, match="Expected round 1 not to be released yet"):
        make_ledger(store, once=True).reserve(1)  # by a process that goes on from too old a checkpoint
    assert ledger.entries() == before
    make_ledger(store, once=True).reconcile(2)
    with pytest.raises(RunError, match="Expected round 2 not to be released yet"):
        ledger.reserve(2)


def test_retry_reuses_the_model_charge_but_not_the_server_charge(ledger: Ledger) -> None:
    for attempt in (1, 2, 3):
        assert ledger.reserve(1) == attempt
        ledger.uploaded(1, attempt)
    assert counts(ledger) == (1, 3)
    ledger.released(1, 3)
    assert counts(ledger) == (1, 3)


def test_rerun_of_a_released_round_is_charged_again(ledger: Ledger) -> None:
    ledger.released(1, ledger.reserve(1))
    assert ledger.reserve(1) == 2
    assert counts(ledger) == (2, 0)
    assert ledger.reserve(1) == 3  # takes over the second charge, not the first
    assert counts(ledger) == (2, 0)


def test_abandoned_round_stays_charged(ledger: Ledger) -> None:
    ledger.uploaded(1, ledger.reserve(1))
    ledger.released(2, ledger.reserve(2))
    assert counts(ledger) == (2, 1)


def test_budget(store: Store) -> None:
    ledger = make_ledger(store, allowed=2)
    ledger.released(1, ledger.reserve(1))
    ledger.reserve(2)
    assert ledger.reserve(2) == 2  # a retry fits, for it costs nothing
    ledger.released(2, 2)
    before = ledger.entries()
    for round in (3, 2):
        with pytest.raises(BudgetExceeded) as error:
            ledger.reserve(round)
        assert str(error.value) == (
            f"Expected round {round} to fit the privacy budget: ε_model=8 at δ=1e-05 allows 2 releases, "
            "and 2 are spent."
        )
    assert ledger.entries() == before


def test_a_repeatable_round_is_not_charged_again(store: Store) -> None:
    ledger = make_ledger(store, allowed=1, repeatable=True)
    for _ in range(3):  # the same numbers, released after each crash
        attempt = ledger.reserve(1)
        ledger.uploaded(1, attempt)
        ledger.released(1, attempt)
    assert (ledger.model_releases, ledger.server_uploads) == (1, 1)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(2)


def test_budget_of_nothing(store: Store) -> None:
    with pytest.raises(BudgetExceeded):
        make_ledger(store, allowed=0).reserve(1)


def test_budget_lowered_while_a_round_is_open(store: Store) -> None:
    make_ledger(store).reserve(1)
    with pytest.raises(BudgetExceeded):
        make_ledger(store, allowed=0).reserve(1)


@pytest.mark.parametrize(
    ("forbidden", "found"),
    [
        (lambda ledger: ledger.uploaded(9, 1), "not reserved"),
        (lambda ledger: ledger.released(9, 1), "not reserved"),
        (lambda ledger: ledger.uploaded(1, 9), "reserved in attempt 2"),
        (lambda ledger: ledger.uploaded(1, 1), "reserved in attempt 2"),  # attempt 2 took over
        (lambda ledger: ledger.released(1, 1), "reserved in attempt 2"),
        (lambda ledger: ledger.uploaded(2, 1), "uploaded in attempt 1"),
        (lambda ledger: ledger.uploaded(3, 1), "released in attempt 1"),
        (lambda ledger: ledger.released(3, 1), "released in attempt 1"),
    ],
)
def test_states_only_go_forward(ledger: Ledger, forbidden: Callable[[Ledger], None], found: str) -> None:
    ledger.reserve(1)
    ledger.reserve(1)
    ledger.uploaded(2, ledger.reserve(2))
    ledger.released(3, ledger.reserve(3))
    before = ledger.entries()
    with pytest.raises(RunError) as error:
        forbidden(ledger)
    assert str(error.value).endswith(f"it is {found}.")
    assert ledger.entries() == before


def test_reconcile_marks_what_the_checkpoint_holds(ledger: Ledger) -> None:
    ledger.released(1, ledger.reserve(1))
    ledger.reserve(2)
    ledger.reserve(2)
    ledger.reserve(3)
    before = counts(ledger)
    ledger.reconcile(2)
    assert counts(ledger) == before
    states = {(entry.round, entry.attempt): entry.state for entry in ledger.entries()}
    assert states == {(1, 1): "released", (2, 1): "reserved", (2, 2): "released", (3, 1): "reserved"}
    ledger.reserve(3)
    assert counts(ledger) == before
    ledger.reserve(2)
    assert counts(ledger) == (before[0] + 1, before[1])


def test_reconcile_without_a_checkpoint(ledger: Ledger) -> None:
    ledger.reserve(1)
    ledger.reconcile(0)
    assert [entry.state for entry in ledger.entries()] == ["reserved"]


def test_lost_ledger_is_noticed(ledger: Ledger) -> None:
    ledger.released(1, ledger.reserve(1))
    with pytest.raises(RunError, match=r"to know round 2 of the newest checkpoint"):
        ledger.reconcile(2)


def test_other_mechanism_is_refused(store: Store) -> None:
    make_ledger(store).reserve(1)
    make_ledger(store, noise_multiplier=1.5 * (1 + 1e-12)).reserve(2)
    with pytest.raises(RunError, match=r"noise_multiplier=1\.4 .* to be 1\.5"):
        make_ledger(store, noise_multiplier=1.4)


def test_reader_of_a_live_run(ledger: Ledger, tmp_path: Path) -> None:
    with open_store_read_only(tmp_path) as live:
        reader = LedgerReader(live)
        ledger.uploaded(1, ledger.reserve(1))
        assert counts(reader) == (1, 1)
        assert reader.entries() == ledger.entries()


class Crash(Exception):
    """The process dies here."""


@dataclass
class World:
    """What really happened, however often the process died. Each step is a point at which it may die."""

    crashes: list[int]
    checkpoints: list[int] = field(default_factory=list)
    released: set[tuple[int, int]] = field(default_factory=set)
    uploads: int = 0

    @property
    def checkpoint_round(self) -> int:
        return self.checkpoints[-1] if self.checkpoints else 0

    def step(self) -> None:
        if self.crashes:
            self.crashes[0] -= 1
            if self.crashes[0] < 0:
                self.crashes.pop(0)
                raise Crash

    def checkpoint(self, round: int, attempt: int) -> None:
        """From here on the model may be seen."""
        self.released.add((round, attempt))
        self.checkpoints.append(round)


@contextmanager
def restarted(folder: Path, world: World, allowed: int | None) -> Iterator[Ledger]:
    with open_store(folder) as store:
        ledger = make_ledger(store, allowed)
        ledger.reconcile(world.checkpoint_round)
        yield ledger


def train(ledger: Ledger, world: World, *, rounds: int, every: int, fails: Iterator[bool], mark_first: bool) -> None:
    """A run loop as the ledger's module describes it, checkpointing ``every`` so many rounds."""
    round = world.checkpoint_round + 1
    while round <= rounds:
        attempt = ledger.reserve(round)
        world.step()
        ledger.uploaded(round, attempt)
        world.step()
        world.uploads += 1
        world.step()
        if next(fails, False):
            continue  # too few survivors: nothing is released, the round is tried again
        if mark_first or round % every:
            ledger.released(round, attempt)
            world.step()
            world.released.add((round, attempt))
            if round % every == 0:
                world.checkpoint(round, attempt)
        else:
            world.checkpoint(round, attempt)
            world.step()
            ledger.released(round, attempt)
        world.step()
        assert len(world.released) <= ledger.model_releases
        round += 1


@settings(max_examples=25, deadline=None)
@given(
    crashes=st.lists(st.integers(0, 12), max_size=5),
    deletions=st.lists(st.booleans(), max_size=5),
    fails=st.lists(st.booleans(), max_size=5),
    every=st.integers(1, 2),
    mark_first=st.booleans(),
    allowed=st.none() | st.integers(0, 5),
)
def test_charges_cover_what_happened(
    crashes: list[int], deletions: list[bool], fails: list[bool], every: int, mark_first: bool, allowed: int | None
) -> None:
    """Crashes anywhere, rounds that fail, and between two starts somebody who deletes the newest checkpoint."""
    world, started, done = World(list(crashes)), 0, False
    failures, deleted = iter(fails), iter(deletions)
    with tempfile.TemporaryDirectory() as name:
        while not done:
            started += 1
            try:
                with restarted(Path(name), world, allowed) as ledger:
                    train(ledger, world, rounds=3, every=every, fails=failures, mark_first=mark_first)
                    done = True
            except Crash:
                with restarted(Path(name), world, allowed):
                    pass
                if next(deleted, False):
                    del world.checkpoints[-1:]
            except BudgetExceeded:
                done = True
            with open_store_read_only(Path(name)) as store:
                charged, uploads = counts(LedgerReader(store))
            assert len(world.released) <= charged
            assert world.uploads <= uploads <= world.uploads + started
            assert allowed is None or charged <= allowed
            if every == 1 and not mark_first and not any(deletions):
                assert charged <= world.checkpoint_round + 1  # a crash costs nothing: the rerun is the same charge


RUN = """
import sys
from pathlib import Path
from server.ledger import Ledger
from server.store import open_store
ledger = Ledger(open_store(Path(sys.argv[1])), noise_multiplier=1.5, rate=0.1, allowed_releases=None, budget="",
                repeatable=False, clock=lambda: 0.0)
for round in range(1, 100_000):
    ledger.released(round, ledger.reserve(round))
    print(round, flush=True)
"""


def test_sigkill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        process.kill()
        lines += process.stdout.readlines()
    released = max(int(line) for line in lines)
    with open_store(tmp_path) as store:
        assert released <= make_ledger(store).model_releases <= released + 1
