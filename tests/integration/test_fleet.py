"""`fedtopk fleet`: real processes, TLS and secure aggregation, and to the bit the model of a plain simulation."""

import json
from pathlib import Path

import numpy as np
import pytest
from deployment import DEVICES, opened
from recorded_fleet import Fleet, planted
from running import user_embeddings

from client.device_contents import known
from client.ledger import Charge
from common.messages import read_arrays, run_digest
from common.settings import load_settings
from common.signed_model import Edition
from server.checkpoint import load_latest
from server.events import EventReader
from server.ledger import LedgerReader
from server.run_folder import RunFolder
from server.site import Site
from server.store import open_store_read_only
from simulations.simulate import load_split

ROUNDS = 3


def test_the_report_tells_of_a_whole_run(fleet: Fleet) -> None:
    report = fleet.report
    assert report == json.loads((fleet.run / "report.json").read_text())
    assert (report["status"], report["rounds"], report["devices"]) == ("finished", ROUNDS, DEVICES)
    assert report["client_updates"] == ROUNDS * DEVICES
    assert report["seconds"] > 0 and report["client_updates_per_second"] > 0
    privacy, evaluation, aggregation = report["privacy"], report["evaluation"], report["aggregation"]
    assert (privacy["unit"], privacy["mechanism"], privacy["noise"]) == ("user", "skellam", "seeded, not private")
    assert privacy["noise_multiplier"] > 0.1 and privacy["clip_norm"] == 1.0 and privacy["delta"] == 1e-4
    assert 0 < privacy["epsilon_model"] < privacy["epsilon_server"]
    assert privacy["releases"] == ROUNDS
    assert (evaluation["protocol"], evaluation["users"]) == ("leave-last-out", DEVICES)
    for figures in (evaluation, evaluation["popularity"], evaluation["markov"]):
        assert 0 <= figures["ndcg@10"] <= figures["hr@10"] <= 1
    assert len(evaluation["hr@10_ci95"]) == 2
    assert (aggregation["kind"], aggregation["dropouts"]) == ("secure", 0)
    assert 0 < aggregation["bytes_up_per_device"] < aggregation["bytes_down_per_device"]


def test_every_device_answered_every_stage_of_one_attempt_a_round(fleet: Fleet) -> None:
    with open_store_read_only(fleet.run) as store:
        stages = EventReader(store).read(kinds=["stage"])
        entries = LedgerReader(store).entries()
    asked = [(event.round, event.fields["stage"]) for event in stages]
    each = [(round_, stage) for round_ in range(1, ROUNDS + 1) for stage in ("share", "upload", "agree", "unmask")]
    assert asked == [(1, "advertise"), *each]
    assert {event.fields["answers"] for event in stages} == {DEVICES}
    assert [(entry.round, entry.attempt, entry.state) for entry in entries] == [
        (round_, 1, "released") for round_ in range(1, ROUNDS + 1)
    ]


def test_the_model_is_to_the_bit_that_of_a_plain_simulation(fleet: Fleet, plain: Path) -> None:
    assert (fleet.run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    simulated = json.loads((plain / "report.json").read_text())
    figures = {name: value for name, value in simulated["privacy"].items() if name in fleet.report["privacy"]}
    alone = {name: value for name, value in fleet.report["privacy"].items() if name != "population"}
    assert figures == alone
    spent = fleet.report["privacy"]["population"]
    assert (spent["runs"], spent["epsilon_model"]) == (1, pytest.approx(alone["epsilon_model"], rel=1e-6))


@pytest.mark.parametrize("number", range(DEVICES))
def test_each_device_kept_what_a_simulated_one_has(fleet: Fleet, plain: Path, number: int) -> None:
    checkpoint = load_latest(plain / "checkpoints")
    assert checkpoint is not None and checkpoint.round == ROUNDS
    settings, site = load_settings(fleet.run / "settings.toml"), Site(fleet.run / "fleet" / "server")
    train = load_split(settings).train
    own = list(train.slices())[number]
    with opened(fleet.device(number)) as store:
        user, events, model = store.load_user(), store.events(), store.load_model()
        charges = [Charge.parse(entry) for entry in store.charges()]
    assert user is not None and np.any(user != 0)
    np.testing.assert_array_equal(user, user_embeddings(plain, checkpoint)[number])
    assert events[-4:] == planted(number)
    items, ratings = known(events, site.catalogue)
    np.testing.assert_array_equal(items, train.items[own])
    np.testing.assert_array_equal(ratings, train.ratings[own])
    assert [(charge.round, charge.attempt, charge.cohort) for charge in charges] == [
        (round_, 1, DEVICES) for round_ in range(1, ROUNDS + 1)
    ]
    noise = fleet.report["privacy"]["noise_multiplier"]
    assert [charge.noise_multiplier for charge in charges] == pytest.approx([noise] * ROUNDS)
    assert model is not None and model.metadata["round"] == str(ROUNDS)
    edition = Edition(run_digest(settings, int(model.metadata["run_id"])), ROUNDS, site.catalogue.digest)
    publisher = site.publisher.public_key().public_bytes_raw()
    edition.check(publisher, model.content, bytes.fromhex(model.metadata["signature"]))
    final = RunFolder(fleet.run).load_model()
    for name, array in read_arrays(model.content).items():
        np.testing.assert_array_equal(array, final[name].numpy())
