"""A round reads the windows of its members, wherever the histories are kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.objective import returns_of
from common.settings import Settings, load_settings
from common.trajectory import Trajectories, rewards_of, window_starts
from simulations.datasets.interactions import Interactions
from simulations.datasets.synthetic import synthetic
from simulations.population import Population

HISTORIES, _ = synthetic(50, 80, seed=2)
MEMBERS = np.array([3, 4, 17, 49])


def settings_of(discount: float) -> Settings:
    return load_settings(None, ["training.window=15", f"objective.discount={discount}"])


def windows(histories: Interactions, discount: float) -> Trajectories:
    return Population(settings_of(discount), histories).windows(7, MEMBERS)


def assert_equal(found: Trajectories, expected: Trajectories) -> None:
    for name in ("items", "rewards", "returns", "lengths", "support"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("discount", [0.0, 0.8])
def test_a_window_is_cut_from_its_devices_whole_history(discount: float) -> None:
    """Returns look ahead to its end, beyond the window."""
    found, lengths = windows(HISTORIES, discount), HISTORIES.lengths()[MEMBERS]
    starts = window_starts(0, 7, MEMBERS, lengths, 15)
    assert (lengths > 15).any()
    for row, (device, start) in enumerate(zip(MEMBERS, starts, strict=True)):
        own = slice(HISTORIES.offsets[device], HISTORIES.offsets[device + 1])
        rewards, steps = rewards_of(HISTORIES.ratings[own], (0.5, 5.0)), int(found.lengths[row])
        assert steps == min(15, len(rewards))
        chosen = slice(start, start + steps)
        np.testing.assert_array_equal(found.items[row, :steps], HISTORIES.items[own][chosen])
        np.testing.assert_array_equal(found.rewards[row, :steps], rewards[chosen])
        np.testing.assert_array_equal(found.returns[row, :steps], returns_of(rewards, discount)[chosen])


def test_a_round_reads_no_other_devices_history() -> None:
    owner = np.repeat(np.arange(HISTORIES.users), HISTORIES.lengths())
    ratings = np.where(np.isin(owner, MEMBERS), HISTORIES.ratings, np.float32(np.nan))
    assert_equal(windows(replace(HISTORIES, ratings=ratings), 0.8), windows(HISTORIES, 0.8))


def test_histories_may_be_memory_mapped(tmp_path: Path) -> None:
    for name in ("items", "ratings", "offsets"):
        np.save(tmp_path / f"{name}.npy", getattr(HISTORIES, name))
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("items", "ratings", "offsets")}
    assert_equal(windows(replace(HISTORIES, **mapped), 0.8), windows(HISTORIES, 0.8))
