"""A command's own defaults, and what the user says instead of them."""

from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import Settings, load_settings
from simulations.fleet import demo_settings
from simulations.presets import load_with_presets

PRESETS = {"training.rounds": 3, "privacy.mechanism": "none"}


def test_presets_are_for_what_nobody_mentions(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("training.seed = 5\n")
    for path, seed in ((None, 0), (config, 5)):
        found = load_with_presets(path, PRESETS, ["training.cohort_rate=0.5"])
        expected = ["training.rounds=3", "privacy.mechanism=none", "training.cohort_rate=0.5", f"training.seed={seed}"]
        assert found == load_settings(None, expected)
    assert load_with_presets(config, PRESETS, ["training.rounds=4"]).training.rounds == 4


def test_a_value_in_a_file_counts_also_where_it_is_the_default(tmp_path: Path) -> None:
    config, default = tmp_path / "config.toml", Settings()
    config.write_text(default.to_toml())
    assert load_with_presets(config, PRESETS, []) == default
    config.write_text(f"[training]\nrounds = {default.training.rounds}\ncohort_rate = {default.training.cohort_rate}\n")
    training = demo_settings(8, config, []).training
    assert (training.rounds, training.cohort_rate) == (default.training.rounds, default.training.cohort_rate)


def test_a_fleet_has_its_devices_whatever_a_file_says(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(Settings().to_toml())  # of a simulation of all users, central
    found = demo_settings(5, config, [])
    assert (found.data.users, found.aggregation.kind) == (5, "secure")
    assert demo_settings(5, config, ["data.users=7"]).data.users == 7
    with pytest.raises(SettingsError, match="devices=2 to be at least 3"):
        demo_settings(2, None, [])
