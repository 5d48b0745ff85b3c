"""A device's own coins: fair, secret, and flipped once for each round."""

import numpy as np
import pytest
from flwr.app import ConfigRecord
from scipy.stats import binomtest

from client.coins import Coins
from common.settings import Settings, load_settings
from server.sampling import draw_roster

SEEDED = load_settings(None, ["training.coins=device", "training.cohort_rate=0.3", "privacy.randomness=seeded"])
SECRET = load_settings(None, ["training.coins=device", "training.cohort_rate=0.3"])


def flips(settings: Settings, rounds: range, device: int = 5) -> list[bool]:
    records: dict[str, ConfigRecord] = {}
    return [Coins(records, bytes(32)).flip(round_, settings, device) for round_ in rounds]


def test_a_coin_falls_with_the_rate() -> None:
    for settings in (SEEDED, SECRET):
        heads = sum(flips(settings, range(1, 2001)))
        assert binomtest(heads, 2000, 0.3).pvalue > 1e-9  # those of SECRET fall anew in every run of this test


def test_asking_again_changes_nothing() -> None:
    records: dict[str, ConfigRecord] = {}
    coins = Coins(records, bytes(32))
    for round_ in range(1, 60):
        first = coins.flip(round_, SECRET, 5)
        assert coins.flip(round_, SECRET, 5) == first == Coins(dict(records), bytes(32)).fell_for(round_)
        assert not coins.flip(round_ - 1, SECRET, 5)
        assert coins.flip(round_, SECRET, 5) == first


def test_a_coin_is_of_one_run() -> None:
    records: dict[str, ConfigRecord] = {}
    always = replace_rate(SECRET, 1.0)
    assert Coins(records, bytes(32)).flip(9, always, 5)
    assert not Coins(records, bytes([1]) * 32).fell_for(9)
    assert Coins(records, bytes([1]) * 32).flip(1, always, 5)


def test_seeded_coins_are_reproducible_and_of_their_device() -> None:
    assert flips(SEEDED, range(1, 100)) == flips(SEEDED, range(1, 100))
    assert flips(SEEDED, range(1, 100)) != flips(SEEDED, range(1, 100), device=6)
    assert flips(SECRET, range(1, 100)) != flips(SECRET, range(1, 100))


@pytest.mark.parametrize(("kind", "everybody"), [("secure", True), ("plain", False), ("central", False)])
def test_real_devices_that_flip_their_coins_are_all_asked(kind: str, everybody: bool) -> None:
    settings = load_settings(None, ["training.coins=device", f"aggregation.kind={kind}"])
    members = draw_roster(settings, 1, 400)
    assert np.array_equal(members, np.arange(400)) == everybody


def replace_rate(settings: Settings, rate: float) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"cohort_rate": rate})})
