"""The SQLite file below a device's store: how it is opened, who may, and what tells that it is intact."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from client.store_key import describe
from common.errors import DataError, RunError

APPLICATION_ID = int.from_bytes(b"ftpD")  # how SQLite files name their owner
TABLES = (
    "CREATE TABLE key_record (id INTEGER PRIMARY KEY CHECK (id = 0), record BLOB NOT NULL)",
    "CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), sealed BLOB NOT NULL)",
    "CREATE TABLE value (slot INTEGER PRIMARY KEY, sealed BLOB NOT NULL)",
    "CREATE TABLE log (name TEXT, position INTEGER, sealed BLOB NOT NULL, PRIMARY KEY (name, position)) WITHOUT ROWID",
)
_DAMAGE = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_ERROR,  # no such table, malformed schema, unknown file format
}
_SCHEMA = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"


def connect(path: Path, patience: float = 0.0) -> sqlite3.Connection:
    """A connection to an existing file that keeps every other one out until it is closed or its process dies; waits for
    another one to be closed for `patience` seconds.

    A rollback journal, and not a write-ahead log: damage to a log would silently take back what was committed.
    """
    address = f"file:{quote(str(path.absolute()))}?mode=rw"
    connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=patience)
    try:
        connection.text_factory = bytes  # text of a damaged file need not be UTF-8
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def read_key_record(connection: sqlite3.Connection) -> bytes:
    """The key record, which may be damaged. Raises :class:`sqlite3.Error` or :class:`TypeError` if there is none."""
    record: bytes = connection.execute("SELECT record FROM key_record").fetchone()[0]
    return record


def damaged(path: Path, what: object) -> DataError:
    """What to raise for a file that is not as this program left it."""
    return DataError(f"Expected {path} to be as it was written: {what}.")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise :class:`DataError` for damage that SQLite reports, and :class:`RunError` for whatever else."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        # A damaged header can claim that the file must not be written to.
        if code in _DAMAGE or (code == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK)):
            raise damaged(path, error) from None
        if code == sqlite3.SQLITE_BUSY:
            raise RunError(f"Expected {path} to be free: a running process has this store open.") from None
        if code == sqlite3.SQLITE_FULL:
            raise RunError(f"Expected {path} to have room to grow: {error}; nothing was changed.") from None
        raise RunError(f"Expected {path} to be a usable store: {error}.") from None


def check_frame(path: Path, connection: sqlite3.Connection, newest: int) -> tuple[int, bytes]:
    """The version and the key record, once SQLite finds nothing wrong with the file."""

    def ask(question: str) -> object:
        return connection.execute(question).fetchone()[0]

    if ask("PRAGMA integrity_check") != b"ok":
        raise damaged(path, "SQLite finds it malformed")
    if ask("PRAGMA application_id") != APPLICATION_ID:
        raise damaged(path, "it is not marked as a device's store")
    version, recorded, record = ask("PRAGMA user_version"), None, b""
    with suppress(sqlite3.Error, TypeError, DataError):
        record = read_key_record(connection)
        recorded = describe(record)["version"]
    # A damaged number contradicts the record; a newer program may keep its record in another way.
    if isinstance(version, int) and version > newest and recorded in (None, version):
        raise RunError(f"Expected {path} to be of version {newest} or older, not {version}: a newer program made it.")
    if not isinstance(version, int) or recorded != version:
        raise damaged(path, "its key record is damaged")
    if {row[0] for row in connection.execute(_SCHEMA)} != {table.encode() for table in TABLES}:
        raise damaged(path, "its tables are not those of a device's store")
    return version, record
