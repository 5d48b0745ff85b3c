"""`forget`: a device's store is destroyed, key first, so that copies made of it before open no more."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from client.device_store import DATABASE, TEMPORARY
from client.sealed_file import connect, read_key_record
from client.store_key import Description, KeyFile, describe, erase, source_of
from common.errors import DataError, RunError

_UNREADABLE = (sqlite3.Error, TypeError, UnicodeDecodeError, DataError)
"""What reading a damaged database can end in."""


def forget(folder: Path, key_file: Path | None = None) -> list[str]:
    """Destroy the key of the store in `folder`, then its files and those set aside; returns what was, in words.

    Guarantees (tests/unit/test_device_store.py):
        - all that is left, together with a copy of the files made before, opens nothing, unless a copy was also made of
          the key file, or somebody knows the passphrase (::test_a_forgotten_store_stays_closed);
        - what was begun can be gone on with (::test_a_forgetting_that_was_interrupted_goes_on).

    Args:
        key_file: where the key file is now, if it was moved.

    Raises:
        RunError: there is no store, it is in use, or a file cannot be written to.
        DataError: the files were destroyed, but their key was not found.
    """
    paths = sorted([*folder.glob(f"{DATABASE}*"), *folder.glob(f"{TEMPORARY}*")])
    if not paths:
        raise RunError(f"Expected {folder} to hold a device store: {DATABASE} is missing.")
    lock = _lock(folder / DATABASE)
    try:
        descriptions = [found for path in paths if (found := _description(path)) is not None]
        done, lost = _destroy_keys(descriptions)
        if key_file is not None and KeyFile(key_file).destroy({}):
            done, lost = [*done, f"key file {key_file}"], False
        for path in paths:
            erase(path)
    finally:
        if lock is not None:
            lock.close()
    if lost:
        raise DataError(
            f"Expected to find the key of {folder}. The files there are destroyed, but a copy of them would open with "
            "the key: if that still exists, destroy it, too."
        )
    return [*done, *map(str, paths)]


def _destroy_keys(descriptions: list[Description]) -> tuple[list[str], bool]:
    """What was destroyed, and whether a key was not where it should be."""
    places = {str(found.get("path") or found.get("account")): found for found in descriptions if source_of(found)}
    done = []
    for place, found in places.items():
        source = source_of(found)
        if source is not None and source.destroy(found):
            done.append(f"{source.kind} {place}")
    return done, not descriptions or len(done) < len(places)


def _lock(path: Path) -> sqlite3.Connection | None:
    """Keeps others out of a database, unless it is missing or too damaged."""
    try:
        return connect(path)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise RunError(f"Expected {path} to be free: a running process has this store open.") from None
        return None


def _description(path: Path) -> Description | None:
    """What the key record of a database says, if that can be read."""
    address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    with suppress(*_UNREADABLE), closing(sqlite3.connect(address, uri=True)) as connection:
        return describe(read_key_record(connection))
    return None
