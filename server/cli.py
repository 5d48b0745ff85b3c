"""`fedtopk authority` and `fedtopk server`: whoever says who is a device, and whoever adds up their updates."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from common.console import FormatOption, answer
from common.errors import RunError, SettingsError

if TYPE_CHECKING:
    from server.training import Progress

authority_app = typer.Typer(help="The enrolment authority: who is a device.", no_args_is_help=True)

server_app = typer.Typer(help="The server: trains over real devices.", no_args_is_help=True)

_DAY = 24 * 3600

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]
PassphraseOption = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File whose first line protects the authority's key.")
]


@authority_app.command()
def init(folder: FolderArgument, passphrase: PassphraseOption = None, format: FormatOption = "text") -> None:
    """Make a new authority. Keep its folder away from the aggregator."""
    from server.authority import KEY, PUBLIC, Authority

    Authority.create(folder, read_passphrase(passphrase))
    found = {"key": str(folder / KEY), "public_key": (folder / PUBLIC).read_text(encoding="utf-8").strip()}
    answer(format, found, lambda: f"Devices and the server pin this public key: {found['public_key']}")


@authority_app.command()
def enrol(
    folder: FolderArgument,
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="What `fedtopk device init` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="File for the enrolment.")],
    name: Annotated[str, typer.Option("--name", help="What to call the device in the register.")] = "",
    days: Annotated[int, typer.Option("--days", min=1, help="How long it is valid.")] = 365,
    device: Annotated[int | None, typer.Option("--device", min=0, help="Its number; by default the next one.")] = None,
    passphrase: PassphraseOption = None,
    format: FormatOption = "text",
) -> None:
    """Enrol a device: certify its keys under a number that no other one has."""
    from common.enrolment import Request
    from common.secagg.identity import Certificate
    from common.secagg.wire import Reader
    from server.authority import Authority
    from server.durable import replacing

    authority, now = Authority(folder, read_passphrase(passphrase)), int(time.time())
    enrolment = authority.enrol(Request.parse(_read(request)), now + days * _DAY, now, name=name, device=device)
    with replacing(out) as file:
        file.write_text(enrolment.to_json(), encoding="utf-8")
    certificate = Certificate.read(Reader(bytes.fromhex(enrolment.certificate), "a certificate"))
    found = {"device": certificate.device, "expires": certificate.expires, "enrolment": str(out)}
    answer(format, found, lambda: f"Device {found['device']} is enrolled for {days} days; give it {out}.")


@authority_app.command()
def revoke(
    folder: FolderArgument,
    device: Annotated[int, typer.Argument(metavar="DEVICE", help="Its number.")],
    passphrase: PassphraseOption = None,
    format: FormatOption = "text",
) -> None:
    """Revoke a device for good, and sign the new list of revoked ones."""
    from server.authority import REVOKED, Authority

    revocations = Authority(folder, read_passphrase(passphrase)).revoke(device, int(time.time()))
    found = {"number": revocations.number, "devices": revocations.devices, "list": str(folder / REVOKED)}
    answer(format, found, lambda: f"{len(revocations.devices)} devices are revoked; give everybody {folder / REVOKED}.")


@authority_app.command("list")
def list_(folder: FolderArgument, format: FormatOption = "text") -> None:
    """List all devices that were ever enrolled."""
    from server.authority import read_register

    now = time.time()
    entries = [asdict(entry) | {"status": _status(asdict(entry), now)} for entry in read_register(folder)]
    answer(format, entries, lambda: _table(entries))


@server_app.command("init")
def server_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")],
    address: Annotated[str, typer.Option("--address", metavar="HOST:PORT", help="Where devices connect to.")],
    authority: Annotated[str, typer.Option("--authority", help="The enrolment authority's public key.")],
    catalogue: Annotated[
        Path,
        typer.Option("--catalogue", metavar="CSV", help="The public items, most frequent first: item, title, labels."),
    ],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a setting.")] = None,
    format: FormatOption = "text",
) -> None:
    """Make a server's folder: its certificate, the key that signs its models, and the invitation for devices."""
    from common.secagg.identity import KEY_BYTES
    from common.settings import load_settings
    from server.app import expect_secure
    from server.site import INVITATION, Site, read_catalogue

    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise SettingsError(f"Expected --address={address} to be HOST:PORT.")
    try:
        key = bytes.fromhex(authority)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SettingsError(f"Expected --authority={authority} to be {KEY_BYTES} bytes in hexadecimal digits.")
    settings = load_settings(config, ["aggregation.kind=secure", *(overrides or ())])
    expect_secure(settings)
    site = Site.create(folder, address, [host.strip("[]")], settings, read_catalogue(catalogue), key)
    found = {"server": str(site.path), "invitation": str(site.path / INVITATION)}
    answer(format, found, lambda: f"Give {found['invitation']} to those who run devices, by a way that they trust.")


@server_app.command("start")
def server_start(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int | None, typer.Option("--port", help="By default that of the invitation.")] = None,
    wait: Annotated[int, typer.Option("--wait", min=0, help="Devices to begin with; 0: all that are enrolled.")] = 0,
    patience: Annotated[float, typer.Option("--patience", min=0, help="Seconds to wait for them.")] = 600.0,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a device has to answer.")] = 120.0,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Show it on a web page, on loopback.")] = False,
    format: FormatOption = "text",
) -> None:
    """Train over the devices that are enrolled and connect; Ctrl-C stops after the round."""
    from common.console import stderr, stopping
    from server.dashboard.serve import beside
    from server.deployment import Service, run_server
    from server.run_folder import RunFolder
    from server.site import Site

    site = Site(folder)
    bound = site.invitation.port if port is None else port
    with (
        (folder / "superlink.log").open("ab") as log,
        beside(out, dashboard),
        stopping("Stopping after this round; press Ctrl-C again to break it off.") as should_stop,
    ):

        def say(line: str) -> None:
            stderr.print(line, highlight=False)

        def told(progress: "Progress") -> None:
            answered = progress.cohort_sum.survivors
            say(f"Round {progress.round}: {answered} of {progress.members} updates, {progress.seconds:.1f} s.")

        service = Service(host, bound, wait, patience, timeout, log, say)
        report = run_server(site, RunFolder(out), service, resume=resume, should_stop=should_stop, on_round=told)
    answer(format, report, lambda: f"{report['status']} after {report['rounds']} rounds; run folder: {out}")
    if report["status"] in ("stopped", "aborted"):
        raise typer.Exit(130)


def _status(entry: dict[str, Any], now: float) -> str:
    if entry["revoked"] is not None:
        return "revoked"
    return "expired" if now > entry["expires"] else "enrolled"


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table("device", "name", "status", "enrolled", "expires")
    for entry in entries:
        days = (time.strftime("%Y-%m-%d", time.gmtime(entry[name])) for name in ("enrolled", "expires"))
        table.add_row(str(entry["device"]), entry["name"], entry["status"], *days)
    return table


def read_passphrase(path: Path | None) -> str | None:
    """The first line of a file. Raises :class:`RunError`."""
    if path is None:
        return None
    lines = _read(path).splitlines()
    if not lines or not lines[0]:
        raise RunError(f"Expected {path} to hold a passphrase in its first line.")
    return lines[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"Expected {path} to be a readable text file: {error}.") from None
