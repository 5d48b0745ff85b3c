"""What a run has recorded so far: read once, and then only what is new."""

import json
import stat
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from common.errors import FedtopkError, RunError
from common.settings import Settings
from server.controls import COMMAND, CONFIRMED, Command, read_commands
from server.events import OPENED, Event, EventReader
from server.ledger import LedgerReader
from server.run_folder import RunFolder
from server.run_lock import LOCK, is_running
from server.store import DATABASE, open_store_read_only

State = Literal[
    "starting", "running", "paused", "ending", "finished", "stopped", "aborted", "budget spent", "failed", "interrupted"
]
_ENDS = ("finished", "stopped", "aborted", "budget spent", "failed")
_ROUNDS = ("round", "simulation", "validation")
_FAILED = "attempt failed"
_OTHERS = (OPENED, "begun", "simulated", "stage", _FAILED, "dropouts", COMMAND, "resumed", "delivered")
KINDS = (*_ROUNDS, *_OTHERS, *_ENDS)
"""Of the events that pages tell of; others are for other programs."""
_EXPECTED: dict[str, dict[str, Any]] = {
    "round": {"members": int, "survivors": int},
    "stage": {"stage": str, "attempt": int, "asked": int, "answers": int, "seconds": int | float},
    "simulated": {"bounds": dict},
    _FAILED: {"attempt": int, "reason": str},
    "dropouts": {"reasons": dict},
    COMMAND: {"action": str, "answer": str},
    "failed": {"reason": str},
}
"""What the events hold that pages rely on."""
STAGES = ("advertise", "share", "upload", "agree", "unmask")
"""Of secure aggregation, in their order."""
FOREIGN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TemplateError)
"""What comes of reading and drawing what another program left."""
_SETTLED_SECONDS = 1.0
"""Longer than the steps in which file systems tell times."""
_TAIL = 50
"""Events of the log that are kept: the page's; a search reads the store."""
_FAILURES = 100

Rows = dict[int, dict[str, Any]]
"""By round; what was recorded last counts, where a crash made a round necessary again."""


@dataclass
class Course:
    """A run's own account of itself. :meth:`update` reads on; everything else only looks.

    Attributes:
        opened: sizes and privacy's account, of the process that ran last.
        bounds: of the histograms; only a simulation has any.
        rounds, simulation, validation: fields of these events by round; histograms as arrays.
        stages: the last stages of secure aggregation, in order, as events; at least those of one attempt.
        stage_seconds, sent: by round, seconds by stage, and bytes by ``bytes_up`` and ``bytes_down``; of all attempts.
        failures: the last attempts that failed, newest first.
        dropouts: how often devices dropped out for which reason.
        releases, attempts: as the ledger counts them.
        report: ``report.json``, {} until the run has ended.
    """

    folder: RunFolder
    settings: Settings = field(default_factory=Settings)
    opened: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)
    rounds: Rows = field(default_factory=dict)
    simulation: Rows = field(default_factory=dict)
    validation: Rows = field(default_factory=dict)
    stages: deque[Event] = field(default_factory=lambda: deque(maxlen=2 * len(STAGES)))
    stage_seconds: Rows = field(default_factory=lambda: defaultdict(Counter))
    sent: Rows = field(default_factory=lambda: defaultdict(Counter))
    failures: deque[Event] = field(default_factory=lambda: deque(maxlen=_FAILURES))
    failed_attempts: int = 0
    dropouts: Counter[str] = field(default_factory=Counter)
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=_TAIL))
    commands: list[Command] = field(default_factory=list)
    releases: int = 0
    attempts: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    running: bool = False
    end: Event | None = None
    paused: bool = False
    last_id: int = 0
    _written: object = None
    _origin: str = ""

    def update(self) -> None:
        """Read what is new. Raises :class:`RunError` with the reason where no run can be read."""
        written = _written(self.folder)
        self.running = is_running(self.folder.path)
        if written is not None and written == self._written:
            return
        self._written = written
        if not self.last_id:
            self.settings = self.folder.settings()
        with open_store_read_only(self.folder.path) as store:
            reader = EventReader(store)
            origin, before = reader.origin, self._origin
            if before and origin != before:
                raise RunError(f"Expected {self.folder.path} to hold the same run still: another one took its place.")
            self._origin = origin
            events = reader.read(self.last_id, kinds=KINDS)
            self.commands = read_commands(store)
            if events or not self.last_id:
                ledger = LedgerReader(store)
                self.releases, self.attempts = ledger.model_releases, ledger.attempts
        for event in events:
            self._take(event)
        self.report = self._read_report()

    @property
    def state(self) -> State:
        """What the run is doing, or how it ended."""
        if self.end is not None:
            return "ending" if self.running and not self.report else self.end.kind  # type: ignore[return-value]
        if not self.running:
            return "interrupted"
        return "paused" if self.paused else "running" if self.rounds else "starting"

    @property
    def version(self) -> tuple[object, ...]:
        """Differs as soon as anything does that pages show."""
        answered = sum(command.answered_at is not None for command in self.commands)
        return self.last_id, self.running, len(self.commands), answered, bool(self.report)

    @property
    def round(self) -> int:
        """The newest round that was completed."""
        return max(self.rounds, default=0)

    @property
    def simulated(self) -> bool:
        """Whether one process plays all devices, so that their figures can be looked at."""
        return bool(self.bounds)

    @property
    def devices(self) -> int | None:
        """N, once it is known."""
        return self.opened.get("devices")

    def latest(self, rows: Rows) -> dict[str, Any]:
        """The newest of some rows."""
        return rows[max(rows)] if rows else {}

    def _take(self, event: Event) -> None:
        self.last_id = event.id
        if not isinstance(event.fields, dict):
            raise TypeError(f"event {event.id}, {event.kind}")
        for name, kind in _EXPECTED.get(event.kind, {}).items():
            if not isinstance(event.fields[name], kind):
                raise TypeError(f"event {event.id}, {event.kind}: {name}")
        self.log.append(event)
        fields, round_ = event.fields, event.round or 0
        if event.kind in _ROUNDS:
            rows: Rows = getattr(self, {"round": "rounds"}.get(event.kind, event.kind))
            counts = {name: np.array(fields[name], float) for name in self.bounds if name in fields}
            rows[round_] = fields | counts
        elif event.kind == OPENED:
            self.opened, self.end, self.paused = fields, None, False
        elif event.kind == "simulated":
            self.bounds = fields["bounds"]
        elif event.kind == "stage":
            self.stages.append(event)
            self.stage_seconds[round_][fields["stage"]] += fields["seconds"]
            for way in ("bytes_up", "bytes_down"):
                self.sent[round_][way] += fields.get(way, 0)
        elif event.kind == _FAILED:
            self.failures.appendleft(event)
            self.failed_attempts += 1
        elif event.kind == "dropouts":
            self.dropouts.update(fields["reasons"])
        elif event.kind == COMMAND and fields["answer"] == CONFIRMED:
            self.paused = {"pause": True, "resume": False}.get(fields["action"], self.paused)
        elif event.kind in _ENDS:
            self.end = event

    def _read_report(self) -> dict[str, Any]:
        if self.end is None:
            return {}
        try:
            report = json.loads(self.folder.report_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return report if isinstance(report, dict) else {}


def read_course(folder: RunFolder) -> Course:
    """A run's whole course. Raises :class:`RunError`, whatever is wrong with the folder."""
    course = Course(folder)
    update(course)
    return course


def update(course: Course) -> None:
    """:meth:`Course.update`, where whatever another program left in the folder is a :class:`RunError`, too."""
    with explained(course.folder.path):
        course.update()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raises :class:`RunError` where something in the folder is not what this version would have written."""
    try:
        yield
    except FedtopkError:
        raise
    except FOREIGN as error:
        kind = type(error).__name__
        raise RunError(f"Expected {folder} to hold what this version records: {kind} {error}.") from None


def _written(folder: RunFolder) -> object:
    """What differs as soon as the run writes; None where it wrote so lately that more could bear the same time.

    Raises :class:`RunError` for anything but files: a link leads elsewhere, and who opens a pipe waits for its writer.
    """
    found, newest = [], 0.0
    telling = (folder.report_file, folder.path / DATABASE, folder.path / f"{DATABASE}-wal")
    for path in (*telling, folder.settings_file, folder.path / f"{DATABASE}-shm", folder.path / LOCK):
        try:
            state = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"Expected {path} to be readable: {error.strerror}.") from None
        if not stat.S_ISREG(state.st_mode):
            raise RunError(f"Expected {path} to be a file, and no folder, link or pipe.")
        if path in telling:
            newest = max(newest, state.st_mtime)
            found.append((path, state.st_ino, state.st_size, state.st_mtime_ns))
    return found if time.time() - newest > _SETTLED_SECONDS else None
