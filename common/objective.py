"""The objective: what each logged step weighs in a device's loss −Σ_t c_t log π(a_t|s_t).

The coefficients c_t are numbers, not functions of the parameters: the gradient passes through log π alone
(Chen et al. 2019, equations 3 to 6; written out in ``docs/decisions/objective.md``).

==================  =================================================================
estimator           c_t
==================  =================================================================
``cross-entropy``   1: rewards are ignored
``likelihood``      max(r_t, 0)
``reinforce``       max(R_t, 0)
``off-policy``      w_t max(R_t, 0), w_t = min(π(a_t|s_t) / β(a_t|s_t), c), see below
``top-k``           w_t λ_t max(R_t, 0), λ_t = K (1 − π(a_t|s_t))^{K−1}
==================  =================================================================

With `objective.self_normalised` w_t is then divided by its mean over the device's own steps: the cap bounds it before,
not after, and a device with a single step has w = 1.

Only the positive part of a return counts: −R log π is unbounded below where R < 0, so that a single disliked item
could drive log π to −∞. Disliked items lose probability because liked ones gain it.
"""

import numpy as np
import torch
from torch import Tensor

from common.settings import ObjectiveSettings


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


def coefficients(
    objective: ObjectiveSettings,
    log_pi: Tensor,
    log_beta: Tensor | None,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor,
    warm: bool,
) -> Tensor:
    """(B, T) detached coefficients c_t of each step; 0 outside of `mask`.

    Args:
        log_pi, log_beta: (B, T) log-probabilities of the logged items; β's may be None where it is not divided by.
        rewards, returns: (B, T) r_t and R_t.
        mask: (B, T) bool, the steps that count.
        warm: warm-up is over; before, w = λ = 1.
    """
    if objective.estimator == "cross-entropy":
        return mask.to(log_pi.dtype)
    if objective.estimator == "likelihood":
        return torch.where(mask, rewards.clamp(min=0), 0)
    value = torch.where(mask, returns.clamp(min=0), 0)
    if objective.estimator == "reinforce" or not warm:
        return value
    assert log_beta is not None
    weights = torch.where(mask, importance_weights(log_pi, log_beta, objective.weight_cap), 0)
    if objective.self_normalised:
        weights = weights / mean_over(weights, mask).clamp(min=torch.finfo(weights.dtype).tiny).unsqueeze(-1)
    if objective.estimator == "top-k":
        weights = weights * top_k_multiplier(log_pi, objective.slate_size)
    return weights * value


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) each user's mean of (B, T) values over the steps of `mask`; 0 where a user has none."""
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp(min=1)
