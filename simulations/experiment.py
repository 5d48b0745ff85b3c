"""Experiments of many trainings: each result is a file, several processes work, and what is there is not done again."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common.errors import RunError
from server.durable import make_folder, replacing
from simulations.processes import start_worker

Job = tuple[str, int]
"""A name and a seed."""


def run_jobs(
    out: Path,
    stamp: Mapping[str, Any],
    jobs: list[Job],
    run: Callable[[Job], dict[str, Any]],
    *,
    workers: int,
    on_done: Callable[[int, str], None],
) -> dict[Job, dict[str, Any]]:
    """The result of every job, in their order.

    Args:
        out: folder of the results; the same call goes on where an earlier one was interrupted.
        stamp: what all results depend on, as JSON knows it.
        run: a picklable function; called in another process, with the next job of the list.
        workers: number of those processes; they change no result.
        on_done: called with the number of results that are there, and the name of the newest.

    Raises:
        RunError: `out` holds results with another stamp.
    """
    make_folder(out)
    claim(out / "experiment.json", json.loads(json.dumps(stamp)))
    missing = [job for job in jobs if not _file(out, job).exists()]
    done = len(jobs) - len(missing)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        running = {pool.submit(run, job): job for job in missing}
        for future in as_completed(running):
            job = running[future]
            with replacing(_file(out, job)) as file:
                file.write_text(json.dumps(future.result(), indent=1), encoding="utf-8")
            done += 1
            on_done(done, f"{job[0]}, seed {job[1]}")
    return {job: json.loads(_file(out, job).read_text(encoding="utf-8")) for job in jobs}


def mean_of(values: list[float]) -> dict[str, Any]:
    """``{"value", "ci95"}``: the mean over seeds and Student's 95 % interval; none for a single seed."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return {"value": mean}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return {"value": mean, "ci95": [mean - half, mean + half]}


def in_words(figure: Mapping[str, Any], digits: int = 3) -> str:
    """A figure of :func:`mean_of` for a rich table."""
    interval = ", ".join(f"{end:.{digits}f}" for end in figure.get("ci95", ()))
    return f"{figure['value']:.{digits}f}" + (f" \\[{interval}]" if interval else "")


def _file(out: Path, job: Job) -> Path:
    return out / f"{job[0].replace(' ', '-').replace(',', '')}.{job[1]}.json"


def claim(file: Path, stamp: dict[str, Any]) -> None:
    """Write what all results beside `file` depend on. Raises :class:`RunError` if it is there and says otherwise."""
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != stamp:
        raise RunError(f"Expected {file.parent} to hold results of the same settings: pick another --out.")
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
