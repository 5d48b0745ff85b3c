"""`fedtopk bench dashboard`: what an open dashboard costs the run that it shows.

One run trains all the time. Its dashboard is a process beside it, as with ``simulate --dashboard``, and a viewer, a
process of its own, holds the run's stream open. Both are stopped (SIGSTOP) between two rounds and go on between two
others: stretches of a few rounds go *open, closed, null, null, closed, open* and over again. Each is compared with its
neighbour, a few seconds away; that the order turns round within a block cancels a steady drift of the machine. *null*
is closed, too, and what it differs from *closed* by is the measurement's own error, by the same statistics.

Time is taken per update, for cohorts differ. What blocks say is summed up by Hodges and Lehmann's estimate, which a few
blocks with something else going on do not move. A dashboard that was stopped draws at once when it goes on: stretches
shorter than its pace, a few seconds, overstate what it costs.
"""

import json
import math
import multiprocessing
import os
import re
import signal
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
from scipy.stats import norm

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
_PAIRS = {"overhead": ((0, 1), (5, 4)), "null": ((2, 1), (3, 4))}
"""Places in a block of stretches that are compared: each with a closed one beside it."""


@dataclass
class Stretch:
    """What so many updates took: seconds by the clock, and CPU seconds of the run and of the dashboard."""

    kind: Kind
    updates: int
    wall: float
    run: float
    dashboard: float


@dataclass
class _Meter:
    """Takes readings after each stretch of rounds, and has the lookers stop and go on.

    Args:
        rounds: of a stretch.
        dashboard, viewer: their process ids; every other child of this process is one of the run's workers.
        complete: the viewer's word that all is there.
        on_stretch: told of each stretch that counts.
    """

    rounds: int
    dashboard: int
    viewer: int
    complete: Connection
    on_stretch: Callable[[int, str], None]
    stretches: list[Stretch] = field(default_factory=list)
    _updates: int = 0
    _begin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def on_round(self, progress: Progress, remark: str) -> None:
        """The first stretch warms up with a viewer."""
        self._updates += progress.cohort_sum.survivors
        number, place = divmod(progress.round, self.rounds)
        if place:
            return
        if number == 1:
            if not self.complete.poll(_PATIENCE_SECONDS):
                raise RunError(f"Expected the dashboard to have the curve of ε within {_PATIENCE_SECONDS:g} s.")
            self.complete.recv()
        else:
            kind = BLOCK[(number - 2) % len(BLOCK)]
            spent = (now - then for now, then in zip(self._readings(), self._begin, strict=True))
            self.stretches.append(Stretch(kind, self._updates, *spent))
            self.on_stretch(number - 1, kind)
        self.look(BLOCK[(number - 1) % len(BLOCK)] == "open")
        self._updates, self._begin = 0, self._readings()

    def look(self, on: bool) -> None:
        """Let the viewer and the dashboard go on, or stop them."""
        for process in (self.viewer, *_family(self.dashboard)):
            os.kill(process, signal.SIGCONT if on else signal.SIGSTOP)

    def _readings(self) -> tuple[float, float, float]:
        workers = {child.pid for child in multiprocessing.active_children() if child.pid} - {self.viewer}
        run = time.process_time() + sum(map(_cpu_seconds, workers))
        return time.perf_counter(), run, sum(map(_cpu_seconds, _family(self.dashboard)))


def settings_of(devices: int, blocks: int, rounds: int) -> Settings:
    """A synthetic population with the default objective, for so many blocks of stretches after one that warms up."""
    overrides = {"data.source": "synthetic", "data.users": devices, "data.items": 2000}
    total = (blocks * len(BLOCK) + 1) * rounds
    overrides |= {"training.rounds": total, "evaluation.every": 0, "evaluation.users": 50}
    overrides |= {"training.checkpoint_every": total}  # one would fall into some stretches and not into others
    return load_settings(None, [f"{key}={value}" for key, value in overrides.items()])


def bench_dashboard(
    settings: Settings, blocks: int, workers: int, on_stretch: Callable[[int, str], None]
) -> dict[str, Any]:
    """Measure.

    Returns:
        The machine, the sizes, and what :func:`compared` makes of the stretches; `messages` and `bytes` are those of
        the viewer.
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
            try:
                simulate(RunFolder(out), watch, settings=settings, workers=workers)
            finally:
                meter.look(True)  # what is stopped does not end
            ours.send("end")
            seen: dict[str, Any] = ours.recv()
            viewer.join(10)
    sizes = {"devices": settings.data.users, "workers": workers, "rounds": settings.training.rounds, "blocks": blocks}
    return {"machine": machine()} | sizes | compared(meter.stretches) | seen


def compared(stretches: list[Stretch]) -> dict[str, Any]:
    """What the stretches say, of whole blocks in their order.

    Returns:
        ``{"update_ms", "overhead", "overhead_ci95", "null", "null_ci95"}`` by the clock: `update_ms`, median
        milliseconds of an update by kind of stretch; `overhead` and `null`, what updates of open and of null stretches
        take more than those of the closed ones beside them, as a share, with 95 % intervals. ``"cpu"`` holds the same
        of CPU time, the run's and the dashboard's together, in place of the clock's; ``"dashboard_cpu"`` is what the
        dashboard takes of a core while a viewer looks; ``"stretch_s"`` the median length of a stretch.
    """
    seen = [stretch for stretch in stretches if stretch.kind == "open"]
    cores = sum(stretch.dashboard for stretch in seen) / sum(stretch.wall for stretch in seen)
    return _statistics(stretches, lambda stretch: stretch.wall) | {
        "cpu": _statistics(stretches, lambda stretch: stretch.run + stretch.dashboard),
        "dashboard_cpu": round(cores, 4),
        "stretch_s": round(float(np.median([stretch.wall for stretch in stretches])), 2),
    }


def _statistics(stretches: list[Stretch], of: Callable[[Stretch], float]) -> dict[str, Any]:
    taken = np.array([of(stretch) / stretch.updates for stretch in stretches]).reshape(-1, len(BLOCK))
    update = {kind: 1000 * np.median(taken[:, [own == kind for own in BLOCK]]) for kind in ("closed", "open", "null")}
    answer: dict[str, Any] = {"update_ms": {kind: round(float(value), 5) for kind, value in update.items()}}
    for name, pairs in _PAIRS.items():
        ratios = np.mean([np.log(taken[:, one] / taken[:, other]) for one, other in pairs], axis=0)
        value, *interval = (round(math.expm1(logarithm), 4) for logarithm in hodges_lehmann(ratios))
        answer |= {name: value, f"{name}_ci95": interval}
    return answer


def hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """The centre of (n,) values of one symmetric distribution, n ≥ 6, and its 95 % interval.

    The median of the means of all pairs, and the interval that Wilcoxon's signed-rank test does not reject, by the
    normal approximation (Hollander and Wolfe, "Nonparametric Statistical Methods", 3.2 and 3.3). Few values that are
    far off do not move it.
    """
    n = len(values)
    places = np.triu_indices(n)
    means = np.sort((values[places[0]] + values[places[1]]) / 2)
    spread = norm.ppf(0.975) * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = max(math.floor(n * (n + 1) / 4 - spread), 0)
    return float(np.median(means)), float(means[cut]), float(means[-1 - cut])


def results_table(results: dict[str, Any]) -> Table:
    """The answer for people."""
    title = f"{results['devices']:,} devices, {results['blocks']} blocks, {results['rounds']} rounds"
    table = Table("", "clock", "CPU, run and dashboard", title=title)
    both = (results, results["cpu"])
    for kind, label in (("closed", "nobody looks"), ("open", "a viewer")):
        table.add_row(f"{label}: ms an update", *(f"{own['update_ms'][kind]:.4f}" for own in both))
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


def _family(process: int) -> list[int]:
    """A process and its children."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children"))
    return [process, *map(int, children.split())]


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS  # with those of its children that have ended


def _view(address: str, told: Connection) -> None:
    """Hold the run's stream open; tell when all is there, and once asked how much came."""
    os.nice(19)
    messages, size, complete = 0, 0, False
    while not told.poll():
        try:
            with httpx.stream("GET", f"{address}/stream/run/run", timeout=httpx.Timeout(30, read=None)) as response:
                for line in response.iter_lines():
                    if not complete and has_curve(line):
                        complete = True
                        told.send("complete")
                    messages += line.startswith("data:")
                    size += len(line)
                    if told.poll():
                        break
        except httpx.TransportError:
            time.sleep(0.1)
    told.send({"messages": messages, "bytes": size})


def has_curve(line: str) -> bool:
    """Whether an event of the stream holds the chart of ε, and not what is said in its place."""
    panels = json.loads(line.removeprefix("data:")).get("panels", {}) if line.startswith("data:") else {}
    return "option" in panels.get("epsilon", {})
