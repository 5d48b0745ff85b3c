"""What a process spent: time by name, and the most memory; and what is measured of an engine.

Without PyTorch, which not every engine's process imports.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median


class Meter:
    """Seconds by name, one number for each time that something of the name was done.

    Args:
        clock: seconds, such as `time.process_time`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._clock = clock

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._clock()
        yield
        self.seconds[name].append(self._clock() - begin)

    def ms(self, name: str, skip: int = 1) -> float:
        """The median without the first ones."""
        return round(1e3 * median(self.seconds[name][skip:]), 3)


def peak_mib(status: str) -> float:
    """The peak of resident memory in what Linux says of a process; 0 of one that has ended."""
    return sum(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        workers: processes.
        runs: measurements.
        seconds: how long one lasts at least.
    """

    workers: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What one engine did.

    Attributes:
        runs: device updates per second of each run.
        startup_s: seconds from its start until it is ready for a first cohort that costs what the later ones do.
        peak_rss_mib: each of its processes' most resident memory, summed; pages that they share count in each.
    """

    runs: list[float]
    startup_s: float
    peak_rss_mib: float


def rate(step: Callable[[], int], seconds: float) -> float:
    """Devices per second of steps that each compute some, for so long or once."""
    devices, begin = 0, time.monotonic()
    while True:
        devices += step()
        elapsed = time.monotonic() - begin
        if elapsed >= seconds:
            return devices / elapsed


def peak_rss_mib(pids: Iterable[int | str] = ("self",)) -> float:
    """The most memory that each of the processes had resident, summed; those that are gone count 0."""
    total = 0.0
    for pid in pids:
        try:
            total += peak_mib(Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
        except OSError:
            continue
    return total
