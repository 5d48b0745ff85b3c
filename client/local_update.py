"""One device's computation in a round, written over a batch of devices.

A real device runs it with B = 1, a simulation runs it with B in the hundreds; both give the same numbers
(``tests/contract/test_batch_of_one.py``).

1. The recurrent states of the window, from the shared parameters.
2. *Private part*: a few gradient steps on the user embedding, over the older part of the window (the support).
3. *Shared part*: the gradient, at the adapted embedding, of the newer part's loss by the shared parameters; or, with
   several local steps, the sum of the gradients along the local path.

The user embedding is an input of step 3 and stays on the device.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from client.histogram import histograms_of
from client.local_loss import At, Loss, Steps, states_at, steps_between
from common.candidates import Candidates
from common.ghost import Gradient
from common.item_slice import ItemSlice
from common.item_tables import by_parts, formed
from common.model import Parameters, group_of, trained
from common.offer import Offer
from common.recurrence import Recurrence
from common.settings import GroupScale, Settings
from common.tape import Tape
from common.trajectory import Trajectories

_SMALLEST_COEFFICIENT = 1e-6


class Gradients(Protocol):
    """The shared gradients of B devices, in the scale of `privacy.group_scale`, or what else a round releases."""

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
    """(B,) each, or (B, bins) for histograms: losses and weights of the shared part, for simulations."""


def update_of(offer: Offer, windows: Trajectories, users: Tensor) -> LocalUpdate:
    """What B devices, of embeddings `users` (B, w), compute in a round from their windows: steps 1 to 3, or a histogram
    of all that they have, which leaves the embeddings as they are."""
    settings = offer.settings
    if offer.counting:
        return LocalUpdate(histograms_of(settings, windows, offer.items, offer.clip), users, {})
    return compute_update(settings, offer.parameters, windows, users, offer.candidates, offer.warm, offer.item_slice)


def compute_update(
    settings: Settings,
    parameters: Parameters,
    trajectories: Trajectories,
    users: Tensor,
    candidates: Candidates,
    warm: bool,
    item_slice: ItemSlice | None = None,
) -> LocalUpdate:
    """Steps 1 to 3 for B devices.

    Args:
        parameters: the round's shared parameters; the update is of those that are trained.
        trajectories: the devices' windows.
        users: (B, w) the devices' embeddings.
        candidates: what the round's softmax is normalised over.
        warm: whether the warm-up rounds are over.
        item_slice: the items that the heads have rows for; steps with other items are in no loss. None: all.
    """
    loss, tables = Loss(settings, candidates, warm, item_slice), formed(parameters)
    recording = Recurrence(settings.model).record(tables, trajectories.items, trajectories.rewards)
    users = _adapt(loss, tables, recording.states, trajectories, users)
    if settings.training.local_steps > 1:
        return _several_steps(loss, parameters, trajectories, users)
    tape, states = Tape(), recording.states.requires_grad_()
    at, steps = _newer(loss, trajectories)
    per_user, _, metrics = loss.shared(tables, states_at(states, at), steps, users, tape)
    outputs = [output for use in tape.uses for output in use.outputs]
    wanted, *deltas = torch.autograd.grad(per_user.sum(), [states, *outputs], allow_unused=True, materialize_grads=True)
    rest = iter(deltas)
    with torch.no_grad():
        heads = [(use.weight, use.gradient(*(next(rest) for _ in use.outputs))) for use in tape.uses]
        uses = by_parts(trained(settings, parameters), parameters, recording.backward(wanted) + heads)
    shapes = {name: value.shape for name, value in trained(settings, parameters).items()}
    return LocalUpdate(_GhostGradients(uses, shapes, settings.privacy.group_scale), users, metrics)


def losses_of(
    settings: Settings,
    parameters: Parameters,
    trajectories: Trajectories,
    users: Tensor,
    candidates: Candidates,
    warm: bool,
    item_slice: ItemSlice | None = None,
) -> tuple[Tensor, Tensor]:
    """(B,) the losses whose gradients :func:`compute_update` takes, differentiable by the parameters, and (B, w) the
    adapted embeddings: for training that is not federated. Arguments as there."""
    loss, tables = Loss(settings, candidates, warm, item_slice), formed(parameters)
    states = Recurrence(settings.model).run(tables, trajectories.items, trajectories.rewards)
    users = _adapt(loss, tables, states.detach(), trajectories, users)
    at, steps = _newer(loss, trajectories)
    per_user, _, _ = loss.shared(tables, states_at(states, at), steps, users, None)
    return per_user, users


def adapt_users(
    settings: Settings, parameters: Parameters, states: Tensor, trajectories: Trajectories, users: Tensor
) -> Tensor:
    """(B, w) embeddings after the local steps over all of each trajectory, by the full softmax: for serving.

    Args:
        states: (B, T, n) states before each step.
    """
    everything = replace(trajectories, support=trajectories.lengths)
    return _adapt(Loss(settings, None, warm=True), parameters, states, everything, users)


def _newer(loss: Loss, trajectories: Trajectories) -> tuple[At, Steps]:
    """Where the newer parts of the windows stand, and their steps."""
    return steps_between(trajectories, trajectories.support, trajectories.lengths, loss.item_slice)


def _adapt(loss: Loss, parameters: Parameters, states: Tensor, trajectories: Trajectories, users: Tensor) -> Tensor:
    """Gradient steps on the user embeddings, each device on its own loss over its own support.

    The loss is divided by the mean coefficient, so that one learning rate suits every estimator.
    """
    training = loss.settings.training
    first = torch.zeros_like(trajectories.support)
    at, support = steps_between(trajectories, first, trajectories.support, loss.item_slice)
    if not support.mask.shape[1]:
        return users
    states = states_at(states, at)
    for _ in range(training.user_steps):
        leaf = users.detach().requires_grad_()
        per_user, coefficient = loss.own(parameters, states, support, leaf)
        scale = coefficient.clamp(min=_SMALLEST_COEFFICIENT)
        (gradient,) = torch.autograd.grad((per_user / scale).sum(), leaf)
        stepped = users - training.user_learning_rate * (gradient + training.user_weight_decay * users)
        # A device without support keeps its embedding, whoever else is in its block.
        users = torch.where(support.mask.any(-1, keepdim=True), stepped, users)
    return users.detach()


def _several_steps(loss: Loss, parameters: Parameters, trajectories: Trajectories, users: Tensor) -> LocalUpdate:
    """Local gradient descent on a copy of the shared parameters per device, all devices of the block at once."""
    training, recurrence = loss.settings.training, Recurrence(loss.settings.model)
    at, query = _newer(loss, trajectories)
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop).expand(len(users), -1)

    def loss_of_one(
        own: Parameters, log_start: Tensor | None, *device: Tensor
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        items, rewards, index, user, *steps = (value.unsqueeze(0) for value in device)
        tables = formed({name: own.get(name, value) for name, value in parameters.items()})
        states = recurrence.run(tables, items, rewards)
        start = None if log_start is None else log_start.unsqueeze(0)
        per_user, log_pi, metrics = loss.shared(tables, states_at(states, index), Steps(*steps), user, None, start)
        return per_user.sum(), (log_pi.squeeze(0), metrics)

    steps = (query.items, query.rewards, query.returns, query.mask)
    arguments = (trajectories.items, trajectories.rewards, at, users, *steps)
    shared = trained(loss.settings, parameters)
    own = {name: value.expand(len(users), *value.shape) for name, value in shared.items()}
    path = {name: torch.zeros(len(users), *value.shape) for name, value in shared.items()}
    log_start: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    for _ in range(training.local_steps):
        dimensions = (0, None if log_start is None else 0, *(0 for _ in arguments))
        gradients, (log_pi, seen) = vmap(grad(loss_of_one, has_aux=True), dimensions)(own, log_start, *arguments)
        log_start = log_pi if log_start is None else log_start
        metrics = metrics or seen  # of the first step, as with a single one
        path = {name: path[name] + gradients[name] for name in path}
        own = {name: own[name] - training.local_learning_rate * gradients[name] for name in own}
    scale = loss.settings.privacy.group_scale
    flat = torch.cat([getattr(scale, group_of(name)) * value.flatten(1) for name, value in path.items()], 1)
    return LocalUpdate(_FormedGradients(flat), users, {name: value.squeeze(1) for name, value in metrics.items()})


@dataclass(frozen=True)
class _GhostGradients:
    """Gradients of one local step, by the uses of the weights."""

    uses: list[tuple[str, Gradient]]
    shapes: dict[str, torch.Size]
    scale: GroupScale

    def _factor(self, weight: str) -> float:
        return float(getattr(self.scale, group_of(weight)))

    @torch.no_grad()
    def norms(self) -> Tensor:
        squares = [self._factor(weight) ** 2 * gradient.square_norms() for weight, gradient in self.uses]
        return torch.stack(squares).sum(0).clamp(min=0).sqrt()

    @torch.no_grad()
    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = torch.zeros(sum(shape.numel() for shape in self.shapes.values()), dtype=weights.dtype)
        parts = torch.split(total, [shape.numel() for shape in self.shapes.values()])
        views = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        for weight, gradient in self.uses:
            gradient.add_sum(weights * self._factor(weight), views[weight])
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
