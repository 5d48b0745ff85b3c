"""`fedtopk simulate` and what can be done with its run folder."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from running import TINY, fedtopk, simulate
from safetensors.torch import load_file

from common.features import features_of
from common.item_slice import slice_of
from common.model import dimension_of, initialise, shapes
from common.settings import load_settings
from server.events import EventReader
from server.run_folder import RunFolder
from server.store import open_store_read_only
from simulations.simulate import load_split


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    simulate(out, evaluation__every=3)
    return out


def test_the_run_folder_is_complete(run: Path) -> None:
    assert {"settings.toml", "report.json", "model.safetensors", "events.sqlite", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    settings = load_settings(run / "settings.toml")
    assert tomllib.loads((run / "settings.toml").read_text()) == tomllib.loads(settings.to_toml())
    model = load_file(run / "model.safetensors")
    expected = shapes(settings, 60)
    assert {name: tuple(value.shape) for name, value in model.items()} == expected


def test_the_report_says_what_was_done(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "finished"
    assert (report["rounds"], report["devices"]) == (6, 40)
    privacy = report["privacy"]
    assert 7 < privacy["epsilon_model"] <= 8 < privacy["epsilon_server"]
    assert (privacy["unit"], privacy["delta"], privacy["noise"]) == ("user", 1e-4, "seeded, not private")
    evaluation = report["evaluation"]
    for figures in (evaluation, evaluation["popularity"], evaluation["markov"]):
        low, high = figures["hr@10_ci95"]
        assert 0 <= low <= figures["hr@10"] <= high <= 1
    assert report["aggregation"] == {"kind": "central", "dropouts": 0}


def test_the_events_tell_the_course_of_the_run(run: Path) -> None:
    with open_store_read_only(run) as store:
        events = EventReader(store).read()
    rounds = [event for event in events if event.kind == "round"]
    assert [event.round for event in rounds] == [1, 2, 3, 4, 5, 6]
    assert [event.round for event in events if event.kind == "validation"] == [3, 6]
    report = json.loads((run / "report.json").read_text())
    assert report["client_updates"] == sum(event.fields["members"] for event in rounds) > 0


def test_evaluate_repeats_the_report(run: Path) -> None:
    done = fedtopk("evaluate", run, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((run / "report.json").read_text())["evaluation"]


def test_export_holds_the_shared_model_and_nothing_of_a_device(run: Path, tmp_path: Path) -> None:
    done = fedtopk("export", run, "--to", tmp_path / "exported", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "model.safetensors",
        "catalogue.csv",
        "settings.toml",
    }
    assert not any(
        "user" in name and name != "user.projection" for name in load_file(tmp_path / "exported/model.safetensors")
    )
    assert len((tmp_path / "exported/catalogue.csv").read_text().splitlines()) == 61


def test_the_settings_of_a_run_repeat_it(run: Path, tmp_path: Path) -> None:
    done = fedtopk("simulate", "--out", tmp_path / "again", "--config", run / "settings.toml", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["central", "plain"])
def test_empty_cohorts_are_valid_rounds(tmp_path: Path, kind: str) -> None:
    report = simulate(tmp_path / "run", training__cohort_rate=0.001, aggregation__kind=kind)
    assert (report["rounds"], report["client_updates"]) == (6, 0)
    assert report["privacy"]["releases"] == 6


def test_a_budget_that_would_be_exceeded_stops_the_run_before_the_round(tmp_path: Path) -> None:
    report = simulate(tmp_path / "run", privacy__noise_multiplier=1.0, privacy__target_epsilon=4)
    assert report["status"] == "budget spent"
    assert 0 < report["rounds"] < TINY["training.rounds"]
    assert report["privacy"]["epsilon_model"] <= 4
    one_more = simulate(
        tmp_path / "more",
        privacy__noise_multiplier=1.0,
        privacy__target_epsilon=100,
        training__rounds=report["rounds"] + 1,
    )
    assert one_more["privacy"]["epsilon_model"] > 4


def test_system_noise_differs_and_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report = simulate(tmp_path / name, privacy__randomness="system")
        assert report["privacy"]["noise"] == "cryptographic"
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("estimator", ["cross-entropy", "likelihood", "reinforce"])
def test_training_lowers_the_loss_it_is_told_to_lower(tmp_path: Path, estimator: str) -> None:
    simulate(
        tmp_path / "run",
        objective__estimator=estimator,
        objective__softmax="full",
        privacy__mechanism="none",
        privacy__clip_norm="inf",
        training__rounds=40,
        training__learning_rate=0.03,
    )
    with open_store_read_only(tmp_path / "run") as store:
        losses = [event.fields["policy_loss"] for event in EventReader(store).read(kinds=["simulation"])]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_a_run_trains_the_parts_of_its_tables_and_leaves_what_is_frozen(tmp_path: Path) -> None:
    """By plain descent; two processes compute what one does."""
    fewer = {"model__items": "features", "model__rank": 2, "training__frozen": "items", "training__optimizer": "sgd"}
    report = simulate(tmp_path / "run", **fewer)
    folder = RunFolder(tmp_path / "run")
    settings, trained = folder.settings(), folder.load_model()
    features = features_of(settings.model, load_split(settings).train.catalogue)
    start = initialise(settings, 60, torch.Generator().manual_seed(settings.training.seed), features)
    assert report["parameters"] == dimension_of(settings, start) < sum(value.numel() for value in start.values()) / 2
    still = {name for name in start if bool((trained[name] == start[name]).all())}
    assert still == {name for name in start if name.startswith(("items", "features"))}
    done = fedtopk("simulate", "--out", tmp_path / "again", "--config", folder.path / "settings.toml", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["central", "plain"])
def test_a_round_on_a_slice_moves_its_items_alone(tmp_path: Path, kind: str) -> None:
    """The update is that of a model of the slice's size; by plain descent the rows of other items stay."""
    sliced = {"objective__slice_items": 20, "model__input_rows": 16, "privacy__mechanism": "none"}
    report = simulate(tmp_path / "run", **sliced, aggregation__kind=kind, training__optimizer="sgd", training__rounds=1)
    folder = RunFolder(tmp_path / "run")
    settings, trained = folder.settings(), folder.load_model()
    start = initialise(settings, 60, torch.Generator().manual_seed(settings.training.seed))
    item_slice = slice_of(settings, 60, 1)
    assert item_slice is not None and len(trained["policy.embedding"]) == 60
    for name in ("policy.embedding", "behaviour.embedding"):
        moved = (trained[name] != start[name]).any(1).nonzero().flatten()
        assert set(moved.tolist()) <= set(item_slice.ids.tolist()) and len(moved) > 10
    assert report["evaluation"]["users"] == 40
