"""Full-ranking evaluation of known scorers, and the shape of what a report shows."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from handmade import interactions
from torch import Tensor

from common.errors import ModelError
from simulations.datasets.interactions import Interactions
from simulations.evaluation import compare, evaluate
from simulations.splits import Kind, Split, split

USERS, ITEMS = 41, 30


@pytest.fixture
def population() -> Split:
    rng = np.random.default_rng(0)
    histories = [rng.permutation(ITEMS)[: rng.integers(3, 12)].tolist() for _ in range(USERS)]
    return split(interactions(histories, items=ITEMS), "leave-last-out")


@dataclass
class Oracle:
    """Knows the targets and gives them `sign`, everything else 0."""

    split: Split
    kind: Kind
    sign: float

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        targets = self.split.targets(self.kind)
        scores = torch.zeros(len(users), ITEMS)
        rows = np.searchsorted(targets.users, users)
        scores[np.arange(len(users)), targets.items[rows]] = self.sign
        return scores


class Same:
    """Cannot tell items apart."""

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        return torch.zeros(len(users), ITEMS)


class Diverged:
    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        return torch.full((len(users), ITEMS), torch.nan)


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_perfect_and_reversed_scorers(population: Split, kind: Kind) -> None:
    perfect = evaluate(Oracle(population, kind, 1.0), population, kind, seed=0)
    assert perfect["users"] == USERS
    assert perfect["hr@10"] == perfect["ndcg@10"] == 1
    assert perfect["hr@10_ci95"] == perfect["ndcg@10_ci95"] == [1, 1]
    assert evaluate(Oracle(population, kind, -1.0), population, kind, seed=0)["hr@10"] == 0


def test_seen_items_do_not_compete() -> None:
    # The history fills all but the target and nine other items, all of which then fit into the best ten.
    data = interactions([[*range(20), 20]], items=ITEMS)
    assert evaluate(Same(), split(data, "leave-last-out"), "test", seed=0)["hr@10"] == 1


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_blocks_do_not_change_the_result(population: Split, block: int) -> None:
    expected = evaluate(Same(), population, "test", seed=3)
    assert evaluate(Same(), population, "test", seed=3, block=block) == expected


def test_seed_decides_the_result(population: Split) -> None:
    first, again, other = (compare(Same(), population, "test", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_diverged_model_is_an_error(population: Split) -> None:
    with pytest.raises(ModelError, match="diverged"):
        evaluate(Diverged(), population, "test", seed=0)


def test_baselines_stand_beside_the_scorer(population: Split) -> None:
    report = compare(Oracle(population, "test", 1.0), population, "test", seed=0)
    figures = {"users", "hr@10", "hr@10_ci95", "ndcg@10", "ndcg@10_ci95", "coverage@10", "deciles@10"}
    assert set(report) == figures | {"protocol", "popularity", "markov"}
    assert report["protocol"] == "leave-last-out"
    assert report["hr@10"] == 1
    assert set(report["popularity"]) == set(report["markov"]) == figures
    assert report["popularity"]["hr@10"] < 1
    # Plain Python numbers, which JSON and TOML can hold.
    assert {type(value) for value in report["markov"].values()} == {int, float, list}


def test_markov_finds_a_chain_that_popularity_cannot() -> None:
    rng = np.random.default_rng(0)
    cycles = [[(start + step) % ITEMS for step in range(6)] for start in rng.integers(0, ITEMS, 300)]
    report = compare(Same(), split(interactions(cycles, items=ITEMS), "leave-last-out"), "test", seed=0)
    assert report["markov"]["ndcg@10"] == 1
    assert report["popularity"]["ndcg@10"] < 0.5
