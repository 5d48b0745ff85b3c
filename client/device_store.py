"""The device's own store: what one user's device keeps and no other may read.

::

    FOLDER/device.sqlite                             everything, sealed (:mod:`client.sealed_database`)
    FOLDER/device.sqlite.quarantined-20260101T000000Z   a damaged one, set aside as it was found

Guarantees (tests in tests/unit/test_device_store.py unless another file is named):

- without the key the files show how many events there are and how large the values, and nothing of what they are: no
  item, time, rating, embedding, record or name (::test_a_stolen_store_shows_nothing, ::test_events_look_alike);
- what a finished change wrote survives the process and a power cut, several changes in one :meth:`transaction` as one
  (tests/integration/test_device_store_crash.py);
- what is read is what was written last, or :class:`DataError`: no row can be changed, swapped, removed, or put back to
  an older one alone (::test_any_changed_byte_is_noticed_or_means_nothing, ::test_rows_cannot_be_exchanged). Not noticed
  is the whole file put back to an older copy;
- a full disk loses nothing (::test_a_full_disk_loses_nothing);
- adding an event costs the same however many there are (::test_adding_an_event_costs_the_same_in_a_long_history);
- one process has it open at a time (tests/integration/test_device_store_crash.py).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from client.device_contents import Event, ReceivedModel, State
from client.guard import Policy
from client.sealed_database import Migration, SealedDatabase, build_database, open_database
from client.store_key import KEY_BYTES, KeySource, Random, sync_folder
from common.errors import DataError, RunError

DATABASE = "device.sqlite"
TEMPORARY = ".tmp-device-"
"""Begins the name of a store in the making; a killed process leaves one behind, without contents."""
VERSION = 1
STORE_PATIENCE_SECONDS = 10.0
"""How long to wait for a process that answers one message, and closes the store then."""
MIGRATIONS: dict[int, Migration] = {}
"""What brings the contents of a version to the next one."""

_HISTORY, _LEDGER = "history", "ledger"
_USER, _STATE, _MODEL, _POLICY, _RECORD = "user", "state", "model", "policy", "record "

_POLICIES = TypeAdapter(Policy)

Clock = Callable[[], float]


class DeviceStore:
    """An open store; close it, or use it in ``with``. Not for several threads.

    Attributes:
        records: small values by name, for whoever needs to keep some.
    """

    def __init__(self, database: SealedDatabase) -> None:
        self._database = database
        self.records: MutableMapping[str, bytes] = _Records(database)

    @classmethod
    def create(cls, folder: Path, key: KeySource, *, random: Random = os.urandom) -> Self:
        """Make a store, and the key for it, in a folder that has none.

        Raises :class:`RunError` if there is one, or the folder or the key's place cannot be written to.
        """
        path = folder / DATABASE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.exists():
                raise RunError(f"Expected {folder} to hold no device store yet.")
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=TEMPORARY)
        except OSError as error:
            raise RunError(f"Expected {folder} to be a folder to write to: {error.strerror}.") from None
        os.close(descriptor)
        temporary = Path(name)
        try:
            wrapping_key, description = key.make(random)
            try:
                description |= {"kind": key.kind}
                build_database(temporary, description, wrapping_key, random(KEY_BYTES), VERSION, random)
                os.link(temporary, path)  # unlike a rename, never in place of another one
                sync_folder(folder)
            except BaseException:
                key.destroy(description)
                raise
        except OSError as error:
            raise RunError(f"Expected {path} to be writable: {error.strerror}.") from None
        finally:
            for leftover in folder.glob(f"{temporary.name}*"):
                leftover.unlink()
        return cls.open(folder, key, random=random)

    @classmethod
    def open(
        cls,
        folder: Path,
        key: KeySource,
        *,
        patience: float = 0.0,
        clock: Clock = time.time,
        random: Random = os.urandom,
    ) -> Self:
        """Open the store in `folder` and check every row of it.

        Args:
            patience: seconds to wait for another process to close it.
            clock: names what is set aside.

        Raises:
            DataError: it is damaged. It was moved aside, the message says where to; nothing was deleted.
            RunError: there is none, it is in use, of a newer version, or not of this key; nothing was moved.
            PrivacyError: others may read the key file.
        """
        path = folder / DATABASE
        if not path.exists():
            raise RunError(f"Expected {folder} to hold a device store: {DATABASE} is missing.")
        try:
            return cls(open_database(path, key, VERSION, MIGRATIONS, random, patience))
        except DataError as error:
            raise DataError(f"{error} {_set_aside(path, clock())}") from None

    def transaction(self) -> AbstractContextManager[None]:
        """All changes made inside become durable together at the end, or none does. Raises :class:`RunError`."""
        return self._database.transaction()

    @property
    def event_count(self) -> int:
        """Number of events in the history."""
        return self._database.length(_HISTORY)

    def add_events(self, events: Iterable[Event]) -> None:
        """Add to the end of the history, all of them or none. Raises :class:`DataError` for what is no event."""
        with self.transaction():
            for event in events:
                self._database.append(_HISTORY, event.pack())

    def events(self, start: int = 0) -> list[Event]:
        """The history from position `start` on, in the order in which events were added."""
        return [Event.unpack(content) for content in self._database.entries(_HISTORY, start)]

    def load_user(self) -> np.ndarray | None:
        """(w,) float32, the user embedding; None before there is one."""
        content = self._database.get(_USER)
        return None if content is None else np.frombuffer(content, "<f4").astype(np.float32)

    def save_user(self, user: np.ndarray) -> None:
        """Keep the user embedding, (w,) float32."""
        self._database.set(_USER, user.astype("<f4").tobytes())

    def load_state(self) -> State | None:
        """The recurrent states; None before there are any."""
        content = self._database.get(_STATE)
        return None if content is None else State.unpack(content)

    def save_state(self, state: State) -> None:
        """Keep the recurrent states."""
        self._database.set(_STATE, state.pack())

    def load_model(self) -> ReceivedModel | None:
        """The last received model; None before there is one."""
        content = self._database.get(_MODEL)
        return None if content is None else ReceivedModel.unpack(content)

    def save_model(self, model: ReceivedModel) -> None:
        """Keep a received model in place of the one before."""
        self._database.set(_MODEL, model.pack())

    def load_policy(self) -> Policy | None:
        """The pinned policy; None before there is one. Raises :class:`DataError` for one of another program."""
        content = self._database.get(_POLICY)
        if content is None:
            return None
        try:
            return _POLICIES.validate_python(json.loads(content))
        except ValidationError as error:
            raise DataError(f"Expected a policy with the fields of this program: {error.errors()[0]['msg']}.") from None

    def save_policy(self, policy: Policy) -> None:
        """Pin a policy in place of the one before."""
        self._database.set(_POLICY, json.dumps(asdict(policy)).encode())

    def charge(self, entry: bytes) -> None:
        """Add an entry to the device's own ledger."""
        self._database.append(_LEDGER, entry)

    def charges(self) -> list[bytes]:
        """The ledger's entries, oldest first."""
        return self._database.entries(_LEDGER)

    def close(self) -> None:
        """Release the files. Closing twice is harmless."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Records(MutableMapping[str, bytes]):
    """The values whose names begin with a word of their own."""

    def __init__(self, database: SealedDatabase) -> None:
        self._database = database

    def __getitem__(self, name: str) -> bytes:
        content = self._database.get(_RECORD + name)
        if content is None:
            raise KeyError(name)
        return content

    def __setitem__(self, name: str, content: bytes) -> None:
        self._database.set(_RECORD + name, content)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._database.remove(_RECORD + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(_RECORD) for name in self._database.names() if name.startswith(_RECORD))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _set_aside(path: Path, now: float) -> str:
    """Move a damaged database, with its journal, to a name of its own; says where to."""
    stem = f"{path.name}.quarantined-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}"
    target, number = path.with_name(stem), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{stem}-{number}")
    try:
        for suffix in ("", "-journal"):
            found = path.with_name(path.name + suffix)
            if found.exists():
                found.rename(target.with_name(target.name + suffix))
        sync_folder(path.parent)
    except OSError as error:
        return f"It could not be moved aside: {error.strerror}."
    return f"It was moved to {target}; nothing was deleted."
