"""Work that pages need and that brings torch, in a process of its own that does not stay: pages need neither the
seconds that torch takes to import, nor its memory.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from common.errors import RunError

_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE_SECONDS = 5.0

Answer = TypeVar("Answer")


class Aside:
    """Calls functions in a process beside this one. Safe to use from any thread: one call at a time.

    Guarantee: the process ends once nobody has called for a while, and with this process, however that ends
    (tests/unit/test_aside.py::test_it_ends_when_nobody_calls, ::test_it_ends_with_its_parent).

    Args:
        idle_seconds: for which the process waits for another call.
    """

    def __init__(self, idle_seconds: float = 60.0) -> None:
        self._idle = idle_seconds
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, function: Callable[..., Answer], *arguments: Any) -> tuple[Answer, float]:
        """What the function returns, and the CPU seconds of it, and of the process's start where one was needed.

        Raises what the function raises, and :class:`RunError` where the process ends before it answers. Function,
        arguments and answer must be such as can be pickled.
        """
        with self._lock:
            while True:
                connection, started = self._connected()
                try:
                    connection.send((function, arguments))
                    answer, error, seconds = connection.recv()
                except (EOFError, OSError):
                    self._drop()
                    if started:
                        raise RunError(f"Expected {function.__name__} to be computed: its process was ended.") from None
                    continue  # it ended because nobody had called
                if error is not None:
                    raise error
                return answer, seconds

    def close(self) -> None:
        """End the process; a call under way then raises."""
        if self._process is not None:
            self._process.terminate()

    def _connected(self) -> tuple[Connection, bool]:
        """The way to the process, and whether it was started for it."""
        if self._connection is not None:
            return self._connection, False
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_answer, args=(theirs, self._idle), daemon=True)
        self._process.start()
        theirs.close()  # else the end of the process would not be seen
        return self._connection, True

    def _drop(self) -> None:
        assert self._connection is not None and self._process is not None
        self._connection.close()
        self._process.join(_PATIENCE_SECONDS)
        self._connection = None


def _answer(calls: Connection, idle_seconds: float) -> None:
    """The process: answer calls until none comes for a while, or the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the caller
    counted = 0.0
    with suppress(EOFError, OSError):
        while calls.poll(idle_seconds):
            function, arguments = calls.recv()
            answer = failure = None
            try:
                answer = function(*arguments)
            except Exception as error:  # whatever it is, the caller is told
                failure = error
            now = time.process_time()
            calls.send((answer, failure, now - counted))
            counted = now
