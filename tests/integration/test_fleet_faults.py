"""One run whose devices and server are killed, as a machine would do it, and which ends well all the same.

======  =========================================================  =====================================================
round   what happens                                               and then
======  =========================================================  =====================================================
1       device 2 is killed while it computes its upload            the round ends without it; it is started again
2       the server is killed after devices have unmasked,          it is started again
        before the release
2, 3    device 3 is killed between them                            the round goes on without it; it is started again
3       the server is killed after devices have uploaded           it is started again
3       Ctrl-C in the server's terminal                            the round ends, and with it the run
======  =========================================================  =====================================================
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pytest
from deployment import DEVICES, SETTINGS, Deployment, Kept, interrupt, opened, processes, wait_for

from client.guard import Policy
from client.joining import enrol, join, make_device
from client.ledger import epsilon_server
from client.store_key import KeyFile
from server.authority import Authority
from server.ledger import LedgerReader
from server.site import ENROLMENTS
from server.site import REVOKED as REVOKED_LIST
from server.store import open_store_read_only
from server.tls import CA, make_tls
from simulations.fleet import demo_settings

ROUNDS = 3
DISTRUSTFUL, REVOKED = DEVICES, DEVICES + 1
"""Devices that take no part: one that pins another certificate than the server's, and one that was revoked."""
PATIENT = ("--timeout", "40", "--patience", "180")


@dataclass(frozen=True)
class Story:
    """What was seen on the way.

    Attributes:
        deployment: as it is at the end.
        before, after: what devices 0 … 3 had at first and at last.
        killed: what devices 2 and 3 had when they were killed.
        states: the ledger's states each time after the server was killed.
        lingered: seconds that the SuperLink outlived the server.
        ended: the server's exit code at last.
        left: exit code of the device that trusts another certificate.
    """

    deployment: Deployment
    before: list[Kept]
    after: list[Kept]
    killed: dict[int, Kept]
    states: list[dict[tuple[int, int], str]]
    lingered: list[float]
    ended: int
    left: int


def add_strangers(deployment: Deployment) -> None:
    """Enrol them, let them join, and revoke the second one."""
    site, authority, now = deployment.site, Authority(deployment.home / "authority"), int(time.time())
    make_tls(deployment.home / "other", ["127.0.0.1"], now=datetime.now(UTC))
    roots = {DISTRUSTFUL: deployment.home / "other" / CA, REVOKED: site.tls.root}
    for number, root in roots.items():
        folder = deployment.device(number)
        request = make_device(folder, KeyFile(folder.with_name(f"{number}.key")))
        enrolment = authority.enrol(request, now + 1000, now, device=number)
        if number == REVOKED:
            (site.path / ENROLMENTS / f"{number}.json").write_text(enrolment.to_json())
        invitation = replace(site.invitation, root_certificate=root.read_text())
        with opened(folder) as store:
            enrol(store, enrolment, authority.public)
            join(store, invitation, Policy.of(site.settings))
    (site.path / REVOKED_LIST).write_text(authority.revoke(REVOKED, now).to_json())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home = tmp_path_factory.mktemp("faults")
    changes = SETTINGS | {"privacy.randomness": "system"}
    settings = demo_settings(DEVICES, None, [f"{key}={value}" for key, value in changes.items()])
    with processes() as group:
        deployment = Deployment(home / "deployment", settings, group)
        before = [Kept.by(deployment.device(number)) for number in range(DEVICES)]
        add_strangers(deployment)
        server = deployment.start_server(*PATIENT)
        devices = [deployment.start_device(number) for number in range(DEVICES)]
        killed: dict[int, Kept] = {}
        states: list[dict[tuple[int, int], str]] = []
        lingered: list[float] = []

        def restarted() -> None:
            """Kill the server, and start it again."""
            nonlocal server
            lingered.append(group.kill(server))
            states.append(deployment.states())
            server = deployment.start_server(*PATIENT, "--resume")

        def released(round_: int) -> bool:
            return any(state == "released" for (number, _), state in deployment.states().items() if number == round_)

        wait_for(
            lambda: "Receiving: train.upload" in deployment.node_said(2), 150, "the first upload", server, *devices
        )
        time.sleep(0.5)  # torch takes longer to import
        group.kill(devices[2])
        killed[2] = Kept.by(deployment.device(2))
        devices[2] = deployment.start_device(2)
        wait_for(lambda: released(1), 150, "round 1", server, *devices)

        distrustful, revoked = (deployment.start_device(number) for number in (DISTRUSTFUL, REVOKED))
        wait_for(
            lambda: all("round 2, unmask: answered" in deployment.said(number) for number in (0, 1)),
            150,
            "round 2",
            server,
            *devices,
        )
        restarted()
        wait_for(lambda: "Failed to activate" in deployment.node_said(REVOKED), 100, "a refusal")
        revoked.terminate()
        wait_for(lambda: released(2), 200, "round 2 again", server, *devices)

        group.kill(devices[3])
        killed[3] = Kept.by(deployment.device(3))
        devices[3] = deployment.start_device(3)
        wait_for(
            lambda: all("round 3, upload: answered" in deployment.said(number) for number in (0, 1)),
            150,
            "round 3",
            server,
            *devices,
        )
        restarted()
        wait_for(lambda: (3, 2) in deployment.states(), 150, "round 3 again", server, *devices)
        interrupt(server)
        ended = server.wait(200)
        distrustful.wait(100)
        assert [device.poll() for device in devices] == [None] * DEVICES, "all devices run still"
        group.end()
        after = [Kept.by(deployment.device(number)) for number in range(DEVICES)]
        yield Story(deployment, before, after, killed, states, lingered, ended, distrustful.returncode)


def test_a_device_that_is_killed_at_its_upload_is_left_out_and_comes_back(story: Story) -> None:
    uploads = [event for event in story.deployment.events("stage") if event.fields["stage"] == "upload"]
    assert [(event.round, event.fields["asked"], event.fields["answers"]) for event in uploads[:1]] == [(1, 4, 3)]
    rounds = {event.round: event.fields for event in story.deployment.events("round")}
    assert (rounds[1]["members"], rounds[1]["survivors"]) == (4, 3)
    assert set(story.killed[2].attempts) <= {(1, 1)}
    assert story.after[2].attempts[: len(story.killed[2].charges)] == story.killed[2].attempts
    assert (3, 2) in story.after[2].attempts


def test_a_device_that_is_killed_between_rounds_has_all_it_had(story: Story) -> None:
    killed, after = story.killed[3], story.after[3]
    assert killed.attempts == [(1, 1), (2, 1), (2, 2)]
    assert killed.history == story.before[3].history
    assert killed.user is not None and after.user is not None
    assert np.any(killed.user != 0)
    assert after.charges[:3] == killed.charges
    # Flower takes a killed node for connected, and refuses its successor, for up to a minute: round 3 may end before.
    # The run's last model is with this device in any case, as `test_no_device_loses_anything` asks.
    came_back = len(after.charges) > len(killed.charges)
    assert np.any(after.user != killed.user) == came_back


def test_a_killed_server_leaves_no_superlink(story: Story) -> None:
    assert len(story.lingered) == 2 and max(story.lingered) < 15


def test_a_run_goes_on_where_it_was(story: Story) -> None:
    early, late = story.states
    assert early == {(1, 1): "released", (2, 1): "uploaded"}
    assert late == {(1, 1): "released", (2, 1): "uploaded", (2, 2): "released", (3, 1): "uploaded"}
    assert story.ended == 0, story.deployment.server_said()
    assert [event.round for event in story.deployment.events("resumed")] == [1, 2]
    report = json.loads((story.deployment.run / "report.json").read_text())
    assert (report["status"], report["rounds"], report["privacy"]["releases"]) == ("finished", ROUNDS, ROUNDS)
    assert report["privacy"]["epsilon_model"] <= 8
    survivors = [event.fields["survivors"] for event in story.deployment.events("round")]
    assert len(survivors) == ROUNDS
    assert (report["client_updates"], report["aggregation"]["dropouts"]) == (sum(survivors), 12 - sum(survivors))


def test_no_round_is_released_twice_and_nothing_is_counted_too_low(story: Story) -> None:
    released = [number for (number, _), state in story.deployment.states().items() if state == "released"]
    assert released == [1, 2, 3]
    charged = {attempt for kept in story.after for attempt in kept.attempts}
    assert charged == {(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)} == set(story.deployment.states())
    with open_store_read_only(story.deployment.run) as store:
        ledger = LedgerReader(store)
        assert ledger.model_releases == ROUNDS
        assert ledger.server_uploads == len(charged)
    privacy = json.loads((story.deployment.run / "report.json").read_text())["privacy"]
    own = [epsilon_server(kept.charges, privacy["delta"]) for kept in story.after]
    assert privacy["epsilon_server"] == pytest.approx(
        max(own), rel=1e-3
    )  # a device counts with the bound of the excess
    for number, kept in enumerate(story.after):
        assert len(set(kept.attempts)) == len(kept.attempts) >= story.deployment.said(number).count("upload: answered")
    for event in story.deployment.events("stage"):
        if event.fields["stage"] == "upload":
            own = [kept for kept in story.after if (event.round, event.fields["attempt"]) in kept.attempts]
            assert event.fields["answers"] <= len(own)


def test_no_device_loses_anything(story: Story) -> None:
    for number, (before, after) in enumerate(zip(story.before, story.after, strict=True)):
        assert after.history == before.history and len(before.history) >= 10
        assert after.user is not None and np.all(np.isfinite(after.user)) and np.any(after.user != 0)
        with opened(story.deployment.device(number)) as store:
            model = store.load_model()
        assert model is not None and model.metadata["round"] == str(ROUNDS)


def test_devices_find_a_restarted_server_by_themselves(story: Story) -> None:
    for number in (0, 1):
        assert story.after[number].attempts == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]


def test_ctrl_c_lets_the_round_end(story: Story) -> None:
    """It reaches the terminal's other processes too, but not the SuperLink, without which no round ends."""
    said = story.deployment.server_said()
    assert said.count("Stopping after this round") == 1
    assert said.index("Stopping after this round") < said.index("Round 3: ")


def test_strangers_take_no_part(story: Story) -> None:
    """Neither gets to the run: one finds that the server is not the one it knows, one that the server does not know it.
    Both try for a while, as there are faults of the network that look so."""
    for number, why in ((DISTRUSTFUL, "CERTIFICATE_VERIFY_FAILED"), (REVOKED, "Failed to activate")):
        said = story.deployment.said(number)
        assert why in story.deployment.node_said(number)
        assert "SuperNode ended; it is started again" in said
        assert "answered" not in said and "Traceback" not in said
        assert Kept.by(story.deployment.device(number)) == Kept([], None, [])
    assert story.left == 1
    assert "may not be the one that the invitation names" in story.deployment.said(DISTRUSTFUL)
    assert story.deployment.events("population")[0].fields == {"devices": list(range(DEVICES))}
