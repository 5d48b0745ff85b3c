"""The paper's simulations: exact results by formula and by the objective itself, and shortened trainings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.objective import Evidence, coefficients
from simulations import paper
from simulations.central import train_centrally
from simulations.federated import train
from simulations.paper import CAP, SIMULATIONS, Case, Simulation, probabilities, settings_of, summarise

CASES = [(simulation, case) for simulation in SIMULATIONS for case in simulation.cases]
names = [f"{simulation.name}-{case.name}" for simulation, case in CASES]
BY_NAME = dict(zip(names, CASES, strict=True))


def expected_gradient(simulation: Simulation, case: Case, policy: np.ndarray) -> np.ndarray:
    """(10,) by the logits of π, of what training raises on average, where β is known: m − π Σ m, m = β c."""
    objective = settings_of(case, seed=0).objective
    log_pi, log_beta = (torch.from_numpy(values).log()[None] for values in (policy, simulation.behaviour))
    rewards, everything = torch.from_numpy(simulation.rewards)[None], torch.ones(1, 10, dtype=torch.bool)
    needed = log_beta if objective.needs_behaviour else None
    evidence = Evidence(rewards, rewards, everything, log_pi, needed, None, None, 10)
    mass = simulation.behaviour * coefficients(objective, evidence, warm=True)[0].numpy()
    return mass - policy * mass.sum()


@pytest.mark.parametrize(("simulation", "case"), CASES, ids=names)
def test_exact_policy_is_where_the_objective_rests(simulation: Simulation, case: Case) -> None:
    assert case.exact.sum() == pytest.approx(1)
    # Items outside of the exact policy have a little mass: they must lose it, and the others must not move.
    near = (1 - 1e-6) * case.exact + 1e-6 * simulation.behaviour
    gradient, absent = expected_gradient(simulation, case, near), case.exact == 0
    assert np.abs(gradient[~absent]).max() < 1e-4
    assert (gradient[absent] < 0).all()


@pytest.mark.parametrize(("simulation", "case"), CASES, ids=names)
def test_objective_leads_to_the_exact_policy(simulation: Simulation, case: Case) -> None:
    """By its expected gradient from the uniform policy. What the others keep falls as 1/steps."""
    policy = np.full(10, 0.1)
    for _ in range(1000):
        logits = np.log(policy) + 0.3 * expected_gradient(simulation, case, policy)
        policy = np.exp(logits) / np.exp(logits).sum()
    assert policy == pytest.approx(case.exact, abs=0.01)


def test_exact_values_are_the_papers() -> None:
    values = {name: simulation.worth(case.exact)["value"] for name, (simulation, case) in BY_NAME.items()}
    assert values["exp1-uncorrected"] == pytest.approx(5.5)
    assert values["exp1-corrected"] == 10
    assert 9.3 < values["exp1-corrected_capped"] < 9.5
    first, second = SIMULATIONS
    assert first.worth(first.behaviour)["value"] == pytest.approx(4)
    i = np.arange(1, 11)
    assert BY_NAME["exp1-uncorrected"][1].exact == pytest.approx(i * (11 - i) / 220)
    assert math.isclose(CAP, math.e**3)
    assert second.worth(BY_NAME["exp2-k1"][1].exact)["slate_value"] == pytest.approx(10)
    assert second.worth(BY_NAME["exp2-k2"][1].exact)["slate_value"] == pytest.approx(14.26, abs=0.005)


def test_no_policy_of_two_items_makes_a_better_set_than_the_exact_one() -> None:
    simulation, case = BY_NAME["exp2-k2"]
    best = simulation.worth(case.exact)["slate_value"]
    for first in np.linspace(0, 1, 201):
        policy = np.array([first, 1 - first] + [0.0] * 8)
        assert simulation.worth(policy)["slate_value"] <= best + 1e-12


def test_logs_follow_beta_and_carry_the_rewards() -> None:
    for simulation in SIMULATIONS:
        log = simulation.log(seed=1)
        share = np.bincount(log.items, minlength=10) / len(log.items)
        assert share == pytest.approx(simulation.behaviour, abs=0.01)
        assert (log.ratings == simulation.rewards[log.items]).all()
        assert not np.array_equal(log.items, simulation.log(seed=2).items)


SHORT = {"training.rounds": 60, "training.learning_rate": 0.2}


@pytest.mark.parametrize("name", ["exp1-uncorrected", "exp1-corrected", "exp2-k1"])
def test_short_training_comes_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_DEVICES", 600)
    simulation, case = BY_NAME[name]
    short = replace(case, settings=case.settings | SHORT)
    settings, log = settings_of(short, seed=0), simulation.log(seed=0)
    federated, central = train(settings, log), train_centrally(settings, log)
    for found in (federated, central):
        summary = summarise(simulation, [found])
        assert summary["value"] == pytest.approx(simulation.worth(case.exact)["value"], abs=0.3)
    assert probabilities(federated, "policy") == pytest.approx(probabilities(central, "policy"), abs=0.03)


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The answer after two rounds with two seeds, and the numbers of the rounds as they were told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "_DEVICES", 100)
        patch.setattr(paper, "_SHARED", paper._SHARED | {"training.rounds": 2})
        told: list[int] = []
        yield paper.run_paper(2, lambda number, what: told.append(number)), told


def test_answer_has_the_promised_form(tiny: tuple[dict[str, Any], list[int]]) -> None:
    answer, told = tiny
    assert told == list(range(1, 2 * paper.trainings(2) + 1))
    assert {name: list(cases) for name, cases in answer.items()} == {
        "exp1": ["uncorrected", "corrected", "corrected_capped"],
        "exp2": ["k1", "k2"],
    }
    for name, cases in answer.items():
        for case, row in cases.items():
            keys = {"policy", "value", "value_std", "seeds", "policy_by_seed"}
            keys |= ({"slate_value"} if name == "exp2" else set()) | ({"behaviour"} if case != "uncorrected" else set())
            assert set(row) == keys | {"central", "exact", "logged"}
            assert set(row["central"]) == keys
            assert len(row["policy"]) == 10 and sum(row["policy"]) == pytest.approx(1)
            assert row["seeds"] == len(row["policy_by_seed"]) == 2
    assert paper.results_table(answer).row_count == 9  # five cases, two sets, and β twice


def test_picture_is_drawn(tiny: tuple[dict[str, Any], list[int]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from simulations.paper_picture import draw

    draw(tiny[0], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
