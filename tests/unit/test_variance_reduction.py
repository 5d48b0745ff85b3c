"""What each variance reduction does to the expected gradient, by enumeration over a few actions; and that the batched
engine computes it as plain autograd does."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from client.local_update import compute_update
from common.errors import SettingsError
from common.item_slice import cut, slice_of
from common.model import HEADS, Parameters, initialise, policy_weight, unflatten
from common.model import shapes as shapes_of
from common.objective import (
    WEIGHT_EDGES,
    Evidence,
    coefficients,
    histogram,
    mean_over,
    propose_cap,
    weights_of,
)
from common.offer import Offer
from common.privacy.encoding import Encoding
from common.settings import Settings, parse_flat
from common.trajectory import HIGHEST_REWARD, Trajectories, pad

ACTIONS = 4
REWARDS = torch.tensor([3.0, -0.5, 5.0, 1.0], dtype=torch.float64)
quick = hypothesis_settings(max_examples=60, deadline=None)


def settings_of(estimator: str, **more: object) -> Settings:
    chosen = {"estimator": estimator, "softmax": "full", "self_normalised": False, "weight_cap": math.inf}
    widths = {"model.input_width": 2, "model.state_width": 3, "model.user_width": 2}
    more = {key.replace("__", "."): value for key, value in more.items()}
    return parse_flat({f"objective.{key}": value for key, value in chosen.items()} | widths | more)


def bandit(settings: Settings, seed: int = 0) -> tuple[Parameters, Tensor]:
    """Heads that all prefer some actions, and the one user embedding that all devices have."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: value.double() for name, value in initialise(settings, ACTIONS, generator).items()}
    for head in settings.heads:
        shape = parameters[HEADS[head]].shape
        parameters[HEADS[head]] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return parameters, torch.tensor([[0.7, -1.1]], dtype=torch.float64)


def logits(parameters: Parameters, user: Tensor, head: str) -> Tensor:
    """(A,) logits of a head before the first step, where the state is the user's alone."""
    state = torch.cat([user @ parameters["user.projection"].T, torch.ones_like(user[:, :1])], -1)
    return (state @ parameters[head].T)[0]


def expected_gradient(settings: Settings, parameters: Parameters, user: Tensor, logged: Tensor) -> Parameters:
    """The mean gradient over one-step devices that log each action with its probability in `logged`."""
    ones, actions = torch.ones(ACTIONS, dtype=torch.int64), torch.arange(ACTIONS)
    steps = Trajectories(actions[:, None], REWARDS[:, None], REWARDS[:, None], ones, ones * 0)
    update = compute_update(settings, parameters, steps, user.expand(ACTIONS, -1), None, warm=True)
    return unflatten(update.gradients.weighted_sum(logged), shapes_of(settings, ACTIONS))


def policy_gradient(parameters: Parameters, user: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    own = parameters["policy.embedding"].clone().requires_grad_()
    log_pi = torch.log_softmax(logits(parameters | {"policy.embedding": own}, user, "policy.embedding"), -1)
    (gradient,) = torch.autograd.grad(objective(log_pi), own)
    return gradient


def beta_of(parameters: Parameters, user: Tensor) -> Tensor:
    return torch.softmax(logits(parameters, user, "behaviour.embedding"), -1)


VALUES = REWARDS.clamp(min=0)


@pytest.mark.parametrize(("estimator", "slate"), [("off-policy", 1), ("top-k", 3)])
@pytest.mark.parametrize("critic", ["baseline", "doubly-robust"])
def test_a_critic_leaves_the_expected_gradient_as_it_is(estimator: str, slate: int, critic: str) -> None:
    """Whatever the critic says: the critic here is random."""
    settings = settings_of(estimator, objective__critic=critic, objective__slate_size=slate)
    parameters, user = bandit(settings)
    beta = beta_of(parameters, user)
    found = expected_gradient(settings, parameters, user, beta)["policy.embedding"]
    if critic == "baseline" and estimator == "top-k":
        # A baseline moves the top-K gradient by that of b Σ_a α_K(a), which is 0 only for K = 1.
        q = HIGHEST_REWARD * torch.sigmoid(logits(parameters, user, "critic.embedding"))
        b = (torch.softmax(logits(parameters, user, "policy.embedding"), -1) * q).sum()
        values = VALUES - b
    else:
        values = VALUES
    expected = policy_gradient(parameters, user, lambda log_pi: ((1 - (1 - log_pi.exp()) ** slate) * values).sum())
    torch.testing.assert_close(-found, expected, rtol=1e-6, atol=1e-9)


def test_a_true_critic_takes_all_variance_of_the_actions_away() -> None:
    settings = settings_of("top-k", objective__critic="doubly-robust", objective__slate_size=2)
    parameters, user = bandit(settings)
    parameters["critic.embedding"] = torch.zeros(ACTIONS, 4, dtype=torch.float64)
    parameters["critic.embedding"][:, -1] = torch.logit(VALUES / HIGHEST_REWARD, eps=1e-15)
    each = [expected_gradient(settings, parameters, user, row)["policy.embedding"] for row in torch.eye(4).double()]
    for one in each[1:]:
        torch.testing.assert_close(one, each[0], rtol=1e-6, atol=1e-9)


def test_entropy_bonus_is_the_gradient_of_the_entropy() -> None:
    settings = settings_of("off-policy", objective__entropy_bonus=0.7)
    parameters, user = bandit(settings)
    found = expected_gradient(settings, parameters, user, beta_of(parameters, user))["policy.embedding"]
    expected = policy_gradient(
        parameters, user, lambda log_pi: (log_pi.exp() * VALUES).sum() - 0.7 * (log_pi.exp() * log_pi).sum()
    )
    torch.testing.assert_close(-found, expected, rtol=1e-6, atol=1e-9)


def test_trust_region_to_behaviour_is_the_gradient_of_the_divergence() -> None:
    settings = settings_of("off-policy", objective__trust_region="behaviour", objective__trust_penalty=1.3)
    parameters, user = bandit(settings)
    beta = beta_of(parameters, user)
    found = expected_gradient(settings, parameters, user, beta)["policy.embedding"]
    expected = policy_gradient(
        parameters, user, lambda log_pi: (log_pi.exp() * VALUES).sum() - 1.3 * (beta * (beta.log() - log_pi)).sum()
    )
    torch.testing.assert_close(-found, expected, rtol=1e-6, atol=1e-9)


def evidence_of(
    log_pi: Tensor, log_beta: Tensor | None, log_start: Tensor | None, rewards: Tensor = REWARDS
) -> Evidence:
    """One device that logged every action once."""
    rows = [None if value is None else value.unsqueeze(0) for value in (log_beta, log_start)]
    every = torch.ones(1, len(rewards), dtype=torch.bool)
    return Evidence(rewards[None], rewards[None], every, log_pi.detach()[None], rows[0], rows[1], None, len(rewards))


def random_policies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.randn(3, ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second, third = torch.log_softmax(drawn, -1)
    return first, second, third


@quick
@given(st.integers(0, 2**32))
def test_trust_region_to_the_start_is_the_gradient_of_the_divergence(seed: int) -> None:
    """Away from the start, as in a later local step: E_β[c ∇log π] by enumeration."""
    more = {"objective__trust_region": "start", "objective__trust_penalty": 2.0, "training__local_steps": 2}
    logits_of_pi, log_beta, log_start = random_policies(seed)
    leaf = logits_of_pi.clone().requires_grad_()
    log_pi = torch.log_softmax(leaf, -1)
    c = coefficients(settings_of("off-policy", **more).objective, evidence_of(log_pi, log_beta, log_start), True)[0]
    (found,) = torch.autograd.grad((log_beta.exp() * c * log_pi).sum(), leaf, retain_graph=True)
    divergence = (log_start.exp() * (log_start - log_pi)).sum()
    (expected,) = torch.autograd.grad((log_pi.exp() * VALUES).sum() - 2 * divergence, leaf)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@quick
@given(st.integers(0, 2**32), st.floats(0.05, 0.5))
def test_clip_ratio_gives_the_gradient_of_ppos_objective(seed: int, clip: float) -> None:
    objective = settings_of("reinforce", objective__clip_ratio=clip, training__local_steps=2).objective
    objective = objective.model_copy(update={"reuse": "importance"})
    logits_of_pi, _, log_start = random_policies(seed)
    leaf = (log_start + 0.3 * logits_of_pi).clone().requires_grad_()
    log_pi = torch.log_softmax(leaf, -1)
    c = coefficients(objective, evidence_of(log_pi, None, log_start), True)[0]
    (found,) = torch.autograd.grad((log_start.exp() * c * log_pi).sum(), leaf, retain_graph=True)
    ratio = (log_pi - log_start).exp()
    surrogate = torch.minimum(ratio * VALUES, ratio.clamp(1 - clip, 1 + clip) * VALUES)
    (expected,) = torch.autograd.grad((log_start.exp() * surrogate).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_reused_logs_are_weighted_by_how_far_the_policy_has_moved() -> None:
    objective = settings_of("reinforce", objective__reuse="importance", training__local_steps=2).objective
    log_pi, _, log_start = random_policies(0)
    c = coefficients(objective, evidence_of(log_pi, None, log_start), True)[0]
    torch.testing.assert_close(c, (log_pi - log_start).exp() * VALUES)
    first = coefficients(objective, evidence_of(log_pi, None, None), True)[0]
    torch.testing.assert_close(first, VALUES)


def test_without_a_correction_a_bad_item_falls_no_further_than_uniform() -> None:
    objective = settings_of("reinforce", objective__critic="baseline").objective
    log_pi = torch.tensor([0.2, 0.3, 0.01, 0.49]).log()
    evidence = evidence_of(log_pi, None, None, torch.tensor([1.0, 1.0, 1.0, 5.0]))
    below = Evidence(**{**vars(evidence), "baseline": torch.full((1, 4), 2.0)})
    assert coefficients(objective, below, True).tolist() == [[0.0, -1.0, 0.0, 3.0]]


def test_warm_up_by_inverse_propensity_has_the_weights_of_the_uniform_policy() -> None:
    objective = settings_of("top-k", objective__warmup="inverse-propensity").objective
    log_pi, log_beta, _ = random_policies(1)
    found = coefficients(objective, evidence_of(log_pi, log_beta, None), False)[0]
    torch.testing.assert_close(found, VALUES / (ACTIONS * log_beta.exp()))
    uniform = torch.full_like(log_pi, -math.log(ACTIONS))
    evidence = evidence_of(uniform, log_beta, None)
    torch.testing.assert_close(weights_of(objective, evidence, True), weights_of(objective, evidence, False))


def test_weighted_likelihood_rests_where_the_policy_is_in_proportion_to_the_rewards() -> None:
    """E_β[r / (Aβ) ∇log π] = 0 at π ∝ r, whatever β; by reward alone it rests at π ∝ βr."""
    _, log_beta, _ = random_policies(2)
    for weights, target in (("inverse-propensity", VALUES), ("reward", VALUES * log_beta.exp())):
        objective = settings_of("likelihood", objective__likelihood_weights=weights).objective
        leaf = (target / target.sum()).clamp(min=1e-12).log().requires_grad_()
        log_pi = torch.log_softmax(leaf, -1)
        c = coefficients(objective, evidence_of(log_pi, log_beta, None), True)[0]
        (gradient,) = torch.autograd.grad((log_beta.exp() * c * log_pi).sum(), leaf)
        torch.testing.assert_close(gradient, torch.zeros(ACTIONS, dtype=torch.float64), rtol=0, atol=1e-9)


# β and the critic


def test_frequencies_rest_at_the_logged_shares() -> None:
    settings = settings_of("off-policy", objective__behaviour="frequency")
    parameters, user = bandit(settings)
    shares = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64)
    parameters["behaviour.frequency"] = shares.log().unsqueeze(-1)
    gradient = expected_gradient(settings, parameters, user, shares)["behaviour.frequency"]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    assert expected_gradient(settings, parameters, user, shares.flip(0))["behaviour.frequency"].abs().max() > 0.1


def test_critic_rests_at_the_mean_positive_reward_of_each_item() -> None:
    settings = settings_of("reinforce", objective__critic="baseline")
    parameters, user = bandit(settings)
    parameters["critic.embedding"] = torch.zeros(ACTIONS, 4, dtype=torch.float64)
    parameters["critic.embedding"][:, -1] = torch.logit(VALUES / HIGHEST_REWARD, eps=1e-15)
    gradient = expected_gradient(settings, parameters, user, torch.full((4,), 0.25).double())["critic.embedding"]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_a_learned_reward_stands_in_for_the_logged_one() -> None:
    settings = settings_of("off-policy", reward__source="critic")
    parameters, user = bandit(settings)
    q = HIGHEST_REWARD * torch.sigmoid(logits(parameters, user, "critic.embedding"))
    found = expected_gradient(settings, parameters, user, beta_of(parameters, user))["policy.embedding"]
    expected = policy_gradient(parameters, user, lambda log_pi: (log_pi.exp() * q).sum())
    torch.testing.assert_close(-found, expected, rtol=1e-6, atol=1e-9)


# The cap


def test_histograms_count_the_steps_of_the_mask() -> None:
    values, edges = torch.tensor([[0.5, 1.5, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([1.0, 2.0, 4.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert histogram(values, mask, edges).tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]


def test_the_proposed_cap_balances_bias_and_variance() -> None:
    edges = WEIGHT_EDGES.double().numpy()
    flat = np.zeros(len(edges) + 1)
    flat[12] = 1000  # all weights near 1: no cap below them
    assert propose_cap(flat, edges) >= 1
    heavy = flat.copy()
    heavy[-1] = 1  # one weight of 1,000 in a thousand logs
    few, many = propose_cap(heavy, edges), propose_cap(heavy * 10_000, edges)
    assert few < 1000
    assert many == pytest.approx(edges[-1])


# The engine against autograd

OPTIONS: list[dict[str, object]] = [
    {"objective.softmax": "nce"},
    {"objective.negatives_from": "uniform"},
    {"objective.negatives_from": "popularity"},
    {"objective.negatives_from": "in-batch"},
    {"objective.behaviour": "frequency", "objective.warmup": "inverse-propensity"},
    {"objective.critic": "baseline"},
    {"objective.critic": "doubly-robust"},
    {"objective.critic": "doubly-robust", "objective.softmax": "full"},
    {"reward.source": "critic", "model.cell": "gru"},
    {"objective.estimator": "direct"},
    {"objective.estimator": "likelihood", "objective.likelihood_weights": "inverse-propensity"},
    {"objective.trust_region": "behaviour", "objective.entropy_bonus": 0.1, "model.cell": "none"},
    {"objective.slice_items": 20, "model.input_rows": 7, "objective.critic": "doubly-robust"},
    {"objective.slice_items": 24, "model.input_rows": 40, "objective.negatives_from": "in-batch"},
]
ITEMS = 30


def one_update(option: dict[str, object], local_steps: int) -> tuple[Tensor, Tensor]:
    """(B, d) gradients and (B,) norms of some devices."""
    widths = {"model.input_width": 4, "model.state_width": 5, "model.user_width": 2, "objective.negatives": 12}
    steps = {"training.local_steps": local_steps, "training.local_learning_rate": 1e-12}
    settings = parse_flat({"privacy.mechanism": "none"} | widths | option | steps)
    rng, lengths = np.random.default_rng(0), np.array([9, 0, 1, 30, 2])
    items, rewards = rng.integers(0, ITEMS, lengths.sum()), rng.uniform(-5, 5, lengths.sum()).astype(np.float32)
    windows = pad(items, rewards, rewards, np.cumsum(lengths) - lengths, lengths, 0.25)
    item_slice = slice_of(settings, ITEMS, 1)
    parameters = cut(initialise(settings, ITEMS, torch.Generator().manual_seed(0)), item_slice)
    offer = Offer(1, 1, parameters, Encoding(1, 1.0, 1.0, 32, 1.0, 0.8), settings, item_slice)
    update = compute_update(settings, parameters, windows, torch.zeros(5, 2), offer.candidates, True, item_slice)
    rows = torch.stack([update.gradients.weighted_sum(row) for row in torch.eye(5)])
    return rows / local_steps, update.gradients.norms() / local_steps


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_the_batched_engine_equals_autograd(option: dict[str, object]) -> None:
    """Two infinitesimal local steps are twice the gradient, by torch.func instead of ghost norms."""
    found, norms = one_update(option, 1)
    expected, _ = one_update(option, 2)
    assert (expected.norm(dim=1) > 0).sum() >= 3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norms, found.norm(dim=1), rtol=1e-4, atol=1e-6)


# What the settings refuse


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"objective.trust_region": "start"}, "Expected training.local_steps=1 > 1 with objective.trust_region=start"),
        ({"objective.clip_ratio": 0.2}, "Expected training.local_steps=1 > 1 with objective.clip_ratio=0.2"),
        ({"objective.reuse": "importance"}, "Expected training.local_steps=1 > 1 with objective.reuse=importance"),
        (
            {"objective.estimator": "cross-entropy", "objective.entropy_bonus": 0.1},
            "Expected objective.entropy_bonus=0.1 only with one of the estimators reinforce, off-policy, top-k",
        ),
        (
            {"objective.estimator": "reinforce", "objective.critic": "doubly-robust"},
            "Expected objective.critic=doubly-robust only with off-policy or top-k",
        ),
        (
            {"objective.negatives_from": "in-batch", "objective.softmax": "nce"},
            "Expected objective.negatives_from=in-batch only with the sampled softmax and without a critic",
        ),
        ({"reward.source": "critic", "objective.discount": 0.5}, "Expected objective.discount=0.5 to be 0"),
        ({"objective.critic": "baseline", "objective.discount": 0.5}, "Expected objective.discount=0.5 to be 0"),
        (
            {"objective.estimator": "reinforce", "objective.trust_region": "start", "training.local_steps": 2},
            "Expected objective.trust_region=start only with off-policy or top-k",
        ),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_flat(settings)
    assert sentence in str(caught.value)


def test_mean_weight_of_a_device_is_one_after_normalisation_by_propensity() -> None:
    more = {"objective__self_normalised": True, "objective__likelihood_weights": "inverse-propensity"}
    log_pi, log_beta, _ = random_policies(5)
    evidence = evidence_of(log_pi, log_beta, None)
    weights = weights_of(settings_of("likelihood", **more).objective, evidence, False)
    torch.testing.assert_close(mean_over(weights, evidence.mask), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["reinforce", "off-policy", "top-k"])
@pytest.mark.parametrize("warm", [True, False])
def test_normalised_weights_bound_nothing_below_the_uniform_probability(estimator: str, warm: bool) -> None:
    """With w divided by its mean, w → 0 as π → 0 no longer holds an item that is below its baseline."""
    more = {"objective__critic": "baseline", "objective__self_normalised": True}
    objective = settings_of(estimator, **more).objective
    log_pi = torch.tensor([0.05, 0.1, 0.05, 0.8]).log()
    log_beta = None if estimator == "reinforce" else torch.full((4,), 0.25).log()
    evidence = evidence_of(log_pi, log_beta, None, torch.tensor([1.0, 1.0, 5.0, 1.0]))
    below = Evidence(**{**vars(evidence), "baseline": torch.full((1, 4), 2.0)})
    c = coefficients(objective, below, warm)[0]
    assert c[:2].tolist() == [0, 0]
    assert c[2] > 0
    assert c[3] < 0


def test_on_top_of_the_critic_a_new_policy_ranks_as_the_critic_and_leaves_it_and_the_state_alone() -> None:
    settings = settings_of("off-policy", objective__prior="critic", objective__prior_temperature=0.5)
    generator = torch.Generator().manual_seed(0)
    parameters = {name: value.double() for name, value in initialise(settings, ACTIONS, generator).items()}
    parameters["critic.embedding"] = torch.randn(ACTIONS, 4, generator=generator, dtype=torch.float64)
    user = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    assert not parameters["policy.embedding"].any()
    torch.testing.assert_close(policy_weight(settings, parameters), 2 * parameters["critic.embedding"])

    direct = settings_of("direct")
    alone = {name: value for name, value in parameters.items() if name in shapes_of(direct, ACTIONS)}
    ones = torch.full((ACTIONS,), 0.25, dtype=torch.float64)
    with_policy = expected_gradient(settings, parameters, user, ones)
    for name, gradient in expected_gradient(direct, alone, user, ones).items():
        torch.testing.assert_close(with_policy[name], gradient)
    assert with_policy["policy.embedding"].abs().max() > 1e-3


def test_on_top_of_a_critic_that_is_still_to_learn_the_policy_rests() -> None:
    objective = settings_of("top-k", objective__prior="critic", objective__entropy_bonus=0.1).objective
    log_pi, log_beta, _ = random_policies(3)
    assert not coefficients(objective, evidence_of(log_pi, log_beta, None), False).any()
    assert coefficients(objective, evidence_of(log_pi, log_beta, None), True).any()


def test_watching_changes_no_gradient_of_what_is_watched() -> None:
    plain, watched = settings_of("reinforce"), settings_of("reinforce", objective__watch=True)
    parameters, user = bandit(watched)
    ones = torch.full((ACTIONS,), 0.25, dtype=torch.float64)
    seen = expected_gradient(watched, parameters, user, ones)
    own = {name: value for name, value in parameters.items() if name in shapes_of(plain, ACTIONS)}
    for name, gradient in expected_gradient(plain, own, user, ones).items():
        torch.testing.assert_close(seen[name], gradient)
    assert seen["behaviour.embedding"].abs().max() > 1e-3
    assert seen["critic.embedding"].abs().max() > 1e-3
