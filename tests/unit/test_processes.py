"""Children that end with their parent however it ends, and what they inherit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from common.processes import running, secret_files

PARENT = """
import subprocess, threading, time
from common.processes import running

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with running(["/bin/sleep", "60"], {}, subprocess.DEVNULL) as process:
    print(process.pid, flush=True)
    time.sleep(60)
"""


def name_of(pid: int) -> str:
    """What a process runs; nothing if it has ended."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return "" if rest.split()[0] == "Z" else name
    except OSError:
        return ""


def becomes(pid: int, name: str) -> bool:
    """Within ten seconds."""
    end = time.monotonic() + 10
    while name_of(pid) != name and time.monotonic() < end:
        time.sleep(0.02)
    return name_of(pid) == name


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert becomes(child, "sleep")
        finally:
            parent.kill()
    assert becomes(child, "")


def test_a_child_ends_with_its_block(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, running(["/bin/sleep", "60"], {}, log) as process:
        assert becomes(process.pid, "sleep")
    assert process.returncode == -signal.SIGTERM and name_of(process.pid) == ""


def test_a_child_has_its_words_its_environment_and_the_secrets(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[2:], os.environ['MORE'], open(sys.argv[1]).read(), oct(os.umask(0)))"
    with (tmp_path / "log").open("wb") as log, secret_files(b"secret") as [(descriptor, path)]:
        words = [sys.executable, "-c", code, path, "a b", "--c"]
        with running(words, {"MORE": "than before"}, log, [descriptor]) as process:
            assert process.wait(30) == 0
    assert (tmp_path / "log").read_text() == "['a b', '--c'] than before secret 0o77\n"
