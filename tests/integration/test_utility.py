"""A study of utility under privacy, small: what it trains and keeps, that it goes on, and what it refuses."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from running import fedtopk

from common.errors import RunError, SettingsError
from server.run_folder import RunFolder
from server.verification import verify_folder
from simulations.closed_loop import Setup, first_log
from simulations.federated import train
from simulations.simulate import Watch
from simulations.utility import Study, run_study

SETUP = Setup(source="synthetic", users=200, items=30, events=12, slate_size=5, factors=3)
OVERRIDES = (
    "model.input_width=4",
    "model.state_width=6",
    "model.rank=2",
    "training.checkpoint_every=2",
    "training.learning_rate=0.1",
)
STUDY = Study(SETUP, rounds=8, cohort=60, epsilons=(8.0, 80.0), seeds=1, first_seed=4, overrides=OVERRIDES)
TRAININGS = ["seed 4, not private", "seed 4, epsilon 8", "seed 4, epsilon 80"]


def watching(begun: list[str], stop_after: int = 10**6) -> Callable[[str, int], Watch]:
    """Watches that note which trainings begin, and stop after so many rounds in all."""
    done: list[int] = []

    def watch_of(name: str, rounds: int) -> Watch:
        begun.append(name)
        return Watch(
            note=lambda sentence: None,
            on_round=lambda progress, remark: done.append(progress.round),
            patient=lambda: nullcontext(lambda: len(done) >= stop_after),
        )

    return watch_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study that was stopped in the middle of its second training, and gone on with."""
    out, begun = tmp_path_factory.mktemp("utility"), list[str]()
    assert run_study(out, STUDY, 1, watching(begun, 11)) is None
    assert begun == TRAININGS[:2]
    assert not (out / "utility.json").exists()
    begun.clear()
    summary = run_study(out, STUDY, 1, watching(begun))
    assert summary is not None
    assert begun == TRAININGS[1:]
    return out, summary


def row_of(summary: dict[str, Any], policy: str) -> dict[str, Any]:
    (row,) = (row for row in summary["policies"] if row["policy"] == policy)
    return dict(row)


def test_every_policy_has_its_value_and_its_ratio(study: tuple[Path, dict[str, Any]]) -> None:
    out, summary = study
    private = [f"{rival}epsilon {epsilon}" for epsilon in (8, 80) for rival in ("DP popularity, ", "")]
    references = ["logging policy", "popularity", "best non-personal", "oracle"]
    assert [row["policy"] for row in summary["policies"]] == [*references, "not private", *private]
    assert row_of(summary, "not private")["ratio"]["mean"]["value"] == 1
    assert row_of(summary, "oracle")["mean"]["value"] == max(row["mean"]["value"] for row in summary["policies"])
    for row in summary["policies"]:
        low, high = row["mean"]["ci95"]
        assert low < row["mean"]["value"] < high
    assert json.loads((out / "utility.json").read_text()) == json.loads(json.dumps(summary))


def test_private_trainings_are_runs_with_a_ledger_that_verifies(study: tuple[Path, dict[str, Any]]) -> None:
    out, summary = study
    for epsilon in (8, 80):
        privacy = row_of(summary, f"epsilon {epsilon}")["privacy"]
        assert 0.97 * epsilon < privacy["epsilon_model"] <= epsilon < privacy["epsilon_server"]
        assert (privacy["releases"], privacy["noise"]) == (8, "cryptographic")
        checks, figures = verify_folder(out / "seed-4" / f"epsilon-{epsilon}")
        assert all(check.ok for check in checks), checks
        assert figures["epsilon_model"] == pytest.approx(privacy["epsilon_model"], abs=0.02)
    assert row_of(summary, "not private")["privacy"] == {"unit": "user", "mechanism": "none"}


def test_the_opponent_differs_in_noise_and_clip_alone(study: tuple[Path, dict[str, Any]]) -> None:
    out, _ = study
    opponent, private = (RunFolder(out / "seed-4" / name).settings().flat() for name in ("not-private", "epsilon-8"))
    assert {key for key in private if private[key] != opponent[key]} == {"privacy.mechanism", "privacy.clip_norm"}


def test_the_opponent_is_what_training_on_the_untouched_log_gives(study: tuple[Path, dict[str, Any]]) -> None:
    """To the bit: nothing that was computed before, such as DP popularity, changes what devices hold."""
    first_log.cache_clear()
    _, log = first_log(SETUP, 4)
    trained = train(STUDY.settings_of(4)["not private"], log.interactions)
    kept = RunFolder(study[0] / "seed-4" / "not-private").load_model()
    assert kept.keys() == trained.parameters.keys()
    assert all(torch.equal(kept[name], value) for name, value in trained.parameters.items())


def test_what_is_there_is_not_done_again_and_another_study_is_refused(study: tuple[Path, dict[str, Any]]) -> None:
    out, summary = study
    begun: list[str] = []
    again = run_study(out, STUDY, 1, watching(begun))
    assert again == summary
    assert begun == []
    more = run_study(out, Study(SETUP, 8, 60, (8.0, 40.0), 1, 4, OVERRIDES), 1, watching(begun))
    assert begun == ["seed 4, epsilon 40"]
    assert more is not None
    assert row_of(more, "DP popularity, epsilon 40")["privacy"]["target_epsilon"] == 40
    assert row_of(more, "epsilon 8") == row_of(summary, "epsilon 8")
    other = Study(SETUP, 9, 60, (8.0,), 1, 4, OVERRIDES)
    with pytest.raises(RunError, match="to hold results of the same settings"):
        run_study(out, other, 1, watching(begun))


@pytest.mark.parametrize(
    ("cohort", "epsilons", "override", "sentence"),
    [
        (201, (8.0,), "model.user_width=1", "Expected a cohort of 201 in \\[1, 200\\], the devices"),
        (20, (2.0, 2.0), "model.user_width=1", "Expected different targets of ε, at least one"),
        (20, (), "model.user_width=1", "Expected different targets of ε, at least one"),
        (20, (-1.0,), "model.user_width=1", "Expected privacy.target_epsilon=-1"),
        (20, (8.0,), "model.width=3", "Unknown setting model.width=3"),
        (20, (8.0,), "privacy.mechanism=none", "Expected privacy.mechanism=none not to be set"),
    ],
)
def test_bad_requests_are_refused(cohort: int, epsilons: tuple[float, ...], override: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Study(SETUP, 8, cohort, epsilons, 1, 0, (override,))


def test_the_command_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    found = fedtopk("privacy", "utility", "--out", tmp_path / "out", "--devices", "200", "--cohort", "201")
    assert found.returncode == 1
    assert "Expected a cohort of 201 in [1, 200], the devices." in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
