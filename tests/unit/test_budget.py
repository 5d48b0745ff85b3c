"""The budget of a run: what the settings stand for, and when no guarantee can be given."""

import pytest

from common.errors import PrivacyError
from common.privacy.budget import make_budget
from common.settings import load_settings


def test_a_budget_refuses_a_minimum_at_which_one_user_decides_over_others() -> None:
    settings = load_settings(None, ["guard.minimum_cohort=3", "training.rounds=20", "training.cohort_rate=1.0"])
    with pytest.raises(PrivacyError, match=r"^Expected guard\.minimum_cohort=3 to be far from the 3 expected members"):
        make_budget(settings, devices=3, dimension=100)
    assert make_budget(settings, devices=300, dimension=100).allowed_releases == 20


def test_a_million_devices_are_no_obstacle() -> None:
    budget = make_budget(load_settings(None, ["training.rounds=50"]), devices=1_000_000, dimension=1000)
    assert budget.allowed_releases == 50
