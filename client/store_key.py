"""Where the key of a device's store comes from: a key file, a passphrase, or the operating system's keyring.

A random *data key* seals all that the store holds. It is kept in the store under a *key-encryption key*, which is not:
that one comes from a :class:`KeySource`. The store's key record says in the clear which kind of source it needs and
what to look for there (a path, a salt, an account), never the key.
"""

import hashlib
import importlib
import json
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from common.errors import DataError, MissingDependency, PrivacyError, RunError, SettingsError

KEY_BYTES = 32
NONCE_BYTES = 12
_HEADER = b"fedtopk device key 1 "
_SERVICE = "fedtopk device"
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
"""32 MiB and some 100 ms for every guess."""
_MOST = {"n": 2**20, "r": 32, "p": 16}
"""More than a store is believed that asks for it."""

Random = Callable[[int], bytes]
"""Secret random bytes, so many: ``os.urandom`` on a real device."""

Description = dict[str, str | int]
"""What a key record says in the clear."""


class KeySource(Protocol):
    """Where a key-encryption key is kept."""

    kind: ClassVar[str]

    def make(self, random: Random) -> tuple[bytes, Description]:
        """A new key for a new store, and what finds it again."""

    def find(self, description: Description) -> bytes:
        """The key of the store with that description. Raises :class:`RunError` if it is not there."""

    def destroy(self, description: Description) -> bool:
        """Destroy what this source itself keeps; whether there was anything."""


@dataclass(frozen=True)
class KeyFile:
    """A file that its owner alone may read. One file belongs to one store, so that it can be destroyed with it.

    Guarantee: a file that others may read is refused, as is one that is there before its store
    (tests/unit/test_device_store.py::test_a_key_file_that_others_may_read_is_refused,
    ::test_a_key_file_is_not_shared).
    """

    path: Path
    kind: ClassVar[str] = "key file"

    def make(self, random: Random) -> tuple[bytes, Description]:
        key = random(KEY_BYTES)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(_HEADER + key.hex().encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
            sync_folder(self.path.parent)
        except FileExistsError:
            raise RunError(
                f"Expected {self.path} not to exist: a key file belongs to one store. Delete it if no store uses it."
            ) from None
        except OSError as error:
            raise RunError(f"Expected {self.path} to be writable: {error.strerror}.") from None
        return key, {"path": str(self.path.absolute())}

    def find(self, description: Description) -> bytes:
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                content = file.read(len(_HEADER) + 2 * KEY_BYTES + 2)
        except OSError as error:
            raise RunError(f"Expected {self.path} to be a readable key file: {error.strerror}.") from None
        if mode & 0o077:
            raise PrivacyError(f"Expected {self.path} to be its owner's alone, mode 600, not {mode:03o}.")
        try:
            key = bytes.fromhex(content.removeprefix(_HEADER).decode())
        except ValueError:
            key = b""
        if not content.startswith(_HEADER) or len(key) != KEY_BYTES:
            raise RunError(f"Expected {self.path} to be a key file of a device's store.")
        return key

    def destroy(self, description: Description) -> bool:
        try:
            with self.path.open("rb") as file:
                if file.read(len(_HEADER)) != _HEADER:  # the word of a store is not enough to destroy a file
                    return False
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(f"Expected {self.path} to be a readable key file: {error.strerror}.") from None
        erase(self.path)
        return True


@dataclass(frozen=True)
class Passphrase:
    """A passphrase, stretched by scrypt (RFC 7914) under a salt of the store's own."""

    text: str = field(repr=False)
    kind: ClassVar[str] = "passphrase"

    def make(self, random: Random) -> tuple[bytes, Description]:
        if not self.text:
            raise SettingsError("Expected a passphrase of at least one character.")
        description: Description = {"salt": random(16).hex(), **_SCRYPT}
        return self.find(description), description

    def find(self, description: Description) -> bytes:
        costs = {name: int(description[name]) for name in _SCRYPT}
        if any(cost > _MOST[name] for name, cost in costs.items()):
            raise RunError(f"Expected the store's scrypt parameters {costs} to be at most {_MOST}.")
        salt = bytes.fromhex(str(description["salt"]))
        # The same characters can be typed as different code points.
        text = unicodedata.normalize("NFC", self.text).encode()
        return Scrypt(salt=salt, length=KEY_BYTES, **costs).derive(text)

    def destroy(self, description: Description) -> bool:
        return False


@dataclass(frozen=True)
class Keyring:
    """The operating system's keyring, through the optional package ``keyring``; one account for each store."""

    kind: ClassVar[str] = "keyring"

    def make(self, random: Random) -> tuple[bytes, Description]:
        key, account = random(KEY_BYTES), random(16).hex()
        _asked("set_password", account, key.hex())
        return key, {"account": account}

    def find(self, description: Description) -> bytes:
        found = _asked("get_password", str(description["account"]))
        if found is None:
            raise RunError(f"Expected the keyring to hold the key of {_SERVICE} {description['account']}.")
        return bytes.fromhex(str(found))

    def destroy(self, description: Description) -> bool:
        account = str(description["account"])
        if _asked("get_password", account) is None:
            return False
        _asked("delete_password", account)
        return True


def source_of(description: Description) -> KeySource | None:
    """The source that a key record names; None for one that keeps nothing: a passphrase."""
    if description["kind"] == KeyFile.kind:
        return KeyFile(Path(str(description["path"])))
    return Keyring() if description["kind"] == Keyring.kind else None


def wrap(description: Description, wrapping_key: bytes, data_key: bytes, random: Random) -> bytes:
    """The key record: checksum, description and the wrapped data key."""
    nonce = random(NONCE_BYTES)
    wrapped = nonce + ChaCha20Poly1305(wrapping_key).encrypt(nonce, data_key, _canonical(description))
    content = _canonical({**description, "wrapped": wrapped.hex()})
    return hashlib.sha256(content).digest() + content


def describe(record: bytes) -> Description:
    """What a key record says in the clear.

    Raises :class:`DataError` if it is damaged. Its checksum is there to tell damage from a wrong key.
    """
    return _parse(record)[0]


def unwrap(record: bytes, source: KeySource) -> tuple[bytes, bytes]:
    """The data key and the key that it was wrapped under.

    Raises :class:`DataError` if the record is damaged, and :class:`RunError` if this is not the store's key.
    """
    description, wrapped = _parse(record)
    if description["kind"] != source.kind:
        raise RunError(f"Expected the key of the store to be a {description['kind']}, not a {source.kind}.")
    wrapping_key = source.find(description)
    nonce, content = wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:]
    try:
        data_key = ChaCha20Poly1305(wrapping_key).decrypt(nonce, content, _canonical(description))
    except InvalidTag:
        raise RunError(f"Expected the {source.kind} to be that of this store: it does not open it.") from None
    return data_key, wrapping_key


def erase(path: Path) -> None:
    """Overwrite a file's content, make that durable, and remove the file. Raises :class:`RunError`.

    What a copy-on-write file system or the controller of a flash disk keeps elsewhere is out of reach.
    """
    try:
        with path.open("r+b") as file:
            left = os.fstat(file.fileno()).st_size
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 16)))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"Expected {path} to be erasable: {error.strerror}.") from None


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(description: Description) -> bytes:
    return json.dumps(description, sort_keys=True).encode()


def _parse(record: bytes) -> tuple[Description, bytes]:
    checksum, content = record[:32], record[32:]
    if hashlib.sha256(content).digest() != checksum:
        raise DataError("Expected the key record of a store to match its checksum.")
    description: Description = json.loads(content)
    return description, bytes.fromhex(str(description.pop("wrapped")))


def _asked(function: str, *arguments: str) -> object:
    """What a function of the keyring answers. Raises :class:`MissingDependency` and :class:`RunError`."""
    try:
        keyring: ModuleType = importlib.import_module("keyring")
    except ImportError:
        raise MissingDependency("Expected the package keyring to be installed: pip install keyring.") from None
    try:
        answer: object = getattr(keyring, function)(_SERVICE, *arguments)
    except keyring.errors.KeyringError as error:
        raise RunError(f"Expected the operating system's keyring to answer: {error}.") from None
    return answer
