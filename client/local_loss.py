"""One device's loss in a round, written over a batch of devices: what :mod:`client.local_update` takes gradients of.

Shapes: B devices, S steps that a loss is taken over, w user width, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.candidates import Candidates, InBatch, Negatives
from common.item_slice import ItemSlice
from common.model import HEADS, Parameters, condition, items_in, policy_weight, queries
from common.objective import WEIGHT_EDGES, Evidence, coefficients, histogram, mean_over, top_k_multiplier
from common.settings import Head, Settings
from common.softmax import CandidateLikelihood, ItemLikelihood, candidate_likelihood, likelihood
from common.tape import Picked, Tape
from common.trajectory import HIGHEST_REWARD, Trajectories

MULTIPLIER_BINS = 20
"""Bins of the histogram of λ_K, over [0, K]."""


@dataclass(frozen=True)
class Steps:
    """The steps of B trajectories that one loss is taken over: S, of which those of `mask` count."""

    items: Tensor
    rewards: Tensor
    returns: Tensor
    mask: Tensor


At = slice | Tensor
"""Where steps stand in their windows: the same stretch in all of them, or (B, S) indices."""


def steps_between(
    trajectories: Trajectories, first: Tensor, last: Tensor, item_slice: ItemSlice | None = None
) -> tuple[At, Steps]:
    """The steps from `first` (B,) to before `last` (B,): the least stretch of the windows that holds them all; of a
    slice only those of its items, moved together, with the items' positions in it."""
    some = first < last
    start, stop = (int(first[some].min()), int(last.max())) if bool(some.any()) else (0, 0)
    at, place = slice(start, stop), torch.arange(start, stop)
    mask = (place >= first.unsqueeze(-1)) & (place < last.unsqueeze(-1))
    items, rewards, returns = trajectories.items[:, at], trajectories.rewards[:, at], trajectories.returns[:, at]
    if item_slice is None:
        return at, Steps(items, rewards, returns, mask)
    items = item_slice.positions(items)
    mask = mask & (items >= 0)
    kept = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    columns = (items.clamp(min=0), rewards, returns, mask)
    return start + kept, Steps(*(values.gather(1, kept) for values in columns))


def states_at(states: Tensor, at: At) -> Tensor:
    """(B, S, n) of (B, T, n)."""
    if isinstance(at, slice):
        return states[:, at]
    return states.gather(1, at.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


@dataclass(frozen=True)
class Loss:
    """What B devices' losses are made of; `item_slice`: the items that the heads have rows for, None: all."""

    settings: Settings
    candidates: Candidates
    warm: bool
    item_slice: ItemSlice | None = None

    def shared(
        self,
        parameters: Parameters,
        states: Tensor,
        steps: Steps,
        users: Tensor,
        tape: Tape | None,
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
                baseline = self._expected(policy, 1, critic).detach()
            elif objective.critic == "doubly-robust" and self.warm:
                slate_size = objective.slate_size if objective.estimator == "top-k" else 1
                shown = self._expected(policy, slate_size, critic)
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

    def own(self, parameters: Parameters, states: Tensor, support: Steps, users: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each user's loss as far as its embedding is concerned, and (B,) its mean coefficient."""
        tape = Tape()  # of which nothing is used: only the embeddings are to have a gradient
        conditioned = queries(condition(parameters, states, users, tape), self.settings.model.temperature)
        if self.settings.objective.estimator == "direct":
            fit = mean_over(_Critic(parameters, conditioned, support, tape).loss, support.mask)
            return fit, torch.ones_like(fit)
        policy = self._head("policy", parameters, conditioned, support, tape)
        log_beta = None
        if self.settings.objective.needs_behaviour:
            head = self.settings.objective.head_of_behaviour
            log_beta = self._head(head, parameters, conditioned.detach(), support, tape).log_probability.detach()
        log_pi = policy.log_probability.detach()
        rewards, returns = support.rewards, support.returns
        if self.settings.reward.source == "critic":
            rewards = returns = _Critic(parameters, conditioned, support, tape).own
        evidence = Evidence(rewards, returns, support.mask, log_pi, log_beta, None, None, self._items(parameters))
        c = coefficients(self.settings.objective, evidence, self.warm)
        return -mean_over(c * policy.fit, support.mask), mean_over(c, support.mask)

    def _items(self, parameters: Parameters) -> int:
        return items_in(parameters) if self.item_slice is None else self.item_slice.items

    def _expected(self, policy: ItemLikelihood, slate_size: int, critic: "_Critic") -> Tensor:
        """(B, S) what a slate drawn from the policy brings, as the critic has it."""
        assert isinstance(policy, CandidateLikelihood)
        return policy.expected_value(slate_size, critic.own, critic.of(self.candidates))

    def _head(
        self, head: Head, parameters: Parameters, conditioned: Tensor, steps: Steps, tape: Tape | None
    ) -> ItemLikelihood:
        name, inputs = HEADS[head], conditioned
        weight = policy_weight(self.settings, parameters) if head == "policy" else parameters[name]
        if head == "frequency":
            inputs = torch.ones_like(conditioned[..., :1])
        if head == "policy" and self.settings.objective.critic != "none":  # which sums over the candidates
            assert not isinstance(self.candidates, InBatch)
            return candidate_likelihood(weight, name, inputs, steps.items, self.candidates, tape)
        return likelihood(weight, name, inputs, steps.items, steps.mask, self.candidates, tape)


class _Critic:
    """The reward model q(s, a) = 5 σ(h·c_a): what a positive reward is expected to be, in [0, 5].

    Fitted by the cross-entropy of r⁺/5, which is least where σ is its mean, on the logged items.
    """

    def __init__(self, parameters: Parameters, conditioned: Tensor, steps: Steps, tape: Tape | None) -> None:
        name = HEADS["critic"]
        self._weight, self._conditioned = parameters[name], conditioned.detach()
        logit = (conditioned * self._weight[steps.items]).sum(-1)
        if tape is not None:
            tape.uses.append(Picked(name, conditioned, tape.watch(logit), steps.items))
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
