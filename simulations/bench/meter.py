"""What a process spent: time by name, and the most memory."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def own_peak_mib() -> float:
    """Of this process, as :func:`peak_mib`."""
    return peak_mib(Path("/proc/self/status").read_text(encoding="utf-8"))


def peak_mib(status: str) -> float:
    """The peak of resident memory in what Linux says of a process."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024, 1)
