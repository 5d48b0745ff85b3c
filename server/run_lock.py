"""The lock that keeps a second writer out of a run folder."""

import fcntl
import os
import time
from pathlib import Path
from typing import IO
from weakref import WeakSet

from common.errors import RunError

LOCK = "run.lock"
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.02

_held: WeakSet[IO[bytes]] = WeakSet()


def lock_run(folder: Path) -> IO[bytes]:
    """Lock the existing ``folder`` until the returned file is closed or this process dies.

    Guarantees:
        - nobody else can lock it meanwhile (tests/unit/test_store.py::test_second_process_is_refused);
        - a killed process leaves no lock behind, not even if its forked workers live on
          (::test_lock_ends_with_its_process).

    Raises :class:`RunError` if it is locked or can't be.
    """
    path = folder / LOCK
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise RunError(f"Expected {path} to be writable: {error.strerror}.") from None
    try:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps only somebody who looks whether the run is running
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_PAUSE_SECONDS)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise RunError(f"Expected {folder} to be free: a running process is writing to this run.") from None
        raise RunError(f"Expected {path} to be lockable: {error.strerror}.") from None
    _held.add(file)
    return file


def is_running(folder: Path) -> bool:
    """Whether a process holds the lock of the run in ``folder``."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of at once, by closing
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _drop_inherited() -> None:
    # A forked worker shares the lock: unless it lets go, it would keep a killed run locked for as long as it lives.
    # Closing its copy does not unlock the parent's.
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_drop_inherited)
