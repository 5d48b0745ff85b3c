"""Ranks, lists and metrics against hand-computed values, torchmetrics and the properties ties must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG

from common.errors import ModelError
from common.ranking import summarise, target_ranks, top_items

NOTHING = torch.empty((2, 0), dtype=torch.int64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(*seen: tuple[int, int]) -> Tensor:
    return torch.tensor(seen, dtype=torch.int64).T


def test_rank_counts_better_unseen_items() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    seen = pairs((0, 0), (0, 1), (0, 1), (1, 4))
    assert target_ranks(scores, torch.tensor([3, 3]), seen, generator()).tolist() == [1, 3]


def test_target_competes_even_if_seen() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    assert target_ranks(scores, torch.tensor([1]), pairs((0, 0), (0, 1)), generator()).tolist() == [0]


def test_scores_are_left_alone() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    target_ranks(scores, torch.tensor([1]), pairs((0, 0)), generator())
    top_items(scores, pairs((0, 0)), 2, generator())
    assert scores.tolist() == [[5.0, 4.0, 3.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.tensor([[1.0, bad, 0.0]])
    with pytest.raises(ModelError, match="finite"):
        target_ranks(scores, torch.tensor([0]), NOTHING, generator())
    with pytest.raises(ModelError, match="finite"):
        top_items(scores, NOTHING, 1, generator())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data())
def test_ties_are_settled_uniformly(values: list[int], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(values) - 1))
    copies = 4000
    scores = torch.tensor(values, dtype=torch.float32).expand(copies, -1)
    ranks = target_ranks(scores, torch.full((copies,), target), NOTHING, generator())

    better = sum(value > values[target] for value in values)
    ties = sum(value == values[target] for value in values) - 1
    counts = np.bincount(ranks.numpy(), minlength=len(values))
    assert counts[better : better + ties + 1].sum() == copies
    share = 1 / (ties + 1)
    assert np.allclose(counts[better : better + ties + 1] / copies, share, atol=6 * math.sqrt(share / copies))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(8)))
def test_permuting_the_items_changes_no_rank(seed: int, permutation: list[int]) -> None:
    scores = torch.randint(0, 4, (20, 8), generator=generator(seed)).float()
    targets = torch.randint(0, 8, (20,), generator=generator(seed + 1))
    seen = torch.stack([torch.arange(20), torch.randint(0, 8, (20,), generator=generator(seed + 2))])
    new = torch.tensor(permutation)
    permuted = torch.empty_like(scores)
    permuted[:, new] = scores
    expected = target_ranks(scores, targets, seen, generator())
    actual = target_ranks(permuted, new[targets], torch.stack([seen[0], new[seen[1]]]), generator())
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("block", [1, 7, 16, 50])
def test_blocks_of_rows_draw_the_same_ties(block: int) -> None:
    scores, targets = torch.zeros(50, 9), torch.arange(50) % 9
    draws = generator()
    ranks = [
        target_ranks(scores[start : start + block], targets[start : start + block], NOTHING, draws)
        for start in range(0, 50, block)
    ]
    assert torch.cat(ranks).tolist() == target_ranks(scores, targets, NOTHING, generator()).tolist()


def test_list_is_best_first_without_seen_items() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert top_items(scores, pairs((0, 3), (1, 1)), 2, generator()).tolist() == [[2, 1], [0, 2]]


def test_list_is_filled_up_where_too_little_is_unseen() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert top_items(scores, pairs((0, 0), (0, 2)), 2, generator()).tolist() == [[1, -1]]
    assert top_items(scores, NOTHING, 10, generator()).tolist() == [[2, 1, 0]]


def test_ties_in_lists_are_random_but_the_same_for_all_users() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]]).expand(3, -1)
    lists = [top_items(scores, NOTHING, 1, generator(seed)).flatten().tolist() for seed in range(400)]
    assert all(len(set(row)) == 1 for row in lists)
    counts = np.bincount([row[0] for row in lists], minlength=5)
    assert counts[0] == 0
    assert (abs(counts[1:] - 100) < 45).all()


def test_metrics_by_hand() -> None:
    ranks, lists = torch.tensor([0, 1, 2, 7]), torch.tensor([[0, 1], [0, 2], [0, -1], [3, 0]])
    report = summarise(ranks, lists, 8, (1, 2), np.random.default_rng(0))
    assert report["users"] == 4
    assert report["hr@1"] == 1 / 4
    assert report["hr@2"] == 2 / 4
    assert report["ndcg@1"] == pytest.approx(1 / 4)
    assert report["ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert report["coverage@1"] == 2 / 8
    assert report["coverage@2"] == 4 / 8


@pytest.mark.parametrize("k", [1, 3, 10])
def test_metrics_agree_with_torchmetrics(k: int) -> None:
    users, items = 30, 12
    scores = torch.randn(users, items, generator=generator(1))
    targets = torch.randint(0, items, (users,), generator=generator(2))
    ranks = target_ranks(scores, targets, NOTHING, generator())
    report = summarise(ranks, top_items(scores, NOTHING, k, generator()), items, (k,), np.random.default_rng(0))

    relevant = torch.nn.functional.one_hot(targets, items).bool()
    rows = torch.arange(users)[:, None].expand(-1, items)
    for name, metric in (("hr", RetrievalHitRate(top_k=k)), ("ndcg", RetrievalNormalizedDCG(top_k=k))):
        expected = metric(scores.flatten(), relevant.flatten(), indexes=rows.flatten())
        assert report[f"{name}@{k}"] == pytest.approx(float(expected), abs=1e-6)


def test_intervals_match_resampling_users() -> None:
    ranks = torch.randint(0, 40, (300,), generator=generator(3))
    report = summarise(ranks, ranks[:, None], 40, (10,), np.random.default_rng(0))
    draws = np.random.default_rng(1).integers(0, 300, (2000, 300))
    sampled = ranks.numpy()[draws]
    for name, value in (("hr", sampled < 10), ("ndcg", (sampled < 10) / np.log2(sampled + 2))):
        expected = np.quantile(value.mean(axis=1), [0.025, 0.975])
        assert report[f"{name}@10_ci95"] == pytest.approx(expected, abs=0.01)
        assert report[f"{name}@10_ci95"][0] < report[f"{name}@10"] < report[f"{name}@10_ci95"][1]


def test_same_seed_gives_the_same_intervals() -> None:
    ranks = torch.arange(50)
    reports = [summarise(ranks, ranks[:, None], 50, (10,), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]
