"""A browser, dashboards and runs, as processes of their own that end with the tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from running import FEDTOPK, TINY, arguments  # noqa: E402

TOKEN = "the operator's token"
LIVE = TINY | {
    "training.rounds": 4000,
    "training.checkpoint_every": 200,
    "objective.estimator": "top-k",
    "objective.watch": "true",
    "objective.warmup_rounds": 2,
    "evaluation.every": 3,
}
"""A run that goes on for longer than any test."""


@contextmanager
def process(*words: str | Path, quiet: bool = True) -> Iterator[subprocess.Popen[str]]:
    """The command, ended by its process with the block."""
    output = subprocess.DEVNULL if quiet else subprocess.PIPE
    with subprocess.Popen([FEDTOPK, *map(str, words)], stdout=output, stderr=output, text=True) as child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()


@contextmanager
def serving(root: Path, port: int = 0) -> Iterator[str]:
    """A dashboard over `root`; its address."""
    with process("dashboard", root, "--port", str(port), "--token", TOKEN, quiet=False) as child:
        assert child.stderr is not None
        line = child.stderr.readline()
        found = re.search(r"http://[^ ]+:\d+", line)
        assert found, line
        yield found.group()


@contextmanager
def training(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A simulation that goes on until it is told to end."""
    with process("simulate", "--out", out, "--workers", "1", *arguments(LIVE)) as child:
        yield child


def wait_until(what: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's browser."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    return executable


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator["sync_api.Browser"]:
    """It speaks to nobody but our pages, and ends with them: its event loop would be in the way of others'."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *quiet])
        try:
            yield browser
        finally:
            browser.close()
