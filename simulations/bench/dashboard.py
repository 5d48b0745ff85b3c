"""`fedtopk bench dashboard`: what an open dashboard costs the run that it shows.

One run trains all the time, and its dashboard is a process beside it, as with ``simulate --dashboard``. A viewer, a
process of its own, opens the run's stream for one stretch of rounds and closes it for another: with nobody looking the
dashboard does nothing. Stretches go *open, closed, null, null, closed, open* and over again, so that a steady drift of
the machine falls on all three alike; *null* is closed, too, and what it differs from *closed* by is the measurement's
own error, by the same statistics.
"""

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from rich.table import Table
from scipy.stats import t as student

from common.errors import RunError
from common.processes import program, running
from common.settings import Settings, load_settings
from server.run_folder import RunFolder
from server.training import Progress
from simulations.bench.machine import machine
from simulations.simulate import Watch, simulate

Kind = Literal["open", "closed", "null"]
BLOCK: tuple[Kind, ...] = ("open", "closed", "null", "null", "closed", "open")

_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE_SECONDS = 300.0
"""With a dashboard that computes what it does once for a run, the curve of ε."""
_SKIPPED = 1
"""Rounds of a stretch that do not count: the viewer is about to come or go."""


@dataclass
class Stretch:
    """What a number of rounds took: seconds by the clock, and CPU seconds of the run and of the dashboard."""

    kind: Kind
    rounds: int
    wall: float
    run: float
    dashboard: float


@dataclass
class _Meter:
    """Takes readings after each round, and tells the viewer when to come and go.

    Args:
        rounds: of a stretch.
        dashboard, viewer: their process ids; every other child of this process is one of the run's workers.
        on_stretch: told of each stretch that counts.
    """

    rounds: int
    dashboard: int
    viewer: int
    told: Connection
    on_stretch: Callable[[int, str], None]
    stretches: list[Stretch] = field(default_factory=list)
    _begin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def on_round(self, progress: Progress, remark: str) -> None:
        """The first stretch warms up with a viewer."""
        number, place = divmod(progress.round - 1, self.rounds)
        kind: Kind = BLOCK[(number - 1) % len(BLOCK)] if number else "open"
        if place == 0:
            self.told.send("open" if kind == "open" else "closed")
        if place == self.rounds - 1 and not number:
            if not self.told.poll(_PATIENCE_SECONDS):
                raise RunError(f"Expected the dashboard to have the curve of ε within {_PATIENCE_SECONDS:g} s.")
            self.told.recv()
        if place == _SKIPPED - 1:
            self._begin = self._readings()
        if place == self.rounds - 1 and number:
            spent = (now - then for now, then in zip(self._readings(), self._begin, strict=True))
            self.stretches.append(Stretch(kind, self.rounds - _SKIPPED, *spent))
            self.on_stretch(number, kind)

    def _readings(self) -> tuple[float, float, float]:
        children = {child.pid for child in multiprocessing.active_children() if child.pid} - {self.viewer}
        workers = sum(map(_cpu_seconds, children))
        return time.perf_counter(), time.process_time() + workers, _cpu_seconds(self.dashboard)


def settings_of(devices: int, blocks: int, rounds: int) -> Settings:
    """A synthetic population with the default objective, for so many blocks of stretches after one that warms up."""
    overrides = {"data.source": "synthetic", "data.users": devices, "data.items": 2000}
    overrides |= {"training.rounds": (blocks * len(BLOCK) + 1) * rounds, "evaluation.every": 0, "evaluation.users": 50}
    return load_settings(None, [f"{key}={value}" for key, value in overrides.items()])


def bench_dashboard(
    settings: Settings, blocks: int, workers: int, on_stretch: Callable[[int, str], None]
) -> dict[str, Any]:
    """Measure.

    Returns:
        The machine, the sizes, and what :func:`compared` makes of the stretches; `messages` and `bytes` are those of
        the viewer, in `open_s` seconds.
    """
    rounds = settings.training.rounds // (blocks * len(BLOCK) + 1)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        out.mkdir()
        with serving(out) as (dashboard, address):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            viewer = multiprocessing.get_context("spawn").Process(target=_view, args=(address, theirs), daemon=True)
            viewer.start()
            meter = _Meter(rounds, dashboard, viewer.pid or 0, ours, on_stretch)
            watch = Watch(lambda sentence: None, meter.on_round, lambda: nullcontext(lambda: False))
            simulate(RunFolder(out), watch, settings=settings, workers=workers)
            ours.send("end")
            seen: dict[str, Any] = ours.recv()
            viewer.join(10)
    sizes = {"devices": settings.data.users, "workers": workers, "rounds": settings.training.rounds, "blocks": blocks}
    return {"machine": machine()} | sizes | compared(meter.stretches) | seen


def compared(stretches: list[Stretch]) -> dict[str, Any]:
    """What the stretches say, of whole blocks in their order.

    Returns:
        ``{"round_s", "overhead", "overhead_ci95", "null", "null_ci95"}`` by the clock, `round_s` in seconds by kind of
        stretch; `overhead` = open / closed − 1 and `null` = null / closed − 1 are means over the blocks, with Student's
        intervals. ``"cpu"`` holds the same of CPU time, the run's and the dashboard's together, in place of the
        clock's; ``"dashboard_cpu"`` is what the dashboard takes of a core while a viewer looks.
    """
    seen = [stretch for stretch in stretches if stretch.kind == "open"]
    cores = sum(stretch.dashboard for stretch in seen) / sum(stretch.wall for stretch in seen)
    return _statistics(stretches, lambda stretch: stretch.wall) | {
        "cpu": _statistics(stretches, lambda stretch: stretch.run + stretch.dashboard),
        "dashboard_cpu": round(cores, 4),
    }


def _statistics(stretches: list[Stretch], of: Callable[[Stretch], float]) -> dict[str, Any]:
    blocks = [stretches[start : start + len(BLOCK)] for start in range(0, len(stretches), len(BLOCK))]
    mean = {
        kind: np.array([np.mean([of(one) / one.rounds for one in block if one.kind == kind]) for block in blocks])
        for kind in ("closed", "open", "null")
    }
    answer: dict[str, Any] = {"round_s": {kind: round(float(values.mean()), 5) for kind, values in mean.items()}}
    for name, kind in (("overhead", "open"), ("null", "null")):
        ratios = mean[kind] / mean["closed"] - 1
        half = student.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
        answer[name] = round(float(ratios.mean()), 4)
        answer[f"{name}_ci95"] = [round(float(ratios.mean() + side * half), 4) for side in (-1, 1)]
    return answer


def results_table(results: dict[str, Any]) -> Table:
    """The answer for people."""
    title = f"{results['devices']:,} devices, {results['blocks']} blocks, {results['rounds']} rounds"
    table = Table("", "clock", "CPU, run and dashboard", title=title)
    both = (results, results["cpu"])
    for kind, label in (("closed", "nobody looks"), ("open", "a viewer")):
        table.add_row(f"{label}: seconds a round", *(f"{own['round_s'][kind]:.4f}" for own in both))
    for name, label in (("overhead", "overhead"), ("null", "nobody against nobody")):
        table.add_row(f"{label} [95 %]", *(_percent(own[name], own[f"{name}_ci95"]) for own in both))
    table.add_row("dashboard, with a viewer", "", f"{results['dashboard_cpu']:.3f} cores")
    return table


def _percent(value: float, interval: list[float]) -> str:
    low, high = (100 * bound for bound in interval)
    return f"{100 * value:+.2f} % [{low:+.2f}, {high:+.2f}]"


@contextmanager
def serving(root: Path) -> Iterator[tuple[int, str]]:
    """A dashboard over `root`, a process of its own: its id, and its address."""
    words = [program("fedtopk"), "dashboard", str(root), "--port", "0"]
    with running(words, {}, subprocess.PIPE) as process:
        assert process.stdout is not None
        with process.stdout as output:
            line = output.readline().decode()
            found = re.search(r"http://[^ ]+:\d+", line)
            if found is None:
                raise RunError(f"Expected the dashboard to start, and it said: {line.strip()}")
            yield process.pid, found.group()


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _view(address: str, told: Connection) -> None:
    """Hold the run's stream open while told so; tell when all is there, and at the end how much came."""
    os.nice(19)
    messages, size, opened, complete, wanted = 0, 0, 0.0, False, "closed"
    while wanted != "end":
        if wanted == "closed":
            wanted = told.recv()
            continue
        try:
            begun = time.monotonic()
            with httpx.stream("GET", f"{address}/stream/run/run", timeout=30) as response:
                for line in response.iter_lines():
                    if not complete and has_curve(line):
                        complete = True
                        told.send("complete")
                    messages += line.startswith("data:")
                    size += len(line)
                    if told.poll():
                        wanted = told.recv()
                        if wanted != "open":
                            break
            opened += time.monotonic() - begun
        except httpx.TransportError:
            time.sleep(0.1)
    told.send({"messages": messages, "bytes": size, "open_s": round(opened, 1)})


def has_curve(line: str) -> bool:
    """Whether an event of the stream holds the chart of ε, and not what is said in its place."""
    panels = json.loads(line.removeprefix("data:")).get("panels", {}) if line.startswith("data:") else {}
    return "option" in panels.get("epsilon", {})
