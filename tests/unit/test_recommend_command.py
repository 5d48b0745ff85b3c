"""`fedtopk recommend`: what the recommender says, by a model of the publisher's, or one line that says why not."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.device_contents import Event, ReceivedModel
from client.device_store import DeviceStore
from client.recommend import received, recommend, recommendations
from client.recommender import Exploration, Recommender
from client.store_key import KeyFile, Passphrase
from client.stored_device import INVITATION
from common.errors import FedtopkError, ModelError, ProtocolError, RunError, SettingsError
from common.invitation import Invitation
from common.messages import model_bytes, run_digest
from common.model import Parameters, initialise
from common.settings import Settings, parse_flat
from common.signed_model import VERSION, Edition

ITEMS, EVENTS, RUN_ID, ROUND = 30, 9, 2**63 + 7, 12
SETTINGS = parse_flat(
    {"model.input_width": 5, "model.state_width": 7, "model.user_width": 4, "training.window": 6, "data.items": ITEMS}
)
PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
INVITED = Invitation(
    "localhost:9092",
    "",
    bytes(32).hex(),
    PUBLISHER.public_key().public_bytes_raw().hex(),
    [(f"i{at}", f"Title [{at}]") for at in range(ITEMS)],
    SETTINGS.to_toml(),
)

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(recommend)


def parameters_of(settings: Settings = SETTINGS, items: int = ITEMS) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    return {name: 3 * value for name, value in initialise(settings, items, generator).items()}


def signed_model(
    key: Ed25519PrivateKey = PUBLISHER, parameters: Parameters | None = None, settings: Settings = SETTINGS
) -> ReceivedModel:
    """As a device keeps it that got it in a round."""
    arrays = {name: value.numpy() for name, value in (parameters or parameters_of()).items()}
    content = model_bytes(arrays)
    signature = Edition(run_digest(settings, RUN_ID), ROUND, INVITED.catalogue.digest).sign(key, content)
    metadata = {
        "version": str(VERSION),
        "settings": settings.to_toml(),
        "run_id": str(RUN_ID),
        "round": str(ROUND),
        "signature": signature.hex(),
    }
    return ReceivedModel(content, metadata)


HISTORY = [Event(f"i{3 * at}", float(1 + 2 * (at % 3)), at) for at in range(EVENTS)]


@dataclass
class Phone:
    """A device's folder."""

    folder: Path

    def changed(self, change: Callable[[DeviceStore], None]) -> None:
        with DeviceStore.open(self.folder, KeyFile(self.folder.with_name("phone.key"))) as store:
            change(store)

    def asked(self, *words: str) -> Result:
        return CliRunner().invoke(app, ["--device", str(self.folder), *words])

    def answer(self, *words: str) -> dict[str, Any]:
        done = self.asked(*words, "--format", "json")
        assert done.exit_code == 0, done.exception
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def items(self, *words: str) -> list[str]:
        return [row["item"] for row in self.answer(*words)["recommendations"]]

    def refused(self, *words: str) -> FedtopkError:
        """What the command line prints as one line."""
        done = self.asked(*words)
        assert isinstance(done.exception, FedtopkError), done.output
        assert done.stdout == "" and "\n" not in str(done.exception)
        return done.exception


@pytest.fixture
def phone(tmp_path: Path) -> Phone:
    """A device that has joined and received a model."""
    with DeviceStore.create(tmp_path / "phone", KeyFile(tmp_path / "phone.key")) as store:
        store.records[INVITATION] = INVITED.to_json().encode()
        store.save_model(signed_model())
        store.save_user(np.linspace(-1, 1, 4, dtype=np.float32))
        store.add_events(HISTORY)
    return Phone(tmp_path / "phone")


def test_it_recommends_what_the_recommender_does(phone: Phone) -> None:
    def check(store: DeviceStore) -> None:
        recommender = Recommender(SETTINGS, parameters_of(), INVITED.catalogue)
        for consumed in (False, True):
            expected = recommender.recommend(recommender.prepare(store), 5, consumed=consumed)
            rows = recommendations(store, 5, consumed=consumed)["recommendations"]
            assert [(row["item"], row["title"], row["score"]) for row in rows] == [
                (one.item, one.title, one.score) for one in expected
            ]
            found.append([row["item"] for row in rows])

    found: list[list[str]] = []
    phone.changed(check)
    assert phone.items("--k", "5") == found[0] and phone.items("--k", "5", "--consumed") == found[1]
    assert not {event.item for event in HISTORY}.intersection(found[0])


def test_the_answer(phone: Phone) -> None:
    found = phone.answer()
    assert found.keys() == {"model", "events", "recommendations"}
    assert found["model"] == {"run_id": RUN_ID, "round": ROUND}
    assert found["events"] == EVENTS
    rows = found["recommendations"]
    assert [row["rank"] for row in rows] == list(range(1, 11))
    assert all(row.keys() == {"rank", "item", "title", "score"} for row in rows)
    assert all(row["title"] == f"Title [{row['item'][1:]}]" for row in rows)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_the_text(phone: Phone) -> None:
    done = phone.asked("--k", "3")
    assert done.exit_code == 0
    for row in phone.answer("--k", "3")["recommendations"]:
        (line,) = (line for line in done.stdout.splitlines() if f" {row['item']} " in line)
        assert row["title"] in line and f"{row['score']:.3f}" in line  # brackets are no markup
    said = " ".join(done.stdout.split())
    assert f"From the model of run {RUN_ID} after {ROUND} rounds, on {EVENTS} interactions." in said


def test_a_new_interaction_counts_and_one_of_an_unknown_item_does_not(phone: Phone) -> None:
    first = phone.items("--k", "1")[0]
    phone.changed(lambda store: store.add_events([Event(first, 5.0, 99), Event("elsewhere", 5.0, 100)]))
    assert phone.answer()["events"] == EVENTS + 1
    assert first not in phone.items()


def test_a_device_without_a_history_gets_recommendations(tmp_path: Path) -> None:
    with DeviceStore.create(tmp_path / "phone", KeyFile(tmp_path / "phone.key")) as store:
        store.records[INVITATION] = INVITED.to_json().encode()
        store.save_model(signed_model())
    found = Phone(tmp_path / "phone").answer()
    assert found["events"] == 0 and len(found["recommendations"]) == 10


def described(**changes: str | None) -> ReceivedModel:
    """The model with another description; None leaves a part of it out."""
    model = signed_model()
    metadata = {name: value for name, value in (model.metadata | changes).items() if value is not None}  # type: ignore[operator]
    return replace(model, metadata=metadata)


def other_settings(**changes: Any) -> str:
    return parse_flat(SETTINGS.flat() | {name.replace("__", "."): value for name, value in changes.items()}).to_toml()


FORGED: dict[str, Callable[[], ReceivedModel]] = {
    "a stranger's": lambda: signed_model(STRANGER),
    "other numbers": lambda: replace(
        signed_model(), content=signed_model(parameters=parameters_of()).content[:-1] + b"x"
    ),
    "no content": lambda: replace(signed_model(), content=b""),
    "another round": lambda: described(round=str(ROUND + 1)),
    "another run": lambda: described(run_id="7"),
    "another window": lambda: described(settings=other_settings(training__window=5)),
    "no signature": lambda: described(signature=""),
}


@pytest.mark.parametrize("kind", FORGED)
def test_no_model_is_used_but_the_publishers(phone: Phone, kind: str) -> None:
    phone.changed(lambda store: store.save_model(FORGED[kind]()))
    error = phone.refused()
    assert isinstance(error, ProtocolError) and "by the publisher that this device has pinned" in str(error)


def test_a_model_of_another_catalogue_or_publisher_is_not_used(phone: Phone) -> None:
    stranger = STRANGER.public_key().public_bytes_raw().hex()
    for other in (replace(INVITED, items=INVITED.items[::-1]), replace(INVITED, publisher=stranger)):
        content = other.to_json().encode()
        phone.changed(lambda store, content=content: store.records.update({INVITATION: content}))  # type: ignore[misc]
        assert isinstance(phone.refused(), ProtocolError)


UNREADABLE: dict[str, tuple[Callable[[], ReceivedModel], str]] = {
    "another version": (lambda: described(version="2"), "version=2 to be 1"),
    "no version": (lambda: described(version=None), "come with its version"),
    "no run and round": (lambda: described(run_id=None, round=None), "its run_id, round"),
    "a round that is none": (lambda: described(round="-1"), "round=-1 to be a number of 64 bits"),
    "a run that is too large": (lambda: described(run_id=str(2**64)), "to be a number of 64 bits"),
    "an odd signature": (lambda: described(signature="xyz"), "hexadecimal"),
    "no settings": (lambda: described(settings="= ="), "settings as TOML"),
    "an unknown setting": (
        lambda: described(settings=SETTINGS.to_toml() + "[later]\nx = 1\n"),
        "Unknown setting later",
    ),
    "settings of a program that knew fewer": (lambda: described(settings=""), "another version of this program"),
    "parameters of another model": (lambda: signed_model(parameters=parameters_of(items=ITEMS + 1)), "shape"),
    "numbers that are none": (
        lambda: signed_model(parameters=parameters_of() | {"user.projection": torch.full((7, 4), torch.nan)}),
        "finite",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_model_that_this_program_cannot_use_is_refused(phone: Phone, kind: str) -> None:
    make, said = UNREADABLE[kind]
    phone.changed(lambda store: store.save_model(make()))
    error = phone.refused()
    assert isinstance(error, ModelError) and said in str(error)


def test_a_device_that_has_not_joined_or_has_no_model_says_so(phone: Phone, tmp_path: Path) -> None:
    with DeviceStore.create(tmp_path / "new", KeyFile(tmp_path / "new.key")) as store:
        with pytest.raises(RunError, match="fedtopk device join"):
            received(store)
        store.records[INVITATION] = INVITED.to_json().encode()
        with pytest.raises(RunError, match="received a model"):
            received(store)
    assert isinstance(Phone(tmp_path / "new").refused(), RunError)
    assert isinstance(Phone(tmp_path / "nowhere").refused(), RunError)


def test_exploration_keeps_the_certain_and_draws_the_others(phone: Phone) -> None:
    ranked = phone.items("--k", "12")
    explored = ("--k", "6", "--explore", "--certain", "2", "--candidates", "12")
    slates = [phone.items(*explored, "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert slates[0] == slates[1] and len({tuple(slate) for slate in slates}) > 1
    for slate in slates:
        assert slate[:2] == ranked[:2] and len(set(slate)) == 6 and set(slate) <= set(ranked)
    assert len({tuple(phone.items(*explored)) for _ in range(4)}) > 1  # another draw each time


def test_exploration_by_default_keeps_half_and_draws_from_ten_times_as_many(phone: Phone) -> None:
    def draw(store: DeviceStore) -> None:
        exploration = Exploration(1, 20, torch.Generator().manual_seed(5))
        rows = recommendations(store, 2, exploration=exploration)["recommendations"]
        expected.extend(row["item"] for row in rows)

    expected: list[str] = []
    phone.changed(draw)
    assert phone.items("--k", "2", "--explore", "--seed", "5") == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--k", "22"), "k=22 to be at most the 21 items"),
        (("--certain", "1"), "--certain=1 only with --explore"),
        (("--candidates", "9"), "--candidates=9 only with --explore"),
        (("--seed", "0"), "--seed=0 only with --explore"),
        (("--explore", "--certain", "11"), "certain=11 <= k=10"),
        (("--explore", "--candidates", "9"), "k=10 <= candidates=9"),
    ],
)
def test_what_cannot_be_shown_is_refused(phone: Phone, words: tuple[str, ...], said: str) -> None:
    error = phone.refused(*words)
    assert isinstance(error, SettingsError) and said in str(error)


def test_the_key_can_be_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("a phrase\n")
    for name, source, words in (
        ("file", KeyFile(tmp_path / "key"), ("--key-file", str(tmp_path / "key"))),
        ("phrase", Passphrase("a phrase"), ("--passphrase-file", str(tmp_path / "words"))),
    ):
        with DeviceStore.create(tmp_path / name, source) as store:
            store.records[INVITATION] = INVITED.to_json().encode()
            store.save_model(signed_model())
        assert len(Phone(tmp_path / name).items(*words)) == 10
        assert isinstance(Phone(tmp_path / name).refused(), RunError)
