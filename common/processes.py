"""Child processes that do not outlive their parent, and secrets that reach them without a file.

Tests: tests/unit/test_processes.py.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# A program of its own and no `preexec_fn`: after a fork nobody releases the locks that threads of this process hold.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # else it died before
    os.execv(sys.argv[2], sys.argv[2:])
"""
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

    Args:
        words: the path of a program, and what it is told.
        descriptors: that it inherits.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *words],
        env=os.environ | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        start_new_session=True,
        umask=0o077,
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
