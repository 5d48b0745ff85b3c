"""`fedtopk`, with the devices of a fleet behind recorders and with something in their histories to look for.

Run as a program: the folder for what is recorded, and then the command's own words.

::

    FOLDER/wire/     what devices and server sent, as anybody on the network sees it
    FOLDER/hidden/   the same without the TLS: all that the server gets and sends
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployment import opened
from recorder import Recorder

import simulations.fleet
from client.device_contents import Event
from client.joining import join
from client.stored_device import INVITATION
from common.invitation import Invitation
from server.site import Site
from simulations.cli import main

WIRE, HIDDEN = "wire", "hidden"
devices_started = simulations.fleet.devices_started


@dataclass(frozen=True)
class Fleet:
    """What is left of a run.

    Attributes:
        run: the run folder.
        traffic: what devices and server told each other, as above.
        said: its standard output.
    """

    run: Path
    traffic: Path
    said: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.said)

    def device(self, number: int) -> Path:
        return self.run / "fleet" / "devices" / str(number)


def planted(device: int) -> list[Event]:
    """Interactions with items that no catalogue has."""
    items = ("The Diary of Nobody in Particular", "How to Leave One's Husband", "A clinic on Canal Street", "Ünïcødé")
    return [Event(f"{item} ({device}, {at})", 5.0, 1_600_000_000 + at) for at, item in enumerate(items)]


def recorded(traffic: Path, folder: Path, stack: ExitStack) -> None:
    """Have all devices of a fleet's folder connect through recorders."""
    site = Site(folder.parent / "server")
    gateway = site.invitation.port
    hidden = stack.enter_context(Recorder(gateway, traffic / HIDDEN, site.tls))
    wire = stack.enter_context(Recorder(hidden.port, traffic / WIRE))
    for path in folder.glob("*.key"):
        with opened(path.with_suffix("")) as store:
            invitation = Invitation.parse(store.records[INVITATION])
            policy = store.load_policy()
            assert policy is not None
            join(store, replace(invitation, server=f"127.0.0.1:{wire.port}"), policy)
            store.add_events(planted(int(path.stem)))


if __name__ == "__main__":
    traffic = Path(sys.argv.pop(1))

    @contextmanager
    def started(folder: Path, devices: Sequence[int]) -> Iterator[None]:
        with ExitStack() as stack:
            recorded(traffic, folder, stack)
            stack.enter_context(devices_started(folder, devices))
            yield

    simulations.fleet.devices_started = started
    main()
