"""Worker processes that end with the process that started them, and how they use memory."""

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from threading import Thread

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_THRESHOLD = 32 << 20


def start_worker() -> None:
    """To be called first in a worker: one torch thread, and what :func:`start_bare_worker` does."""
    import torch  # not above: a bare worker has none

    torch.set_num_threads(1)
    start_bare_worker()


def start_bare_worker() -> None:
    """To be called first in a worker without PyTorch: Ctrl-C left to the main process, and no life after it.

    A worker whose main process was killed would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the system: a block's temporaries are megabytes each, and
    touching fresh pages costs about as much as the arithmetic on them. No effect on other systems.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
