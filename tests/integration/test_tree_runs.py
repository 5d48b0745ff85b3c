"""Runs with correlated noise: stopped, killed, gone on with, verified; and no ε for the server, wherever one looks."""

import json
import random
import signal
import subprocess
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import FEDTOPK, TINY, arguments, simulate

from common.errors import AggregationError, PrivacyError, RunError
from common.offer import Offer
from common.privacy import NOT_OFFERED
from common.settings import load_settings
from server.cohort import CohortSum
from server.dashboard.course import Course
from server.dashboard.panels import panels
from server.dashboard.spending import Spending
from server.dashboard.view import run_parts
from server.ledger import LedgerReader
from server.model_card import model_card
from server.run_folder import RunFolder
from server.store import open_store_read_only
from server.verification import TOLERANCE, verify_folder
from simulations.audits.system import Size, repetition
from simulations.plain_cohort import PlainCohort
from simulations.simulate import Watch
from simulations.simulate import simulate as run_simulation

TREE = TINY | {"privacy.mechanism": "tree", "training.rounds": 9, "training.cohort_rate": 0.3}


def train(out: Path, rounds: int | None = None, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """A run in this process, stopped after so many rounds."""
    tree = TREE | {key.replace("__", "."): value for key, value in changes.items()}
    settings = None if resume else load_settings(None, [f"{key}={value}" for key, value in tree.items()])
    asked = count(1)
    watch = Watch(
        note=lambda sentence: None,
        on_round=lambda progress, remark: None,
        patient=lambda: nullcontext(lambda: rounds is not None and next(asked) > rounds),
    )
    return run_simulation(RunFolder(out), watch, settings=settings, workers=1)


@pytest.mark.parametrize("kind", ["central", "plain"])
def test_a_run_that_was_stopped_goes_on_with_the_very_noise(tmp_path: Path, kind: str) -> None:
    whole = train(tmp_path / "whole", aggregation__kind=kind)
    assert train(tmp_path / "run", 4, aggregation__kind=kind)["status"] == "stopped"
    report = train(tmp_path / "run", resume=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1] and report["status"] == whole["status"] == "finished"
    assert report["privacy"] == whole["privacy"] and report["privacy"]["contributions"] == 3
    assert report["client_updates"] == 120  # each of 40 devices three times


def test_killed_while_noise_is_secret_no_round_is_released_twice(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = TREE | {"privacy.randomness": "system", "training.rounds": 60, "training.checkpoint_every": 50}
    words = [FEDTOPK, "simulate", "--out", str(out), "--workers", "1", *arguments(settings)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(int(path.stem[-6:]) >= 10 for path in out.glob("checkpoints/round-*.safetensors")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    key = out / "noise.key"
    content = key.read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600 and not (out / "report.json").exists()

    key.unlink()
    with pytest.raises(RunError, match=r"noise\.key to hold the key of the run's noise"):
        train(out, resume=True)
    key.touch(0o600)
    key.write_bytes(content)

    report = train(out, resume=True)
    with open_store_read_only(out) as store:
        entries = LedgerReader(store).entries()
    released = [entry.round for entry in entries if entry.state == "released"]
    assert released == list(range(1, 61)) and report["rounds"] == report["privacy"]["releases"] == 60
    assert report["privacy"]["noise"] == "cryptographic" and report["privacy"]["epsilon_model"] <= 8
    assert not key.exists()
    assert all(check.ok for check in verify_folder(out)[0])


def test_a_turn_that_cannot_be_summed_ends_in_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that uploaded in vain do not upload again, so that a round's last attempt is without them."""
    whole = PlainCohort.sum_updates

    def failing(cohort: PlainCohort, offer: Offer, members: np.ndarray) -> CohortSum:
        if offer.round == 2 and len(members):
            raise AggregationError("Too few answered.")
        return whole(cohort, offer, members)

    monkeypatch.setattr(PlainCohort, "sum_updates", failing)
    out = tmp_path / "run"
    changes = {"aggregation__kind": "plain", "privacy__randomness": "system", "training__rounds": 3}
    report = train(out, **changes)
    with open_store_read_only(out) as store:
        entries = [(entry.round, entry.attempt, entry.state) for entry in LedgerReader(store).entries()]
    second = [(2, 1, "uploaded"), (2, 2, "uploaded"), (2, 3, "released")]
    assert entries == [(1, 1, "released"), *second, (3, 1, "released")]
    assert report["status"] == "finished" and report["privacy"]["releases"] == 3
    assert all(check.ok for check in verify_folder(out)[0])


def test_a_checkpoint_that_is_gone_ends_the_run_and_releases_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, 5, privacy__randomness="system")
    for path in sorted(out.glob("checkpoints/round-*.safetensors"))[-1:]:
        path.unlink()  # as a damaged one's message says
    with pytest.raises(RunError, match="Expected round 5 not to be released yet"):
        train(out, resume=True)
    with open_store_read_only(out) as store:
        assert [entry.attempt for entry in LedgerReader(store).entries()] == [1] * 5


@pytest.mark.parametrize("seed", range(6))
def test_the_second_accountant_agrees(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    report = simulate(
        tmp_path / "run",
        privacy__mechanism="tree",
        privacy__noise_multiplier=draw.uniform(0.8, 6.0),
        privacy__target_epsilon=200.0,
        privacy__delta=10 ** draw.uniform(-7, -2),
        training__cohort_rate=draw.choice([1.0, 0.5, draw.uniform(0.1, 1.0)]),
        training__rounds=draw.randrange(1, 9),
    )
    checks, figures = verify_folder(tmp_path / "run")
    assert all(check.ok for check in checks), checks
    assert abs(report["privacy"]["epsilon_model"] - figures["epsilon_model"]) <= TOLERANCE
    assert report["privacy"]["epsilon_server"] == figures["epsilon_server"] == NOT_OFFERED


def test_no_epsilon_of_the_server_is_claimed_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = train(out)
    card = model_card(report, RunFolder(out).settings())
    assert f"| ε_server | {NOT_OFFERED} |" in card and "no sampling is assumed" in card
    course, spending = Course(RunFolder(out)), Spending()
    course.update()
    spending.finish(course)
    [chart] = panels(course, spending)["privacy"]
    page = run_parts("run", course, spending, preview=False)["html"]
    assert spending.spent is not None and spending.spent["epsilon_server"] == NOT_OFFERED
    assert {line.name.split(",")[0] for line in chart.lines} == {"ε_model"}  # type: ignore[union-attr]
    assert "not offered" in page["privacy"] and "noise.key" in page["cautions"]
    report["privacy"]["epsilon_server"] = 8.0
    (out / "report.json").write_text(json.dumps(report))
    assert [check.check for check in verify_folder(out)[0] if not check.ok] == ["epsilon_server"]
    with pytest.raises(PrivacyError, match=r"privacy\.mechanism=tree to be skellam"):
        repetition(RunFolder(out).settings(), 1.0, Size())
