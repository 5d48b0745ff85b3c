"""A device's store under real processes that are killed, and beside each other."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from client.device_contents import Event
from client.device_store import DATABASE, DeviceStore
from client.store_key import KeyFile
from common.errors import DataError, RunError

JOURNAL = f"{DATABASE}-journal"
OPENING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from client.device_contents import Event, ReceivedModel
from client.device_store import DeviceStore
from client.store_key import KeyFile

folder = Path(sys.argv[1])
store = DeviceStore.open(folder, KeyFile(folder.parent / "key"))

def write(number):
    store.add_events([Event(f"planted item {number}", 3.5, number)])
    store.save_user(np.full(3, number, np.float32))
    store.records["number"] = str(number).encode()
    store.save_model(ReceivedModel(bytes([number % 256]) * 300_000, {"number": str(number)}))
    store.charge(str(number).encode())
"""
WRITING = (
    OPENING
    + """
for number in range(store.event_count, 1_000_000):
    with store.transaction():
        write(number)
    print(number, flush=True)
"""
)
KILLED_WHILE_WRITING = (
    OPENING
    + """
store._database._connection.execute("PRAGMA cache_size=5")  # what does not fit is written to the file at once
with store.transaction():
    write(store.event_count)
    os.kill(os.getpid(), signal.SIGKILL)
"""
)
HOLDING = (
    OPENING
    + """
print("open", flush=True)
import time
time.sleep(60)
"""
)
CREATING = """
import os, signal, sys
from pathlib import Path
from client.device_store import DeviceStore
from client.store_key import KeyFile

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.link = kill
DeviceStore.create(Path(sys.argv[1]), KeyFile(Path(sys.argv[1]).parent / "key"))
"""


@contextmanager
def process(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, which ends with the block."""
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def killed(program: str, folder: Path) -> None:
    with process(program, folder) as running:
        assert running.wait(60) == -signal.SIGKILL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three whole changes, closed."""
    folder = tmp_path / "device"
    DeviceStore.create(folder, KeyFile(tmp_path / "key")).close()
    with process(WRITING, folder) as running:
        assert running.stdout is not None
        for _ in range(3):
            running.stdout.readline()
    return folder


def reopen(folder: Path) -> DeviceStore:
    return DeviceStore.open(folder, KeyFile(folder.parent / "key"))


def whole_changes(folder: Path) -> int:
    """How many changes the store holds, each of them whole."""
    with reopen(folder) as store:
        count = store.event_count
        model, user = store.load_model(), store.load_user()
        assert model is not None and user is not None
        assert store.events() == [Event(f"planted item {number}", 3.5, number) for number in range(count)]
        assert (user == np.float32(count - 1)).all()
        assert store.records["number"] == str(count - 1).encode()
        assert model.metadata == {"number": str(count - 1)}
        assert model.content == bytes([(count - 1) % 256]) * 300_000
        assert store.charges() == [str(number).encode() for number in range(count)]
    return count


def test_killed_at_any_time_nothing_that_was_finished_is_lost(folder: Path) -> None:
    for delay in (0.0, 0.013, 0.031, 0.057, 0.11):
        before = whole_changes(folder)
        with process(WRITING, folder) as running:
            assert running.stdout is not None
            finished = [int(running.stdout.readline())]
            time.sleep(delay)
            running.send_signal(signal.SIGKILL)
            finished += [int(line) for line in running.stdout if line.endswith("\n")]
        assert finished == list(range(before, before + len(finished)))
        # One more may have been finished and not told of.
        assert before + len(finished) <= whole_changes(folder) <= before + len(finished) + 1


def test_killed_in_the_middle_of_writing(folder: Path) -> None:
    before, written = whole_changes(folder), (folder / DATABASE).read_bytes()
    killed(KILLED_WHILE_WRITING, folder)
    assert (folder / DATABASE).read_bytes() != written
    journal = (folder / JOURNAL).read_bytes()
    assert journal and all(b"planted" not in content for content in (journal, (folder / DATABASE).read_bytes()))
    assert whole_changes(folder) == before


def test_a_damaged_journal_gives_no_half_change(folder: Path) -> None:
    before = whole_changes(folder)
    killed(KILLED_WHILE_WRITING, folder)
    hot = shutil.copytree(folder, folder.parent / "hot")
    size, noticed = (hot / JOURNAL).stat().st_size, 0
    for at in (0, 9, 15, 20, 24, 512, 517, 3000, size // 3, size // 2, size - 3):
        shutil.rmtree(folder)
        shutil.copytree(hot, folder)
        journal = bytearray((hot / JOURNAL).read_bytes())
        journal[at] ^= 0xFF
        (folder / JOURNAL).write_bytes(journal)
        with suppress(DataError):
            assert whole_changes(folder) == before
            continue
        assert not (folder / DATABASE).exists()
        noticed += 1
    assert noticed


def test_one_process_at_a_time(folder: Path) -> None:
    with process(HOLDING, folder) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(RunError, match="a running process has this store open"):
            reopen(folder)
    assert whole_changes(folder) >= 3  # a killed process holds nothing


def test_killed_while_the_store_is_made(tmp_path: Path) -> None:
    folder, key = tmp_path / "device", KeyFile(tmp_path / "key")
    killed(CREATING, folder)
    with pytest.raises(RunError, match="is missing"):
        DeviceStore.open(folder, key)
    with pytest.raises(RunError, match="Delete it if no store uses it"):
        DeviceStore.create(folder, key)
    key.path.unlink()  # as the message says
    DeviceStore.create(folder, key).close()
    DeviceStore.open(folder, key).close()
