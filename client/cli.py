"""`fedtopk device`: a device's own store, from its keys to its end."""

import csv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import Format, answer
from common.errors import DataError, RunError, SettingsError

if TYPE_CHECKING:
    from client.device_store import DeviceStore
    from client.store_key import KeySource

device_app = typer.Typer(help="A device: its keys, its user's history, its end.", no_args_is_help=True)

IDENTITY_KEY, TRANSPORT_KEY, ENROLMENT = "identity key", "transport key", "enrolment"
"""Names of the store's records: 32 secret bytes, a PEM, and the authority's JSON."""

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder.")]
FormatOption = Annotated[Format, typer.Option("--format", help="What standard output holds.")]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="Where the store's key is; by default DIR.key beside the folder.")
]
PassphraseOption = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File whose first line is the store's passphrase.")
]
KeyringOption = Annotated[bool, typer.Option("--keyring", help="The store's key is in the system's keyring.")]


@device_app.command()
def init(
    folder: FolderArgument,
    request: Annotated[Path, typer.Option("--request", help="File for what the enrolment authority is to certify.")],
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Make a device's encrypted store and its keys."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    from client.device_store import DeviceStore
    from common.enrolment import Request

    identity, transport = Ed25519PrivateKey.generate(), generate_private_key(SECP384R1())
    public = transport.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with DeviceStore.create(folder, _source(folder, key_file, passphrase, keyring)) as store, store.transaction():
        store.records[IDENTITY_KEY] = identity.private_bytes_raw()
        store.records[TRANSPORT_KEY] = transport.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _write(request, Request.make(identity, public).to_json())
    found = {"device": str(folder), "request": str(request)}
    answer(format, found, lambda: f"Have {request} certified (`fedtopk authority enrol`), then `fedtopk device enrol`.")


@device_app.command()
def enrol(
    folder: FolderArgument,
    enrolment: Annotated[Path, typer.Argument(metavar="ENROLMENT", help="What `fedtopk authority enrol` wrote.")],
    authority: Annotated[str, typer.Option("--authority", help="The authority's public key, which is pinned.")],
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Check the authority's enrolment and keep it."""
    import time

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from common.enrolment import Enrolment

    try:
        pinned = bytes.fromhex(authority)
    except ValueError:
        raise SettingsError(f"Expected --authority {authority} to be hexadecimal.") from None
    content = Enrolment.parse(_read(enrolment))
    certificate = content.checked(pinned, time.time())
    with _opened(folder, key_file, passphrase, keyring) as store:
        own = Ed25519PrivateKey.from_private_bytes(store.records[IDENTITY_KEY]).public_key().public_bytes_raw()
        if certificate.key != own:
            raise DataError(f"Expected {enrolment} to be of this device's key.")
        store.records[ENROLMENT] = content.to_json().encode()
    found = {"device": certificate.device, "expires": certificate.expires}
    answer(format, found, lambda: f"This is device {certificate.device}.")


@device_app.command("add-events")
def add_events(
    folder: FolderArgument,
    events: Annotated[Path, typer.Argument(metavar="CSV", help="With a header: item, rating, timestamp (seconds).")],
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Add interactions to the user's history, all of a file's or none."""
    from client.device_contents import Event

    rows = sorted((Event(*row) for row in _rows(events)), key=lambda event: event.timestamp)
    with _opened(folder, key_file, passphrase, keyring) as store:
        with store.transaction():
            store.add_events(rows)
        count = store.event_count
    answer(format, {"added": len(rows), "events": count}, lambda: f"{len(rows)} events added, {count} in all.")


@device_app.command()
def export(
    folder: FolderArgument,
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
) -> None:
    """Print all that the device holds of its user, as JSON."""
    with _opened(folder, key_file, passphrase, keyring) as store:
        user, state = store.load_user(), store.load_state()
        found: dict[str, Any] = {
            "events": [asdict(event) for event in store.events()],
            "user_embedding": None if user is None else user.tolist(),
            "recurrent_state": None if state is None else state.values.tolist(),
            "contributions": [charge.decode() for charge in store.charges()],
        }
    answer("json", found, lambda: None)


@device_app.command()
def forget(folder: FolderArgument, key_file: KeyFileOption = None, format: FormatOption = "text") -> None:
    """Destroy the store's key, and then the store: copies of it open no more."""
    from client import erasure

    done = erasure.forget(folder, key_file)
    answer(format, {"destroyed": done}, lambda: "Destroyed: " + ", ".join(done) + ".")


def _source(folder: Path, key_file: Path | None, passphrase: Path | None, keyring: bool) -> "KeySource":
    from client.store_key import KeyFile, Keyring, Passphrase

    if (key_file is not None) + (passphrase is not None) + keyring > 1:
        raise SettingsError("Expected one of --key-file, --passphrase-file and --keyring.")
    if keyring:
        return Keyring()
    if passphrase is not None:
        return Passphrase(_read(passphrase).split("\n")[0])
    return KeyFile((key_file or folder.with_name(folder.name + ".key")).absolute())


def _opened(folder: Path, key_file: Path | None, passphrase: Path | None, keyring: bool) -> "DeviceStore":
    from client.device_store import DeviceStore

    return DeviceStore.open(folder, _source(folder, key_file, passphrase, keyring))


def _rows(path: Path) -> Iterator[tuple[str, float, int]]:
    reader = csv.DictReader(_read(path).splitlines())
    if set(reader.fieldnames or ()) != {"item", "rating", "timestamp"}:
        raise DataError(f"Expected {path} to have the columns item, rating and timestamp, found {reader.fieldnames}.")
    for number, row in enumerate(reader, start=2):
        try:
            yield row["item"], float(row["rating"]), int(row["timestamp"])
        except (TypeError, ValueError):
            raise DataError(f"Expected line {number} of {path} to hold an item, a rating and whole seconds.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"Expected {path} to be a readable text file: {error}.") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"Expected {path} to be writable: {error.strerror}.") from None
