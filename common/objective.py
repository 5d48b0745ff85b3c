"""The objective: what each logged step weighs in a device's loss −Σ_t c_t log π(a_t|s_t).

The coefficients c_t are numbers, not functions of the parameters: the gradient passes through log π alone
(Chen et al. 2019, equations 3 to 6; derivations in ``docs/formulas/``).

==================  ====================================================================
estimator           c_t
==================  ====================================================================
``cross-entropy``   1: rewards are ignored
``likelihood``      max(r_t, 0), or times min(1/(Aβ), c): a weighted log-likelihood
``reinforce``       V_t
``off-policy``      w_t V_t, w_t = min(π(a_t|s_t) / β(a_t|s_t), c)
``top-k``           w_t λ_t V_t, λ_t = K (1 − π(a_t|s_t))^{K−1}
``direct``          no policy: the reward model q(s, a) is fitted, and items are ranked by it
==================  ====================================================================

V_t = max(R_t, 0) − b_t, b_t a baseline. Only the positive part of a return counts: −R log π is unbounded below where
R < 0, so that a single disliked item could drive log π to −∞. Disliked items lose probability because liked ones gain
it. Below its baseline V_t is negative all the same: there w_t → 0 as π → 0 bounds the loss of the corrected estimators,
and where w_t does not (uncorrected, in the warm-up, or normalised) such steps count for nothing below the uniform
probability 1/A.

With `objective.self_normalised` w_t is then divided by its mean over the device's own steps: the cap bounds it before,
not after, and a device with a single step has w = 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.settings import ObjectiveSettings


@dataclass(frozen=True)
class Evidence:
    """What is known of B devices' T logged steps when they are weighed; all detached, (B, T).

    Attributes:
        rewards, returns: r_t and R_t.
        mask: bool, the steps that count.
        log_pi: log π(a_t|s_t).
        log_beta: log β(a_t|s_t); None where the estimator does not need it.
        log_start: log π(a_t|s_t) under the round's starting policy; None in the first local step, where π is it.
        baseline: b_t; None: 0.
        items: A, the number of items.
    """

    rewards: Tensor
    returns: Tensor
    mask: Tensor
    log_pi: Tensor
    log_beta: Tensor | None
    log_start: Tensor | None
    baseline: Tensor | None
    items: int


def returns_of(rewards: np.ndarray, discount: float) -> np.ndarray:
    """(T,) returns R_t = Σ_{t' ≥ t} γ^{t'−t} r_{t'} of one user's own history, oldest first."""
    if discount == 0:
        return rewards
    from scipy.signal import lfilter  # slow to import, and not needed without a discount

    backwards = lfilter([1.0], [1.0, -discount], rewards[::-1].astype(np.float64))
    return np.asarray(backwards[::-1], dtype=np.float32)


def importance_weights(log_pi: Tensor, log_beta: Tensor, cap: float) -> Tensor:
    """w = min(π/β, cap), element by element, detached."""
    return (log_pi - log_beta).detach().exp().clamp(max=cap)


def top_k_multiplier(log_pi: Tensor, slate_size: int) -> Tensor:
    """λ = K (1 − π)^{K−1}: the derivative of the inclusion probability 1 − (1 − π)^K by π, detached."""
    return slate_size * (1 - log_pi.detach().exp()).clamp(min=0) ** (slate_size - 1)


def coefficients(objective: ObjectiveSettings, evidence: Evidence, warm: bool) -> Tensor:
    """(B, T) detached coefficients c_t of each step; 0 outside of the mask.

    Args:
        warm: warm-up is over; before, w is that of `objective.warmup` and λ = 1 where β is divided by, and on top of a
            critic that is still to learn all c_t are 0.
    """
    mask = evidence.mask
    if objective.estimator == "cross-entropy":
        return mask.to(evidence.log_pi.dtype)
    if objective.estimator == "likelihood":
        reward = torch.where(mask, evidence.rewards.clamp(min=0), 0)
        return reward if objective.likelihood_weights == "reward" else reward * weights_of(objective, evidence, False)
    if not warm and objective.prior == "critic":
        return torch.zeros_like(evidence.log_pi)
    bounded = warm and objective.corrected and not objective.self_normalised
    c = _values(objective, evidence, bounded)
    if not warm and objective.corrected:
        return c * weights_of(objective, evidence, warm) if objective.warmup == "inverse-propensity" else c
    weights = weights_of(objective, evidence, warm)
    if objective.estimator == "top-k":
        c = c * top_k_multiplier(evidence.log_pi, objective.slate_size)
    c = c * weights
    if objective.entropy_bonus:
        # ∇H(π) = E_π[−log π ∇log π], brought to the logged items by the same weights.
        c = c - objective.entropy_bonus * weights * evidence.log_pi
    return torch.where(mask, c + _trust(objective, evidence), 0)


def weights_of(objective: ObjectiveSettings, evidence: Evidence, warm: bool) -> Tensor:
    """(B, T) the weights that bring what was logged to the policy: π/β, capped and normalised; 0 outside of the mask.

    Before `warm` they are those of the uniform policy, 1/(Aβ). Without β they are π/π_start if local steps reuse the
    logs by importance, and else 1.
    """
    log_pi, log_other, mask = evidence.log_pi, evidence.log_beta, evidence.mask
    if log_other is None:
        if evidence.log_start is None or objective.reuse == "plain":
            return mask.to(log_pi.dtype)
        log_other = evidence.log_start
    elif not warm:
        log_pi = torch.full_like(log_pi, -np.log(evidence.items))
    weights = torch.where(mask, importance_weights(log_pi, log_other, objective.weight_cap), 0)
    if objective.self_normalised:
        weights = weights / mean_over(weights, mask).clamp(min=torch.finfo(weights.dtype).tiny).unsqueeze(-1)
    return weights


def _values(objective: ObjectiveSettings, evidence: Evidence, bounded: bool) -> Tensor:
    """(B, T) V_t, as far as it may move π; `bounded`: its weight falls to 0 with π."""
    values = evidence.returns.clamp(min=0)
    if evidence.baseline is not None:
        values = values - evidence.baseline
        if not bounded:
            values = torch.where((values < 0) & (evidence.log_pi < -np.log(evidence.items)), 0, values)
    if evidence.log_start is not None:
        # PPO (Schulman et al. 2017, eq. 7): no further where the ratio has already moved past the clip.
        ratio = (evidence.log_pi - evidence.log_start).exp()
        beyond = torch.where(values > 0, ratio > 1 + objective.clip_ratio, ratio < 1 - objective.clip_ratio)
        values = torch.where(beyond, 0, values)
    return torch.where(evidence.mask, values, 0)


def _trust(objective: ObjectiveSettings, evidence: Evidence) -> Tensor | float:
    """(B, T) what κ·KL(reference ‖ π) adds to c_t: its gradient is −κ E_reference[∇log π] (TRPO's penalty form,
    Schulman et al. 2015), and the logged items are drawn from β."""
    if objective.trust_region == "none":
        return 0.0
    if objective.trust_region == "behaviour":
        return objective.trust_penalty
    assert evidence.log_beta is not None
    log_start = evidence.log_pi if evidence.log_start is None else evidence.log_start
    return objective.trust_penalty * importance_weights(log_start, evidence.log_beta, objective.weight_cap)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) each user's mean of (B, T) values over the steps of `mask`; 0 where a user has none."""
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp(min=1)


WEIGHT_EDGES = torch.logspace(-3, 3, 25)
"""Edges of the histogram of importance weights before their cap, four to a factor of ten; outer bins are open."""


def histogram(values: Tensor, mask: Tensor, edges: Tensor) -> Tensor:
    """(B, E+1) counts of each user's (B, T) values between (E,) ascending edges, below the first and above the last."""
    bins = torch.bucketize(values, edges.to(values.dtype))
    counts = values.new_zeros(len(values), len(edges) + 1)
    return counts.scatter_add_(1, bins, mask.to(values.dtype))


def propose_cap(counts: np.ndarray, edges: np.ndarray) -> float:
    """The edge c that minimises the squared bias plus the variance of the mean of min(w, c).

    Of n weights with mean E[w]: bias E[w] − E[min(w, c)] for rewards of one size, variance Var[min(w, c)] / n
    (Ionides 2008). Bins stand for their geometric middles; the outer ones for their edge.

    Args:
        counts: (E+1,) as of :func:`histogram`, summed over users.
        edges: (E,) ascending and positive.
    """
    n = counts.sum()
    middles = np.concatenate(([edges[0]], np.sqrt(edges[:-1] * edges[1:]), [edges[-1]]))
    capped = np.minimum(middles, edges[:, None])
    means = capped @ counts / max(n, 1)
    variances = capped**2 @ counts / max(n, 1) - means**2
    bias = middles @ counts / max(n, 1) - means
    return float(edges[np.argmin(bias**2 + variances / max(n, 1))])
