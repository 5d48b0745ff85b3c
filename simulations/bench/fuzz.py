"""`fedtopk bench fuzz`: coverage-guided fuzzing of every reader of secure aggregation's messages.

atheris (libFuzzer) counts the branches of :mod:`common` that an input reaches and changes those that reached new ones.
One process loads it and the targets (:mod:`simulations.bench.fuzz_targets`) and forks once for each target, because
libFuzzer ends the process that it ran in. A failure is anything but a :class:`FedtopkError`: another exception, more
than a second for one input, or memory beyond :data:`_MEMORY`.

Needs the extra: pip install 'fedtopk[dev]'.
"""

import atexit
import contextlib
import ctypes
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.table import Table

from common.errors import FedtopkError, MissingDependency

if TYPE_CHECKING:
    from simulations.bench.fuzz_targets import Target

_MEMORY = 64 << 20  # bytes beyond those at the start, for the input and for what the fuzzer keeps
_SECONDS = 1
_KEEPING = 4  # all changes but one in so many keep the length, which most messages have fixed
_PR_SET_PDEATHSIG = 1


def fuzz(inputs: int, seed: int, on_target: Callable[[int, str], None]) -> dict[str, Any]:
    """Try at least `inputs` inputs, spread over the targets.

    Args:
        seed: of the keys and of the fuzzer's choices.
        on_target: told after each target how many inputs were tried so far, and its name.

    Returns:
        ``{"targets": [{"name", "inputs", "seconds", "crashes"}], "inputs", "crashes"}``; a target ends with its first
        crash, and then also has its ``"error"`` and the ``"input"`` in hexadecimal digits.

    Raises:
        MissingDependency: atheris is missing.
    """
    if find_spec("atheris") is None:
        raise MissingDependency("Expected atheris to fuzz the messages (pip install 'fedtopk[dev]').")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedtopk-fuzz-") as folder:
        words = [sys.executable, "-m", __name__, str(inputs), str(seed), folder]
        log = Path(folder, "log")
        with log.open("w") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                rows.append(json.loads(line))
                on_target(sum(row["inputs"] for row in rows), rows[-1]["name"])
        if process.returncode:
            raise ChildProcessError(log.read_text(errors="replace"))
    totals = {name: sum(row[name] for row in rows) for name in ("inputs", "crashes")}
    return {"targets": rows, **totals}


def results_table(results: dict[str, Any]) -> Table:
    """The targets for people."""
    table = Table("reader", "inputs", "seconds", "crashes", "error", title="Fuzzing")
    for row in results["targets"]:
        table.add_row(*(str(row.get(name, "")) for name in ("name", "inputs", "seconds", "crashes", "error")))
    table.add_section()
    table.add_row("all", str(results["inputs"]), "", str(results["crashes"]), "")
    return table


def _fuzz_all(inputs: int, seed: int, folder: Path) -> None:
    """Each target in a fork, as many at a time as there are cores; a line of JSON for each that has ended."""
    _end_with_parent()
    import atheris

    with atheris.instrument_imports(include=["common"]):
        from simulations.bench.fuzz_targets import targets

    waiting = targets(seed)
    weight = sum(target.weight for target in waiting)
    running: dict[int, tuple[Target, int, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            target = waiting.pop(0)
            count, place = math.ceil(inputs * target.weight / weight), folder / target.name
            (place / "corpus").mkdir(parents=True)
            begin = time.perf_counter()
            process = os.fork()
            if not process:
                _fuzz_one(target, count, seed, place)
            running[process] = target, count, place, begin
        process, status = os.wait()
        target, count, place, begin = running.pop(process)
        row = _row(target.name, count, place, failed=status != 0)
        print(json.dumps(row | {"seconds": round(time.perf_counter() - begin, 2)}), flush=True)


def _fuzz_one(target: "Target", count: int, seed: int, place: Path) -> NoReturn:
    """In the target's own process, which this ends."""
    import atheris

    _end_with_parent()
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number, content in enumerate(target.seeds):
        target.read(content)
        (place / "corpus" / f"valid-{number}").write_bytes(content)

    def read(content: bytes) -> None:
        with contextlib.suppress(FedtopkError):
            target.read(content)

    def mutate(content: bytes, most: int, number: int) -> bytes:
        changed: bytes = atheris.Mutate(content, most)
        return changed[: len(content)].ljust(len(content), b"\0") if number % _KEEPING else changed

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # of data
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    limits = [f"-atheris_runs={count}", f"-timeout={_SECONDS}", "-len_control=0", f"-seed={seed + 1}"]
    words = ["fuzz", *limits, f"-artifact_prefix={place}/found-", str(place / "corpus")]
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # libFuzzer's own, which would kill the ending interpreter
    atheris.Setup(words, read, custom_mutator=mutate)
    atheris.Fuzz()
    sys.exit("Expected libFuzzer to end the process.")


def _row(name: str, count: int, place: Path, *, failed: bool) -> dict[str, Any]:
    log = (place / "log").read_text(errors="replace")
    tried = re.findall(r"^Done (\d+) ", log, re.MULTILINE) or re.findall(r"^#(\d+)\t", log, re.MULTILINE)
    row: dict[str, Any] = {"name": name, "inputs": int(tried[-1]) if tried else 0, "seconds": 0.0, "crashes": 0}
    if failed or row["inputs"] < count:
        found = b"".join(path.read_bytes() for path in place.glob("found-*"))
        row |= {"crashes": 1, "error": _error(log), "input": found.hex()}
    return row


def _error(log: str) -> str:
    """What a process died of: the exception, libFuzzer's own words, or the last line."""
    for pattern in (r"Uncaught Python exception: ===\s*\n(.+)", r"ERROR: (libFuzzer: .+)", r"(.+)\s*\Z"):
        match = re.search(pattern, log)
        if match:
            return match[1]
    return "It said nothing."


def _end_with_parent() -> None:
    """No life after the command's, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _fuzz_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
