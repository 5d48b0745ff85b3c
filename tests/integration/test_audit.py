"""The audits catch every system that is broken on purpose, and pass the one that is not.

The same over 20 seeds, at the size of the command: `fedtopk audit RUN --study 20`, whose output is in docs/audits.md.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from running import TINY, fedtopk, simulate

from client.local_update import compute_update
from common.errors import PrivacyError, RunError
from common.privacy.accounting import epsilon_model
from common.settings import Settings, load_settings
from server.run_folder import RunFolder
from simulations.audit import claim_of
from simulations.audits.bounds import CONFIDENCE, error_of_each
from simulations.audits.canaries import audit_canaries
from simulations.audits.finding import Finding
from simulations.audits.flaws import BROKEN, Flaw, as_it_is, without_noise, without_sampling
from simulations.audits.interactions import Excess, audit_interactions, excess_by_round
from simulations.audits.membership import FEWEST_RUNS, Alignment, audit_membership, likelihood_ratios
from simulations.audits.payload import audit_payload, no_masks
from simulations.audits.system import DELTA, Seen, Size, System, devices_of, repetition, train

ERROR = error_of_each(CONFIDENCE)
NEVER = 1e-9
"""Noise and coins are the system's own here: a correct one must not fail this suite once in a thousand runs."""
SIZE = Size(users=60, items=100, rounds=10, window=20, canaries=4096, shadow_runs=16)


def settings_with(**changes: object) -> Settings:
    tree = TINY | {
        "data.users": 60,
        "data.items": 100,
        "model.input_width": 8,
        "model.state_width": 16,
        "objective.negatives": 60,
        "training.rounds": 10,
        "training.cohort_rate": 0.2,
        "privacy.randomness": "system",
    }
    return load_settings(None, [f"{key}={value}" for key, value in (tree | changes).items()])


@cache
def system() -> System:
    """At z = 2: ε_model is about 3 at δ = 1e-9."""
    return repetition(settings_with(), 2.0, SIZE)


@cache
def canaries_of(flaw: Flaw, seed: int) -> dict[str, Finding]:
    error = NEVER if flaw is as_it_is else ERROR
    findings = audit_canaries(replace(system(), flaw=flaw), SIZE.canaries, seed, error)
    return {finding.name: finding for finding in findings}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.verdict == "failed"}


def test_the_repetition_keeps_the_mechanism_and_claims_what_it_costs() -> None:
    run, own = settings_with(), system().settings
    assert (own.training.cohort_rate, own.privacy.clip_norm) == (run.training.cohort_rate, run.privacy.clip_norm)
    claim = canaries_of(as_it_is, 0)["canaries"].limit
    assert claim == pytest.approx(epsilon_model(2.0, 0.2, 10, DELTA), abs=0.05)


def test_the_correct_system_passes() -> None:
    """Its figures are right as well: over four trainings, noise has a standard error of .0025, contribution of .05."""
    found = [canaries_of(as_it_is, seed) for seed in range(4)]
    assert not any(failed(findings) for findings in found)
    assert np.mean([findings["noise"].value for findings in found]) == pytest.approx(1, abs=0.03)
    assert np.mean([findings["contribution"].value for findings in found]) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("noise × 0.1", "noise"),
        ("clip off", "contribution"),
        ("sampling off", "contribution"),
        ("weight by examples", "contribution"),
        ("seeded noise", "prediction"),
    ],
)
def test_every_broken_system_is_caught_by_its_check(name: str, check: str) -> None:
    assert check in failed(canaries_of(BROKEN[name], 0))


@pytest.mark.parametrize("name", ["noise × 0.1", "clip off", "weight by examples", "seeded noise"])
def test_a_broken_system_contradicts_the_claimed_epsilon(name: str) -> None:
    found = canaries_of(BROKEN[name], 0)["canaries"]
    assert found.lower_bound > found.limit > 0


def test_an_adaptive_clip_is_audited_in_its_own_units() -> None:
    """From a first C far above all norms, so that it moves, in a round's units of what one user adds to it."""
    changes = {"privacy.clip_quantile": 0.5, "privacy.clip_norm": 50.0, "privacy.clip_learning_rate": 1.0}
    adaptive = repetition(settings_with(**changes), 2.0, SIZE)
    found = {finding.name: finding for finding in audit_canaries(adaptive, SIZE.canaries, 0, NEVER)}
    assert not failed(found) and found["noise"].value == pytest.approx(1, abs=0.03)
    flawed = audit_canaries(replace(adaptive, flaw=BROKEN["clip off"]), SIZE.canaries, 0, ERROR)
    assert "contribution" in failed({finding.name: finding for finding in flawed})


def test_no_claim_above_the_largest_bound_can_be_contradicted() -> None:
    details = canaries_of(BROKEN["clip off"], 0)["canaries"]
    assert details.lower_bound <= details.details["largest_bound"] < np.log(SIZE.canaries)


def test_a_run_with_seeded_noise_fails() -> None:
    seeded = repetition(settings_with(**{"privacy.randomness": "seeded"}), 2.0, SIZE)
    found = {finding.name: finding for finding in audit_canaries(seeded, SIZE.canaries, 0, ERROR)}
    assert "prediction" in failed(found)


def test_masks_hide_the_items_that_a_raw_update_gives_away() -> None:
    masked = [audit_payload(system(), seed, NEVER) for seed in range(3)]
    assert [finding.verdict for finding in masked] == ["passed"] * 3
    assert masked[0].details["recovered_from_raw_updates"] > 0.99
    bare = audit_payload(system(), 0, ERROR, no_masks)
    assert bare.verdict == "failed" and bare.details["recovered"] > 0.9


@pytest.fixture(scope="module")
def excess() -> dict[Flaw, Excess]:
    """Of cohorts of six. Without noise the mean of 40 rounds is twelve standard errors above zero, with it as many
    below."""
    of_six = repetition(settings_with(**{"training.cohort_rate": 0.1}), 2.0, SIZE)
    return {flaw: excess_by_round(replace(of_six, flaw=flaw), 0) for flaw in (as_it_is, without_noise)}


def test_noise_keeps_a_sum_from_telling_more_than_popularity(excess: dict[Flaw, Excess]) -> None:
    assert audit_interactions(excess[as_it_is], excess[without_noise], ERROR).verdict == "passed"
    assert audit_interactions(excess[without_noise], excess[without_noise], ERROR).verdict == "failed"


def test_an_attack_that_would_not_work_either_way_is_inconclusive(excess: dict[Flaw, Excess]) -> None:
    assert audit_interactions(excess[as_it_is], excess[as_it_is], ERROR).verdict == "inconclusive"


def test_alignment_is_the_product_of_each_update_with_the_sum() -> None:
    own = system().seeded(1)
    sums: list[tuple[dict[str, torch.Tensor], np.ndarray]] = []

    def see(seen: Seen) -> None:
        attacker.see(seen)
        sums.append(({name: value.clone() for name, value in seen.offer.parameters.items()}, seen.total))
        if seen.offer.round == 1:
            offers.append(seen)

    attacker, offers = Alignment(own), []  # type: ignore[var-annotated]
    train(replace(own, settings=_with_rounds(own.settings, 1)), devices_of(own), own.examples, see)
    offer, population = offers[0].offer, own.population()
    windows = population.windows(1, np.arange(len(population)))
    update = compute_update(own.settings, sums[0][0], windows, population.users, offer.candidates, offer.warm)
    found = attacker.scores()
    for user in (0, 31, 59):
        alone = update.gradients.weighted_sum(torch.nn.functional.one_hot(torch.tensor(user), 60).float())
        assert found[user] == pytest.approx(float(alone.double() @ torch.from_numpy(sums[0][1])), rel=1e-3, abs=1e-3)


def _with_rounds(settings: Settings, rounds: int) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"rounds": rounds})})


def test_likelihood_ratios_find_users_whose_scores_rise_when_they_are_there() -> None:
    generator = np.random.default_rng(0)
    present = generator.random((40, 50)) < 0.5
    scores = generator.standard_normal((40, 50)) + 6 * present + 10 * generator.standard_normal(50)
    ratios, there = likelihood_ratios(scores, present, 30)
    assert there.tolist() == present[30:].ravel().tolist()
    assert np.mean((ratios > 0) == there) > 0.95


def test_membership_of_real_users_passes_under_noise_and_shows_without() -> None:
    def attack(flaw: Flaw, runs: int) -> Finding | None:
        return audit_membership(replace(system(), flaw=flaw), runs, 0, ERROR, lambda: None, lambda: False)

    protected = attack(as_it_is, FEWEST_RUNS)
    bare = attack(lambda *round_: without_sampling(*without_noise(*round_), round_[2]), SIZE.shadow_runs)
    assert protected is not None and bare is not None
    assert protected.verdict == "inconclusive"  # 120 coins contradict no such ε, wherever they fall
    assert bare.lower_bound > 0


def test_a_stop_leaves_no_half_attack() -> None:
    stops = iter([False, True])
    assert audit_membership(system(), 16, 0, ERROR, lambda: None, lambda: next(stops)) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "run"
    simulate(out, privacy__randomness="system", privacy__clip_quantile=0.5, training__start="popularity")
    return out


def test_the_command_answers_in_json_and_leaves_the_run_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    size = ("--budget", "8", "--canaries", "512", "--rounds", "3")
    done = fedtopk("audit", run, *size, "--confidence", str(1 - NEVER), "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = ["canaries", "noise", "prediction", "contribution", "payload", "interactions", "membership"]
    assert [finding["name"] for finding in report["audits"]] == names
    assert report["passed"] and report["complete"] and report["confidence"] == 1 - NEVER
    assert all(finding["detects"] and finding["cannot_detect"] for finding in report["audits"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_is_not_private_on_purpose_fails_the_command(tmp_path: Path) -> None:
    simulate(tmp_path / "run")
    done = fedtopk("audit", tmp_path / "run", "--budget", "8", "--canaries", "512", "--rounds", "3")
    assert done.returncode == 1, done.stderr
    assert "prediction" in done.stdout and "failed" in done.stdout


def test_what_cannot_be_audited_is_said(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError, match=r"report\.json"):
        claim_of(RunFolder(tmp_path))
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(RunError, match="privacy"):
        claim_of(RunFolder(tmp_path))
    with pytest.raises(PrivacyError, match="mechanism=skellam"):
        repetition(settings_with(**{"privacy.mechanism": "none"}), 0.0, SIZE)
