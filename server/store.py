"""The run folder's database ``events.sqlite``.

All tables, the event log, the privacy ledger and the operator's commands, live in this one file, so that one commit
order holds for all.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, Self
from urllib.parse import quote

from sqlalchemy import Column, Connection, Float, Integer, MetaData, QueuePool, Table, Text, create_engine, event
from sqlalchemy.exc import DBAPIError

from common.errors import RunError
from server.durable import make_folder
from server.run_lock import lock_run

DATABASE = "events.sqlite"
APPLICATION_ID = int.from_bytes(b"ftpK")  # how SQLite files name their owner; `file events.sqlite` prints it
SCHEMA_VERSION = 2

schema = MetaData()

event_table = Table(
    "events",
    schema,
    Column("id", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("kind", Text, nullable=False),
    Column("round", Integer),
    Column("fields", Text, nullable=False),
    Column("digest", Text, nullable=False),
)

ledger_table = Table(
    "ledger",
    schema,
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("noise_multiplier", Float, nullable=False),
    Column("rate", Float, nullable=False),
    Column("reserved_at", Float, nullable=False),
    Column("uploaded_at", Float),
    Column("released_at", Float),
)

command_table = Table(
    "commands",
    schema,
    Column("id", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("action", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("answered_at", Float),
    Column("answer", Text),
)


class Store:
    """An open database. Made by :func:`open_store` or :func:`open_store_read_only`; close it, or use it in ``with``.

    Guarantees:
        - what a finished :meth:`transaction` wrote survives the process and a power cut: write-ahead log with
          ``synchronous=FULL`` (tests/unit/test_store.py::test_durable_mode, tests/unit/test_ledger.py::test_sigkill);
        - one transaction sees no other one's half-done work, from any thread: they run one after another.
    """

    def __init__(
        self, path: Path, mode: Literal["rwc", "rw", "ro"], lock: IO[bytes] | None = None, durable: bool = True
    ) -> None:
        self._path = path
        self._lock = lock
        address = f"file:{quote(str(path.absolute()))}?mode={mode}"

        def connect() -> sqlite3.Connection:
            # isolation_level=None leaves BEGIN to us; the driver would begin too late, after the first SELECT.
            connection = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            return connection

        self._engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
        begin = "BEGIN" if mode == "ro" else "BEGIN IMMEDIATE"
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql(begin))

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All that is written inside is committed together at the end, or not at all if an exception leaves it.

        Raises :class:`RunError` for whatever SQLite reports: not a database, read-only, disk full, locked.
        """
        with self._explained(), self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Release the file and the lock. Closing twice is harmless."""
        self._engine.dispose()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise RunError(f"Expected {self._path} to be a usable database of a run: {reason}.") from None

    def _create_if_empty(self) -> None:
        with self.transaction() as connection:
            if connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one() == 0:
                schema.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _add_missing_tables(self) -> None:
        """What earlier versions of the same schema did not have yet."""
        with self.transaction() as connection:
            schema.create_all(connection)

    def _check_schema(self) -> None:
        with self.transaction() as connection:
            application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if application != APPLICATION_ID:
            raise RunError(f"Expected {self._path} to be the database of a run; another program made it.")
        if version != SCHEMA_VERSION:
            raise RunError(f"Expected {self._path} to have schema version {SCHEMA_VERSION}, not {version}.")

    def _enable_wal(self) -> None:
        # Not inside a transaction, and only once the file is known to be ours: the mode is written into it.
        with self._explained():
            raw = self._engine.raw_connection()
            try:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            finally:
                raw.close()


def open_store(folder: Path, *, durable: bool = True) -> Store:
    """Open the database of the run in ``folder`` for writing; make folder and database where they are missing.

    Not `durable`, for folders that nobody will come back to, a power cut may take what was committed.
    Guarantee: while it is open, and its process lives, no other process can open it for writing
    (see :mod:`server.run_lock`).
    Raises :class:`RunError` in that case, and if the folder cannot be written to, or the file is not a database,
    of another program or of another version; a file that is refused is not changed.
    """
    make_folder(folder)
    store = Store(folder / DATABASE, "rwc", lock_run(folder), durable)
    try:
        store._create_if_empty()
        store._check_schema()
        store._enable_wal()
        store._add_missing_tables()
    except BaseException:
        store.close()
        raise
    return store


def open_store_read_only(folder: Path) -> Store:
    """Open the database of a run to read it, also while another process writes it; neither waits for the other.

    Writing raises :class:`RunError`, as does a file that is missing, not a database, or of another version.
    SQLite needs to create its ``-shm`` file next to a database that nobody has open, so the reader must be allowed
    to write to the folder of a run that is over.
    """
    return _opened(Store(folder / DATABASE, "ro"))


def open_store_for_commands(folder: Path) -> Store:
    """Open the database of a run beside the process that runs it, to add commands and nothing else.

    Raises :class:`RunError` as :func:`open_store_read_only` does, and where the file may not be written to.
    """
    return _opened(Store(folder / DATABASE, "rw"))


def _opened(store: Store) -> Store:
    try:
        store._check_schema()
    except BaseException:
        store.close()
        raise
    return store
