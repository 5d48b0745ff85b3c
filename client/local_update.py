"""One device's computation in a round, written over a batch of devices.

A real device runs it with B = 1, a simulation with B in the thousands; both give the same numbers
(``tests/contract/test_batch_of_one.py``).

1. The recurrent states of the window, from the shared parameters.
2. *Private part*: a few gradient steps on the user embedding, over the older part of the window (the support).
3. *Shared part*: the gradient, at the adapted embedding, of the newer part's loss by the shared parameters; or, with
   several local steps, the sum of the gradients along the local path.

The user embedding is an input of step 3 and stays on the device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from common.ghost import Tape, Use
from common.model import CORRECTED, Parameters, Recurrence, condition, group_of, queries
from common.objective import coefficients, mean_over
from common.settings import GroupScale, Settings
from common.softmax import Negatives, log_probabilities
from common.trajectory import Trajectories

_SMALLEST_COEFFICIENT = 1e-6


class Gradients(Protocol):
    """The shared gradients of B devices, in the scale of `privacy.group_scale`."""

    def norms(self) -> Tensor:
        """(B,) joint L2 norms over everything shared."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """(d,) Σ_u weights[u] · gradient_u; weights: (B,)."""


@dataclass(frozen=True)
class LocalUpdate:
    """What B devices computed: their gradients, which may be shared, and their embeddings, which may not."""

    gradients: Gradients
    local_users: Tensor
    """(B, w) adapted user embeddings."""
    local_metrics: dict[str, Tensor]
    """(B,) each: losses and weights of the shared part, for simulations."""


@dataclass(frozen=True)
class _Steps:
    """The steps of B trajectories that one loss is taken over, padded to S."""

    items: Tensor
    rewards: Tensor
    returns: Tensor
    mask: Tensor


def compute_update(
    settings: Settings,
    parameters: Parameters,
    trajectories: Trajectories,
    users: Tensor,
    negatives: Negatives | None,
    warm: bool,
) -> LocalUpdate:
    """Steps 1 to 3 for B devices.

    Args:
        parameters: the round's shared parameters.
        trajectories: the devices' windows.
        users: (B, w) the devices' embeddings.
        negatives: the round's shared negatives; None for the full softmax.
        warm: whether the warm-up rounds are over.
    """
    loss = _Loss(settings, negatives, warm)
    tape = Tape(recording=settings.training.local_steps == 1)
    states = Recurrence(settings.model).run(parameters, trajectories.items, trajectories.rewards, tape)
    support_end = int(trajectories.support.max())
    support = _take(trajectories, torch.arange(support_end).expand(len(users), -1), trajectories.support)
    users = _adapt(loss, parameters, states[:, :support_end].detach(), support, users)

    newer = trajectories.lengths - trajectories.support
    at = trajectories.support.unsqueeze(-1) + torch.arange(int(newer.max()))
    at = at.clamp(max=trajectories.items.shape[1] - 1)  # padded steps may point anywhere
    query = _take(trajectories, at, newer)
    if settings.training.local_steps > 1:
        return _several_steps(loss, parameters, trajectories, query, at, users)
    per_user, metrics = loss.shared(parameters, _rows(states, at), query, users, tape)
    outputs = [output for use in tape.uses for output in use.outputs]
    deltas = iter(torch.autograd.grad(per_user.sum(), outputs))
    recorded = [(use, tuple(next(deltas).detach() for _ in use.outputs)) for use in tape.uses]
    shapes = {name: value.shape for name, value in parameters.items()}
    return LocalUpdate(_GhostGradients(recorded, shapes, settings.privacy.group_scale), users, metrics)


def adapt_users(
    settings: Settings, parameters: Parameters, states: Tensor, trajectories: Trajectories, users: Tensor
) -> Tensor:
    """(B, w) embeddings after the local steps over all of each trajectory, by the full softmax: for serving.

    Args:
        states: (B, T, n) states before each step.
    """
    everything = torch.arange(trajectories.items.shape[1]).expand(len(users), -1)
    support = _take(trajectories, everything, trajectories.lengths)
    return _adapt(_Loss(settings, None, warm=True), parameters, states, support, users)


@dataclass(frozen=True)
class _Loss:
    settings: Settings
    negatives: Negatives | None
    warm: bool

    def policy(
        self, parameters: Parameters, states: Tensor, steps: _Steps, users: Tensor, tape: Tape
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(B,) each user's mean of −c log π, and (B, S) the log-probabilities and coefficients it is made of."""
        objective, model = self.settings.objective, self.settings.model
        conditioned = queries(condition(parameters, states, users, tape), model.temperature)
        weight = parameters["policy.embedding"]
        log_pi = log_probabilities(weight, "policy.embedding", conditioned, steps.items, self.negatives, tape)
        log_beta = None
        if objective.estimator in CORRECTED:
            # β reads the state and does not shape it: its gradient stops here.
            weight = parameters["behaviour.embedding"]
            log_beta = log_probabilities(
                weight, "behaviour.embedding", conditioned.detach(), steps.items, self.negatives, tape
            )
        c = coefficients(objective, log_pi, log_beta, steps.rewards, steps.returns, steps.mask, self.warm)
        return -mean_over(c * log_pi, steps.mask), log_pi, log_beta, c

    def shared(
        self, parameters: Parameters, states: Tensor, steps: _Steps, users: Tensor, tape: Tape
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) each user's loss: the policy's, and β's mean cross-entropy on every logged step."""
        loss, log_pi, log_beta, c = self.policy(parameters, states, steps, users, tape)
        metrics = {
            "policy_loss": loss,
            "log_pi": mean_over(log_pi, steps.mask),
            "coefficient": mean_over(c, steps.mask),
        }
        if log_beta is not None:
            behaviour_loss = -mean_over(log_beta, steps.mask)
            metrics |= {"behaviour_loss": behaviour_loss}
            loss = loss + behaviour_loss
        return loss, {name: value.detach() for name, value in metrics.items()}


def _adapt(loss: _Loss, parameters: Parameters, states: Tensor, support: _Steps, users: Tensor) -> Tensor:
    """Gradient steps on the user embeddings, each device on its own loss over its own support.

    The loss is divided by the mean coefficient, so that one learning rate suits every estimator.
    """
    training = loss.settings.training
    if not support.mask.shape[1]:
        return users
    for _ in range(training.user_steps):
        leaf = users.detach().requires_grad_()
        per_user, _, _, c = loss.policy(parameters, states, support, leaf, Tape(recording=False))
        scale = mean_over(c, support.mask).clamp(min=_SMALLEST_COEFFICIENT)
        (gradient,) = torch.autograd.grad((per_user / scale).sum(), leaf)
        stepped = users - training.user_learning_rate * (gradient + training.user_weight_decay * users)
        # A device without support keeps its embedding, whoever else is in its block.
        users = torch.where(support.mask.any(-1, keepdim=True), stepped, users)
    return users.detach()


def _several_steps(
    loss: _Loss, parameters: Parameters, trajectories: Trajectories, query: _Steps, at: Tensor, users: Tensor
) -> LocalUpdate:
    """Local gradient descent on a copy of the shared parameters per device, all devices of the block at once."""
    training, recurrence = loss.settings.training, Recurrence(loss.settings.model)

    def loss_of_one(own: Parameters, *device: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        items, rewards, index, user, *steps = (value.unsqueeze(0) for value in device)
        tape = Tape(recording=False)
        states = recurrence.run(own, items, rewards, tape)
        per_user, metrics = loss.shared(own, _rows(states, index), _Steps(*steps), user, tape)
        return per_user.sum(), metrics

    step = vmap(grad(loss_of_one, has_aux=True))
    steps = (query.items, query.rewards, query.returns, query.mask)
    arguments = (trajectories.items, trajectories.rewards, at, users, *steps)
    own = {name: value.expand(len(users), *value.shape) for name, value in parameters.items()}
    path = {name: torch.zeros(len(users), *value.shape) for name, value in parameters.items()}
    metrics: dict[str, Tensor] = {}
    for _ in range(training.local_steps):
        gradients, seen = step(own, *arguments)
        metrics = metrics or seen  # of the first step, as with a single one
        path = {name: path[name] + gradients[name] for name in path}
        own = {name: own[name] - training.local_learning_rate * gradients[name] for name in own}
    scale = loss.settings.privacy.group_scale
    flat = torch.cat([getattr(scale, group_of(name)) * value.flatten(1) for name, value in path.items()], 1)
    return LocalUpdate(_FormedGradients(flat), users, {name: value.squeeze(-1) for name, value in metrics.items()})


def _rows(states: Tensor, at: Tensor) -> Tensor:
    """(B, S, n) the states at the (B, S) steps."""
    return states.gather(1, at.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _take(trajectories: Trajectories, index: Tensor, count: Tensor) -> _Steps:
    """The steps at (B, S) `index`, of which the first (B,) `count` are real."""
    mask = torch.arange(index.shape[1]) < count.unsqueeze(-1)
    return _Steps(
        trajectories.items.gather(1, index),
        trajectories.rewards.gather(1, index),
        trajectories.returns.gather(1, index),
        mask,
    )


@dataclass(frozen=True)
class _GhostGradients:
    """Gradients of one local step, never formed."""

    recorded: list[tuple[Use, tuple[Tensor, ...]]]
    shapes: dict[str, torch.Size]
    scale: GroupScale

    def _factor(self, weight: str) -> float:
        return float(getattr(self.scale, group_of(weight)))

    @torch.no_grad()
    def norms(self) -> Tensor:
        squares = [self._factor(use.weight) ** 2 * use.square_norms(deltas) for use, deltas in self.recorded]
        return torch.stack(squares).sum(0).clamp(min=0).sqrt()

    @torch.no_grad()
    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = torch.zeros(sum(shape.numel() for shape in self.shapes.values()), dtype=weights.dtype)
        parts = torch.split(total, [shape.numel() for shape in self.shapes.values()])
        views = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        for use, deltas in self.recorded:
            use.add_sum(deltas, weights * self._factor(use.weight), views[use.weight])
        return total


@dataclass(frozen=True)
class _FormedGradients:
    """Gradients of several local steps: (B, d), formed."""

    flat: Tensor

    def norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.flat, dim=1)
        return norms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return weights @ self.flat
