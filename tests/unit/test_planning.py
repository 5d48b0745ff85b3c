"""A plan's noise against the published table, its scaling law, and its words."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import PrivacyError, SettingsError
from common.messages import model_bytes
from common.model import dimension_of, initialise
from common.privacy.accounting import default_delta
from common.privacy.planning import FEWER, default_parameters, make_curve, make_plan, planned_budget, signal_to_noise
from common.privacy.rotation import padded
from common.secagg.packing import lane, pack
from common.settings import load_settings
from common.sizes import sizes_of

TABLE = {
    (610, 61): (4.71, 2.75, 1.69),
    (6_040, 604): (5.71, 3.21, 1.90),
    (138_493, 5_000): (2.61, 1.54, 1.01),
    (138_493, 20_000): (9.91, 5.37, 3.02),
    (1_000_000, 20_000): (1.71, 1.09, 0.80),
    (10_000_000, 50_000): (0.88, 0.71, 0.57),
}
"""z by (users, cohort) for ε_model = 2, 4 and 8: PLD, a user added or removed, δ = N^-1.1, 1,000 rounds."""


@pytest.mark.parametrize(("users", "cohort"), TABLE)
def test_the_noise_of_a_plan_is_that_of_the_table(users: int, cohort: int) -> None:
    for epsilon, expected in zip((2.0, 4.0, 8.0), TABLE[users, cohort], strict=True):
        budget = planned_budget(users, cohort, 1000, epsilon, 0.0, 100_000)
        assert budget.noise_multiplier == pytest.approx(expected, rel=0.05)
        assert budget.delta == default_delta(users)
        assert budget.allowed_releases == 1000


@pytest.mark.parametrize(
    ("users", "cohort", "z", "parameters", "expected"),
    [
        (6_040, 604, 1.90, 49 * 3_700, 5.6),
        (138_493, 20_000, 3.02, 49 * 26_700, 42),
        (138_493, 20_000, 9.91, 49 * 26_700, 12),
        (1_000_000, 20_000, 1.71, 49 * 100_000, 41),
    ],
)
def test_the_scaling_law_gives_the_known_cases(
    users: int, cohort: int, z: float, parameters: int, expected: float
) -> None:
    assert signal_to_noise(cohort, 1000, z, parameters) == pytest.approx(expected, rel=0.12)  # α = .24 for .22 to .26


def test_the_law_is_that_of_the_gaussian_dp_parameter() -> None:
    users, cohort, rounds, z, parameters = 1e5, 2e3, 500, 1.3, 10_000
    mu = cohort / users * math.sqrt(rounds * (math.exp(1 / z**2) - 1))
    eta = 1 / (z * math.sqrt(math.exp(1 / z**2) - 1))
    assert signal_to_noise(cohort, rounds, z, parameters) == pytest.approx(0.24 * users * mu * eta / 100)
    assert eta < 1


def test_too_few_users_are_told_so() -> None:
    plan = make_plan(671, 67, 400, 8.0)
    assert plan["parameters"] == default_parameters() == 831_824
    assert plan["epsilon_model"] <= 8 < plan["epsilon_server"]
    assert plan["signal_to_noise"] < 1
    assert plan["verdict"].startswith("671 users cannot support ε_model=8 at δ=0.00078 for 831,824 shared parameters")
    assert plan["verdict"].endswith("Expect popularity-level quality.")
    changes = {lever["change"]: lever["signal_to_noise"] for lever in plan["levers"]}
    assert min(changes.values()) > plan["signal_to_noise"]
    fewer = {lever["change"].partition(" (")[0]: lever for lever in plan["levers"] if "parameters" in lever}
    assert list(fewer) == list(FEWER)
    others = {change: ratio for change, ratio in changes.items() if "model." not in change}
    assert changes["10 × the users"] == max(others.values())
    assert changes["a tenth of the shared parameters"] == pytest.approx(10**0.5 * plan["signal_to_noise"], rel=1e-3)
    assert {"unit", "adjacency", "observer", "delta"} <= plan.keys()


def test_many_users_and_a_curve() -> None:
    plan = make_plan(100_000, 10_000, 400, 8.0, parameters=20_000)
    assert plan["signal_to_noise"] > 10 and "less than the model without noise" in plan["verdict"]
    assert make_plan(10_000_000, 100_000, 400, 8.0, parameters=20_000)["verdict"].endswith("not what limits quality.")
    own, fewer, more = make_curve(plan).values()
    assert all(epsilon > other for (epsilon, _), (other, _) in pairwise(own))
    assert all(ratio > other for (_, ratio), (_, other) in pairwise(own))
    assert [epsilon for epsilon, _ in fewer] == [epsilon for epsilon, _ in own]
    assert all(epsilon > other for (epsilon, _), (other, _) in zip(more, own, strict=True))  # their δ is smaller


def test_a_delta_that_reveals_one_user_is_named() -> None:
    assert "permits to reveal one user outright" in make_plan(1000, 1000, 1, 8.0, 0.01, 100)["verdict"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1, 1, 8.0, 0.0, 1), "users=0"),
        ((10, 0, 1, 8.0, 0.0, 1), "cohort=0"),
        ((10, 11, 1, 8.0, 0.0, 1), "cohort=11 to be at most users=10"),
        ((10, 5, 0, 8.0, 0.0, 1), "training.rounds=0"),
        ((10, 5, 1, -1.0, 0.0, 1), "privacy.target_epsilon=-1"),
        ((10, 5, 1, math.nan, 0.0, 1), "privacy.target_epsilon=nan"),
        ((10, 5, 1, 1000.0, 0.0, 1), "target_epsilon=1000"),
        ((10, 5, 1, 8.0, 1.0, 1), "privacy.delta=1"),
        ((10, 5, 1, 8.0, 0.0, -1), "parameters=-1"),
    ],
)
def test_what_is_out_of_range_is_named(arguments: tuple[int, int, int, float, float, int], named: str) -> None:
    with pytest.raises((PrivacyError, SettingsError), match=named):
        make_plan(*arguments)


def test_the_model_of_the_settings_is_counted_as_it_is(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text('[model]\nitems = "features"\nrank = 2\n[training]\nfrozen = ["items"]\n')
    settings = load_settings(config, ["data.items=300", "objective.critic=baseline"])
    sizes, model = sizes_of(settings), initialise(settings, 300, torch.Generator())
    assert sizes.dimension == dimension_of(settings, model)
    assert (sizes.trained["items"], sizes.fixed["items"]) == (0, 64 * 32 + 2 * 32 + 300 * 2)
    assert (sizes.trained["policy"], sizes.fixed["policy"]) == (64 * 65 + 2 * 65 + 300 * 2, 0)
    assert (sizes.trained["features"], sizes.fixed["features"]) == (0, 300 * 64)
    sent = model_bytes({name: value.numpy() for name, value in model.items()})
    assert sizes.model_bytes <= len(sent) <= sizes.model_bytes + 2000
    sliced = load_settings(None, ["objective.slice_items=500", "model.input_rows=500"])
    assert sizes_of(sliced).trained["policy"] == 500 * 65
    with pytest.raises(SettingsError, match=r"Expected data.items=0 to be the size of the catalogue"):
        sizes_of(load_settings(None, ["data.items=0"]))


def test_a_plan_of_a_configuration_with_fewer_parameters(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("[model]\nrank = 4\n")
    plan = make_plan(10_000, 100, 10, 8.0, overrides=["data.items=300"], config=config)
    assert plan["parameters"] == sum(numbers["trained"] for numbers in plan["groups"].values())
    levers = [lever for lever in plan["levers"] if "parameters" in lever]
    assert [lever["change"].partition(" (")[0] for lever in levers] == list(FEWER)[-1:]  # the others have no fewer
    ratio = (plan["parameters"] / levers[0]["parameters"]) ** 0.5
    assert ratio > 1 and levers[0]["signal_to_noise"] == pytest.approx(ratio * plan["signal_to_noise"])
    uploads = [len(pack(np.zeros(padded(plan["parameters"]), lane(bits)), bits)) for bits in (16, 20, 32)]
    assert plan["bytes_up"] in uploads


def test_what_has_no_noise_cannot_be_planned() -> None:
    with pytest.raises(PrivacyError, match=r"Expected privacy.mechanism=none to be a mechanism with noise"):
        make_plan(671, 67, 400, 8.0, overrides=["privacy.mechanism=none"])
