"""The closed loop and the accuracy experiment, small: what they report, and that they go on where they were."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import FEDTOPK, arguments, fedtopk

from common.errors import RunError, SettingsError
from simulations.accuracy import CASES, run_accuracy
from simulations.behaviour import log_events, uniform
from simulations.closed_loop import FULL_INFORMATION, Setup, joined, references, value_of
from simulations.closed_loop_table import (
    behaviour_table,
    comparisons_table,
    jobs_of,
    off_policy_table,
    run_closed_loop,
    summarise,
    values_table,
)
from simulations.experiment import mean_of

SETUP = Setup(source="synthetic", users=300, items=40, events=12, slate_size=5, generations=2, factors=3)
TINY = [
    "model.input_width=4",
    "model.state_width=6",
    "model.user_width=2",
    "training.rounds=30",
    "training.cohort_rate=0.5",
    "training.learning_rate=0.05",
    "objective.negatives=20",
]
LEARNERS = ["top-k", "top-k on the critic", "direct", FULL_INFORMATION]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out, done = tmp_path_factory.mktemp("loop"), list[str]()
    summary = run_closed_loop(
        out, SETUP, LEARNERS, 2, TINY, valued=300, workers=2, on_done=lambda number, name: done.append(name)
    )
    return out, summary, done


def row_of(summary: dict[str, Any], policy: str, generation: int) -> dict[str, Any]:
    (row,) = (row for row in summary["rows"] if (row["policy"], row["generation"]) == (policy, generation))
    return dict(row)


def test_every_policy_is_valued_in_every_generation(loop: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, summary, done = loop
    assert len(done) == jobs_of(LEARNERS, 2) == 10
    policies = {(row["policy"], row["generation"]) for row in summary["rows"]}
    fixed = {"logging policy", "popularity", "best non-personal", "oracle"}
    assert policies == {(name, 0) for name in fixed} | {(name, g) for name in LEARNERS for g in (1, 2)}
    oracle = row_of(summary, "oracle", 0)
    for row in summary["rows"]:
        for measure in ("first", "mean", "consumed"):
            low, high = row[measure]["ci95"]
            assert low <= row[measure]["value"] <= high
        assert row["mean"]["value"] <= oracle["mean"]["value"]


def test_what_is_learned_of_the_truth_beats_what_was_logged(loop: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, summary, _ = loop
    logged = row_of(summary, "logging policy", 0)["mean"]["value"]
    assert row_of(summary, FULL_INFORMATION, 1)["mean"]["value"] > logged + 0.03


def test_a_second_call_does_nothing_anew_and_another_setup_is_refused(
    loop: tuple[Path, dict[str, Any], list[str]],
) -> None:
    out, summary, _ = loop
    again: list[str] = []
    found = run_closed_loop(
        out, SETUP, LEARNERS, 2, TINY, valued=300, workers=1, on_done=lambda number, name: again.append(name)
    )
    assert found == summary
    assert again == []
    with pytest.raises(RunError, match="to hold results of the same settings"):
        run_closed_loop(out, SETUP, LEARNERS, 2, [], valued=300, workers=1, on_done=lambda number, name: None)


def test_tables_show_every_row(loop: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, summary, _ = loop
    assert values_table(summary).row_count == len(summary["rows"])
    assert comparisons_table(summary).row_count == len(summary["comparisons"]) == 3


def test_the_log_tells_what_a_policy_is_worth(loop: tuple[Path, dict[str, Any], list[str]]) -> None:
    """IPS and DR with true propensities lie around the truth; β's calibration is told where there is a neural β."""
    out, summary, _ = loop
    unbiased = []
    for path in out.glob("*.json"):
        report = json.loads(path.read_text()).get("off_policy")
        for name in ("ips", "doubly robust") if isinstance(report, dict) else ():
            if name in report["true propensities"]:
                estimate = report["true propensities"][name]
                unbiased.append((estimate["value"] - report["true"]) / estimate["standard_error"])
    assert len(unbiased) >= 10
    assert np.abs(unbiased).max() < 4
    assert abs(np.mean(unbiased)) < 4 / np.sqrt(len(unbiased))
    rows = {row["policy"]: row for row in summary["off_policy"]}
    assert set(rows) == set(LEARNERS)
    assert "doubly robust" in rows["direct"]["true propensities"] and "behaviour" not in rows["direct"]
    behaviour = rows["top-k"]["behaviour"]
    assert behaviour["log_loss"]["value"] == pytest.approx(behaviour["entropy"]["value"] + behaviour["kl"]["value"])
    assert 0 < behaviour["ece"]["value"] < behaviour["mean_probability"]["value"] == pytest.approx(1 / SETUP.items)
    assert off_policy_table(summary).row_count == 4 + 2
    assert behaviour_table(summary).row_count == 2


def test_comparisons_are_of_the_same_seed() -> None:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for seed, level in enumerate((0.1, 0.5, 0.9)):
        for name, more in (("top-k", 0.01), ("off-policy", 0.0)):
            value = {"first": level, "mean": level + more, "consumed": level}
            found[name, seed] = {"generations": [value], "off_policy": {}}
    (row,) = summarise(found)["comparisons"]
    assert row["value"] == pytest.approx(0.01)
    assert row["ci95"] == pytest.approx([0.01, 0.01])


def test_a_joined_log_has_each_users_first_events_first() -> None:
    world = SETUP.world(3)
    first, second = (log_events(world, uniform(world), events, seed=events, start=float(events)) for events in (3, 5))
    both = joined(first, second)
    for user in (0, 7, 299):
        parts = [log.interactions.items[3 * user : 3 * user + 3] for log in (first,)]
        parts.append(second.interactions.items[5 * user : 5 * user + 5])
        own = slice(both.interactions.offsets[user], both.interactions.offsets[user + 1])
        assert both.interactions.items[own].tolist() == np.concatenate(parts).tolist()
        assert (np.diff(both.interactions.timestamps[own]) >= 0).all()
    np.testing.assert_allclose(np.sort(both.propensities), np.full(300 * 8, 1 / 40), rtol=1e-5)


def test_references_are_in_their_order() -> None:
    found = references(SETUP, 0, 300)
    assert found["best non-personal"]["mean"] > found["popularity"]["mean"]
    assert found["oracle"]["mean"] > found["best non-personal"]["mean"]


def test_a_slates_value_is_the_mean_over_users() -> None:
    world, users = SETUP.world(0), np.arange(4)
    slates = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    likes = np.take_along_axis(world.likes(users), slates, 1).astype(float)
    found = value_of(world, slates, users)
    assert found["first"] == pytest.approx(likes[:, 0].mean(), rel=1e-5)
    assert found["mean"] == pytest.approx(likes.mean(), rel=1e-5)
    assert found["consumed"] == pytest.approx((1 - (1 - likes).prod(1)).mean(), rel=1e-5)


def test_intervals_are_students() -> None:
    assert mean_of([1.0]) == {"value": 1.0}
    found = mean_of([1.0, 2.0, 3.0])
    assert found["value"] == 2
    assert found["ci95"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("learners", "valued", "sentence"),
    [
        (["td3"], 10, "Expected the learner 'td3' to be one of cross-entropy, likelihood"),
        ([], 301, "Expected valued=301 in [1, 300]."),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, learners: list[str], valued: int, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run_closed_loop(
            tmp_path / "out", SETUP, learners, 1, [], valued=valued, workers=1, on_done=lambda number, name: None
        )
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_experiment_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    words = ["closed-loop", "--source", "synthetic", "--users", "300", "--items", "40", "--events", "12"]
    words += ["--out", str(tmp_path), "--seeds", "2", "--learner", "direct", "--learner", "top-k", "--format", "json"]
    words += arguments(dict(setting.split("=") for setting in TINY))
    process = subprocess.Popen(
        [FEDTOPK, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.0.json"))) > 0)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert "goes on" in errors
        wait_until(lambda: not any_alive(process.pid))
    finally:
        if any_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    finished = fedtopk(*words)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["seeds"] == 2


def wait_until(holds: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def any_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_accuracy_compares_both_ways(tmp_path: Path) -> None:
    data = ["data.source=synthetic", "data.users=60", "data.items=50", "training.rounds=4", "training.seed=0"]
    small = [*TINY[:3], "objective.negatives=20", "objective.warmup_rounds=1", *data]
    cases = ["cross-entropy", "top-k"]
    summary = run_accuracy(tmp_path, cases, 2, small, workers=1, on_done=lambda number, name: None)
    assert set(cases) <= set(CASES)
    assert [row["case"] for row in summary["rows"]] == ["popularity", "markov", *cases]
    for row in summary["rows"][2:]:
        for metric in ("hr@10", "ndcg@10"):
            assert 0 <= row["federated"][metric]["value"] <= 1
            if row["central"][metric]["value"]:
                ratio = row["federated"][metric]["value"] / row["central"][metric]["value"]
                assert row["gap"][metric] == pytest.approx(1 - ratio)
