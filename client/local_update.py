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
from torch.nn.functional import binary_cross_entropy_with_logits

from common.ghost import Gradient, Picked, Tape
from common.item_slice import ItemSlice
from common.model import HEADS, Parameters, Recurrence, condition, group_of, items_in, policy_weight, queries
from common.objective import WEIGHT_EDGES, Evidence, coefficients, histogram, mean_over, top_k_multiplier
from common.settings import GroupScale, Head, Settings
from common.softmax import Candidates, ItemLikelihood, Negatives, likelihood
from common.trajectory import HIGHEST_REWARD, Trajectories

MULTIPLIER_BINS = 20
"""Bins of the histogram of λ_K, over [0, K]."""

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
    """(B,) each, or (B, bins) for histograms: losses and weights of the shared part, for simulations."""


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
    candidates: Candidates,
    warm: bool,
    item_slice: ItemSlice | None = None,
) -> LocalUpdate:
    """Steps 1 to 3 for B devices.

    Args:
        parameters: the round's shared parameters.
        trajectories: the devices' windows.
        users: (B, w) the devices' embeddings.
        candidates: what the round's softmax is normalised over.
        warm: whether the warm-up rounds are over.
        item_slice: the items that the heads have rows for; steps with other items are in no loss. None: all.
    """
    loss = _Loss(settings, candidates, warm, item_slice)
    tape = Tape(recording=settings.training.local_steps == 1)
    states, at, query, users = _prepare(loss, parameters, trajectories, users, tape)
    if settings.training.local_steps > 1:
        return _several_steps(loss, parameters, trajectories, query, at, users)
    per_user, _, metrics = loss.shared(parameters, _rows(states, at), query, users, tape)
    outputs = [output for use in tape.uses for output in use.outputs]
    deltas = iter(torch.autograd.grad(per_user.sum(), outputs))
    with torch.no_grad():
        uses = [(use.weight, use.gradient(*(next(deltas) for _ in use.outputs))) for use in tape.uses]
    shapes = {name: value.shape for name, value in parameters.items()}
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
    loss, idle = _Loss(settings, candidates, warm, item_slice), Tape(recording=False)
    states, at, query, users = _prepare(loss, parameters, trajectories, users, idle)
    per_user, _, _ = loss.shared(parameters, _rows(states, at), query, users, idle)
    return per_user, users


def adapt_users(
    settings: Settings, parameters: Parameters, states: Tensor, trajectories: Trajectories, users: Tensor
) -> Tensor:
    """(B, w) embeddings after the local steps over all of each trajectory, by the full softmax: for serving.

    Args:
        states: (B, T, n) states before each step.
    """
    everything = torch.arange(trajectories.items.shape[1]).expand(len(users), -1)
    _, support = _take(trajectories, everything, trajectories.lengths, None)
    return _adapt(_Loss(settings, None, warm=True), parameters, states, support, users)


@dataclass(frozen=True)
class _Loss:
    settings: Settings
    candidates: Candidates
    warm: bool
    item_slice: ItemSlice | None = None

    def shared(
        self,
        parameters: Parameters,
        states: Tensor,
        steps: _Steps,
        users: Tensor,
        tape: Tape,
        log_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B,) each user's loss, the sum of the heads' means over its steps; (B, S) log π; and the metrics.

        Args:
            log_start: (B, S) log π of the round's starting policy, in local steps after the first.
        """
        objective = self.settings.objective
        conditioned = queries(condition(parameters, states, users, tape), self.settings.model.temperature)
        if objective.estimator == "direct":
            critic = _Critic(parameters, conditioned, steps, tape)
            loss = mean_over(critic.loss, steps.mask)
            metrics = {"critic_loss": loss, "value": mean_over(critic.own, steps.mask)}
            return loss, critic.own, {name: value.detach() for name, value in metrics.items()}
        # On top of the critic's ranking π leaves the state to the critic.
        shaping = conditioned if objective.prior == "none" else conditioned.detach()
        policy = self._head("policy", parameters, shaping, steps, tape)
        loss = torch.zeros(len(users), dtype=states.dtype)
        metrics, log_beta = {"log_pi": policy.log_probability}, None  # log β, whether or not a weight divides by it
        # β reads the state and does not shape it: its gradient stops here.
        for head in self.settings.heads:
            if head in ("behaviour", "frequency"):
                behaviour = self._head(head, parameters, conditioned.detach(), steps, tape)
                loss = loss - mean_over(behaviour.fit, steps.mask)
                metrics |= {f"{head}_loss": -behaviour.log_probability}
                if (objective.needs_behaviour or objective.watch) and head == objective.head_of_behaviour:
                    log_beta = behaviour.log_probability.detach()
        baseline, rewards, returns = None, steps.rewards, steps.returns
        if "critic" in self.settings.heads:
            used = self.settings.needs_critic
            critic = _Critic(parameters, conditioned if used else conditioned.detach(), steps, tape)
            loss = loss + mean_over(critic.loss, steps.mask)
            metrics |= {"critic_loss": critic.loss, "value": critic.own}
            if self.settings.reward.source == "critic":
                rewards = returns = critic.own
            if objective.critic == "baseline":
                baseline = policy.expected_value(1, critic.own, critic.of(self.candidates)).detach()
            elif objective.critic == "doubly-robust" and self.warm:
                slate_size = objective.slate_size if objective.estimator == "top-k" else 1
                shown = policy.expected_value(slate_size, critic.own, critic.of(self.candidates))
                loss = loss - mean_over(shown, steps.mask)
                baseline = critic.own
        log_pi = policy.log_probability.detach()
        evidence = Evidence(
            rewards,
            returns,
            steps.mask,
            log_pi,
            log_beta if objective.needs_behaviour else None,
            log_start,
            baseline,
            self._items(parameters),
        )
        c = coefficients(objective, evidence, self.warm)
        policy_loss = -mean_over(c * policy.fit, steps.mask)
        metrics |= {"coefficient": c}
        means = {"policy_loss": policy_loss} | {name: mean_over(value, steps.mask) for name, value in metrics.items()}
        if log_beta is not None:
            means |= _correction(log_pi, log_beta, steps.mask, objective.slate_size)
        return loss + policy_loss, log_pi, {name: value.detach() for name, value in means.items()}

    def own(self, parameters: Parameters, states: Tensor, support: _Steps, users: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each user's loss as far as its embedding is concerned, and (B,) its mean coefficient."""
        idle = Tape(recording=False)
        conditioned = queries(condition(parameters, states, users, idle), self.settings.model.temperature)
        if self.settings.objective.estimator == "direct":
            fit = mean_over(_Critic(parameters, conditioned, support, idle).loss, support.mask)
            return fit, torch.ones_like(fit)
        policy = self._head("policy", parameters, conditioned, support, idle)
        log_beta = None
        if self.settings.objective.needs_behaviour:
            head = self.settings.objective.head_of_behaviour
            log_beta = self._head(head, parameters, conditioned.detach(), support, idle).log_probability.detach()
        log_pi = policy.log_probability.detach()
        rewards, returns = support.rewards, support.returns
        if self.settings.reward.source == "critic":
            rewards = returns = _Critic(parameters, conditioned, support, idle).own
        evidence = Evidence(rewards, returns, support.mask, log_pi, log_beta, None, None, self._items(parameters))
        c = coefficients(self.settings.objective, evidence, self.warm)
        return -mean_over(c * policy.fit, support.mask), mean_over(c, support.mask)

    def _items(self, parameters: Parameters) -> int:
        return items_in(parameters) if self.item_slice is None else self.item_slice.items

    def _head(
        self, head: Head, parameters: Parameters, conditioned: Tensor, steps: _Steps, tape: Tape
    ) -> ItemLikelihood:
        name, inputs = HEADS[head], conditioned
        weight = policy_weight(self.settings, parameters) if head == "policy" else parameters[name]
        if head == "frequency":
            inputs = torch.ones_like(conditioned[..., :1])
        return likelihood(weight, name, inputs, steps.items, steps.mask, self.candidates, tape)


class _Critic:
    """The reward model q(s, a) = 5 σ(h·c_a): what a positive reward is expected to be, in [0, 5].

    Fitted by the cross-entropy of r⁺/5, which is least where σ is its mean, on the logged items.
    """

    def __init__(self, parameters: Parameters, conditioned: Tensor, steps: _Steps, tape: Tape) -> None:
        name = HEADS["critic"]
        self._weight, self._conditioned = parameters[name], conditioned.detach()
        logit = tape.watch((conditioned * self._weight[steps.items]).sum(-1))
        tape.uses.append(Picked(name, conditioned, steps.items, logit))
        self.loss = binary_cross_entropy_with_logits(
            logit, steps.rewards.clamp(min=0) / HIGHEST_REWARD, reduction="none"
        )
        self.own = HIGHEST_REWARD * torch.sigmoid(logit.detach())

    def of(self, candidates: Candidates) -> Tensor:
        """(B, S, C) q of the candidates, detached."""
        rows = self._weight[candidates.ids] if isinstance(candidates, Negatives) else self._weight
        return HIGHEST_REWARD * torch.sigmoid(self._conditioned @ rows.detach().T)


def _correction(log_pi: Tensor, log_beta: Tensor, mask: Tensor, slate_size: int) -> dict[str, Tensor]:
    """Histograms of the weights before their cap and of λ_K: counts of each user's steps."""
    weights = (log_pi - log_beta).exp()
    multiplier = top_k_multiplier(log_pi, slate_size)
    return {
        "weights": histogram(weights, mask, WEIGHT_EDGES),
        "multipliers": histogram(multiplier, mask, torch.linspace(0, slate_size, MULTIPLIER_BINS + 1)[1:-1]),
    }


def _prepare(
    loss: _Loss, parameters: Parameters, trajectories: Trajectories, users: Tensor, tape: Tape
) -> tuple[Tensor, Tensor, _Steps, Tensor]:
    """Steps 1 and 2: (B, T+1, n) states, (B, S) where the newer part stands, its steps, and adapted embeddings."""
    states = Recurrence(loss.settings.model).run(parameters, trajectories.items, trajectories.rewards, tape)
    support_end = int(trajectories.support.max())
    older = torch.arange(support_end).expand(len(users), -1)
    before, support = _take(trajectories, older, trajectories.support, loss.item_slice)
    users = _adapt(loss, parameters, _rows(states.detach(), before), support, users)
    newer = trajectories.lengths - trajectories.support
    at = trajectories.support.unsqueeze(-1) + torch.arange(int(newer.max()))
    at = at.clamp(max=trajectories.items.shape[1] - 1)  # padded steps may point anywhere
    at, query = _take(trajectories, at, newer, loss.item_slice)
    return states, at, query, users


def _adapt(loss: _Loss, parameters: Parameters, states: Tensor, support: _Steps, users: Tensor) -> Tensor:
    """Gradient steps on the user embeddings, each device on its own loss over its own support.

    The loss is divided by the mean coefficient, so that one learning rate suits every estimator.
    """
    training = loss.settings.training
    if not support.mask.shape[1]:
        return users
    for _ in range(training.user_steps):
        leaf = users.detach().requires_grad_()
        per_user, coefficient = loss.own(parameters, states, support, leaf)
        scale = coefficient.clamp(min=_SMALLEST_COEFFICIENT)
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

    def loss_of_one(
        own: Parameters, log_start: Tensor | None, *device: Tensor
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        items, rewards, index, user, *steps = (value.unsqueeze(0) for value in device)
        tape = Tape(recording=False)
        states = recurrence.run(own, items, rewards, tape)
        start = None if log_start is None else log_start.unsqueeze(0)
        per_user, log_pi, metrics = loss.shared(own, _rows(states, index), _Steps(*steps), user, tape, start)
        return per_user.sum(), (log_pi.squeeze(0), metrics)

    steps = (query.items, query.rewards, query.returns, query.mask)
    arguments = (trajectories.items, trajectories.rewards, at, users, *steps)
    own = {name: value.expand(len(users), *value.shape) for name, value in parameters.items()}
    path = {name: torch.zeros(len(users), *value.shape) for name, value in parameters.items()}
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


def _rows(states: Tensor, at: Tensor) -> Tensor:
    """(B, S, n) the states at the (B, S) steps."""
    return states.gather(1, at.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _take(
    trajectories: Trajectories, index: Tensor, count: Tensor, item_slice: ItemSlice | None
) -> tuple[Tensor, _Steps]:
    """The steps at (B, S) `index`, of which the first (B,) `count` are real, and where they are; of a slice only those
    of its items, moved together, with the items' positions in it."""
    mask = torch.arange(index.shape[1]) < count.unsqueeze(-1)
    items = trajectories.items.gather(1, index)
    if item_slice is not None:
        items = item_slice.positions(items)
        mask = mask & (items >= 0)
        kept = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
        index, items, mask = (values.gather(1, kept) for values in (index, items.clamp(min=0), mask))
    return index, _Steps(items, trajectories.rewards.gather(1, index), trajectories.returns.gather(1, index), mask)


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
