"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
from threading import Thread

import torch


def start_worker() -> None:
    """To be called first in a worker: one torch thread, Ctrl-C left to the main process, and no life after it.

    A worker whose main process was killed would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
