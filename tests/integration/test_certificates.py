"""Who is not let in, over real Messages to devices with stores of their own, in this process."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deployment import DEVICES, SETTINGS, opened
from flwr.app import Context
from in_process_grid import InProcessGrid

from client.app import make_app
from client.ledger import Charge
from client.stored_device import ENROLMENT, IDENTITY_KEY, StoredDevice
from common.enrolment import Enrolment, Request
from common.errors import AggregationError
from common.messages import run_digest
from common.model import initialise
from common.offer import Offer
from common.privacy.adaptive_clip import sent
from common.privacy.encoding import Encoding
from common.settings import Settings
from server.authority import Authority
from server.cohort import CohortSum
from server.nodes import Nodes
from server.secure_sum import SecureSum, Trust
from server.site import REVOKED
from simulations.fleet import demo_settings, set_up
from simulations.simulate import load_split

STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"s")


class Trial:
    """A server and four devices.

    Attributes:
        reasons: the server's record of why devices fell out.
    """

    def __init__(self, home: Path, stack: ExitStack) -> None:
        changes = SETTINGS | {"training.start": "random"}  # so that all rounds are alike
        self.settings = demo_settings(DEVICES, None, [f"{key}={value}" for key, value in changes.items()])
        self.site = set_up(home, self.settings, load_split(self.settings).train)
        self.authority = Authority(home / "authority")
        self.stores = [stack.enter_context(opened(home / "devices" / str(number))) for number in range(DEVICES)]
        self.grid = InProcessGrid(make_app(self._device), DEVICES, self.settings.flat(), lambda kind, node: False)
        self.publisher = self.site.publisher
        self.reasons: list[str] = []

    def certify(self, number: int, authority: Ed25519PrivateKey, expires: float) -> None:
        """Put another certificate of its own key in a device's store."""
        store = self.stores[number]
        old = Enrolment.parse(store.records[ENROLMENT])
        asked = Request.make(Ed25519PrivateKey.from_private_bytes(store.records[IDENTITY_KEY]), old.transport)
        new = Enrolment.make(authority, number, asked, int(expires))
        kept = Enrolment(new.certificate, new.transport, old.authority, new.signature)
        store.records[ENROLMENT] = kept.to_json().encode()

    def sum_updates(self, round_: int = 1) -> CohortSum:
        """Of all devices; what was asked of whom is in ``grid.seen``."""
        trust = Trust(self.site.authority, self.publisher, self.site.catalogue.digest, self.site.revoked)
        nodes = Nodes(self.grid, 10.0, {number: 100 + number for number in range(DEVICES)})
        cohort = SecureSum(nodes, self.settings, run_digest(self.settings, 7), trust, self._record)
        parameters = initialise(self.settings, len(self.site.catalogue), torch.Generator().manual_seed(1))
        length, bound = sent(self.settings.privacy, sum(value.numel() for value in parameters.values()))
        honest = 1 - self.settings.aggregation.corrupt_fraction - self.settings.aggregation.dropout_fraction
        encoding = Encoding.choose(length, bound, 1.0, DEVICES, honest)
        self.grid.seen.clear()
        return cohort.sum_updates(Offer(round_, 1, parameters, encoding, self.settings), np.arange(DEVICES))

    def rosters(self) -> list[list[int]]:
        """By device, the sizes of the rosters in which it was charged."""
        return [[Charge.parse(entry).cohort for entry in store.charges()] for store in self.stores]

    def _device(self, settings: Settings, context: Context) -> StoredDevice:
        return StoredDevice(self.stores[int(context.node_config["partition-id"])], settings)

    def _record(self, kind: str, round_: int | None = None, **fields: Any) -> None:
        if kind == "dropouts":
            self.reasons += fields["reasons"]


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    with ExitStack() as stack:
        yield Trial(tmp_path / "trial", stack)


def test_a_revoked_device_is_asked_for_nothing_from_the_next_round_on(trial: Trial) -> None:
    assert trial.sum_updates(1).survivors == DEVICES
    revoked = trial.authority.revoke(1, int(time.time()))
    (trial.site.path / REVOKED).write_text(revoked.to_json())
    assert trial.sum_updates(2).survivors == DEVICES - 1
    assert trial.rosters() == [[DEVICES, DEVICES - 1], [DEVICES], [DEVICES, DEVICES - 1], [DEVICES, DEVICES - 1]]
    assert 1 not in {device for _, device in trial.grid.seen}
    assert set(trial.site.enrolled()) == {0, 2, 3}  # whose keys the SuperLink is told, when it starts


@pytest.mark.parametrize("kind", ["expired", "foreign"])
def test_a_device_without_a_valid_certificate_is_in_no_roster(trial: Trial, kind: str) -> None:
    if kind == "expired":
        trial.certify(2, trial.authority._key, time.time() - 5)
    else:
        trial.certify(2, STRANGER, time.time() + 1000)
    assert trial.sum_updates().survivors == DEVICES - 1
    assert trial.rosters() == [[DEVICES - 1], [DEVICES - 1], [], [DEVICES - 1]]
    assert [action for action, device in trial.grid.seen if device == 2] == ["query.advertise"]
    said = {"expired": "to be valid still", "foreign": "to be of the authority"}[kind]
    assert trial.reasons == [f"Expected the certificate of device 2 {said}."]


def test_a_model_of_another_publisher_is_refused_with_a_reason(trial: Trial) -> None:
    trial.publisher = STRANGER
    with pytest.raises(AggregationError, match="by the publisher that this device has pinned"):
        trial.sum_updates()
    assert {action for action, _ in trial.grid.seen} == {"query.advertise", "query.share", "train.upload"}
    for store in trial.stores:
        assert store.charges() == [] and store.load_model() is None and store.load_user() is None
