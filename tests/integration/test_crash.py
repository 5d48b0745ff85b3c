"""Runs that are killed or interrupted, by real signals to real processes, and go on."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import FEDTOPK, TINY, arguments, fedtopk

from server.ledger import LedgerReader
from server.store import open_store_read_only

LONG = TINY | {"training.rounds": 160, "training.checkpoint_every": 7}
LONG |= {"privacy.clip_quantile": 0.5, "training.start": "popularity"}


@contextmanager
def running(out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A simulation in a process of its own, which ends with the block."""
    words = [FEDTOPK, "simulate", "--out", str(out), "--workers", "1", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_checkpoint(run: Path, round_: int) -> None:
    deadline = time.monotonic() + 120
    while not any(int(path.stem[-6:]) >= round_ for path in run.glob("checkpoints/round-*.safetensors")):
        assert time.monotonic() < deadline, f"no checkpoint of round {round_}"
        time.sleep(0.01)


def interrupt(out: Path, settings: dict[str, object], after_round: int, number: signal.Signals) -> tuple[int, str]:
    """Start a run and send it a signal once it has a checkpoint of `after_round`; its exit code and errors."""
    with running(out, *arguments(settings)) as process:
        wait_for_checkpoint(out, after_round)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors


MANY = TINY | {"data.users": 1500, "data.items": 200, "training.rounds": 2000, "training.checkpoint_every": 1}
"""Enough devices for several blocks, and so for worker processes."""


def charges(run: Path) -> tuple[int, int]:
    """ε_model charges, and rounds that the ledger knows as released."""
    with open_store_read_only(run) as store:
        ledger = LedgerReader(store)
        return ledger.model_releases, len({entry.round for entry in ledger.entries() if entry.state == "released"})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = fedtopk("simulate", "--out", out, "--workers", "1", *arguments(LONG))
    assert done.returncode == 0, done.stderr
    return out


def test_killed_twice_and_resumed_gives_the_uninterrupted_model(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    code, _ = interrupt(out, LONG, 30, signal.SIGKILL)
    assert code == -signal.SIGKILL
    charged, released = charges(out)
    assert charged >= released >= 30
    assert not (out / "report.json").exists()

    with running(out, "--resume"):
        wait_for_checkpoint(out, 80)
    assert charges(out)[0] >= 80

    done = fedtopk("simulate", "--out", out, "--resume", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["status"], report["rounds"], report["privacy"]["releases"]) == ("finished", 160, 160)
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    whole = json.loads((uninterrupted / "report.json").read_text())
    assert report["evaluation"] == whole["evaluation"]
    assert report["client_updates"] == whole["client_updates"]
    clips = [dict(of["clip"]["by_round"]) for of in (report, whole)]
    assert clips[0].items() <= clips[1].items() and clips[0][160] == clips[1][160] != clips[1][2]


def test_lost_rounds_with_real_noise_are_charged_again(tmp_path: Path) -> None:
    """Rounds after the newest checkpoint were released; they run again under new attempts, until the budget ends."""
    out = tmp_path / "run"
    settings = LONG | {"privacy.randomness": "system", "training.checkpoint_every": 20, "training.rounds": 120}
    interrupt(out, settings, 40, signal.SIGKILL)
    done = fedtopk("simulate", "--out", out, "--resume", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with open_store_read_only(out) as store:
        entries = LedgerReader(store).entries()
    released = [entry for entry in entries if entry.state == "released"]
    again = len(released) - len({entry.round for entry in released})
    assert report["privacy"]["releases"] == len(released) <= 120
    assert report["rounds"] == 120 - again
    assert report["status"] == ("budget spent" if again else "finished")
    assert report["privacy"]["epsilon_model"] <= 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path: Path, uninterrupted: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    code, errors = interrupt(out, LONG, 20, number)
    assert code == 130
    assert "Traceback" not in errors
    assert "--resume" in errors
    stopped = json.loads((out / "report.json").read_text())
    assert stopped["status"] == "stopped"
    assert "evaluation" not in stopped
    done = fedtopk("simulate", "--out", out, "--resume", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert charges(out) == (160, 160)


def test_a_run_in_progress_keeps_others_out(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(out, *arguments(LONG | {"training.rounds": 5000})):  # outlasts the other's start
        wait_for_checkpoint(out, 7)
        done = fedtopk("simulate", "--out", out, "--resume")
    assert done.returncode == 1
    assert "a running process is writing to this run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    interrupt(out, LONG, 30, signal.SIGKILL)
    newest = max(out.glob("checkpoints/round-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    done = fedtopk("simulate", "--out", out, "--resume")
    assert done.returncode == 1
    assert str(newest) in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    newest.unlink()  # as the message says
    done = fedtopk("simulate", "--out", out, "--resume", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("delay", [2.0, 4.0, 7.0])
def test_ctrl_c_while_worker_processes_start(tmp_path: Path, delay: float) -> None:
    """As a terminal sends it: to the whole process group, workers included."""
    words = [FEDTOPK, "simulate", "--out", str(tmp_path / "run"), "--workers", "2", *arguments(MANY)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    with running(tmp_path / "run", "--workers", "2", *arguments(MANY)) as process:
        wait_for_checkpoint(tmp_path / "run", 1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "worker processes live on"
        time.sleep(0.1)
