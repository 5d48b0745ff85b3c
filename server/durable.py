"""Files that are either wholly there or not at all, and that survive a power cut once written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from common.errors import RunError

TEMPORARY = ".tmp"
"""Begins the name of the file in which the next content is built; a killed process leaves one behind.

The temporary files that safetensors makes next to the one it writes begin with it, too.
"""


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents where they are missing. Raises :class:`RunError`."""
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in created:
            _sync(path.parent)
    except OSError as error:
        raise RunError(f"Expected {folder} to be a folder to write to: {error.strerror}.") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file to write; at the end it takes the place of ``path`` in one step.

    Guarantee: whatever happens, ``path`` is either as it was or wholly new, and after the end of the block it is new
    even if the power fails (tests/unit/test_checkpoint.py::test_disk_full, ::test_failed_replace).
    Raises :class:`RunError` when the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f"{TEMPORARY}-{path.name}")
    try:
        yield temporary
        _sync(temporary)  # the content first: a rename must never become durable before it
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors writes files itself, and wraps what the system says
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"Expected {path} to be writable: {reason}.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
