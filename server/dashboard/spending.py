"""ε so far and ahead, computed in a thread of its own: PRV accounting takes a second to begin with."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from common.errors import FedtopkError
from common.privacy import NOT_OFFERED
from server.dashboard.course import FOREIGN, Course

_POINTS = 12
"""Of the curve; more of them where it bends."""
_HOLD_SECONDS = 2.0
"""After the first look at a run: the page comes before what has torch imported."""
_PAUSE_SECONDS = 5.0
"""Between two computations for a run that goes on, at least: the machine is the run's."""
_SHARE = 0.005
"""Of a core, that they may cost once the curve is there."""

_worker = ThreadPoolExecutor(1, "epsilon")


class Spending:
    """Both figures of one run, as far as they are computed.

    Guarantee: no figure ever falls while the run goes on (tests/unit/test_dashboard.py::test_epsilon_never_falls).

    Attributes:
        spent: ``{"releases", "epsilon_model", "epsilon_server"}`` of a past moment; None until the first one is there.
        curve: releases → (ε_model, ε_server), for as many attempts; ε_server is a word where it is not offered. Empty
            until all of it is there.
        problem: why there are none and will be none; empty as long as nothing went wrong.
    """

    def __init__(self) -> None:
        self.spent: dict[str, Any] | None = None
        self.curve: dict[int, tuple[float, float | str]] = {}
        self.problem = ""
        self._due: Future[None] | None = None
        self._first = self._next = time.monotonic() + _HOLD_SECONDS

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
        due = time.monotonic() >= (self._first if wanted and not self.curve else self._next)
        if not busy and due and (points or behind):
            self._due = _worker.submit(self._compute, account, course.releases, course.attempts, points, last)

    @property
    def version(self) -> tuple[object, ...]:
        """Differs as soon as a figure does."""
        return self.spent and self.spent["releases"], bool(self.curve), self.problem

    def finish(self, course: Course) -> None:
        """The same, and wait until all figures are there."""
        self._first = self._next = 0.0
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
        """What is spent, and after it the `points` of the curve."""
        from common.privacy.budget import Account  # brings torch, which takes seconds

        start = time.thread_time()
        try:
            account = Account(**fields)
            if self.spent is None or self.spent["releases"] < releases:
                model = account.epsilon_model(releases, at_most)
                self._spent(releases, model, _offered(account.epsilon_server(attempts)))
            if points:
                self.curve = {
                    point: (account.epsilon_model(point, at_most), _offered(account.epsilon_server(point)))
                    for point in points
                }
        except (FedtopkError, MemoryError, *FOREIGN) as error:
            self.problem = f"ε cannot be computed from what the run recorded: {type(error).__name__} {error}."
        cost = (time.thread_time() - start) / (1 + len(points))  # of one figure
        self._next = time.monotonic() + max(_PAUSE_SECONDS, cost / _SHARE)


def _offered(epsilon: float | None) -> float | str:
    return NOT_OFFERED if epsilon is None else epsilon


def _ends_at(course: Course) -> int:
    """Releases until the budget or the last round ends the run."""
    rounds, allowed = course.settings.training.rounds, course.opened.get("allowed_releases")
    return max(course.releases, min(rounds, allowed) if allowed else rounds)
