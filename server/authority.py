"""The enrolment authority's folder: its key, and an append-only register of whom it enrolled and revoked.

The authority is the root of trust of secure aggregation and is run apart from the aggregator: by somebody whom the
devices believe, on another machine. All that the aggregator needs of it is its public key, the enrolments and the
revocation list.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from common.enrolment import LARGEST_DEVICE, Enrolment, Request, Revocations
from common.errors import RunError
from server.durable import make_folder, replacing
from server.signing_key import read_signing_key

KEY, PUBLIC, REGISTER, REVOKED = "authority.key", "authority.pub", "register.jsonl", "revoked.json"


@dataclass(frozen=True)
class Entry:
    """One device in the register.

    Attributes:
        device: its number.
        name: what the operator calls it.
        key: hexadecimal, its Ed25519 public key.
        enrolled, expires: seconds since the epoch.
        revoked: the same, or None.
    """

    device: int
    name: str
    key: str
    enrolled: int
    expires: int
    revoked: int | None


class Authority:
    """An authority whose key is at hand.

    Args:
        passphrase: of the key file, if it has one.

    Raises:
        RunError: no such folder, or not the right passphrase.
    """

    def __init__(self, folder: Path, passphrase: str | None = None) -> None:
        self._folder = folder
        self._key = read_signing_key(folder / KEY, passphrase)

    @classmethod
    def create(cls, folder: Path, passphrase: str | None = None) -> "Authority":
        """A new authority. Raises :class:`RunError` where the folder has one already."""
        make_folder(folder)
        if (folder / KEY).exists():
            raise RunError(f"Expected {folder} not to hold an authority yet.")
        key = Ed25519PrivateKey.generate()
        protection = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
        with replacing(folder / KEY) as file:
            file.touch(mode=0o600)
            file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
        with replacing(folder / PUBLIC) as file:
            file.write_text(key.public_key().public_bytes_raw().hex() + "\n", encoding="utf-8")
        authority = cls(folder, passphrase)
        authority._write_revocations([])
        return authority

    @property
    def public(self) -> bytes:
        """32 bytes, its public key."""
        return self._key.public_key().public_bytes_raw()

    def enrol(
        self, request: Request, expires: int, now: int, *, name: str = "", device: int | None = None
    ) -> Enrolment:
        """Enrol a device under a number: the lowest that was never given, unless one is named.

        Raises:
            RunError: the number or the key was given before; a key that was revoked does not come back.
        """
        with self._register() as entries:
            number = max((entry.device for entry in entries), default=-1) + 1 if device is None else device
            if not 0 <= number <= LARGEST_DEVICE:
                raise RunError(f"Expected device={number} in [0, {LARGEST_DEVICE}].")
            if any(number == entry.device or request.key == entry.key for entry in entries):
                raise RunError(f"Expected device {number} and its key not to be enrolled before.")
            if expires <= now:
                raise RunError(f"Expected expires={expires} to be after now={now}.")
            self._append({"device": number, "name": name, "key": request.key, "enrolled": now, "expires": expires})
        return Enrolment.make(self._key, number, request, expires)

    def revoke(self, device: int, now: int) -> Revocations:
        """The new list of revoked devices, which is also in the folder. Raises :class:`RunError` for a stranger."""
        with self._register() as entries:
            if device not in {entry.device for entry in entries}:
                raise RunError(f"Expected device {device} to be enrolled.")
            revoked = {entry.device for entry in entries if entry.revoked is not None}
            if device not in revoked:
                self._append({"device": device, "revoked": now})
            return self._write_revocations(sorted(revoked | {device}))

    def _write_revocations(self, devices: list[int]) -> Revocations:
        revocations = Revocations.make(self._key, len(devices), devices)
        with replacing(self._folder / REVOKED) as file:
            file.write_text(revocations.to_json(), encoding="utf-8")
        return revocations

    @contextmanager
    def _register(self) -> Iterator[list[Entry]]:
        """The entries, while nobody else writes."""
        with (self._folder / REGISTER).open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield read_register(self._folder)

    def _append(self, line: dict[str, Any]) -> None:
        with (self._folder / REGISTER).open("r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # without a line that a crash cut off
            file.seek(whole)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_register(folder: Path) -> list[Entry]:
    """All devices ever enrolled, by number; needs no key. Raises :class:`RunError`."""
    if not (folder / PUBLIC).exists():
        raise RunError(f"Expected {folder} to be an authority's folder.")
    entries: dict[int, Entry] = {}
    try:
        lines = (folder / REGISTER).read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:  # a line without its end was cut off by a crash, and its answer never given
            found = json.loads(line)
            device = found["device"]
            if "revoked" in found:
                entries[device] = Entry(**vars(entries[device]) | {"revoked": found["revoked"]})
            else:
                entries[device] = Entry(**found, revoked=None)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"Expected {folder / REGISTER} to be an authority's register: {error!r}.") from None
    return [entries[device] for device in sorted(entries)]
