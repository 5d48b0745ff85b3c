"""`fedtopk bench dashboard`: what an open dashboard costs the run that it shows.

One run trains all the time, and its dashboard is a process beside it, as with ``simulate --dashboard``. A viewer, a
process of its own, opens the run's stream for one stretch of rounds and closes it for the next: with nobody looking
the dashboard does nothing. Stretches alternate, so that whatever else changes on the machine falls on both.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import IO, Any

import httpx
from rich.table import Table

from common.errors import RunError
from common.processes import program, running
from common.settings import Settings, load_settings
from server.run_folder import RunFolder
from server.training import Progress
from simulations.bench.machine import machine
from simulations.simulate import Watch, simulate

_TICKS = os.sysconf("SC_CLK_TCK")
_SETTLING = 60
_SKIPPED = 1
"""Rounds of a stretch that do not count: the viewer is about to come or go."""


def settings_of(devices: int, stretches: int, rounds: int) -> Settings:
    """A synthetic population with the default objective, for so many stretches after one that warms up."""
    overrides = {"data.source": "synthetic", "data.users": devices, "data.items": 2000}
    overrides |= {"training.rounds": (stretches + 1) * rounds, "evaluation.every": 0, "evaluation.users": 50}
    return load_settings(None, [f"{key}={value}" for key, value in overrides.items()])


def bench_dashboard(
    settings: Settings, stretches: int, workers: int, on_stretch: Callable[[int, str], None]
) -> dict[str, Any]:
    """Measure.

    Returns:
        ``{"machine", "devices", "rounds", "round_s": {"closed", "open"}, "overhead", "dashboard_cpu", "messages"}``:
        medians over the stretches' means; `overhead` = open / closed − 1; `dashboard_cpu` is the CPU time of the
        dashboard's process in a second with a viewer, in cores.
    """
    rounds = settings.training.rounds // (stretches + 1)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        out.mkdir()
        words = [program("fedtopk"), "dashboard", str(out), "--port", "0"]
        with running(words, {}, subprocess.PIPE) as dashboard, _output_of(dashboard) as output:
            address = _address(output)
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            viewer = multiprocessing.get_context("spawn").Process(target=_view, args=(address, theirs), daemon=True)
            viewer.start()
            seconds: dict[str, list[float]] = {"closed": [], "open": []}
            state = {"begun": 0.0, "rounds": 0.0, "cpu": 0.0, "viewed": 0.0, "busy": 0.0}

            def on_round(progress: Progress, remark: str) -> None:
                stretch, place = divmod(progress.round - 1, rounds)
                if stretch == 0:
                    if place == 0:
                        ours.send("open")
                    if place == rounds - 1:
                        _settle(dashboard.pid)
                        ours.send("closed")
                    return
                now, open_ = time.perf_counter(), stretch % 2 == 1
                if place == 0:
                    ours.send("open" if open_ else "closed")
                    state["busy"] = _cpu_seconds(dashboard.pid)
                if place == _SKIPPED - 1 or rounds == 1:
                    state["begun"] = now
                if place == rounds - 1:
                    seconds["open" if open_ else "closed"].append((now - state["begun"]) / max(rounds - _SKIPPED, 1))
                    if open_:
                        state["cpu"] += _cpu_seconds(dashboard.pid) - state["busy"]
                        state["viewed"] += now - state["begun"]
                    on_stretch(stretch, "open" if open_ else "closed")

            watch = Watch(lambda sentence: None, on_round, lambda: nullcontext(lambda: False))
            simulate(RunFolder(out), watch, settings=settings, workers=workers)
            ours.send("end")
            messages = ours.recv()
            viewer.join(10)
    middle = {kind: median(values) for kind, values in seconds.items()}
    return {
        "machine": machine(),
        "devices": settings.data.users,
        "rounds": settings.training.rounds,
        "round_s": {kind: round(value, 4) for kind, value in middle.items()},
        "overhead": round(middle["open"] / middle["closed"] - 1, 4),
        "dashboard_cpu": round(state["cpu"] / max(state["viewed"], 1e-9), 4),
        "messages": messages,
    }


def results_table(results: dict[str, Any]) -> Table:
    """The answer for people."""
    table = Table("viewer", "seconds a round", title=f"{results['devices']} devices, {results['rounds']} rounds")
    for kind, seconds in results["round_s"].items():
        table.add_row(kind, f"{seconds:.4f}")
    table.add_row("overhead", f"{100 * results['overhead']:+.2f} %")
    table.add_row("dashboard's CPU", f"{results['dashboard_cpu']:.3f} cores")
    return table


def _output_of(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _address(output: IO[bytes]) -> str:
    line = output.readline().decode()
    found = re.search(r"http://[^ ]+:\d+", line)
    if found is None:
        raise RunError(f"Expected the dashboard to start, and it said: {line.strip()}")
    return found.group()


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _settle(process: int) -> None:
    """Wait until the dashboard has computed what it does once for a run."""
    for _ in range(_SETTLING):
        before = _cpu_seconds(process)
        time.sleep(3)
        if _cpu_seconds(process) - before < 0.15:
            return


def _view(address: str, told: Connection) -> None:
    """Hold the run's stream open while told so; at the end tell how many messages came."""
    os.nice(15)
    messages, wanted = 0, "closed"
    while wanted != "end":
        if wanted == "closed":
            wanted = told.recv()
            continue
        try:
            with httpx.stream("GET", f"{address}/stream/run/run", timeout=30) as response:
                for line in response.iter_lines():
                    messages += line.startswith("data:")
                    if told.poll():
                        wanted = told.recv()
                        if wanted != "open":
                            break
        except httpx.TransportError:
            time.sleep(0.1)
    told.send(messages)
