"""The estimators against the gradients they estimate, by enumeration, and against each known defect of RecNN.

RecNN's defects, and the tests that exclude them:

* the loss is taken at a sampled action, another one for β — `test_expected_gradient_…`, `test_loss_is_taken_at_…`
* weights are not detached — `test_coefficients_are_numbers`, `test_a_rewarded_improbable_action_…`
* β has a double softmax — `test_beta_rests_at_the_logged_frequencies`
* returns run across users, γ is hard-coded — `test_returns_…`
* a clip of −1 turns the sign — refused in `test_settings.py`
"""

import numpy as np
import pytest
import torch
from handmade import interactions
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from client.local_update import LocalUpdate, compute_update
from common.model import Parameters, initialise, unflatten
from common.model import shapes as shapes_of
from common.objective import Evidence, coefficients, importance_weights, mean_over, returns_of, top_k_multiplier
from common.settings import ObjectiveSettings, Settings, parse_flat
from common.trajectory import Trajectories
from simulations.population import Population

ACTIONS = 4
REWARDS = torch.tensor([3.0, 0.5, 5.0, 1.0], dtype=torch.float64)
quick = hypothesis_settings(max_examples=60, deadline=None)


def settings_of(estimator: str, **more: object) -> Settings:
    chosen = {"objective.estimator": estimator, "objective.softmax": "full", "objective.self_normalised": False}
    widths = {"model.input_width": 2, "model.state_width": 3, "model.user_width": 2}
    return parse_flat(chosen | widths | {"objective.weight_cap": float("inf")} | more)


def bandit(settings: Settings, seed: int = 0) -> tuple[Parameters, Tensor]:
    """A policy and a behaviour that both prefer some actions, and the one user embedding that all devices have."""
    generator = torch.Generator().manual_seed(seed)
    drawn = initialise(settings, ACTIONS, generator)
    parameters = {name: value.double() for name, value in drawn.items()}
    for head in ("policy.embedding", "behaviour.embedding"):
        if head in parameters:
            parameters[head] = torch.randn(ACTIONS, 4, generator=generator, dtype=torch.float64)
    return parameters, torch.tensor([[0.7, -1.1]], dtype=torch.float64)


def log_head(parameters: Parameters, user: Tensor, head: str) -> Tensor:
    """(A,) log-probabilities of a head before the first step, where the state is the user's alone."""
    state = torch.cat([user @ parameters["user.projection"].T, torch.ones_like(user[:, :1])], -1)
    return torch.log_softmax(state @ parameters[head].T, -1)[0]


def log_each(settings: Settings, parameters: Parameters, user: Tensor, rewards: Tensor, actions: Tensor) -> LocalUpdate:
    """As many devices as actions, each with one step that logs its action."""
    ones = torch.ones(len(actions), dtype=torch.int64)
    logged = Trajectories(actions[:, None], rewards[:, None], rewards[:, None], ones, ones * 0)
    return compute_update(settings, parameters, logged, user.expand(len(actions), -1), None, warm=True)


def gradient_by(settings: Settings, update: LocalUpdate, weights: Tensor) -> Parameters:
    shapes = shapes_of(settings, ACTIONS)
    return unflatten(update.gradients.weighted_sum(weights.double()), shapes)


def arrays(estimator: str, log_pi: Tensor, log_beta: Tensor, rewards: Tensor, **more: object) -> Tensor:
    """Coefficients of (B, T) steps that all count."""
    warm = bool(more.pop("warm", True))
    objective = settings_of(estimator, **more).objective
    return weighed(objective, log_pi, log_beta, rewards, rewards, torch.ones_like(log_pi, dtype=torch.bool), warm)


def weighed(
    objective: ObjectiveSettings,
    log_pi: Tensor,
    log_beta: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor,
    warm: bool = True,
    log_start: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    """Coefficients of (B, T) steps."""
    needed = log_beta if objective.needs_behaviour else None
    evidence = Evidence(rewards, returns, mask, log_pi, needed, log_start, baseline, ACTIONS)
    return coefficients(objective, evidence, warm)


# Returns


@quick
@given(st.lists(st.floats(-5, 5, width=32), max_size=30), st.floats(0, 1))
def test_returns_equal_a_slow_loop(rewards: list[float], discount: float) -> None:
    expected = [
        sum(reward * discount**ahead for ahead, reward in enumerate(rewards[step:])) for step in range(len(rewards))
    ]
    found = returns_of(np.array(rewards, dtype=np.float32), discount)
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array(expected), rel=1e-5, abs=1e-5)


def test_returns_never_reach_into_another_user() -> None:
    histories = interactions([[0, 1], [], [2, 0, 1], [1]], items=3)
    histories.ratings[:] = [5, 0.5, 5, 5, 0.5, 5]
    settings = parse_flat({"objective.discount": 0.5})
    windows = Population(settings, histories).windows(0, np.arange(4))
    assert windows.returns.tolist() == [[2.5, -5, 0], [0, 0, 0], [6.25, 2.5, -5], [5, 0, 0]]


# What the expected gradient is


@pytest.mark.parametrize(("estimator", "slate"), [("off-policy", 7), ("top-k", 1), ("top-k", 2), ("top-k", 5)])
def test_expected_gradient_is_that_of_the_expected_reward_of_the_slate(estimator: str, slate: int) -> None:
    settings = settings_of(estimator, **{"objective.slate_size": slate})
    parameters, user = bandit(settings)
    beta = log_head(parameters, user, "behaviour.embedding").exp()
    update = log_each(settings, parameters, user, REWARDS, torch.arange(ACTIONS))
    estimate = gradient_by(settings, update, beta)

    own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    pi = log_head(own, user, "policy.embedding").exp()
    inclusion = pi if estimator == "off-policy" else 1 - (1 - pi) ** slate
    (inclusion * REWARDS).sum().backward()
    for name in ("policy.embedding", "user.projection"):
        assert own[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(-estimate[name], own[name].grad, rtol=1e-6, atol=1e-9)


def test_reinforce_on_the_log_is_biased_towards_what_was_logged() -> None:
    settings = settings_of("reinforce")
    parameters, user = bandit(settings)
    logged = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    update = log_each(settings, parameters, user, REWARDS, torch.arange(ACTIONS))
    own = parameters["policy.embedding"].clone().requires_grad_()
    pi = log_head(parameters | {"policy.embedding": own}, user, "policy.embedding")
    (logged * REWARDS * pi).sum().backward()
    torch.testing.assert_close(-gradient_by(settings, update, logged)["policy.embedding"], own.grad)


@pytest.mark.parametrize("estimator", ["likelihood", "reinforce", "off-policy", "top-k"])
def test_a_rewarded_improbable_action_becomes_more_probable(estimator: str) -> None:
    settings = settings_of(estimator)
    parameters, user = bandit(settings)
    parameters["policy.embedding"][2, -1] -= 8
    before = log_head(parameters, user, "policy.embedding")
    assert before[2] < -4
    update = log_each(settings, parameters, user, REWARDS[2:3], torch.tensor([2]))
    gradient = gradient_by(settings, update, torch.ones(1))["policy.embedding"]
    stepped = parameters | {"policy.embedding": parameters["policy.embedding"] - 1e-3 * gradient}
    assert log_head(stepped, user, "policy.embedding")[2] > before[2]


def test_loss_is_taken_at_the_logged_action() -> None:
    settings = settings_of("cross-entropy")
    parameters, user = bandit(settings)
    pi = log_head(parameters, user, "policy.embedding").exp()
    for action in range(ACTIONS):
        update = log_each(settings, parameters, user, REWARDS[:1], torch.tensor([action]))
        bias = gradient_by(settings, update, torch.ones(1))["policy.embedding"][:, -1]
        torch.testing.assert_close(bias, pi - torch.nn.functional.one_hot(torch.tensor(action), ACTIONS))


# β


def test_beta_rests_at_the_logged_frequencies() -> None:
    settings = settings_of("off-policy")
    parameters, user = bandit(settings)
    counts = torch.tensor([1, 2, 4, 3])
    parameters["behaviour.embedding"] = torch.zeros(ACTIONS, 4, dtype=torch.float64)
    parameters["behaviour.embedding"][:, -1] = counts.double().log()
    actions = torch.arange(ACTIONS).repeat_interleave(counts)
    update = log_each(settings, parameters, user, REWARDS[actions], actions)
    gradient = gradient_by(settings, update, torch.ones(len(actions)))["behaviour.embedding"]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", ["cfn", "gru"])
@pytest.mark.parametrize("estimator", ["off-policy", "top-k"])
@pytest.mark.parametrize("local_steps", [1, 2])
def test_beta_shapes_neither_state_nor_policy(cell: str, estimator: str, local_steps: int) -> None:
    settings = settings_of(estimator, **{"model.cell": cell, "training.local_steps": local_steps})
    parameters, user = bandit(settings)
    disliked = torch.full((1, 5), -2.0, dtype=torch.float64)
    logged = Trajectories(torch.tensor([[0, 1, 2, 3, 0]]), disliked, disliked, torch.tensor([5]), torch.tensor([1]))
    gradient = gradient_by(settings, compute_update(settings, parameters, logged, user, None, True), torch.ones(1))
    assert gradient.pop("behaviour.embedding").abs().max() > 0.01
    assert set(gradient) == {"items.embedding", "cell.gates", "cell.candidate", "user.projection", "policy.embedding"}
    assert not any(value.any() for value in gradient.values())


# Coefficients


def random_steps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log π, log β and rewards of 3 users with 6 steps."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (-4 * torch.rand(3, 6, generator=generator) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_(), 10 * torch.rand(3, 6, generator=generator) - 5


@pytest.mark.parametrize("estimator", ["cross-entropy", "likelihood", "reinforce", "off-policy", "top-k"])
@pytest.mark.parametrize("self_normalised", [False, True])
def test_coefficients_are_numbers(estimator: str, self_normalised: bool) -> None:
    found = arrays(estimator, *random_steps(), **{"objective.self_normalised": self_normalised})
    assert not found.requires_grad
    assert (found >= 0).all()


def test_importance_weights_are_capped_and_detached() -> None:
    log_pi, log_beta, _ = random_steps()
    ratio = (log_pi - log_beta).exp().detach()
    assert (ratio > 2).any()
    assert (ratio < 2).any()
    weights = importance_weights(log_pi, log_beta, 2.0)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, ratio.minimum(torch.tensor(2.0)))
    torch.testing.assert_close(importance_weights(log_pi, log_beta, float("inf")), ratio)


def test_multiplier_is_the_slope_of_the_inclusion_probability() -> None:
    pi = torch.linspace(0.001, 0.999, 50, dtype=torch.float64).requires_grad_()
    for slate in (1, 2, 16):
        (slope,) = torch.autograd.grad((1 - (1 - pi) ** slate).sum(), pi)
        found = top_k_multiplier(pi.log(), slate)
        torch.testing.assert_close(found, slope)
        assert not found.requires_grad
    certain = torch.tensor([0.0, 1e-7])
    assert top_k_multiplier(certain, 3).tolist() == [0, 0]
    assert top_k_multiplier(certain, 1).tolist() == [1, 1]


def test_cross_entropy_ignores_rewards() -> None:
    log_pi, log_beta, rewards = random_steps()
    assert (arrays("cross-entropy", log_pi, log_beta, rewards) == 1).all()
    assert (arrays("cross-entropy", log_pi, log_beta, rewards * 0) == 1).all()


@pytest.mark.parametrize("estimator", ["likelihood", "reinforce", "off-policy", "top-k"])
def test_negative_rewards_count_for_nothing(estimator: str) -> None:
    log_pi, log_beta, rewards = random_steps()
    found = arrays(estimator, log_pi, log_beta, rewards)
    assert (found[rewards <= 0] == 0).all()
    assert (found[rewards > 0] > 0).all()


def test_likelihood_weighs_rewards_and_reinforce_returns() -> None:
    log_pi, log_beta, rewards = random_steps()
    mask = torch.ones_like(rewards, dtype=torch.bool)
    for estimator, value in (("likelihood", rewards), ("reinforce", 2 * rewards)):
        objective = settings_of(estimator).objective
        found = weighed(objective, log_pi, log_beta, rewards, 2 * rewards, mask)
        torch.testing.assert_close(found, value.clamp(min=0))


@pytest.mark.parametrize("estimator", ["off-policy", "top-k"])
@pytest.mark.parametrize("self_normalised", [False, True])
def test_correction_rests_during_warm_up(estimator: str, self_normalised: bool) -> None:
    steps, more = random_steps(), {"objective.self_normalised": self_normalised}
    torch.testing.assert_close(arrays(estimator, *steps, warm=False, **more), arrays("reinforce", *steps))


@quick
@given(st.integers(0, 2**32), st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_self_normalised_weights_have_mean_one_over_the_users_own_steps(seed: int, lengths: list[int]) -> None:
    log_pi, log_beta, _ = random_steps(seed)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    objective = settings_of("off-policy", **{"objective.self_normalised": True, "objective.weight_cap": 3.0}).objective
    found = weighed(objective, log_pi, log_beta, mask.float(), mask.float(), mask)
    torch.testing.assert_close(mean_over(found, mask), torch.ones(3))
    assert not found[~mask].any()
    ratio = importance_weights(log_pi, log_beta, 3.0)
    torch.testing.assert_close(found / found[:, :1], torch.where(mask, ratio / ratio[:, :1], 0))


def test_coefficients_are_zero_outside_of_the_mask_without_a_cap() -> None:
    log_pi, log_beta = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -100.0]])
    mask, rewards = torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]])
    found = weighed(settings_of("off-policy").objective, log_pi, log_beta, rewards, rewards, mask)
    assert found.tolist() == [[1, 0]]


def test_mean_over_the_mask() -> None:
    values = torch.tensor([[1.0, 3.0, torch.nan], [5.0, torch.nan, torch.nan], [torch.nan] * 3])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert mean_over(values, mask).tolist() == [2, 5, 0]
