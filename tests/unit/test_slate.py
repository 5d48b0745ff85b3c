"""Slates against enumeration: what is drawn, how probable it is, and which way its gradient points."""

from collections.abc import Callable, Sequence
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from common.errors import ModelError, SettingsError
from common.objective import top_k_multiplier
from common.slate import (
    _relaxed_top_k,
    explore,
    explored_log_probability,
    gumbel_top_k,
    inclusion,
    log_probability,
    straight_through,
    top_k,
)

PI = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)
LOGITS = PI.log() + 3
DRAWS = 40_000
quick = settings(max_examples=60, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plackett_luce(pi: Sequence[float], slate: Sequence[int]) -> float:
    """Probability of an ordered slate, the slow way."""
    probability, left = 1.0, float(sum(pi))
    for item in slate:
        probability *= pi[item] / left
        left -= pi[item]
    return probability


def copies(logits: Tensor, number: int = DRAWS) -> Tensor:
    return logits.expand(number, -1)


def assert_frequencies(slates: Tensor, probabilities: dict[tuple[int, ...], float]) -> None:
    """A chi-square test at one in 100,000 that slates come with these probabilities, and no others come."""
    drawn, numbers = slates.unique(dim=0, return_counts=True)
    counts = dict.fromkeys(probabilities, 0) | {
        tuple(slate): number for slate, number in zip(drawn.tolist(), numbers.tolist(), strict=True)
    }
    assert counts.keys() == probabilities.keys()
    assert sum(probabilities.values()) == pytest.approx(1)
    if len(counts) > 1:
        expected = [probabilities[slate] * len(slates) for slate in counts]
        assert chisquare(list(counts.values()), expected).pvalue > 1e-5


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(3, A) logits of which some are −inf, and a k that every row has room for."""
    items = draw(st.integers(1, 12))
    logit = st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)
    row = st.lists(logit, min_size=items, max_size=items).filter(lambda row: max(row) > -np.inf)
    logits = torch.tensor([draw(row) for _ in range(3)])
    return logits, draw(st.integers(1, int((logits > -torch.inf).sum(1).min())))


Chooser = Callable[[Tensor, int, torch.Generator], Tensor]
CHOOSERS: dict[str, Chooser] = {
    "top_k": lambda logits, k, _: top_k(logits, k),
    "gumbel_top_k": gumbel_top_k,
    "explore": lambda logits, k, draws: explore(logits, k, k // 2, k + 3, draws),
    "straight_through": lambda logits, k, draws: straight_through(logits, k, 0.5, draws).topk(k).indices,
}


# Which items


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
@quick
@given(catalogues(), st.integers(0, 2**32))
def test_items_are_different_and_may_be_shown(choose: Chooser, drawn: tuple[Tensor, int], seed: int) -> None:
    logits, k = drawn
    slates = choose(logits, k, generator(seed))
    assert slates.shape == (3, k)
    assert all(len(set(slate)) == k for slate in slates.tolist())
    assert (logits.gather(1, slates) > -torch.inf).all()


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
def test_whole_catalogue_is_a_permutation(choose: Chooser) -> None:
    slates = choose(copies(LOGITS, 50), 5, generator())
    assert (slates.sort(1).values == torch.arange(5)).all()


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
def test_too_few_items_are_an_error(choose: Chooser) -> None:
    logits = copies(LOGITS, 2).clone()
    logits[1, :2] = -torch.inf
    assert choose(logits, 3, generator()).shape == (2, 3)
    with pytest.raises(SettingsError, match=r"^Expected k=4 to be at most the 3 items that may be shown\.$"):
        choose(logits, 4, generator())
    with pytest.raises(SettingsError, match=r"k=6 to be at most the 5 items"):
        choose(copies(LOGITS, 2), 6, generator())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_model_is_an_error(value: float) -> None:
    logits = torch.tensor([[0.0, value, 1.0, 2.0, -torch.inf]])
    for choose in CHOOSERS.values():
        with pytest.raises(ModelError, match="diverged"):
            choose(logits, 2, generator())
    with pytest.raises(ModelError, match="diverged"):
        log_probability(logits, torch.tensor([[0, 2]]))
    with pytest.raises(ModelError, match="diverged"):
        explored_log_probability(logits, torch.tensor([[0, 2]]), 1, 3)


def test_no_rows_are_no_slates() -> None:
    for choose in CHOOSERS.values():
        assert choose(torch.empty(0, 5), 2, generator()).shape == (0, 2)


def test_top_k_is_highest_first() -> None:
    assert top_k(torch.stack([LOGITS, -LOGITS]), 3).tolist() == [[1, 3, 4], [0, 2, 4]]


# Plackett–Luce


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_gumbel_top_k_has_plackett_luce_frequencies(k: int) -> None:
    slates = gumbel_top_k(copies(LOGITS), k, generator(k))
    assert_frequencies(slates, {slate: plackett_luce(PI.tolist(), slate) for slate in permutations(range(5), k)})


def test_masked_items_take_no_share() -> None:
    logits = LOGITS.masked_fill(torch.tensor([False, True, False, False, False]), -torch.inf)
    left = [0.05, 0, 0.1, 0.25, 0.2]
    expected = {slate: plackett_luce(left, slate) for slate in permutations((0, 2, 3, 4), 2)}
    assert_frequencies(gumbel_top_k(copies(logits), 2, generator(8)), expected)
    slates = torch.tensor(list(expected))
    torch.testing.assert_close(
        log_probability(copies(logits, len(slates)), slates).exp(),
        torch.tensor(list(expected.values()), dtype=torch.float64),
    )


@quick
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=5), st.data())
def test_log_probability_equals_enumeration_and_sums_to_one(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    slates = list(permutations(range(len(values)), k))
    logits = copies(torch.tensor(values, dtype=torch.float64), len(slates))
    found = log_probability(logits, torch.tensor(slates, dtype=torch.int64).reshape(len(slates), k)).exp()
    assert float(found.sum()) == pytest.approx(1, rel=1e-12)
    expected = [plackett_luce(np.exp(values).tolist(), slate) for slate in slates]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_impossible_slates_have_no_probability() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]]).expand(4, -1)
    found = log_probability(logits, torch.tensor([[0, 2], [2, 0], [1, 1], [0, 1]]))
    assert found.tolist()[:3] == [-torch.inf] * 3
    assert found[3] == pytest.approx(float(torch.log_softmax(logits[0], 0)[0]))
    assert log_probability(logits[:2], torch.tensor([[0, 1, 2], [2, 1, 0]])).tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("banned", [0, 1, 2])
def test_gradient_of_log_probability(banned: int) -> None:
    """Against autograd through the definition; the smallest slate leaves nothing over but what may not be shown."""
    logits = torch.cat([LOGITS[: 5 - banned], LOGITS.new_full((banned,), -torch.inf)])
    for slate in ([2], [1, 2], [2, 0, 1], list(range(5 - banned))):
        own, definition = (logits.clone().requires_grad_() for _ in range(2))
        log_probability(own[None], torch.tensor([slate])).sum().backward()
        left = list(range(5 - banned))
        total = definition.new_zeros(())
        for item in slate:
            total = total + definition[item] - definition[left].logsumexp(0)
            left.remove(item)
        total.backward()
        torch.testing.assert_close(own.grad, definition.grad, rtol=1e-9, atol=1e-12)


def test_expected_score_is_zero() -> None:
    """E[∇ log P] = 0, which holds only if log P is normalised for all logits."""
    slates = torch.tensor(list(permutations(range(5), 3)))
    logits = LOGITS.clone().requires_grad_()
    log_p = log_probability(copies(logits, len(slates)), slates)
    (log_p * log_p.detach().exp()).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


# Exploration


def explored(certain: int, candidates: int, k: int) -> dict[tuple[int, ...], float]:
    """Every slate that exploration can give with PI, and its probability."""
    order = [1, 3, 4, 2, 0][:candidates]
    left = [float(PI[item]) if item in order[certain:] else 0.0 for item in range(5)]
    return {
        (*order[:certain], *drawn): plackett_luce(left, drawn) for drawn in permutations(order[certain:], k - certain)
    }


CASES = [(0, 5, 3), (1, 4, 3), (2, 5, 3), (2, 3, 3), (1, 5, 2), (3, 3, 3), (0, 2, 2)]


@pytest.mark.parametrize(("certain", "candidates", "k"), CASES)
def test_exploration_has_the_enumerated_frequencies(certain: int, candidates: int, k: int) -> None:
    slates = explore(copies(LOGITS), k, certain, candidates, generator(candidates))
    assert_frequencies(slates, explored(certain, candidates, k))


@pytest.mark.parametrize(("certain", "candidates", "k"), CASES)
def test_explored_log_probability_of_all_slates(certain: int, candidates: int, k: int) -> None:
    expected = explored(certain, candidates, k)
    slates = list(permutations(range(5), k))
    found = explored_log_probability(copies(LOGITS, len(slates)), torch.tensor(slates), certain, candidates)
    np.testing.assert_allclose(found.exp().numpy(), [expected.get(slate, 0.0) for slate in slates], rtol=1e-12)


def test_explored_log_probability_has_the_gradient_of_its_drawn_part() -> None:
    """Highest first the items are 1, 3, 4, 2, 0: with K′ = 1 and M = 4 this slate draws 4, then 2, out of 3, 4, 2."""
    logits, drawn = (LOGITS.clone().requires_grad_() for _ in range(2))
    explored_log_probability(logits[None], torch.tensor([[1, 4, 2]]), 1, 4).sum().backward()
    log_probability(drawn[[3, 4, 2]][None], torch.tensor([[1, 2]])).sum().backward()
    torch.testing.assert_close(logits.grad, drawn.grad)


@quick
@given(catalogues(), st.integers(0, 2**32), st.data())
def test_certain_items_are_always_there_and_in_place(drawn: tuple[Tensor, int], seed: int, data: st.DataObject) -> None:
    logits, k = drawn
    certain, candidates = data.draw(st.integers(0, k)), data.draw(st.integers(k, 15))
    slates = explore(logits, k, certain, candidates, generator(seed))
    highest = logits.sort(1, descending=True).values
    assert torch.equal(logits.gather(1, slates)[:, :certain], highest[:, :certain])
    lowest = highest[:, min(candidates, logits.shape[1]) - 1 :][:, :1]
    assert (logits.gather(1, slates) >= lowest).all()
    assert (explored_log_probability(logits, slates, certain, candidates) <= 0).all()
    assert (explored_log_probability(logits, slates, certain, candidates) > -torch.inf).all()


def test_exploration_spans_from_top_k_to_gumbel_top_k() -> None:
    logits = torch.randn(30, 9, generator=generator(4))
    for candidates in (4, 7, 9, 100):
        assert torch.equal(explore(logits, 4, 4, candidates, generator()), top_k(logits, 4))
    slates = gumbel_top_k(logits, 4, generator())
    torch.testing.assert_close(explored_log_probability(logits, slates, 0, 9), log_probability(logits, slates))


@pytest.mark.parametrize(("certain", "candidates"), [(-1, 5), (4, 5), (1, 2)])
def test_exploration_that_contradicts_itself_is_an_error(certain: int, candidates: int) -> None:
    with pytest.raises(SettingsError, match=rf"Expected 0 <= certain={certain} <= k=3 <= candidates={candidates}\."):
        explore(LOGITS[None], 3, certain, candidates, generator())


# Independent draws


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_inclusion_equals_enumeration_of_all_tuples(k: int) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    for drawn in product(range(5), repeat=k):
        expected[list(set(drawn))] += PI[list(drawn)].prod()
    torch.testing.assert_close(inclusion(PI.log(), k), expected)
    torch.testing.assert_close(inclusion(PI.log().float(), k), expected.float())


def test_inclusion_of_the_rare_and_the_certain() -> None:
    found = inclusion(torch.tensor([-60.0, -20.0, 0.0, 1e-7]), 16)
    torch.testing.assert_close(found[:2] / 16, torch.tensor([-60.0, -20.0]).exp(), rtol=1e-5, atol=0)
    assert found[2:].tolist() == [1, 1]
    assert inclusion(torch.tensor([0.0, -torch.inf]), 1).tolist() == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 16])
def test_slope_of_inclusion_is_the_multiplier(k: int) -> None:
    log_pi = torch.tensor([-30.0, -3.0, -0.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(inclusion(log_pi, k).sum(), log_pi)
    torch.testing.assert_close(slope, top_k_multiplier(log_pi, k) * log_pi.detach().exp())
    certain = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(inclusion(certain, k).sum(), certain)[0].isfinite().all()


# Straight-through


@quick
@given(catalogues(), st.integers(0, 2**32), st.sampled_from([0.01, 0.3, 0.9, 1.0, 3.0]))
def test_forward_is_the_drawn_slate_and_backward_is_finite(
    drawn: tuple[Tensor, int], seed: int, temperature: float
) -> None:
    logits, k = drawn[0].requires_grad_(), drawn[1]
    slate = straight_through(logits, k, temperature, generator(seed))
    expected = torch.zeros_like(slate).scatter(1, gumbel_top_k(logits, k, generator(seed)), 1)
    assert torch.equal(slate, expected)
    (slate * torch.arange(slate.shape[1])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[logits == -torch.inf].any()


def slate_value(logits: Tensor, rewards: Tensor, k: int) -> Tensor:
    """The expected sum of the rewards of a slate, by enumeration."""
    slates = torch.tensor(list(permutations(range(len(logits)), k)))
    return (log_probability(copies(logits, len(slates)), slates).exp() * rewards[slates].sum(1)).sum()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.3, 0.7])
def test_expected_gradient_points_where_the_exact_one_does(k: int, temperature: float) -> None:
    rewards = torch.tensor([4.0, 1.0, 2.5, 0.0, 3.0], dtype=torch.float64)
    exact, mine = (LOGITS.clone().requires_grad_() for _ in range(2))
    slate_value(exact, rewards, k).backward()
    rows = copies(mine)
    each = straight_through(rows, k, temperature, generator(k)) @ rewards
    (per_draw,) = torch.autograd.grad(each.sum(), rows)
    mean, error = per_draw.mean(0), per_draw.std(0) / DRAWS**0.5
    assert torch.cosine_similarity(mean, exact.grad, dim=0) > 0.985
    clear = mean.abs() > 4 * error
    assert clear.sum() >= 4
    assert torch.equal(mean.sign()[clear], exact.grad.sign()[clear])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_relaxed_slate_hardens_as_the_temperature_falls(k: int) -> None:
    keys = copies(LOGITS, 500) + torch.randn(500, 5, dtype=torch.float64, generator=generator(5))
    hard = torch.zeros_like(keys).scatter(1, top_k(keys, k), 1)
    distances = []
    for temperature in (1.0, 0.3, 0.1, 0.01, 1e-4):
        relaxed = _relaxed_top_k(keys, k, temperature)
        torch.testing.assert_close(relaxed.sum(1), torch.full((500,), float(k), dtype=torch.float64))
        assert (relaxed >= 0).all()
        distances.append(float((relaxed - hard).abs().sum(1).mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.3
    assert distances[-1] < 0.01


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(SettingsError, match=r"Expected temperature=.* > 0\."):
        straight_through(LOGITS[None], 2, temperature, generator())


# Numbers


def test_float32_draws_what_float64_draws() -> None:
    logits = 3 * torch.randn(200, 30, generator=generator(6))
    for choose in CHOOSERS.values():
        assert torch.equal(choose(logits, 5, generator(7)), choose(logits.double(), 5, generator(7)))
    slates = gumbel_top_k(logits, 5, generator())
    found = log_probability(logits, slates)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), log_probability(logits.double(), slates), rtol=1e-6, atol=0)
    assert straight_through(logits, 5, 0.5, generator()).dtype == torch.float32


def test_large_logits_draw_and_count_exactly() -> None:
    """Two items at 1e4 and two at −1e4, in float32: as if each pair were a catalogue of its own."""
    logits = torch.tensor([1e4, -1e4, 1e4 - 1, -1e4 + 1])
    odds = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    expected = {
        (*high, *low): (odds if high[0] == 0 else 1 - odds) * (odds if low[0] == 3 else 1 - odds)
        for high in ((0, 2), (2, 0))
        for low in ((1, 3), (3, 1))
    }
    assert_frequencies(gumbel_top_k(copies(logits), 4, generator(9)), expected)
    found = log_probability(copies(logits, 4), torch.tensor(list(expected)))
    np.testing.assert_allclose(found.exp().numpy(), list(expected.values()), rtol=1e-6)
    improbable = log_probability(logits[None], torch.tensor([[1, 0]]))
    torch.testing.assert_close(improbable, torch.tensor([-2e4 - np.log1p(np.exp(-1)) * 2], dtype=torch.float32))


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
@pytest.mark.parametrize("block", [1, 7, 16])
def test_blocks_of_rows_draw_the_same_slates(choose: Chooser, block: int) -> None:
    logits, draws = torch.randn(50, 20, generator=generator(3)), generator(1)
    blocks = [choose(logits[start : start + block], 4, draws) for start in range(0, 50, block)]
    assert torch.equal(torch.cat(blocks), choose(logits, 4, generator(1)))
