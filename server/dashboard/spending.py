"""ε so far and ahead, which nobody waits for: PRV accounting takes a second, and brings torch."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from common.errors import FedtopkError
from common.privacy import NOT_OFFERED
from server.dashboard.course import FOREIGN, Course

_POINTS = 12
"""Of the curve; more of them where it bends."""
_PAUSE_SECONDS = 5.0
"""Between two computations for a run that goes on, at least: the machine is the run's."""
_SHARE = 0.005
"""Of a core, that they may cost once the curve is there."""

_worker = ThreadPoolExecutor(1, "epsilon")

Apart = Callable[..., tuple[Any, float]]
"""``apart(function, *arguments)``: the answer and its CPU seconds; :class:`~server.dashboard.aside.Aside` is one."""


def here(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """An :data:`Apart` that computes in this process."""
    start = time.thread_time()
    return function(*arguments), time.thread_time() - start


class Spending:
    """Both figures of one run, as far as they are computed.

    Guarantee: no figure ever falls while the run goes on (tests/unit/test_dashboard.py::test_epsilon_never_falls).

    Args:
        apart: where they are computed.
        told: called when the first figures are there or will never be, and when the curve is; from another thread.

    Attributes:
        spent: ``{"releases", "epsilon_model", "epsilon_server"}`` of a past moment; None until the first one is there.
        curve: releases → (ε_model, ε_server), for as many attempts; ε_server is a word where it is not offered. Empty
            until all of it is there.
        problem: why there are none and will be none; empty as long as nothing went wrong.
    """

    def __init__(self, apart: Apart = here, told: Callable[[], None] = lambda: None) -> None:
        self.spent: dict[str, Any] | None = None
        self.curve: dict[int, tuple[float, float | str]] = {}
        self.problem = ""
        self._apart = apart
        self._told = told
        self._due: Future[None] | None = None
        self._next = 0.0

    def update(self, course: Course, ahead: bool = True) -> None:
        """Take the figures of a run that has ended from its report, and have the others computed.

        Args:
            ahead: also the curve.
        """
        account = course.opened.get("account")
        if not account or self.problem:
            return
        final = course.report.get("privacy", {})
        if {"epsilon_model", "epsilon_server", "releases"} <= set(final):
            self._spent(final["releases"], final["epsilon_model"], final["epsilon_server"])
        last = _ends_at(course)
        wanted = ahead and last not in self.curve
        points = sorted({round(last * (n / _POINTS) ** 2) for n in range(_POINTS + 1)}) if wanted else []
        behind = self.spent is None or self.spent["releases"] < course.releases
        busy = self._due is not None and not self._due.done()
        due = time.monotonic() >= self._next or (wanted and not self.curve)
        if not busy and due and (points or behind):
            first = self.spent is None
            self._due = _worker.submit(self._compute, account, course.releases, course.attempts, points, last)
            if first or points:
                self._due.add_done_callback(lambda done: self._told())

    @property
    def version(self) -> tuple[object, ...]:
        """Differs as soon as a figure does."""
        return self.spent and self.spent["releases"], bool(self.curve), self.problem

    def finish(self, course: Course) -> None:
        """The same, and wait until all figures are there."""
        if self._due is not None:
            self._due.result()
        self._next = 0.0
        self.update(course)
        if self._due is not None:
            self._due.result()

    def _spent(self, releases: int, model: float, server: float | str) -> None:
        if self.spent is not None:
            model = max(model, self.spent["epsilon_model"])
            server = server if isinstance(server, str) else max(server, self.spent["epsilon_server"])
        self.spent = {"releases": releases, "epsilon_model": model, "epsilon_server": server}

    def _compute(
        self, fields: dict[str, Any], releases: int, attempts: int, points: Sequence[int], at_most: int
    ) -> None:
        """What is spent, and the `points` of the curve."""
        counts = [(releases, attempts), *((point, point) for point in points)]
        try:
            (spent, *curve), seconds = self._apart(figures, fields, counts, at_most)
        except (FedtopkError, MemoryError, *FOREIGN) as error:
            self.problem = f"ε cannot be computed from what the run recorded: {type(error).__name__} {error}."
            return
        if self.spent is None or self.spent["releases"] < releases:
            self._spent(releases, *spent)
        self._next = time.monotonic() + max(_PAUSE_SECONDS, seconds / _SHARE if self.curve else 0.0)
        if points:
            self.curve = dict(zip(points, curve, strict=True))


def figures(
    account: dict[str, Any], counts: Sequence[tuple[int, int]], at_most: int
) -> list[tuple[float, float | str]]:
    """(ε_model, ε_server) by a recorded account after each (releases, attempts), of which none is above `at_most`."""
    from common.privacy.budget import Account  # brings torch

    by = Account(**account)
    return [
        (by.epsilon_model(releases, at_most), _offered(by.epsilon_server(attempts))) for releases, attempts in counts
    ]


def _offered(epsilon: float | None) -> float | str:
    return NOT_OFFERED if epsilon is None else epsilon


def _ends_at(course: Course) -> int:
    """Releases until the budget or the last round ends the run."""
    rounds, allowed = course.settings.training.rounds, course.opened.get("allowed_releases")
    return max(course.releases, min(rounds, allowed) if allowed else rounds)
