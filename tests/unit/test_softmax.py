"""The full softmax is torch's; the sampled one estimates its normaliser without bias, and its logarithm with one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from common.candidates import InBatch, Negatives, draw_negatives, log_uniform, take_turns
from common.softmax import CandidateLikelihood, likelihood
from common.tape import Tape

ITEMS, USERS, STEPS, WIDTH = 40, 3, 5, 4
CHANCE = 1e-3
quick = settings(max_examples=40, deadline=None)


def tensors(seed: int = 0, deviation: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Item embeddings, queries and logged items, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ITEMS, WIDTH, generator=generator, dtype=torch.float64) * deviation
    queries = torch.randn(USERS, STEPS, WIDTH, generator=generator, dtype=torch.float64)
    return weight, queries, torch.randint(0, ITEMS, (USERS, STEPS), generator=generator)


def log_pi(weight: Tensor, queries: Tensor, items: Tensor, negatives: Negatives | None) -> Tensor:
    return evaluate(weight, queries, items, negatives).log_probability


def evaluate(weight: Tensor, queries: Tensor, items: Tensor, candidates: Negatives | None) -> CandidateLikelihood:
    """By autograd's way; and the one with a slope of its own must say the same."""
    every = torch.ones_like(items, dtype=torch.bool)
    sloped = likelihood(weight.detach(), "policy.embedding", queries.detach(), items, every, candidates, Tape())
    plain = likelihood(weight, "policy.embedding", queries, items, every, candidates, None)
    assert isinstance(plain, CandidateLikelihood)
    near = 1e-12 if queries.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(sloped.log_probability, plain.log_probability.detach(), rtol=near, atol=near)
    return plain


def counts_of(negatives: Negatives, items: int, draws: int) -> np.ndarray:
    """How often each item was drawn, read back from the weights."""
    counts = np.zeros(items)
    drawn = negatives.ids.numpy()
    counts[drawn] = np.exp(negatives.log_weights.double().numpy()) * draws * log_uniform(items)[drawn]
    return counts


def normalisers(weight: Tensor, queries: Tensor, items: Tensor, draws: int, repeats: int) -> Tensor:
    """(repeats, B, T) estimates Ẑ/Z of the normaliser."""
    rng, truth = np.random.default_rng(draws), log_pi(weight, queries, items, None)
    rounds = (draw_negatives(log_uniform(ITEMS), draws, rng) for _ in range(repeats))
    return torch.stack([(truth - log_pi(weight, queries, items, negatives)).exp() for negatives in rounds])


@quick
@given(st.integers(0, 2**32), st.floats(0.1, 10))
def test_full_softmax_is_torchs(seed: int, deviation: float) -> None:
    weight, queries, items = tensors(seed, deviation)
    expected = torch.log_softmax(queries @ weight.T, -1).gather(-1, items.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_pi(weight, queries, items, None), expected, rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite() -> None:
    weight, queries, items = tensors(deviation=300)
    for negatives in (None, draw_negatives(log_uniform(ITEMS), 10, np.random.default_rng(0))):
        assert log_pi(weight.float(), queries.float(), items, negatives).isfinite().all()


@pytest.mark.parametrize("items", [1, 2, 10, 5000])
def test_log_uniform_is_a_falling_distribution(items: int) -> None:
    probability = log_uniform(items)
    k = np.arange(items)
    assert probability == pytest.approx((np.log(k + 2) - np.log(k + 1)) / np.log(items + 1), rel=1e-9)
    assert probability.sum() == pytest.approx(1)
    assert (np.diff(probability) < 0).all()


@quick
@given(st.integers(1, 60), st.integers(1, 100), st.integers(0, 2**32))
def test_negatives_are_unique_ascending_and_consistent(items: int, draws: int, seed: int) -> None:
    negatives = draw_negatives(log_uniform(items), draws, np.random.default_rng(seed))
    ids = negatives.ids.tolist()
    assert ids == sorted(set(ids))
    assert set(ids) <= set(range(items))
    assert (negatives.ids.dtype, negatives.log_weights.dtype) == (torch.int64, torch.float32)
    assert negatives.column.tolist() == [ids.index(item) if item in ids else -1 for item in range(items)]
    counts = counts_of(negatives, items, draws)
    assert counts == pytest.approx(np.round(counts), abs=1e-3)
    assert counts[ids].min() >= 1 - 1e-3
    assert counts.sum() == pytest.approx(draws, rel=1e-5)


def test_negatives_are_drawn_log_uniformly() -> None:
    draws = 100_000
    counts = np.round(counts_of(draw_negatives(log_uniform(ITEMS), draws, np.random.default_rng(5)), ITEMS, draws))
    assert chisquare(counts, draws * log_uniform(ITEMS)).pvalue > CHANCE


@pytest.mark.parametrize("draws", [1, 16, 64])
def test_expected_normaliser_is_the_full_one(draws: int) -> None:
    estimates = normalisers(*tensors(), draws, repeats=3000)
    error = (estimates.mean(0) - 1) / (estimates.std(0) / len(estimates) ** 0.5)
    assert error.abs().max() < 4.5


def test_bias_of_the_log_probability_falls_as_one_over_the_draws() -> None:
    bias = {}
    for draws in (16, 64, 256):
        ratio = normalisers(*tensors(), draws, repeats=2000)
        # −log(Ẑ/Z) is the error of log π; Ẑ/Z − 1 has mean 0 and takes most of its noise away.
        bias[draws] = float((ratio - 1 - ratio.log()).mean())
    assert bias[256] > 0
    assert bias[64] / bias[256] == pytest.approx(4, rel=0.2)
    assert bias[16] / bias[64] == pytest.approx(4, rel=0.4)


def test_more_draws_approach_the_full_softmax() -> None:
    weight, queries, items = tensors()
    many = draw_negatives(log_uniform(ITEMS), 2_000_000, np.random.default_rng(0))
    error = log_pi(weight, queries, items, many) - log_pi(weight, queries, items, None)
    assert error.abs().max() < 0.01


@quick
@given(st.integers(0, 2**32), st.integers(1, 64), st.floats(-50, 50))
def test_an_accidental_hit_never_counts(seed: int, draws: int, shift: float) -> None:
    weight, queries, items = tensors(seed)
    negatives = draw_negatives(log_uniform(ITEMS), draws, np.random.default_rng(seed))
    for user, step in np.ndindex(USERS, STEPS):
        own = items[user : user + 1, step : step + 1]
        query = queries[user : user + 1, step : step + 1]
        kept = negatives.ids != own.flatten()
        logits = query[0, 0] @ weight[negatives.ids[kept]].T + negatives.log_weights[kept]
        expected = -torch.nn.functional.softplus(logits.logsumexp(-1) - query[0, 0] @ weight[own[0, 0]])
        torch.testing.assert_close(log_pi(weight, query, own, negatives)[0, 0], expected, rtol=1e-9, atol=1e-9)
        drawn = negatives.log_weights.clone()
        drawn[~kept] += shift
        shifted = replace(negatives, log_weights=drawn)
        assert log_pi(weight, query, own, shifted) == log_pi(weight, query, own, negatives)


def test_own_item_as_the_only_negative_is_certain_and_without_gradient() -> None:
    weight, queries, _ = tensors()
    column = torch.full((ITEMS,), -1)
    column[7] = 0
    negatives = Negatives(torch.tensor([7]), torch.zeros(1, dtype=torch.float64), column, torch.zeros(ITEMS))
    weight.requires_grad_()
    result = log_pi(weight, queries, torch.full((USERS, STEPS), 7), negatives)
    result.sum().backward()
    assert not result.any()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_slope_is_autograds_gradient(sampled: bool) -> None:
    weight, queries, items = tensors()
    negatives = draw_negatives(log_uniform(ITEMS), 16, np.random.default_rng(0)) if sampled else None
    tape, bend = Tape(), torch.linspace(-1, 2, items.numel(), dtype=torch.float64).view_as(items)
    every, leaf = torch.ones_like(items, dtype=torch.bool), queries.clone().requires_grad_()
    sloped = likelihood(weight, "policy.embedding", leaf, items, every, negatives, tape).log_probability
    plain = log_pi(weight, leaf, items, negatives)
    (found,) = torch.autograd.grad((sloped * bend).sum(), leaf)
    (expected,) = torch.autograd.grad((plain * bend).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert [use.weight for use in tape.uses] == ["policy.embedding"]
    assert not weight.requires_grad


# Popularity, noise contrast, in-batch


def popularity(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(ITEMS, 0.7))


def test_any_distribution_of_the_draws_gives_an_unbiased_normaliser() -> None:
    weight, queries, items = tensors()
    rng, truth, q = np.random.default_rng(0), log_pi(weight, queries, items, None), popularity() + 0.01
    rounds = (draw_negatives(q / q.sum(), 30, rng) for _ in range(1000))
    found = torch.stack([(truth - log_pi(weight, queries, items, drawn)).exp() for drawn in rounds])
    error = (found.mean(0) - 1) / (found.std(0) / len(found) ** 0.5)
    assert error.abs().max() < 4.5


def test_draws_follow_their_distribution() -> None:
    q, draws = popularity(), 200_000
    drawn = draw_negatives(q, draws, np.random.default_rng(1))
    counts = np.zeros(ITEMS)
    counts[drawn.ids] = np.exp(drawn.log_weights.double().numpy() + drawn.log_expected.double().numpy()[drawn.ids])
    frequent = q * draws > 10
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(q[frequent], q[~frequent].sum()) * draws
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > CHANCE


def test_noise_contrast_is_the_likelihood_of_telling_logged_from_drawn_items() -> None:
    weight, queries, items = tensors()
    drawn = draw_negatives(popularity(), 12, np.random.default_rng(2), contrast=True)
    expected = drawn.log_expected.double()
    counts = (drawn.log_weights.double() + expected[drawn.ids]).exp().round()
    for b, t in np.ndindex(USERS, STEPS):
        logits = weight @ queries[b, t]
        genuine = torch.sigmoid(logits - expected)
        by_hand = genuine[items[b, t]].log() + (counts * (1 - genuine[drawn.ids]).log()).sum()
        assert evaluate(weight, queries, items, drawn).fit[b, t].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_noise_contrast_rests_at_normalised_frequencies() -> None:
    """With all probabilities known, the expected fit has its maximum at f = log p, normaliser included."""
    p = torch.from_numpy(popularity(4))
    logits = torch.zeros(ITEMS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe")
    drawn = draw_negatives(log_uniform(ITEMS), 20_000, np.random.default_rng(0), contrast=True)
    assert len(drawn.ids) == ITEMS
    everything, one = torch.arange(ITEMS).unsqueeze(1), torch.ones(ITEMS, 1, 1, dtype=torch.float64)
    exact = replace(
        drawn, log_weights=torch.zeros(ITEMS, dtype=torch.float64), log_expected=drawn.log_expected.double()
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(p * evaluate(logits.unsqueeze(1), one, everything, exact).fit.squeeze(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().exp(), p, rtol=1e-3, atol=1e-6)


def test_a_devices_own_items_normalise_by_their_frequency() -> None:
    weight, queries, items = tensors()
    log_q, mask = torch.from_numpy(np.log(popularity())), torch.arange(STEPS) < torch.tensor([[5], [3], [1]])
    found = likelihood(weight, "", queries, items, mask, InBatch(log_q), None).log_probability
    for b, t in np.argwhere(mask.numpy()):
        own = items[b, t]
        others = [item for item in items[b][mask[b]] if item != own]
        logits = queries[b, t] @ weight.T
        masses = [(logits[item] - log_q[item]).exp() / (mask[b].sum() - 1) for item in others]
        assert found[b, t].item() == pytest.approx((logits[own] - (logits[own].exp() + sum(masses)).log()).item())


# Expected values


@pytest.mark.parametrize("slate_size", [1, 2, 5])
def test_expected_value_by_the_full_softmax_and_its_gradient(slate_size: int) -> None:
    weight, queries, items = tensors()
    values = torch.rand(USERS, STEPS, ITEMS, dtype=torch.float64)
    leaf = queries.clone().requires_grad_()
    found = evaluate(weight, leaf, items, None).expected_value(slate_size, values[..., 0], values)
    again = queries.clone().requires_grad_()
    pi = torch.softmax(again @ weight.T, -1)
    expected = ((1 - (1 - pi) ** slate_size) * values).sum(-1)
    torch.testing.assert_close(found, expected)
    for result, at in ((found, leaf), (expected, again)):
        result.sum().backward()
        assert at.grad is not None
    torch.testing.assert_close(leaf.grad, again.grad)


def test_expected_value_by_samples_tends_to_the_full_one() -> None:
    weight, queries, items = tensors()
    values = torch.rand(USERS, STEPS, ITEMS, dtype=torch.float64)
    own = values.gather(-1, items.unsqueeze(-1)).squeeze(-1)
    truth = evaluate(weight, queries, items, None).expected_value(3, own, values)
    rng, q = np.random.default_rng(0), log_uniform(ITEMS)
    errors = []
    for draws in (100, 10_000):
        rounds = [draw_negatives(q, draws, rng) for _ in range(20)]
        found = [evaluate(weight, queries, items, n).expected_value(3, own, values[..., n.ids]) for n in rounds]
        errors.append((torch.stack(found) - truth).abs().mean())
    assert errors[1] < errors[0] / 5


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 9), st.integers(1, 5))
def test_every_item_has_its_turn_before_any_has_another(items: int, draws: int, seed: int, first: int) -> None:
    seen = np.zeros(items, int)
    for round_ in range(1, 1 + items):  # items · draws places: every item `draws` times
        negatives = take_turns(items, draws, round_, seed)
        counts = np.rint(np.exp(negatives.log_weights.numpy().astype(float)) * draws / items).astype(int)
        assert counts.sum() == draws and counts.min() > 0
        seen[negatives.ids.numpy()] += counts
        assert seen.max() - seen.min() <= 1
    assert (seen == draws).all()


def test_turns_of_all_items_add_up_to_the_partition_function() -> None:
    """Over one pass the mean of Σ exp(logit)/(mQ) is Z itself, not only in expectation."""
    items, draws = 60, 12
    logits = np.random.default_rng(0).normal(size=items)
    sums = []
    for round_ in range(1, 1 + items // draws):
        negatives = take_turns(items, draws, round_, seed=4)
        sums.append(np.exp(logits[negatives.ids.numpy()] + negatives.log_weights.numpy()).sum())
    assert np.std(sums) > 0
    assert np.mean(sums) == pytest.approx(np.exp(logits).sum(), rel=1e-6)
