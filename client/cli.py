"""`fedtopk device`: a device's own store, from its keys to its end."""

import csv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import FormatOption, answer
from common.errors import DataError, RunError, SettingsError

if TYPE_CHECKING:
    from client.device_store import DeviceStore
    from client.store_key import KeySource

device_app = typer.Typer(help="A device: its keys, its user's history, its end.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder.")]
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
    from client.joining import make_device

    _write(request, make_device(folder, key_source(folder, key_file, passphrase, keyring)).to_json())
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
    from client.joining import enrol as keep
    from common.enrolment import Enrolment

    try:
        pinned = bytes.fromhex(authority)
    except ValueError:
        raise SettingsError(f"Expected --authority {authority} to be hexadecimal.") from None
    with opened_store(folder, key_file, passphrase, keyring) as store:
        certificate = keep(store, Enrolment.parse(_read(enrolment)), pinned)
    found = {"device": certificate.device, "expires": certificate.expires}
    answer(format, found, lambda: f"This is device {certificate.device}.")


@device_app.command()
def join(
    folder: FolderArgument,
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="What `fedtopk server init` wrote.")],
    policy_file: Annotated[
        Path | None, typer.Option("--policy", help="TOML with what to insist on instead of what the server proposes.")
    ] = None,
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Pin a server: its certificate, its models' publisher, its catalogue, and the terms to take part under."""
    from client.guard import Policy, with_changes
    from client.joining import join as pin
    from common.invitation import Invitation
    from common.settings import load_toml

    content = Invitation.parse(_read(invitation))
    policy = with_changes(Policy.proposed(load_toml(content.settings)), _read(policy_file) if policy_file else "")
    with opened_store(folder, key_file, passphrase, keyring) as store:
        pin(store, content, policy)
    found = {"server": content.server, "items": len(content.items), "policy": asdict(policy)}
    words = "".join(f"\n- {line}" for line in policy.in_words())
    answer(format, found, lambda: f"This device takes part with {content.server} in sums that have{words}")


@device_app.command()
def revocations(
    folder: FolderArgument,
    listed: Annotated[Path, typer.Argument(metavar="LIST", help="What `fedtopk authority revoke` wrote.")],
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Keep the authority's list of revoked devices: this device takes part with none of them."""
    from client.joining import keep_revocations

    with opened_store(folder, key_file, passphrase, keyring) as store:
        found = keep_revocations(store, _read(listed))
    content = {"number": found.number, "devices": found.devices}
    answer(format, content, lambda: f"{len(found.devices)} devices are revoked, by list number {found.number}.")


@device_app.command()
def start(
    folder: FolderArgument,
    condition: Annotated[
        str, typer.Option("--condition", help="Command that must succeed before each participation, or says why not.")
    ] = "",
    log: Annotated[Path | None, typer.Option("--log", help="File for the words of Flower's SuperNode.")] = None,
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
) -> None:
    """Answer the server until Ctrl-C: take part in rounds, and receive its models."""
    from client.agent import Agent
    from client.conditions import command
    from common.console import stderr, stopping

    source = key_source(folder, key_file, passphrase, keyring)
    with (log or folder / "supernode.log").open("ab") as words, stopping("Leaving.") as should_stop:
        agent = Agent(folder, source, command(condition), lambda line: stderr.print(line, highlight=False), words)
        agent.run(should_stop)


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
    with opened_store(folder, key_file, passphrase, keyring) as store:
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
    with opened_store(folder, key_file, passphrase, keyring) as store:
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


def key_source(folder: Path, key_file: Path | None, passphrase: Path | None, keyring: bool) -> "KeySource":
    """The source of the key that the options name. Raises :class:`SettingsError` for more than one."""
    from client.store_key import KeyFile, Keyring, Passphrase

    if (key_file is not None) + (passphrase is not None) + keyring > 1:
        raise SettingsError("Expected one of --key-file, --passphrase-file and --keyring.")
    if keyring:
        return Keyring()
    if passphrase is not None:
        return Passphrase(_read(passphrase).split("\n")[0])
    return KeyFile((key_file or folder.with_name(folder.name + ".key")).absolute())


def opened_store(folder: Path, key_file: Path | None, passphrase: Path | None, keyring: bool) -> "DeviceStore":
    """The device's store, once whoever has it open has closed it."""
    from client.device_store import STORE_PATIENCE_SECONDS, DeviceStore

    source = key_source(folder, key_file, passphrase, keyring)
    return DeviceStore.open(folder, source, patience=STORE_PATIENCE_SECONDS)


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
