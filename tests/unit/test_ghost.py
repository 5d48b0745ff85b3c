"""Ghost norms and weighted sums against autograd, one user at a time, and against opacus's per-sample gradients."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn

from client.local_update import LocalUpdate, compute_update
from common.candidates import Negatives, draw_negatives, log_uniform
from common.ghost import Scattered
from common.model import Parameters, group_of, initialise
from common.objective import returns_of
from common.privacy.clipping import clip_factor
from common.settings import Estimator, Settings, parse_flat
from common.softmax import likelihood
from common.tape import Dense, Sampled, Tape
from common.trajectory import Trajectories

quick = hypothesis_settings(max_examples=40, deadline=None)


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Problem:
    """B users with T steps over A rows of width i, and how the loss bends what it reads."""

    weight: Tensor
    inputs: Tensor
    ids: Tensor
    rows: Tensor
    bend: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    users, steps, items, width = draw(st.tuples(*[st.integers(1, 4)] * 2, st.integers(1, 6), st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = draw(st.lists(st.integers(0, items - 1), min_size=users * steps, max_size=users * steps))
    rows = draw(st.sets(st.integers(0, items - 1), min_size=1))
    return Problem(
        torch.randn(items, width, generator=generator, dtype=torch.float64),
        torch.randn(users, steps, width, generator=generator, dtype=torch.float64),
        torch.tensor(ids).view(users, steps),
        torch.tensor(sorted(rows)),
        torch.randn(users, steps, 1, generator=generator, dtype=torch.float64),
    )


def column_of(problem: Problem) -> Tensor:
    """Where each step's own item stands among the rows, or -1."""
    place = {row: column for column, row in enumerate(problem.rows.tolist())}
    return torch.tensor([[place.get(item, -1) for item in user] for user in problem.ids.tolist()])


def dense(problem: Problem, weight: Tensor, tape: Tape | None) -> Tensor:
    output = problem.inputs @ weight.T
    if tape is not None:
        tape.uses.append(Dense("w", problem.inputs, tape.watch(output)))
    return output


def sampled(problem: Problem, weight: Tensor, tape: Tape | None) -> Tensor:
    """Both parts of a sampled softmax; an accidental hit is masked before the loss."""
    negative, own = problem.inputs @ weight[problem.rows].T, (problem.inputs * weight[problem.ids]).sum(-1)
    column = column_of(problem)
    if tape is not None:
        use = Sampled("w", problem.inputs, problem.rows, problem.ids, column, tape.watch(negative), tape.watch(own))
        tape.uses.append(use)
    hit = column.unsqueeze(-1) == torch.arange(len(problem.rows))
    return torch.cat([negative.masked_fill(hit, 0), own.unsqueeze(-1)], -1)


def log_softmax(problem: Problem, weight: Tensor, tape: Tape | None) -> Tensor:
    mask = torch.ones_like(problem.ids, dtype=torch.bool)
    return likelihood(weight, "w", problem.inputs, problem.ids, mask, None, tape).log_probability.unsqueeze(-1)


def sampled_log_softmax(problem: Problem, weight: Tensor, tape: Tape | None) -> Tensor:
    mask, column = torch.ones_like(problem.ids, dtype=torch.bool), torch.full((len(weight),), -1)
    column[problem.rows] = torch.arange(len(problem.rows))
    drawn = Negatives(problem.rows, problem.weight[problem.rows, 0], column, problem.weight[:, 0])
    return likelihood(weight, "w", problem.inputs, problem.ids, mask, drawn, tape).log_probability.unsqueeze(-1)


FORWARDS: list[Callable[[Problem, Tensor, Tape | None], Tensor]] = [dense, sampled, log_softmax, sampled_log_softmax]


@pytest.mark.parametrize("forward", FORWARDS)
@quick
@given(problem=problems(), weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_a_use_equals_autograd_for_each_user(
    forward: Callable[[Problem, Tensor, Tape | None], Tensor], problem: Problem, weights: list[float]
) -> None:
    leaf = problem.weight.clone().requires_grad_()
    loss = (torch.sin(forward(problem, leaf, None) * problem.bend)).sum((1, 2))
    expected = torch.stack([torch.autograd.grad(user, leaf, retain_graph=True)[0] for user in loss])

    tape = Tape()
    per_user = torch.sin(forward(problem, problem.weight, tape) * problem.bend).sum((1, 2))
    (use,) = tape.uses
    deltas = torch.autograd.grad(per_user.sum(), use.outputs)
    own = torch.tensor(weights[: len(loss)], dtype=torch.float64)
    total = torch.ones_like(problem.weight)
    gradient = use.gradient(*deltas)
    gradient.add_sum(own, total)
    assert_exact(gradient.square_norms(), expected.square().sum((1, 2)))
    assert_exact(total, 1 + torch.einsum("u,uij->ij", own, expected))


@quick
@given(problem=problems(), weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_scattered_rows_are_what_autograd_scatters(problem: Problem, weights: list[float]) -> None:
    leaf = problem.weight.clone().requires_grad_()
    loss = (leaf[problem.ids] * problem.inputs).sum((1, 2))
    expected = torch.stack([torch.autograd.grad(user, leaf, retain_graph=True)[0] for user in loss])
    gradient, own = Scattered(problem.inputs, problem.ids), torch.tensor(weights[: len(loss)], dtype=torch.float64)
    total = torch.ones_like(problem.weight)
    gradient.add_sum(own, total)
    assert_exact(gradient.square_norms(), expected.square().sum((1, 2)))
    assert_exact(total, 1 + torch.einsum("u,uij->ij", own, expected))


class Recommender(nn.Module):
    """The model once more, by hand and of standard layers, for which opacus has per-sample gradients of its own."""

    def __init__(self, settings: Settings, parameters: Parameters) -> None:
        super().__init__()
        self.cell = settings.model.cell
        self.width = settings.model.state_width
        self.temperature = settings.model.temperature
        for name, weight in parameters.items():
            layer = nn.Embedding(*weight.shape) if name == "items.embedding" else nn.Linear(*weight.T.shape, bias=False)
            layer.weight = nn.Parameter(weight.clone())
            setattr(self, name.replace(".", "_"), layer)

    def forward(self, items: Tensor, rewards: Tensor, users: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of π and β before each step, (B, T, A)."""
        state, shift = torch.zeros(len(items), self.width, dtype=users.dtype), self.user_projection(users)
        one, embedded = torch.ones(len(items), 1, dtype=users.dtype), self.items_embedding(items)
        queries = [torch.cat([state + shift, one], -1) / self.temperature]
        for step in range(items.shape[1] - 1):
            rating = rewards[:, step, None] / 5
            drive = torch.cat([embedded[:, step], rating * embedded[:, step], rating], -1)
            first, second = self.cell_gates(torch.cat([drive, one, state], -1)).sigmoid().chunk(2, -1)
            if self.cell == "cfn":
                state = first * state.tanh() + second * self.cell_candidate(drive).tanh()
            else:
                fresh = self.cell_candidate(torch.cat([drive, one, second * state], -1)).tanh()
                state = first * state + (1 - first) * fresh
            queries.append(torch.cat([state + shift, one], -1) / self.temperature)
        heads = torch.stack(queries, 1)
        beta = self.behaviour_embedding(heads.detach()) if hasattr(self, "behaviour_embedding") else None
        return self.policy_embedding(heads), beta


def log_softmax(logits: Tensor, negatives: Negatives | None, item: int) -> Tensor:
    """log-probability of `item` under (A,) logits."""
    if negatives is None:
        return logits.log_softmax(-1)[item]
    others = [place for place, drawn in enumerate(negatives.ids.tolist()) if drawn != item]
    drawn = (logits[negatives.ids] + negatives.log_weights)[others]
    return logits[item] - torch.cat([logits[item : item + 1], drawn]).logsumexp(-1)


def loss_of(
    settings: Settings, device: Trajectories, negatives: Negatives | None, pi: Tensor, beta: Tensor | None
) -> Tensor:
    """One device's loss, from its (T, A) logits, as the design writes it."""
    objective, steps = settings.objective, range(int(device.support[0]), int(device.lengths[0]))
    if not steps:
        return pi.sum() * 0 + (0 if beta is None else beta.sum() * 0)
    items, rewards, returns = (values[0, steps.start : steps.stop] for values in steps_of(device))
    at = list(zip(steps, items.tolist(), strict=True))
    log_pi = torch.stack([log_softmax(pi[step], negatives, item) for step, item in at])
    c = (rewards if objective.estimator == "likelihood" else returns).clamp(min=0)
    if objective.estimator == "cross-entropy":
        c = torch.ones_like(rewards)
    if beta is None:
        return -(c * log_pi).mean()
    log_beta = torch.stack([log_softmax(beta[step], negatives, item) for step, item in at])
    w = (log_pi - log_beta).detach().exp().clamp(max=objective.weight_cap)
    if objective.self_normalised:
        w = w / w.mean()
    if objective.estimator == "top-k":
        w = w * objective.slate_size * (1 - log_pi.detach().exp()) ** (objective.slate_size - 1)
    return -(w * c * log_pi).mean() - log_beta.mean()


def steps_of(trajectories: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    return trajectories.items, trajectories.rewards, trajectories.returns


@dataclass(frozen=True)
class Case:
    settings: Settings
    parameters: Parameters
    trajectories: Trajectories
    users: Tensor
    negatives: Negatives | None

    def update(self) -> LocalUpdate:
        return compute_update(self.settings, self.parameters, self.trajectories, self.users, self.negatives, warm=True)

    def device(self, number: int) -> Trajectories:
        t, steps = self.trajectories, max(1, int(self.trajectories.lengths[number]))
        own = slice(number, number + 1)
        items, rewards, returns = (values[own, :steps] for values in steps_of(t))
        return Trajectories(items, rewards, returns, t.lengths[own], t.support[own])

    def losses(self, model: nn.Module, embeddings: Tensor) -> Tensor:
        pi, beta = model(self.trajectories.items, self.trajectories.rewards, embeddings)
        losses = [
            loss_of(self.settings, self.device(u), self.negatives, pi[u], None if beta is None else beta[u])
            for u in range(len(embeddings))
        ]
        return torch.stack(losses)

    def scaled(self, gradients: dict[str, Tensor]) -> Tensor:
        """(B, d) per-user gradients in the scale of `privacy.group_scale`."""
        scale = self.settings.privacy.group_scale
        parts = [getattr(scale, group_of(name)) * gradients[name].flatten(1) for name in self.parameters]
        return torch.cat(parts, 1)


LENGTHS = (0, 1, 2, 5, 9)


def case(cell: str, softmax: str, estimator: Estimator, **more: float | bool) -> Case:
    """A small random case in float64, with groups of different scales and items that repeat."""
    chosen = {"model.cell": cell, "objective.softmax": softmax, "objective.estimator": estimator}
    widths = {"model.input_width": 3, "model.state_width": 4, "model.user_width": 2, "model.temperature": 0.7}
    scales = {"items": 0.5, "cell": 2.0, "policy": 0.3, "behaviour": 3.0}
    scales = {f"privacy.group_scale.{group}": value for group, value in scales.items()}
    settings = parse_flat(chosen | widths | scales | {"objective.slate_size": 3, "objective.weight_cap": 2.0} | more)
    generator, rng, items = torch.Generator().manual_seed(1), np.random.default_rng(1), 7
    parameters = initialise(settings, items, generator)
    rewards = [rng.uniform(-5, 5, size) for size in LENGTHS]
    returns = [returns_of(own, 0.5) for own in rewards]

    def padded(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(row.astype(float), (0, LENGTHS[-1] - len(row))) for row in rows]))

    lengths = torch.tensor(LENGTHS)
    negatives = draw_negatives(log_uniform(items), 5, rng)
    return Case(
        settings,
        {name: 3 * value.double() for name, value in parameters.items()},
        Trajectories(
            padded([rng.integers(0, items, size) for size in LENGTHS]).long(),
            padded(rewards),
            padded(returns),
            lengths,
            lengths // 4,
        ),
        torch.randn(len(LENGTHS), 2, generator=generator).double(),
        replace(negatives, log_weights=negatives.log_weights.double()) if softmax == "sampled" else None,
    )


POLICIES = [estimator for estimator in get_args(Estimator) if estimator != "direct"]
EVERY = list(itertools.product(("cfn", "gru"), ("full", "sampled"), POLICIES))


@pytest.mark.parametrize(("cell", "softmax", "estimator"), EVERY)
def test_an_update_equals_autograd_for_each_user(cell: str, softmax: str, estimator: Estimator) -> None:
    small = case(cell, softmax, estimator)
    update, model = small.update(), Recommender(small.settings, small.parameters)
    parameters = dict(zip(small.parameters, model.parameters(), strict=True))
    rows = []
    for loss in small.losses(model, update.local_users):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        rows.append(small.scaled({name: value[None] for name, value in zip(parameters, gradients, strict=True)}))
    expected = torch.cat(rows)
    assert (expected.norm(dim=1)[1:] > 1e-3).all()
    assert_exact(update.gradients.norms(), expected.norm(dim=1))
    weights = torch.linspace(-1, 2, len(LENGTHS)).double()
    assert_exact(update.gradients.weighted_sum(weights), weights @ expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("cell", "softmax", "estimator"), EVERY)
def test_a_clipped_sum_equals_that_of_opacus(cell: str, softmax: str, estimator: Estimator) -> None:
    small = case(cell, softmax, estimator)
    update = small.update()
    model = GradSampleModule(Recommender(small.settings, small.parameters), batch_first=True, loss_reduction="sum")
    small.losses(model, update.local_users).sum().backward()
    samples = [parameter.grad_sample for parameter in model.parameters()]
    expected = small.scaled(dict(zip(small.parameters, samples, strict=True)))

    norms, clip = update.gradients.norms(), 0.8
    assert_exact(norms, expected.norm(dim=1))
    assert 0 < (norms > clip).sum() < len(norms)
    factors = torch.from_numpy(clip_factor(norms.numpy(), clip))
    clipped = expected * (clip / expected.norm(dim=1)).clamp(max=1).nan_to_num(1)[:, None]
    assert_exact(update.gradients.weighted_sum(factors), clipped.sum(0))
    assert (clipped.norm(dim=1) <= clip * (1 + 1e-9)).all()


@pytest.mark.parametrize("more", [{"objective.self_normalised": False}, {"objective.weight_cap": float("inf")}])
def test_settings_of_the_weights_reach_the_update(more: dict[str, float | bool]) -> None:
    small = case("cfn", "full", "top-k", **more)
    update, model = small.update(), Recommender(small.settings, small.parameters)
    small.losses(model, update.local_users).sum().backward()
    expected = {name: leaf.grad[None] for name, leaf in zip(small.parameters, model.parameters(), strict=True)}
    ones = torch.ones(len(LENGTHS)).double()
    assert_exact(update.gradients.weighted_sum(ones), small.scaled(expected)[0])
