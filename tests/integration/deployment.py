"""A deployment on loopback of which a test starts, watches and kills each process by itself."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from running import FEDTOPK, TINY

from client.device_contents import Event as Interaction
from client.device_store import DeviceStore
from client.ledger import Charge
from client.store_key import KeyFile
from common.settings import Settings
from server.events import Event, EventReader
from server.ledger import Entry, LedgerReader
from server.site import Site
from server.store import DATABASE, open_store_read_only
from simulations.fleet import set_up
from simulations.simulate import load_split

DEVICES = 4
SETTINGS = {
    key: value for key, value in TINY.items() if key.startswith(("data.source", "data.items", "model.", "objective."))
} | {
    "privacy.randomness": "seeded",
    "privacy.delta": 1e-4,
    "training.checkpoint_every": 1,
    "privacy.clip_quantile": 0.5,
    "training.start": "popularity",
}
"""Of fleets and deployments here, with what `fedtopk fleet` sets."""

Process = subprocess.Popen[bytes]

_POLL_SECONDS = 0.05
_END_SECONDS = 15


def wait_for(condition: Callable[[], object], seconds: float, what: str, *needed: Process) -> None:
    """Fail if the condition does not hold within so many seconds, or one of the processes that it needs has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        assert all(process.poll() is None for process in needed), f"{what}: a process ended before"
        time.sleep(_POLL_SECONDS)


def children(process: Process) -> list[int]:
    """The pids of what a process has started."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs: not one that has ended, and that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Processes:
    """Processes of `fedtopk`, each ended by its own pid."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def start(self, log: Path, *words: str | Path) -> Process:
        """One with these words, in a session of its own as in a terminal of its own; what it says goes to `log`."""
        environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "COLUMNS": "200"}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [FEDTOPK, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def kill(self, process: Process) -> float:
        """As kill -9 does it; seconds until what it had started has ended too."""
        started, begin = children(process), time.monotonic()
        assert started and process.poll() is None
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(alive, started)), _END_SECONDS, f"an end of {started}, left by a killed process")
        return time.monotonic() - begin

    def end(self) -> None:
        """End all that still run, with SIGTERM."""
        left = [process for process in self._started if process.poll() is None]
        for process in left:
            process.terminate()
        for process in left:
            try:
                process.wait(2 * _END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def processes() -> Iterator[Processes]:
    """A group of processes that ends with this block."""
    group = Processes()
    try:
        yield group
    finally:
        group.end()


@contextmanager
def opened(folder: Path) -> Iterator[DeviceStore]:
    """The store of one of the devices of `set_up`, with its key."""
    with DeviceStore.open(folder, KeyFile(folder.with_name(f"{folder.name}.key")), patience=10.0) as store:
        yield store


@dataclass(frozen=True)
class Kept:
    """What a device has of its user, and how often it took part."""

    history: list[Interaction]
    user: np.ndarray | None
    charges: list[Charge]

    @classmethod
    def by(cls, folder: Path) -> "Kept":
        with opened(folder) as store:
            return cls(store.events(), store.load_user(), [Charge.parse(entry) for entry in store.charges()])

    @property
    def attempts(self) -> list[tuple[int, int]]:
        """Round and attempt of each charge."""
        return [(charge.round, charge.attempt) for charge in self.charges]


class Deployment:
    """A server, and devices that are enrolled and have joined, in a folder; nothing runs yet.

    Attributes:
        home: where the authority, the server's folder and the devices' are.
        run: the run folder.
    """

    def __init__(self, home: Path, settings: Settings, group: Processes) -> None:
        self.home, self.run, self._group = home, home / "run", group
        self.site: Site = set_up(home, settings, load_split(settings).train)

    def device(self, number: int) -> Path:
        return self.home / "devices" / str(number)

    def start_device(self, number: int) -> Process:
        folder = self.device(number)
        return self._group.start(folder / "device.log", "device", "start", folder)

    def start_server(self, *options: str) -> Process:
        words = ("server", "start", self.site.path, "--out", self.run, "--host", "127.0.0.1", *options)
        return self._group.start(self.home / "server.log", *words)

    def said(self, number: int) -> str:
        """What a device has told its owner so far."""
        return _text(self.device(number) / "device.log")

    def node_said(self, number: int) -> str:
        """What a device's SuperNode has logged so far."""
        return _text(self.device(number) / "supernode.log")

    def server_said(self) -> str:
        """What the server has told its operator so far."""
        return _text(self.home / "server.log")

    def entries(self) -> list[Entry]:
        """The server's privacy ledger."""
        if not (self.run / DATABASE).exists():
            return []
        with open_store_read_only(self.run) as store:
            return LedgerReader(store).entries()

    def states(self) -> dict[tuple[int, int], str]:
        """The state of each attempt, by round and attempt."""
        return {(entry.round, entry.attempt): entry.state for entry in self.entries()}

    def events(self, *kinds: str) -> list[Event]:
        with open_store_read_only(self.run) as store:
            return EventReader(store).read(kinds=kinds)


def interrupt(process: Process) -> None:
    """As Ctrl-C in its terminal: to all processes there."""
    os.killpg(process.pid, signal.SIGINT)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
