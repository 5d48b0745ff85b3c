"""The runs below a folder, each read once and then followed, for however many browsers."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common.errors import FedtopkError, RunError
from server.dashboard.course import Course, explained, update
from server.dashboard.folders import find_runs
from server.dashboard.spending import Apart, Spending, here
from server.dashboard.view import run_facts, templates
from server.run_folder import RunFolder

_LOOK_SECONDS = 2.0

_ROW = templates.get_template("parts/runs_row.html")

Shown = TypeVar("Shown")


class Runs:
    """Names and courses. Safe to use from any thread: one reads and draws at a time.

    Args:
        apart: where ε is computed.
        told: called with the name of a run of which ε is there that was not; from any thread.
    """

    def __init__(self, root: Path, apart: Apart = here, told: Callable[[str], None] = lambda name: None) -> None:
        self._root = root
        self._apart = apart
        self._told = told
        self._lock = threading.Lock()
        self._followed: dict[str, tuple[Course, Spending]] = {}
        self._rows: dict[str, tuple[object, str]] = {}
        self._found: Mapping[str, Path] = {}
        self._looked = 0.0

    def names(self) -> list[str]:
        """All runs there are, in order."""
        now = time.monotonic()
        if not self._found or now - self._looked > _LOOK_SECONDS:
            self._found, self._looked = find_runs(self._root), now
        return list(self._found)

    def path(self, name: str) -> Path | None:
        """The folder of a run that was found; names are looked up and never made into paths."""
        self.names()
        return self._found.get(name)

    def show(self, name: str, draw: Callable[[Course, Spending], Shown]) -> Shown:
        """What `draw` makes of a run as it is now. Raises :class:`RunError` in words where it cannot be read."""
        with self._lock:
            course, spending = self._read(name)
            spending.update(course)
            with explained(course.folder.path):
                return draw(course, spending)

    def show_all(self, names: Iterable[str], draw: Callable[[Mapping[str, tuple[Course, Spending]]], Shown]) -> Shown:
        """What `draw` makes of those of some runs that can be read."""
        found = {}
        with self._lock:
            for name in names:
                try:
                    self._row(name)
                except FedtopkError:
                    continue
                found[name] = self._followed[name]
            with explained(self._root):
                return draw(found)

    def index(self) -> dict[str, Any]:
        """What the first page is sent: a row for each run, or why there is none."""
        rows = []
        for name in self.names():
            with self._lock:
                try:
                    rows.append(self._row(name))
                except FedtopkError as error:
                    rows.append(_ROW.render(name=name, problem=str(error)))
        template = templates.get_template("parts/runs.html")
        return {"html": {"runs": template.render(rows=rows, root=str(self._root))}}

    def _row(self, name: str) -> str:
        """HTML."""
        course, spending = self._read(name)
        spending.update(course, ahead=False)
        version, (known, row) = (course.version, spending.version), self._rows.get(name, (None, ""))
        if known != version:
            with explained(course.folder.path):
                row = _ROW.render(run_facts(name, course, spending) | {"problem": ""})
            self._rows[name] = version, row
        return row

    def _read(self, name: str) -> tuple[Course, Spending]:
        folder = self.path(name)
        if folder is None:
            raise RunError(f"Expected {name} to be a run below {self._root}.")
        if name not in self._followed:
            spending = Spending(self._apart, lambda: self._told(name))
            self._followed[name] = Course(RunFolder(folder)), spending
        course, spending = self._followed[name]
        try:
            update(course)
        except FedtopkError:
            del self._followed[name]  # it is read from its beginning once it can be
            raise
        return course, spending
