"""Files that are either wholly there or not at all, and that survive a power cut once written."""

import os
from contextlib import suppress
from pathlib import Path

from common.errors import RunError

TEMPORARY = ".tmp-"
"""Begins the name of the file in which the next content is built; a killed process leaves one behind."""


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents where they are missing. Raises :class:`RunError`."""
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in created:
            _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"Expected {folder} to be a folder to write to: {error.strerror}.") from None


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step.

    Guarantee: whatever happens, ``path`` holds either its previous content or all of ``data``, and after the
    return it holds ``data`` even if the power fails (tests/unit/test_checkpoint.py::test_disk_full and
    ::test_failed_replace).
    Raises :class:`RunError` when the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the content first: a rename must never become durable before it
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"Expected {path} to be writable: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A new or renamed entry is durable only once its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
