"""Calls in a process beside this one: what comes back, and when the process ends."""

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import RunError
from server.dashboard.aside import Aside

PARENT = """
import os, time
from server.dashboard.aside import Aside

print(Aside()(os.getpid)[0], flush=True)
time.sleep(60)
"""


def ends(pid: int) -> bool:
    """Within ten seconds."""
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def aside() -> Iterator[Aside]:
    with closing(Aside()) as aside:
        yield aside


def test_answers_and_errors_come_back_and_the_process_stays(aside: Aside) -> None:
    pid, seconds = aside(os.getpid)
    assert pid != os.getpid() and seconds > 0
    with pytest.raises(ZeroDivisionError):
        aside(operator.truediv, 1, 0)
    assert aside(operator.add, "ε", "δ")[0] == "εδ"
    assert aside(os.getpid)[0] == pid


def test_a_process_that_is_ended_is_told_of_and_replaced(aside: Aside) -> None:
    with pytest.raises(RunError, match=r"Expected _exit to be computed"):
        aside(os._exit, 3)
    pid, _ = aside(os.getpid)
    os.kill(pid, signal.SIGKILL)
    assert aside(os.getpid)[0] != pid


def test_it_ends_when_nobody_calls() -> None:
    with closing(Aside(idle_seconds=0.1)) as aside:
        pid, _ = aside(os.getpid)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.02)
        assert aside(os.getpid)[0] != pid
        assert ends(pid)


def test_it_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
        finally:
            parent.kill()
    assert ends(pid)
