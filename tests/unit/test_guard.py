"""What a real device refuses: offers through Messages to the ClientApp over an encrypted store, one a reason."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from decoders import message_with
from flwr.app import Context, Message, RecordDict
from protocol import AUTHORITY, SERVER_SEED, identity_of, key_of

from client.app import make_app
from client.device_contents import Event
from client.device_store import DeviceStore
from client.guard import Policy, with_changes
from client.joining import enrol, join, keep_revocations, make_device
from client.ledger import Charge, epsilon_server
from client.store_key import KeyFile
from client.stored_device import StoredDevice
from common.catalogue import Catalogue
from common.enrolment import Enrolment, Request, Revocations
from common.errors import DataError, ProtocolError, RunError, SettingsError
from common.invitation import Invitation
from common.item_slice import cut, rows_digest, slice_of
from common.messages import advertisement_of, body_of, content_of, model_bytes, run_digest
from common.model import initialise
from common.offer import Offer
from common.privacy.adaptive_clip import joint, sent
from common.privacy.encoding import Encoding
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.member import Identity
from common.secagg.roster import View
from common.secagg.terms import Terms
from common.secagg.wire import numbers
from common.settings import Settings, load_settings
from common.signed_model import Edition

N, OWN, RUN_ID, LATER = 6, 2, 7, 2**40
PUBLISHER = key_of(2**199)
CATALOGUE = Catalogue(np.array([f"item {at}" for at in range(30)], object), np.array(["title"] * 30, object))
TINY = (
    "aggregation.kind=secure",
    "model.input_width=3",
    "model.state_width=4",
    "model.user_width=2",
    "objective.negatives=5",
    "privacy.noise_multiplier=1.0",
    "privacy.delta=1e-4",
)
SETTINGS = load_settings(None, TINY)
TURNS = load_settings(None, [*TINY, "privacy.mechanism=tree", "training.cohort_rate=0.2", "training.rounds=12"])
POLICY = replace(Policy.of(SETTINGS), minimum_cohort=3, maximum_cohort=50, minimum_noise_multiplier=0.9)

ADAPTIVE = load_settings(None, [*TINY, "privacy.clip_quantile=0.5", "guard.maximum_clip=2"])


@dataclass
class World:
    """A real device, the other members of an attempt, and what their server offers."""

    folder: Path
    policy: Policy = POLICY
    settings: Settings = SETTINGS
    terms: dict[str, Any] = field(default_factory=dict)
    encoding: dict[str, Any] = field(default_factory=dict)
    authority: Ed25519PrivateKey = AUTHORITY
    condition: Callable[[], str] = str

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        key = KeyFile(self.folder / "key")
        request = make_device(self.folder / "device", key)
        self.store = DeviceStore.open(self.folder / "device", key)
        enrol(self.store, Enrolment.make(AUTHORITY, OWN, request, LATER), AUTHORITY.public_key().public_bytes_raw())
        join(self.store, invitation(), self.policy)
        self.store.add_events([Event(f"item {at % 7}", 4.0, at) for at in range(20)])
        self.run = run_digest(self.settings, RUN_ID)
        self.item_slice = slice_of(self.settings, len(CATALOGUE.ids), 3)
        whole = initialise(self.settings, len(CATALOGUE.ids), torch.Generator().manual_seed(1))
        self.parameters = cut(whole, self.item_slice)
        self.model = model_bytes({name: value.numpy() for name, value in self.parameters.items()})

    def ask(self, kind: str, content: RecordDict) -> Message:
        app = make_app(lambda settings, context: StoredDevice(self.store, settings, self.condition))
        context = Context(RUN_ID, 2, {}, RecordDict(), self.settings.flat())
        message = message_with(content)
        message.metadata.__dict__["_message_type"] = kind
        return app(message, context)

    def refusal(self, kind: str, content: RecordDict) -> str:
        reply = self.ask(kind, content)
        return reply.error.reason if reply.has_error() else ""

    def offer(self) -> Terms:
        length, bound = sent(self.settings.privacy, sum(value.numel() for value in self.parameters.values()))
        encoding = replace(Encoding.choose(length, bound, 1.0, N, 0.8), **self.encoding)
        model = Offer(3, 1, self.parameters, encoding, self.settings, self.item_slice).model
        values: dict[str, Any] = {"round": 3, "attempt": 1, "n": N, "corrupt": 0.1, "dropout": 0.1, "hybrid": False}
        return Terms(**values | {"encoding": encoding, "model": model} | self.terms)

    def advertised(self) -> bytes:
        return body_of(self.ask("query.advertise", content_of(numbers("I", 3))))

    def share(self) -> str:
        """Offer the terms to everybody; what the device refuses with."""
        terms, draw = self.offer(), random.Random(1).randbytes
        others = {device: identity_of(device, self.authority, LATER) for device in range(terms.n) if device != OWN}
        states = {
            device: member.advertise(identity, self.run, draw, hybrid=terms.hybrid)
            for device, identity in others.items()
        }
        messages = {device: state.message for device, state in states.items()} | {OWN: self.advertised()}
        roster = [Advertisement.parse(messages[device], terms.hybrid) for device in range(terms.n)]
        self.aggregate = Aggregate(self.run, terms, roster, SERVER_SEED)
        refusal = self.refusal("query.share", content_of(self.aggregate.view(OWN)))
        if not refusal:
            for device, identity in others.items():
                pinned = Identity(identity.key, identity.certificate, self.authority.public_key().public_bytes_raw())
                view = View.parse(self.aggregate.view(device), lambda terms: None)
                _, shares = member.share(states[device], pinned, view, 0, draw)
                self.aggregate.take_shares(device, shares)
        return refusal

    def upload(self, *, round_: int = 2, publisher: Ed25519PrivateKey = PUBLISHER, rows: bytes = b"") -> str:
        """Ask for the update, with a signed model; what the device refuses with."""
        edition = Edition(self.run, round_, rows or rows_digest(CATALOGUE.digest, self.item_slice))
        content = content_of(self.aggregate.inbox(OWN), model=self.model, signature=edition.sign(publisher, self.model))
        return self.refusal("train.upload", content)


def invitation(**changes: Any) -> Invitation:
    items = [(str(item), str(title)) for item, title in zip(CATALOGUE.ids, CATALOGUE.titles, strict=True)]
    keys = {
        "authority": AUTHORITY.public_key().public_bytes_raw().hex(),
        "publisher": PUBLISHER.public_key().public_bytes_raw().hex(),
    }
    values = {"server": "127.0.0.1:1", "root_certificate": "", "items": items, "settings": SETTINGS.to_toml()}
    return Invitation(**keys | values | changes)  # type: ignore[arg-type]


def test_an_offer_within_the_policy_is_taken(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.share() == "" and world.upload() == ""
    [entry] = world.store.charges()
    charge = Charge.parse(entry)
    assert (charge.round, charge.attempt, charge.cohort, charge.honest) == (3, 1, N, 0.8)
    assert world.store.load_user() is not None
    received = world.store.load_model()
    assert received is not None and received.content == world.model and received.metadata["round"] == "2"


OFFERS: dict[str, tuple[dict[str, Any], str]] = {
    "too few devices": ({"policy": replace(POLICY, minimum_cohort=7)}, "cohort=6 ≥ 7"),
    "too many devices": ({"policy": replace(POLICY, maximum_cohort=5)}, "cohort=6 ≤ 5"),
    "another γ": ({"terms": {"corrupt": 0.05}}, "corrupt_fraction=0.05 to be 0.1"),
    "another δ": ({"terms": {"dropout": 0.15}}, "dropout_fraction=0.15 to be 0.1"),
    "another width": ({"policy": replace(POLICY, bits=(32,))}, r"bits=\d+ to be in \(32,\)"),
    "a larger clip": ({"policy": replace(POLICY, maximum_clip=0.5)}, r"clip_norm=1.0 ≤ 0.5"),
    "a clip that has grown": (
        {"settings": ADAPTIVE, "policy": Policy.of(ADAPTIVE), "encoding": {"clip": joint(2.001), "scale": 1.0}},
        r"clip_norm=2.01\d* ≤ 2.00997",
    ),
    "less noise": ({"policy": replace(POLICY, minimum_noise_multiplier=1.5)}, "noise_multiplier=1 ≥ 1.5"),
    "no noise": ({"encoding": {"variance": 0.0}}, "noise_multiplier=0 ≥ 0.9"),
    "a smaller share of the noise": ({"encoding": {"honest": 1.0}}, "honest=1.0 to be 0.8"),
    "noise by the server": ({"encoding": {"central": True}}, "noise from the devices"),
    "ε_server": ({"policy": replace(POLICY, maximum_epsilon_server=1.0)}, r"ε_server=[\d.]+ ≤ 1"),
    "seeded noise": (
        {"settings": load_settings(None, [*TINY, "privacy.randomness=seeded"])},
        "noise that nobody can reproduce",
    ),
    "a run without noise": (
        {"settings": load_settings(None, [*TINY[:-2], "privacy.mechanism=none"])},
        "noise that nobody can reproduce",
    ),
    "noise by a server that is not trusted": ({"settings": TURNS}, "with privacy.mechanism=tree the server adds it"),
    "an unknown authority": ({"authority": key_of(2**198)}, "certificate of device 0 to be of the authority"),
    "an unwilling device": ({"condition": lambda: "the battery is at 9 %."}, "battery is at 9 %"),
    "its own coin": ({"policy": replace(POLICY, own_coins=True)}, "its own coin did not fall for round 3"),
}


@pytest.mark.parametrize("name", list(OFFERS))
def test_an_offer_outside_the_policy_is_refused(tmp_path: Path, name: str) -> None:
    changes, reason = OFFERS[name]
    world = World(tmp_path, **changes)
    refusals = [world.refusal("query.advertise", content_of(numbers("I", 3)))]
    if not refusals[0]:
        refusals = [world.share()]
    assert re.search(reason, refusals[0]), refusals
    assert not world.store.charges()


def test_contributions_are_counted_over_all_runs(tmp_path: Path) -> None:
    world = World(tmp_path, policy=replace(POLICY, maximum_contributions=2))
    for run in (bytes(32), bytes([1]) * 32):
        world.store.charge(Charge.of(run, world.offer()).to_json().encode())
    assert "contributions=2 < 2" in world.share()


def test_turns_are_kept_apart(tmp_path: Path) -> None:
    """5 rounds at least, whether or not the upload before was of an attempt that released anything, and 3 in 12."""
    assert Policy.of(TURNS).separation == 5 and Policy.of(TURNS).maximum_contributions == 3
    policy = replace(Policy.of(TURNS), trust_server=True, minimum_cohort=3, minimum_noise_multiplier=0.9)
    expected = {
        1: "",
        3: "round 7 to be 5 after round 3",
        4: "round 7 to be 5 after round 4",
        2: "",
        7: "after round 7",
    }
    for number, (last, refusal) in enumerate(expected.items()):
        terms = {"round": 7, "attempt": 2}
        world = World(tmp_path / str(number), policy=policy, settings=TURNS, terms=terms, encoding={"variance": 0.0})
        world.store.charge(Charge.of(world.run, replace(world.offer(), round=last, attempt=1)).to_json().encode())
        other = Charge.of(bytes(32), replace(world.offer(), round=6))  # another run's rounds are not this one's
        world.store.charge(other.to_json().encode())
        found = world.share()
        assert (refusal in found) if refusal else found == "", (last, found)
    world.store.charge(other.to_json().encode())
    assert "contributions=3 < 3" in world.share()
    assert "the server may add" in policy.in_words()[-1] and "5 rounds from one" in policy.in_words()[-2]
    bounded = World(
        tmp_path / "bounded", replace(policy, maximum_epsilon_server=50.0), TURNS, encoding={"variance": 0.0}
    )
    assert "ε_server=inf ≤ 50" in bounded.share()


def test_trust_in_a_server_is_not_its_own_to_propose(tmp_path: Path) -> None:
    settings = load_settings(None, [*TINY, "privacy.mechanism=tree", "guard.trust_server=true"])
    assert Policy.of(settings).trust_server and not Policy.proposed(settings).trust_server
    assert Policy.proposed(SETTINGS) == Policy.of(SETTINGS)
    world = World(tmp_path, policy=Policy.proposed(settings), settings=settings)
    assert "which the policy's trust_server allows" in world.refusal("query.advertise", content_of(numbers("I", 3)))
    assert with_changes(Policy.proposed(settings), "trust_server = true") == Policy.of(settings)


def test_epsilon_of_all_servers_together_is_bounded(tmp_path: Path) -> None:
    charge = Charge.of(bytes(32), World(tmp_path / "any").offer())
    limit = (epsilon_server([charge], 1e-4) + epsilon_server([charge] * 2, 1e-4)) / 2
    once = World(tmp_path / "once", policy=replace(POLICY, maximum_epsilon_server=limit, delta=1e-4))
    assert once.share() == "" and once.upload() == ""
    again = World(tmp_path / "again", policy=once.policy)
    again.store.charge(charge.to_json().encode())
    assert "ε_server=" in again.share()


def test_a_round_comes_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.share() == "" and world.upload() == ""
    assert "round 3, attempt 1 to come after round 3, attempt 1" in world.share()


def test_a_roster_with_a_revoked_device_is_refused(tmp_path: Path) -> None:
    world, key = World(tmp_path), AUTHORITY
    keep_revocations(world.store, Revocations.make(key, 2, [1, 4]).to_json())
    assert "expected no revoked devices, found [1, 4]" in world.share()
    with pytest.raises(ProtocolError, match="number 1 to be at least number 2"):
        keep_revocations(world.store, Revocations.make(key, 1, [1]).to_json())
    with pytest.raises(ProtocolError, match="to be of the authority"):
        keep_revocations(world.store, Revocations.make(key_of(3), 9, []).to_json())


MODELS: dict[str, dict[str, Any]] = {
    "of another publisher": {"publisher": key_of(2**190)},
    "of another round": {"round_": 1},
    "of another catalogue": {"rows": bytes(32)},
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_is_not_the_publishers_is_refused_before_anything_is_charged(tmp_path: Path, name: str) -> None:
    world = World(tmp_path)
    assert world.share() == ""
    assert "by the publisher that this device has pinned" in world.upload(**MODELS[name])
    assert not world.store.charges() and world.store.load_model() is None
    assert world.upload() == ""


SLICED = load_settings(None, [*TINY, "objective.slice_items=10", "model.input_rows=20"])


@pytest.mark.parametrize("round_", [None, 2, 4])
def test_a_slice_that_is_not_the_rounds_is_refused_before_anything_is_charged(
    tmp_path: Path, round_: int | None
) -> None:
    """Its own slice of round 3 is all that a device trains on, whatever other rows are signed: those of all items, or
    of the slice of another round."""
    world = World(tmp_path, settings=SLICED)
    assert world.share() == ""
    other = None if round_ is None else slice_of(SLICED, len(CATALOGUE.ids), round_)
    assert "for this run and these items" in world.upload(rows=rows_digest(CATALOGUE.digest, other))
    assert not world.store.charges()
    assert world.upload() == ""
    assert len(world.store.charges()) == 1


def test_the_model_of_a_slice_is_not_kept_to_recommend_with(tmp_path: Path) -> None:
    world = World(tmp_path, settings=SLICED)
    assert world.share() == "" and world.upload() == "" and world.store.load_model() is None
    signature = Edition(world.run, 3, rows_digest(CATALOGUE.digest, world.item_slice)).sign(PUBLISHER, world.model)
    delivered = content_of(numbers("I", 3), model=world.model, signature=signature)
    assert "for this run and these items" in world.refusal("query.model", delivered)
    assert world.store.load_model() is None


def test_an_unsigned_model_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.share() == ""
    content = content_of(world.aggregate.inbox(OWN), model=world.model)
    assert "by the publisher" in world.refusal("train.upload", content)
    assert "'content' in the record 'model'" in world.refusal("train.upload", content_of(world.aggregate.inbox(OWN)))


def test_a_delivered_model_is_kept_unless_it_is_older(tmp_path: Path) -> None:
    world = World(tmp_path)

    def deliver(round_: int) -> str:
        signature = Edition(world.run, round_, CATALOGUE.digest).sign(PUBLISHER, world.model)
        content = content_of(numbers("I", round_), model=world.model, signature=signature)
        return world.refusal("query.model", content)

    assert deliver(5) == "" and deliver(5) == "" and deliver(6) == ""
    assert "model of 5 rounds to be of at least 6" in deliver(5)
    received = world.store.load_model()
    assert received is not None and received.metadata["round"] == "6"


def test_the_last_answer_brings_the_next_keys(tmp_path: Path) -> None:
    """Through a whole attempt of one real device among others that only share: it refuses to be alone at the end."""
    world = World(tmp_path)
    assert world.share() == "" and world.upload() == ""
    assert "survivors" in world.refusal("query.agree", content_of(b"\x04"))
    reply = world.ask("query.unmask", content_of(b""))
    assert reply.has_error() and "is at the stage 'Uploaded'" in reply.error.reason
    with pytest.raises(ProtocolError):
        advertisement_of(reply)


def test_a_device_that_is_not_set_up_says_so(tmp_path: Path) -> None:
    key = KeyFile(tmp_path / "key")
    request = make_device(tmp_path / "device", key)
    with DeviceStore.open(tmp_path / "device", key) as store:
        with pytest.raises(RunError, match="enrolled first: fedtopk device enrol"):
            StoredDevice(store, SETTINGS)
        with pytest.raises(RunError, match="enrolled first"):
            join(store, invitation(), POLICY)
        public = AUTHORITY.public_key().public_bytes_raw()
        other = Request.make(Ed25519PrivateKey.generate(), request.transport)
        with pytest.raises(DataError, match="of this device's key"):
            enrol(store, Enrolment.make(AUTHORITY, OWN, other, LATER), public)
        with pytest.raises(ProtocolError, match="valid still"):
            enrol(store, Enrolment.make(AUTHORITY, OWN, request, 1), public)
        enrol(store, Enrolment.make(AUTHORITY, OWN, request, LATER), public)
        with pytest.raises(RunError, match="joined to a server"):
            StoredDevice(store, SETTINGS)
        with pytest.raises(DataError, match="the authority that enrolled this device"):
            join(store, invitation(authority=os.urandom(32).hex()), POLICY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("minimum_cohort = 'many'", "Expected a policy as TOML"),
        ("minimum = 3", r"not \['minimum'\]"),
        ("= 3", "Expected a policy as TOML"),
    ],
)
def test_a_policy_of_ones_own_is_read_or_refused(text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        with_changes(POLICY, text)
    assert with_changes(POLICY, "minimum_cohort = 40\nbits = [16, 20]") == replace(
        POLICY, minimum_cohort=40, bits=(16, 20)
    )
    assert with_changes(POLICY, "") == POLICY


@pytest.mark.parametrize(
    "change", [{"authority": "zz"}, {"publisher": "00"}, {"items": []}, {"settings": "a = 1"}, {"server": "x"}]
)
def test_an_invitation_that_is_none_is_refused(change: dict[str, Any]) -> None:
    assert Invitation.parse(invitation().to_json()) == invitation()
    with pytest.raises(DataError, match="Expected"):
        Invitation.parse(invitation(**change).to_json())
    with pytest.raises(DataError, match="Expected an invitation"):
        Invitation.parse("{}")


def test_what_goes_wrong_on_the_device_is_not_told(tmp_path: Path) -> None:
    """It is raised for the device's own process, which answers that it failed."""
    world = World(tmp_path)
    assert world.share() == ""
    world.store.close()
    with pytest.raises(Exception, match=str(tmp_path)):
        world.upload()
