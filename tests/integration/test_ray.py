"""The batched engine on a real Ray cluster, one of whose workers is killed in the middle of a round."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import FEDTOPK, TINY, arguments, fedtopk

from common.flower_tasks import free_port

RAY = str(Path(sys.executable).with_name("ray"))
SETTINGS = TINY | {
    "data.users": 3000,
    "data.items": 300,
    "training.rounds": 5,
    "training.cohort_rate": 1.0,
    "training.local_steps": 2,
}
"""Rounds of a second or two, so that one can be met."""


def processes(words: str) -> list[int]:
    """Those whose command line holds the words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if words.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a head with two cores; all its processes end with the test."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: sockets are below it
        port = free_port()
        words = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
        words += ["--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        head = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            end = time.monotonic() + 60
            while not processes(f"{folder}/session") and time.monotonic() < end:
                time.sleep(0.5)
            yield f"127.0.0.1:{port}"
        finally:
            for pid in (*processes(folder), head.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            head.wait()


def test_a_killed_worker_changes_nothing(cluster: str, tmp_path: Path) -> None:
    words = [FEDTOPK, "simulate", "--out", str(tmp_path / "ray"), "--ray", cluster, *arguments(SETTINGS)]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end, killed = time.monotonic() + 120, 0
        while not killed and time.monotonic() < end and run.poll() is None:
            for pid in processes("ray::_shard"):
                time.sleep(0.2)  # into its work
                os.kill(pid, signal.SIGKILL)
                killed = pid
                break
            time.sleep(0.02)
        said, _ = run.communicate(timeout=200)
    finally:
        run.kill()
    assert killed, said
    assert run.returncode == 0, said
    plain = fedtopk("simulate", "--out", tmp_path / "one", "--workers", "1", *arguments(SETTINGS))
    assert plain.returncode == 0, plain.stderr
    assert (tmp_path / "ray/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = fedtopk("simulate", "--out", tmp_path / "run", "--ray", f"127.0.0.1:{free_port()}", *arguments(SETTINGS))
    assert done.returncode == 1 and "Expected a Ray cluster at 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr
