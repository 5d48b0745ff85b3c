"""How integration tests run the command: as a user does, in a process of its own."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.settings import load_settings
from server.run_folder import RunFolder
from simulations.simulate import Watch
from simulations.simulate import simulate as run_simulation

FEDTOPK = str(Path(sys.executable).with_name("fedtopk"))

TINY = {
    "data.source": "synthetic",
    "data.users": 40,
    "data.items": 60,
    "model.input_width": 4,
    "model.state_width": 6,
    "model.user_width": 3,
    "objective.negatives": 20,
    "objective.warmup_rounds": 2,
    "training.rounds": 6,
    "training.cohort_rate": 0.4,
    "privacy.randomness": "seeded",
    "privacy.delta": 1e-4,
}
"""Settings of a run that takes a second."""


def arguments(settings: dict[str, Any]) -> list[str]:
    """The settings as `--set` options."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def fedtopk(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [FEDTOPK, *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300
    )


def simulate(out: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run in this process; returns its report. Dots in names of `changes` are written as two underscores."""
    tree = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    settings = load_settings(None, [f"{key}={value}" for key, value in tree.items()])
    silent = Watch(
        note=lambda sentence: None,
        on_round=lambda progress, remark: None,
        patient=lambda: nullcontext(lambda: False),
    )
    return run_simulation(RunFolder(out), silent, settings=settings, workers=1)
