"""`fedtopk fleet`: a whole deployment on loopback, for trying it out and for tests.

An authority, a server and N devices are set up as `docs/deploy.md` does it on separate machines: real keys, TLS, node
authentication, one process and one encrypted store for each device, whose histories are those of the data's users. Only
the policy is a demonstration's, since so few devices cannot bear a real one::

    RUN/                    the run folder, as of any run
    RUN/fleet/authority/    the enrolment authority
    RUN/fleet/server/       the server's folder
    RUN/fleet/devices/3/    device 3's store, with RUN/fleet/devices/3.key beside it
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from client.device_contents import Event
from client.device_store import DeviceStore
from client.guard import Policy
from client.joining import enrol, join, make_device
from client.store_key import KeyFile
from common.errors import SettingsError
from common.flower_tasks import free_port
from common.model import Parameters
from common.processes import program, running
from common.settings import Settings
from server.authority import Authority
from server.deployment import Service, run_server
from server.durable import make_folder
from server.run_folder import RunFolder
from server.site import ENROLMENTS, Site
from server.training import Progress
from simulations.datasets.interactions import Interactions
from simulations.population import Population
from simulations.presets import load_with_presets
from simulations.simulate import evaluate_model, load_split

_DAY = 24 * 3600
_PATIENCE_SECONDS = 300.0
_TIMEOUT_SECONDS = 120.0
_LEAST = 3


def demo_settings(devices: int, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings under which so few devices can run at all; what the user sets has precedence, but in a file the users
    and the aggregation, which a fleet is: it may be of a simulation.

    Raises :class:`SettingsError`, also for fewer than 3 devices.
    """
    if devices < _LEAST:
        raise SettingsError(f"Expected devices={devices} to be at least {_LEAST}, so that a sum hides something.")
    demo = {
        "training.rounds": 3,
        "training.cohort_rate": 1.0,
        "aggregation.dropout_fraction": max(0.1, 1 / devices),
        "guard.minimum_cohort": min(_LEAST, devices - 1),
        "guard.minimum_noise_multiplier": 0.1,
    }
    return load_with_presets(config, demo, [f"data.users={devices}", "aggregation.kind=secure", *overrides])


def run_fleet(
    folder: RunFolder,
    settings: Settings,
    *,
    should_stop: Callable[[], bool],
    on_round: Callable[[Progress], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Set everything up, train, evaluate and shut down. Returns the report.

    Raises:
        FedtopkError: whatever the user can mend.
    """
    folder.expect_new()
    data = load_split(settings)
    population = Population(settings, data.train)

    def evaluate(parameters: Parameters) -> dict[str, Any]:
        return evaluate_model(settings, parameters, population, data)

    home = folder.path / "fleet"
    site = set_up(home, settings, data.train)
    say(f"{len(population)} devices have keys, certificates and histories. A demonstration's policy, each insists on:")
    for line in Policy.of(settings).in_words():
        say(f"  {line}")
    port = site.invitation.port
    with ExitStack() as stack:
        log = stack.enter_context((home / "server" / "superlink.log").open("ab"))
        stack.enter_context(devices_started(home / "devices", range(len(population))))
        service = Service("127.0.0.1", port, 0, _PATIENCE_SECONDS, _TIMEOUT_SECONDS, log, say, evaluate)
        return run_server(site, folder, service, resume=False, should_stop=should_stop, on_round=on_round)


def set_up(home: Path, settings: Settings, histories: Interactions) -> Site:
    """An authority, a server's folder and one enrolled device with a history for each user, which has joined."""
    make_folder(home / "devices")
    authority = Authority.create(home / "authority")
    address = f"127.0.0.1:{free_port()}"
    site = Site.create(home / "server", address, ["127.0.0.1"], settings, histories.catalogue, authority.public)
    now = int(time.time())
    for device, own in enumerate(histories.slices()):
        folder = home / "devices" / str(device)
        key = KeyFile(folder.with_name(f"{device}.key").absolute())
        request = make_device(folder, key)
        enrolment = authority.enrol(request, now + _DAY, now, name=f"user {histories.user_ids[device]}", device=device)
        (site.path / ENROLMENTS / f"{device}.json").write_text(enrolment.to_json(), encoding="utf-8")
        with DeviceStore.open(folder, key) as store, store.transaction():
            enrol(store, enrolment, authority.public)
            join(store, site.invitation, Policy.of(settings))
            store.add_events(_events(histories, own))
    return site


@contextmanager
def devices_started(folder: Path, devices: Sequence[int]) -> Iterator[None]:
    """The processes of these devices, which end with this block; their words are in DEVICE/device.log."""
    with ExitStack() as stack:
        started = []
        for device in devices:
            log = stack.enter_context((folder / str(device) / "device.log").open("ab"))
            words = [program("fedtopk"), "device", "start", str(folder / str(device))]
            started.append(stack.enter_context(running(words, {}, log)))
        for process in started:  # all at once, before each is waited for
            stack.callback(process.terminate)
        yield


def _events(histories: Interactions, own: slice) -> Iterator[Event]:
    ids = histories.catalogue.ids
    columns = (histories.items[own], histories.ratings[own], histories.timestamps[own])
    for item, rating, timestamp in zip(*(column.tolist() for column in columns), strict=True):
        yield Event(str(ids[item]), rating, timestamp)
