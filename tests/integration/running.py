"""How integration tests run the command: in this process, or as a user does, in one of its own."""

import io
import signal
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from common.settings import load_settings
from server.checkpoint import Checkpoint
from server.run_folder import RunFolder
from simulations.cli import main
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


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


def fedtopk(*words: str | Path) -> Done:
    """Run the command to its end by its entry point, in this process, which has imported torch and the accountants
    already: those seconds are most of what a small command costs. An error that is not the user's comes out here."""
    out, errors = io.StringIO(), io.StringIO()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with (
            patch.object(sys, "argv", ["fedtopk", *map(str, words)]),
            redirect_stdout(out),
            redirect_stderr(errors),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return Done(int(ended.value.code or 0), out.getvalue(), errors.getvalue())


def fedtopk_process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end as a user does."""
    return subprocess.run([FEDTOPK, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)


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


def user_embeddings(run: Path, checkpoint: Checkpoint) -> np.ndarray:
    """(N, w) what all devices of a simulation had at a checkpoint: what it holds, laid over the file of the run."""
    users: np.ndarray = np.load(RunFolder(run).user_embeddings)
    users[checkpoint.extra["devices"].numpy()] = checkpoint.extra["users"].numpy()
    return users
