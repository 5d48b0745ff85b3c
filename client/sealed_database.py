"""A SQLite file of named values and logs, each entry sealed on its own: nothing in it can be read, or put elsewhere.

==============  =============================  ==========================================================
table           row                            sealed under
==============  =============================  ==========================================================
``key_record``  the wrapped data key           the key-encryption key (:mod:`client.store_key`)
``head``        what all other rows must be    the data key, with version and table
``value``       slot → content                 the data key, with version, table and the value's name
``log``         log, position → entry          the data key, with version, table, log and position
==============  =============================  ==========================================================

The head is written in the transaction of every change. It holds each value's name, slot and nonce (random, so it names
one sealing), and each log's length and running digest H_i = SHA-256(H_{i-1} ‖ sealed_i). Names are nowhere else.
An older copy of the whole file is not told from the newest one.

A nonce has 96 random bits: after 2^32 sealings, some 10^9 transactions, two are equal with probability 2^-33.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from client.sealed_file import APPLICATION_ID, TABLES, check_frame, connect, damaged, explained
from client.store_key import NONCE_BYTES, Description, KeySource, Random, describe, unwrap, wrap
from common.errors import DataError, RunError


@dataclass(frozen=True)
class Contents:
    """All that a database holds, opened: what a migration is given and returns."""

    values: dict[str, bytes]
    logs: dict[str, list[bytes]]


Migration = Callable[[Contents], Contents]


@dataclass(frozen=True)
class _Head:
    """Each value's slot and nonce, and each log's length and running digest."""

    values: Mapping[str, tuple[int, str]]
    logs: Mapping[str, tuple[int, str]]


_EMPTY = _Head({}, {})
_NO_ENTRIES = (0, bytes(32).hex())


class SealedDatabase:
    """An open database, made by :func:`open_database`. Not for several threads."""

    def __init__(self, path: Path, connection: sqlite3.Connection, key: bytes, version: int, random: Random) -> None:
        self.path = path
        self._connection = connection
        self._cipher = ChaCha20Poly1305(key)
        self._version = version
        self._random = random
        self._head = _EMPTY
        self._before: _Head | None = None
        self._failed = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes made inside become durable together at the end, or none does; one inside another joins it.

        Raises :class:`RunError` for a full disk and what else SQLite reports, and if the block went on after a change
        in it had failed; :class:`DataError` for damage that it comes across.
        """
        if self._failed:
            raise self._given_up()
        if self._before is not None:
            try:
                with explained(self.path):
                    yield
            except BaseException:
                self._give_up()
                raise
            return
        self._before = self._head
        try:
            with explained(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                if self._failed:
                    raise self._given_up()
                if self._head is not self._before:
                    self._write_head()
                self._connection.execute("COMMIT")
        except BaseException:
            self._give_up()
            raise
        finally:
            self._before, self._failed = None, False

    def names(self) -> list[str]:
        """The names of all values."""
        return list(self._head.values)

    def get(self, name: str) -> bytes | None:
        """A value, or None if there is none of this name."""
        if name not in self._head.values:
            return None
        slot, nonce = self._head.values[name]
        with explained(self.path):
            row = self._connection.execute("SELECT sealed FROM value WHERE slot = ?", (slot,)).fetchone()
            if row is None or row[0][:NONCE_BYTES].hex() != nonce:
                raise self._damaged("a value is missing or not the one that was stored last")
            return self._unseal(row[0], "value", name)

    def set(self, name: str, content: bytes) -> None:
        """Keep a value in place of the one before."""
        values = self._head.values
        slot = values[name][0] if name in values else 1 + max((used for used, _ in values.values()), default=-1)
        sealed = self._seal(content, "value", name)
        with self.transaction():
            self._connection.execute("INSERT OR REPLACE INTO value VALUES (?, ?)", (slot, sealed))
            self._head = replace(self._head, values={**values, name: (slot, sealed[:NONCE_BYTES].hex())})

    def remove(self, name: str) -> None:
        """Remove a value that there is."""
        left = {other: place for other, place in self._head.values.items() if other != name}
        with self.transaction():
            self._connection.execute("DELETE FROM value WHERE slot = ?", (self._head.values[name][0],))
            self._head = replace(self._head, values=left)

    def length(self, log: str) -> int:
        """Number of a log's entries."""
        return self._head.logs.get(log, _NO_ENTRIES)[0]

    def append(self, log: str, content: bytes) -> None:
        """Add an entry to a log: one row, and the head."""
        length, digest = self._head.logs.get(log, _NO_ENTRIES)
        sealed = self._seal(content, "log", f"{log} {length}")
        with self.transaction():
            self._connection.execute("INSERT INTO log VALUES (?, ?, ?)", (log, length, sealed))
            self._head = replace(self._head, logs={**self._head.logs, log: (length + 1, _follow(digest, sealed))})

    def entries(self, log: str, start: int = 0) -> list[bytes]:
        """A log's entries from position `start` on."""
        with explained(self.path):
            rows = self._connection.execute(
                "SELECT sealed FROM log WHERE name = ? AND position >= ? ORDER BY position", (log, start)
            ).fetchall()
            return [self._unseal(sealed, "log", f"{log} {start + at}") for at, (sealed,) in enumerate(rows)]

    def contents(self) -> Contents:
        """Everything, checked against the head row by row. Raises :class:`DataError`."""
        logs: dict[str, list[bytes]] = {}
        for name, (length, expected) in self._head.logs.items():
            rows = self._connection.execute("SELECT sealed FROM log WHERE name = ? ORDER BY position", (name,))
            digest = _NO_ENTRIES[1]
            logs[name] = []
            for position, (sealed,) in enumerate(rows):
                logs[name].append(self._unseal(sealed, "log", f"{name} {position}"))
                digest = _follow(digest, sealed)
            if len(logs[name]) != length or digest != expected:
                raise self._damaged("entries of a log are missing, added or changed")
        values = {name: content for name in self._head.values if (content := self.get(name)) is not None}
        for table, count in (("value", len(values)), ("log", sum(len(entries) for entries in logs.values()))):
            if self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] != count:
                raise self._damaged(f"the table {table!r} has rows that it was not given")
        return Contents(values, logs)

    def close(self) -> None:
        """Release the file. Closing twice is harmless."""
        self._connection.close()

    def read_head(self) -> None:
        """Take the head from the file. Raises :class:`DataError`."""
        row = self._connection.execute("SELECT sealed FROM head").fetchone()
        if row is None:
            raise self._damaged("its head is missing")
        tree = json.loads(self._unseal(row[0], "head", ""))
        self._head = _Head(*({name: tuple(place) for name, place in tree[part].items()} for part in ("values", "logs")))

    def create(self, record: bytes) -> None:
        """Make the tables, without contents."""
        with self.transaction():
            for table in TABLES:
                self._connection.execute(table)
            self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self.rewrite(Contents({}, {}), self._version, record)

    def rewrite(self, contents: Contents, version: int, record: bytes) -> None:
        """Seal other contents in place of all there is, under another version and key record."""
        with self.transaction():
            for table in ("value", "log", "key_record"):
                self._connection.execute(f"DELETE FROM {table}")
            self._version, self._head = version, replace(_EMPTY)
            for name, content in contents.values.items():
                self.set(name, content)
            for log, entries in contents.logs.items():
                for entry in entries:
                    self.append(log, entry)
            self._connection.execute("INSERT INTO key_record VALUES (0, ?)", (record,))
            self._connection.execute(f"PRAGMA user_version={version}")

    def _give_up(self) -> None:
        """Take back the transaction that is under way, at once: a full disk ends it, and what came then would stay."""
        self._failed = True
        if self._before is not None:
            self._head = self._before
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _given_up(self) -> RunError:
        return RunError(f"Expected all changes of {self.path} to succeed: one failed, and none was made.")

    def _write_head(self) -> None:
        content = json.dumps({"values": self._head.values, "logs": self._head.logs}).encode()
        sealed = self._seal(content, "head", "")
        self._connection.execute("INSERT OR REPLACE INTO head VALUES (0, ?)", (sealed,))

    def _seal(self, content: bytes, table: str, name: str) -> bytes:
        nonce = self._random(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, self._place(table, name))

    def _unseal(self, sealed: bytes, table: str, name: str) -> bytes:
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self._place(table, name))
        except (InvalidTag, ValueError):
            raise self._damaged(f"a row of the table {table!r} was changed or moved") from None

    def _place(self, table: str, name: str) -> bytes:
        return f"fedtopk device store {self._version}\0{table}\0{name}".encode()

    def _damaged(self, what: str) -> DataError:
        return damaged(self.path, what)


def _follow(digest: str, sealed: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(digest) + sealed).hexdigest()


def build_database(
    path: Path, description: Description, wrapping_key: bytes, data_key: bytes, version: int, random: Random
) -> None:
    """Make the existing empty file `path` a database without contents. Raises :class:`RunError`."""
    with explained(path):
        database = SealedDatabase(path, connect(path), data_key, version, random)
        try:
            database.create(wrap(description | {"version": version}, wrapping_key, data_key, random))
        finally:
            database.close()


def open_database(
    path: Path, key: KeySource, version: int, migrations: Mapping[int, Migration], random: Random, patience: float
) -> SealedDatabase:
    """Open an existing database, check every row of it and bring it to `version`.

    Args:
        migrations: what brings the contents of a version to the next one.
        patience: seconds to wait for it to be free.

    Raises:
        DataError: it is damaged; nothing was changed.
        RunError: it is in use, of a newer version, or not of this key.
    """
    try:
        with explained(path):
            connection = connect(path, patience)
            try:
                found, record = check_frame(path, connection, version)
                data_key, wrapping_key = unwrap(record, key)
                database = SealedDatabase(path, connection, data_key, found, random)
                database.read_head()
                contents = database.contents()
                for old in range(found, version):
                    contents = migrations[old](contents)
                if found < version:
                    description = describe(record) | {"version": version}
                    database.rewrite(contents, version, wrap(description, wrapping_key, data_key, random))
            except BaseException:
                connection.close()
                raise
    except UnicodeDecodeError:  # SQLite quotes a damaged schema in what it reports
        raise damaged(path, "its schema is not text") from None
    return database
