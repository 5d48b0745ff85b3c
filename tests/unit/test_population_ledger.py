"""A population's ledger: what it shows is never less than what its runs spent, wherever one of them dies."""

import math
from pathlib import Path

import pytest

from common.errors import BudgetExceeded, PrivacyError, RunError
from common.privacy.accounting import epsilon_model, epsilon_server, noise_multiplier_for, releases_within
from common.privacy.budget import Spending, make_budget
from common.settings import load_settings
from server.events import Events
from server.population_ledger import open_population
from server.store import open_store

ONE = Spending(((1.2, 0.1, 20),), 30 / (1.2**2 * 0.8), 1e-18)
TWO = Spending(((2.0, 1.0, 5),), 5 / (2.0**2 * 0.8), 1e-18)


def test_runs_compose() -> None:
    both = (ONE + TWO).statement(1e-4)
    assert both["runs"] == 2
    for name in ("epsilon_model", "epsilon_server"):
        one, two = ONE.statement(1e-4)[name], TWO.statement(1e-4)[name]
        assert max(one, two) < both[name] < one + two
    assert ONE.statement(1e-4)["epsilon_model"] == epsilon_model(1.2, 0.1, 20, 1e-4 * 0.998)
    assert ONE.statement(1e-4)["epsilon_server"] == pytest.approx(epsilon_server(1.2, 0.8, 30, 1e-4 * 0.998))
    assert (TWO + TWO).statement(1e-4)["epsilon_model"] == pytest.approx(epsilon_model(2.0, 1.0, 10, 1e-4 * 0.998))
    assert Spending().statement(1e-4)["epsilon_model"] == Spending().statement(1e-4)["epsilon_server"] == 0
    assert Spending(ONE.history, ONE.server, 1.9e-3 * 1e-4).left(1e-4) == 1e-4 * 0.998  # one run may lose as much
    with pytest.raises(PrivacyError, match="2 runs lose"):
        (ONE + TWO).statement(1e-16)


def test_noise_and_releases_are_for_what_is_left() -> None:
    spent = ONE.history
    z = noise_multiplier_for(4.0, 0.1, 20, 1e-4, spent)
    assert noise_multiplier_for(4.0, 0.1, 20, 1e-4) < z
    assert epsilon_model(z, 0.1, 20, 1e-4, spent) <= 4 * 1.001
    assert epsilon_model(0.97 * z, 0.1, 20, 1e-4, spent) > 4
    within = releases_within(4.0, 1.2, 0.1, 1e-4, 200, spent)
    assert epsilon_model(1.2, 0.1, within, 1e-4, spent) <= 4 < epsilon_model(1.2, 0.1, within + 1, 1e-4, spent)
    assert within == pytest.approx(releases_within(4.0, 1.2, 0.1, 1e-4, 220) - 20, abs=1)
    for over in (((0.5, 0.5, 100),), ((0.0, 0.1, 1),)):
        with pytest.raises(BudgetExceeded, match="other runs over this population"):
            noise_multiplier_for(4.0, 0.1, 20, 1e-4, over)


def test_a_run_without_noise_spends_everything() -> None:
    budget = make_budget(load_settings(None, ["privacy.mechanism=none"]), 100, 50)
    spending = budget.spending(3, 3)
    assert spending.statement(1e-4)["epsilon_model"] == spending.statement(1e-4)["epsilon_server"] == math.inf
    assert budget.spending(0, 0) == Spending()


def test_a_run_that_dies_stays_charged_with_its_most(tmp_path: Path) -> None:
    with open_population(tmp_path / "ledger") as population:
        origin = population.origin
        population.charge("one", ONE, 1e-4, settled=False)
    with open_population(tmp_path / "ledger") as population:  # the process that charged it is gone
        assert population.origin == origin
        assert population.others("two") == ONE
        assert population.others("one") == Spending()
        total = population.charge("two", TWO, 1e-4, settled=False)
        assert total["runs"] == 2 and total["log"]["events"] == 3
        less = Spending(((1.2, 0.1, 2),), 3 / (1.2**2 * 0.8), 0.0)
        population.charge("one", less, 1e-4, settled=True)
        assert population.others("two") == less


def test_one_process_at_a_time_and_no_other_folder(tmp_path: Path) -> None:
    with (
        open_population(tmp_path / "ledger"),
        pytest.raises(RunError, match="to be free"),
        open_population(tmp_path / "ledger"),
    ):
        pass
    with open_store(tmp_path / "run") as store:
        Events(store, lambda: 0.0).record("begun")
    with pytest.raises(RunError, match="a folder of its own"), open_population(tmp_path / "run"):
        pass
