"""Large data: arrays in files without a name, and histories that are looked at in blocks."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from simulations.baselines import Markov
from simulations.datasets import interactions, storage
from simulations.datasets.synthetic import synthetic
from simulations.dp_popularity import bounded_counts
from simulations.splits import split


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, where everything is large."""
    monkeypatch.setenv("FEDTOPK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_IN_MEMORY", 0)
    return tmp_path / "cache"


def is_mapped(values: np.ndarray) -> bool:
    while isinstance(values.base, np.ndarray):
        values = values.base
    return isinstance(values, np.memmap)


def test_large_data_is_the_same_and_leaves_no_file(mapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, truth = synthetic(700, 50, seed=3)
    assert all(is_mapped(part) for part in (large.items, large.ratings, large.timestamps, large.user_ids, truth.tastes))
    assert list(mapped.iterdir()) == []
    monkeypatch.undo()
    small, small_truth = synthetic(700, 50, seed=3)
    assert not is_mapped(small.items)
    for name in ("offsets", "items", "ratings", "timestamps", "user_ids"):
        np.testing.assert_array_equal(getattr(large, name), getattr(small, name))
    np.testing.assert_array_equal(truth.tastes, small_truth.tastes)


def test_what_begins_at_nothing_can_be_written(mapped: Path) -> None:
    values = storage.zeros((3, 2), np.int64)
    assert values.tolist() == [[0, 0]] * 3
    values[1] = 7
    assert values.sum() == 14


def test_a_full_disk_is_told_of(mapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"Expected the cache folder .*cache to be writable: No space left on device"):
        synthetic(10, 10, seed=0)


@pytest.mark.parametrize("block", [1, 37, 10**6])
def test_what_is_counted_in_blocks_does_not_depend_on_them(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = synthetic(60, 20, seed=1)
    times = np.sort(np.random.default_rng(0).integers(0, 1000, len(data.items)))
    data = replace(data, timestamps=times)
    cut = split(data, "time-split")
    whole = [list(data.items[own]) for own in cut.train.slices()]
    monkeypatch.setattr(interactions, "_BLOCK", block)
    again = split(data, "time-split")
    np.testing.assert_array_equal(again.train.lengths(), cut.train.lengths())
    np.testing.assert_array_equal(again.tested_after, cut.tested_after)
    assert again.train.counts().tolist() == np.bincount(np.concatenate(whole).astype(int), minlength=20).tolist()
    pairs = np.zeros((21, 20), int)
    for own in whole:
        np.add.at(pairs, (own[:-1], own[1:]), 1)
    assert Markov(again.train).transitions.toarray().tolist() == pairs.tolist()
    bounded = sum(counts / np.linalg.norm(counts) for own in whole if (counts := np.bincount(own, minlength=20)).any())
    np.testing.assert_allclose(bounded_counts(again.train), bounded)
