"""`fedtopk bench engine`: device updates per second of our batched engine and of others, on the same work.

==========  ==========================================================================================================
`fedtopk`   :class:`simulations.batched_cohort.BatchedCohort`, whole cohorts; for the workload `full` with the release,
            which the others leave out
`plain`     device after device in PyTorch: forward, backward, clip, add; in one process, and in as many as ours
`flower`    Flower's simulation on Ray, one actor a process of ours, whose clients run the plain loop; 200 nodes
`pfl`       pfl-research's simulated backend, in as many processes as ours, whose users run the plain loop
`fedjax`    FedJAX's `for_each_client`, compiled by XLA, in as many independent processes as ours
==========  ==========================================================================================================

An engine counts only if its sum is the batched engine's. Each has processes of its own, and a first cohort that does
not count: starting up ends where it could have begun. The model does not change meanwhile. Other programs on the
machine count: run it on an idle one (`machine.load`).

The last two are peers, which are not installed with fedtopk and do the workload `reference` only: for one that is not
there, or does not work, the results say why, and the others stand as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from statistics import median
from typing import Any, Literal

from rich.table import Table

from simulations.bench.engine_loops import measure_batched, measure_plain
from simulations.bench.engine_workloads import Workload
from simulations.bench.machine import machine
from simulations.bench.meter import Effort, Measured

Engine = Literal["fedtopk", "plain", "flower", "pfl", "fedjax"]

PEERS: dict[Engine, tuple[str, ...]] = {"pfl": ("pfl",), "fedjax": ("fedjax", "jax")}
"""Engines that are measured where they are installed, and the packages whose versions count."""
FLOWER_NODES = 200
_SECONDS: dict[Engine, float] = {"fedtopk": 3.0, "plain": 6.0, "flower": 0.0, "pfl": 6.0, "fedjax": 6.0}
"""How long a run lasts at least; a round of Flower's takes long enough."""

_GROWTH: dict[str, Sequence[float]] = {"devices": (0.1, 10), "cohort": (0.025, 0.25, 5), "items": (10,), "steps": (4,)}
"""Factors of each size, the others being as they are."""
_SLICED_CATALOGUE = 20
"""Times as many items, of which a round's slice are as many as there are in the workload."""


@dataclass(frozen=True)
class Job:
    """What becomes one row."""

    engine: Engine
    workload: Workload
    effort: Effort

    def row(self) -> dict[str, Any]:
        """Measure. Raises :class:`AggregationError` where an engine fails or has another sum; a peer may raise more."""
        measured, workload = self._measure(), self.workload
        middle = median(measured.runs)
        return {
            "engine": self.engine,
            "softmax": workload.softmax,
            "workers": self.effort.workers,
            "devices": workload.devices,
            "cohort": workload.cohort,
            "items": workload.items,
            "steps": workload.steps,
            "slice": workload.slice_items,
            "parameters": workload.dimension,
            "updates_per_second": round(middle, 1),
            "spread": round((max(measured.runs) - min(measured.runs)) / middle, 3),
            "peak_rss_mib": round(measured.peak_rss_mib, 1),
            "startup_s": round(measured.startup_s, 2),
            "runs": [round(rate, 1) for rate in measured.runs],
        }

    def _measure(self) -> Measured:
        if self.engine == "fedtopk":
            return measure_batched(self.workload, self.effort)
        if self.engine == "plain":
            return measure_plain(self.workload, self.effort)
        if self.engine == "flower":
            from simulations.bench.engine_flower import measure_flower

            return measure_flower(self.workload, self.effort)
        if self.engine == "pfl":
            from simulations.bench.engine_pfl import measure_pfl

            return measure_pfl(self.workload, self.effort)
        from simulations.bench.engine_fedjax import measure_fedjax

        return measure_fedjax(self.workload, self.effort)


def compared(
    workloads: Sequence[Workload], engines: Sequence[Engine], workers: int, runs: int, *, quick: bool = False
) -> list[Job]:
    """The rows of the comparison."""
    jobs = []
    for workload in workloads:
        for engine in engines:
            effort = Effort(workers, runs, 0.0 if quick else _SECONDS[engine])
            if engine == "plain" and workers > 1:
                jobs.append(Job(engine, workload, replace(effort, workers=1)))
            jobs.append(Job(engine, workload.limited(FLOWER_NODES) if engine == "flower" else workload, effort))
    return jobs


def grown(workload: Workload, workers: int, runs: int, *, quick: bool = False) -> list[Job]:
    """Rows of our engine, each with one size that differs from the workload's, after the workload itself."""
    effort = Effort(workers, runs, 0.0 if quick else _SECONDS["fedtopk"])
    jobs = [Job("fedtopk", workload, effort)]
    for size, factors in _GROWTH.items():
        for factor in factors:
            jobs.append(Job("fedtopk", workload.scaled(size, factor), effort))
    sliced = replace(workload.scaled("items", _SLICED_CATALOGUE), slice_items=workload.items)
    jobs.append(Job("fedtopk", sliced, effort))
    return jobs + [Job("fedtopk", workload, replace(effort, workers=1))] * (workers > 1)


def bench_engine(
    comparison: Sequence[Job], growth: Sequence[Job], on_step: Callable[[int, str], None]
) -> dict[str, Any]:
    """``{"machine", "workload", "rows", "absent", "ratios", "growth"}``; `absent`: by peer, why it has no row.

    Args:
        on_step: called before each job, with how many are done and the engine's name, and at the end.

    Raises:
        AggregationError: an engine fails or has another sum, and is no peer.
    """
    jobs, asked = [*comparison, *growth], {job.engine for job in comparison}
    packages = [name for peer, names in PEERS.items() if peer in asked for name in names if installed(name)]
    where, found = machine("torch", "numpy", "flwr", "ray", *packages), []
    for done, job in enumerate(jobs):
        on_step(done, job.engine)
        found.append(_row_or_reason(job))
    on_step(len(jobs), "")
    rows = [row for row in found[: len(comparison)] if isinstance(row, dict)]
    return {
        "machine": where,
        "workload": jobs[0].workload.name,
        "rows": rows,
        "absent": {job.engine: why for job, why in zip(jobs, found, strict=True) if isinstance(why, str)},
        "ratios": _ratios(rows),
        "growth": found[len(comparison) :],
    }


def _row_or_reason(job: Job) -> dict[str, Any] | str:
    """The row, or why a peer has none."""
    if job.engine not in PEERS:
        return job.row()
    if not installed(job.engine):
        return "not installed"
    if job.workload.name != "reference":
        return "does the workload reference only"
    try:
        return job.row()
    except Exception as error:  # whatever comes of packages that were made for other versions of each other
        return f"{type(error).__name__}: {error}"


def installed(package: str) -> bool:
    """Asked without importing it."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By softmax and other engine: how many times as fast ours is, with as many processes."""
    ratios: dict[str, dict[str, float]] = {}
    for ours in (row for row in rows if row["engine"] == "fedtopk"):
        ratios[ours["softmax"]] = {
            row["engine"]: round(ours["updates_per_second"] / row["updates_per_second"], 1)
            for row in rows
            if row["engine"] != "fedtopk" and row["softmax"] == ours["softmax"] and row["workers"] == ours["workers"]
        }
    return ratios


def results_table(results: dict[str, Any]) -> Table:
    """The rows for people."""
    ratios = [
        f"{softmax} softmax: {ratio:g} times {engine}"
        for softmax, engines in results["ratios"].items()
        for engine, ratio in engines.items()
    ]
    table = Table(title=f"Workload {results['workload']}", caption="; ".join(ratios) or None)
    columns = {
        "engine": "engine",
        "softmax": "softmax",
        "workers": "processes",
        "devices": "devices",
        "cohort": "cohort",
        "items": "items",
        "steps": "steps",
        "slice": "slice",
        "parameters": "parameters",
        "updates_per_second": "updates/s",
        "spread": "spread",
        "peak_rss_mib": "peak MiB",
        "startup_s": "start s",
    }
    for name, heading in columns.items():
        table.add_column(heading, justify="left" if name in ("engine", "softmax") else "right")
    for part in ("rows", "growth"):
        for row in results[part]:
            table.add_row(*(str(row[name]) for name in columns))
        if part == "rows":
            for peer, why in results["absent"].items():
                table.add_row(peer, why)
        table.add_section()
    return table
