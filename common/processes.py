"""Child processes that do not outlive their parent, and secrets that reach them without a file."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PDEATHSIG = 1  # of Linux's prctl
_PATIENCE_SECONDS = 10.0


def program(name: str) -> str:
    """A command that was installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


@contextmanager
def secret_files(*contents: bytes) -> Iterator[list[tuple[int, str]]]:
    """Descriptors and paths of files that hold the contents in memory alone, for a child that inherits them."""
    descriptors: list[int] = []
    try:
        for content in contents:
            descriptor = os.memfd_create("fedtopk", 0)
            descriptors.append(descriptor)
            os.write(descriptor, content)
        yield [(descriptor, f"/proc/self/fd/{descriptor}") for descriptor in descriptors]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def running(
    words: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int, descriptors: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, which is ended with this block, and by the kernel if this process is killed.

    A terminal's Ctrl-C does not reach it: that is for this process to pass on, when it is ready. Flower's processes and
    our own would take the signal even where it was ignored when they were started. Others cannot read its files.
    """
    process = subprocess.Popen(
        words,
        env=os.environ | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        start_new_session=True,
        umask=0o077,
        preexec_fn=_die_with(os.getpid()),
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            os._exit(1)

    return prepare
