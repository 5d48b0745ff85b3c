"""Off-policy evaluation: what a policy would have earned, from the log of another one.

n logged events i: a state s_i, an action a_i ~ β(·|s_i), its propensity b_i = β(a_i|s_i) and a reward r_i. The target
policy π is known by `target` p_i, the probability that it shows the *logged* action. With w_i = min(p_i/b_i, c):

=================  ======================================  ==================================================
`ips`              mean of w r                             Horvitz & Thompson 1952; cap: Strehl et al. 2010
`snips`            Σ w r / Σ w                             Swaminathan & Joachims 2015
`direct_method`    mean of Σ_a π(a|s_i) q̂(s_i,a)           Dudík et al. 2011
`doubly_robust`    the same + mean of w (r − q̂(s_i,a_i))   Dudík et al. 2011
=================  ======================================  ==================================================

A slate of K enters through `target` alone: `inclusion_probability` for K independent draws, `share_of_list` for a fixed
list. Arguments not as the docstrings say raise a DataError that names the first bad value. Derivations, and when each
estimator fails: ``docs/formulas/off-policy-evaluation.md``. Tests: ``tests/unit/test_ope.py``.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import DataError

Column = NDArray[np.float64]

MINIMUM_ESS = 100
"""Below this effective sample size an estimate carries a warning: its noise is above a tenth of a reward's standard
deviation, and where weights are skewed a "95 %" interval of IPS covers the truth about 9 times in 10, or less."""

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, eq=False)
class LoggedEvents:
    """What was logged, n ≥ 1 events. Events of one user may depend on each other; without `users` none do."""

    rewards: Column  # (n,) finite
    propensities: Column  # (n,) in (0, 1], what the logging policy gave to the logged actions
    users: NDArray[np.int64] | None = None  # (n,) any integers

    def __post_init__(self) -> None:
        n = np.size(self.rewards)
        if n == 0:
            raise DataError("Expected at least 1 logged event, found 0.")
        object.__setattr__(self, "rewards", column("rewards", self.rewards, n, "finite"))
        object.__setattr__(self, "propensities", column("propensities", self.propensities, n, "in (0, 1]"))
        if self.users is not None:
            object.__setattr__(self, "users", _integers("users", self.users, (n,)))


@dataclass(frozen=True)
class Estimate:
    """An estimated mean reward per event, and how far to trust it."""

    value: float
    standard_error: float  # robust to dependence within a user; inf with one user, who tells nothing of the others
    ci95: tuple[float, float]  # value ∓ 1.96 standard errors
    effective_sample_size: float  # (Σw)²/Σw² (Kong 1992), w summed by user: as many users of equal weight are as noisy
    n: int
    warning: str | None  # why not to rely on it


def ips(events: LoggedEvents, target: ArrayLike, *, cap: float = math.inf) -> Estimate:
    """Inverse propensity score: unbiased without a cap, if β > 0 wherever π > 0.

    A cap lowers the value, where r ≥ 0, by Σ_a β (π/β − min(π/β, cap)) r in expectation, and bounds its variance.

    Args:
        target: (n,) in [0, 1].
        cap: upper bound of a weight, > 0.
    """
    weights = _weights(events, target, cap)
    return _mean(events, weights * events.rewards, weights)


def snips(events: LoggedEvents, target: ArrayLike, *, cap: float = math.inf) -> Estimate:
    """Self-normalised IPS: never outside of the range of the rewards, and moves with a constant added to them.

    Bias: −E[w² (r − V)]/n to first order. Standard error: the delta method's, from the influence w (r − V) / mean(w).
    With a slate's `target` it is the mean reward *per item shown*. Arguments as in `ips`, but not every target 0.
    """
    weights = _weights(events, target, cap)
    total = weights.sum()
    if total == 0:
        raise DataError("Expected some target > 0: the policy takes no logged action, and SNIPS divides by their sum.")
    value = float(weights @ events.rewards / total)
    return _estimate(events, value, weights * (events.rewards - value) / (total / len(weights)), weights)


def direct_method(events: LoggedEvents, expected: ArrayLike) -> Estimate:
    """The reward model's own answer, as biased as q̂; the interval knows nothing of q̂'s error.

    `expected` is (n,) Σ_a π(a|s_i) q̂(s_i, a), finite; for a slate with its target in place of π.
    """
    modelled = column("expected", expected, len(events.rewards), "finite")
    return _mean(events, modelled, np.ones_like(modelled))


def doubly_robust(
    events: LoggedEvents, target: ArrayLike, expected: ArrayLike, predicted: ArrayLike, *, cap: float = math.inf
) -> Estimate:
    """The direct method, corrected by IPS of its residuals: without a cap unbiased if either b or q̂ is right.

    q̂ must come from other events than these: a model that has seen a reward hides its own error. `predicted` is (n,)
    q̂(s_i, a_i), finite; `target` and `cap` are as in `ips`, `expected` as in `direct_method`.
    """
    weights, n = _weights(events, target, cap), len(events.rewards)
    residuals = events.rewards - column("predicted", predicted, n, "finite")
    return _mean(events, column("expected", expected, n, "finite") + weights * residuals, weights)


def inclusion_probability(probabilities: ArrayLike, slate_size: int) -> Column:
    """α = 1 − (1 − π)^K: how likely K independent draws from π show an item (Chen et al. 2019, section 4.3).

    As a `target` it values the sum of rewards over a slate's distinct items. `probabilities` is (n,) in [0, 1].
    """
    if slate_size < 1:
        raise DataError(f"Expected slate_size={slate_size} ≥ 1.")
    pi = column("probabilities", probabilities, np.size(probabilities), "in [0, 1]")
    with np.errstate(divide="ignore"):  # log1p(−1) = −inf is meant: α = 1
        return np.asarray(-np.expm1(slate_size * np.log1p(-pi)))  # exact where π is tiny, as 1 − (1 − π)^K is not


def share_of_list(actions: ArrayLike, lists: ArrayLike) -> Column:
    """The share of a fixed list's K places that show the logged action: 1/K or 0 if no item is repeated.

    As a `target` it values the mean reward over the K places. `actions` is (n,) items, `lists` (n, K) what the policy
    would show in each event; −1 is an empty place, which earns 0.
    """
    n = np.size(actions)
    logged = _integers("actions", actions, (n,))
    shown = _integers("lists", lists, (n, max(np.size(lists) // max(n, 1), 1)))
    return np.asarray(((shown == logged[:, None]) & (shown >= 0)).mean(axis=1), dtype=np.float64)


def column(name: str, values: ArrayLike, n: int, range_: Literal["finite", "in [0, 1]", "in (0, 1]"]) -> Column:
    """The values as (n,) float64, or a DataError that names the first one out of range."""
    checked = np.asarray(values, dtype=np.float64)
    if checked.shape != (n,):
        raise DataError(f"Expected {name} of shape ({n},), not {checked.shape}.")
    if range_ == "finite":
        good = np.isfinite(checked)
    else:
        good = (checked <= 1) & (checked >= 0 if range_ == "in [0, 1]" else checked > 0)
    if not good.all():
        first = int(np.argmin(good))
        raise DataError(f"Expected {name}[{first}]={checked[first]} {range_}.")
    return checked


def _integers(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    checked = np.asarray(values)
    if checked.shape != shape or not np.issubdtype(checked.dtype, np.integer):
        raise DataError(f"Expected {name} of integers, of shape {shape}, not {checked.dtype} of {checked.shape}.")
    return checked


def _weights(events: LoggedEvents, target: ArrayLike, cap: float) -> Column:
    if not cap > 0:
        raise DataError(f"Expected cap={cap} > 0.")
    probabilities = column("target", target, len(events.rewards), "in [0, 1]")
    return np.minimum(probabilities / events.propensities, cap)


def _mean(events: LoggedEvents, values: Column, weights: Column) -> Estimate:
    mean = float(values.mean())
    return _estimate(events, mean, values - mean, weights)


def _estimate(events: LoggedEvents, value: float, influence: Column, weights: Column) -> Estimate:
    """An estimate that is, to first order, the truth plus the mean of a (n,) influence whose sum is 0."""
    sums, n = influence, len(influence)
    if events.users is not None:  # Liang & Zeger 1986: users are independent, their events need not be
        rows = np.unique(events.users, return_inverse=True)[1]
        sums, weights = (np.bincount(rows, each).astype(np.float64) for each in (influence, weights))
    independent = len(sums)
    # The factor m/(m − 1) makes it the usual unbiased variance where every user has one event.
    variance = float(sums @ sums) * independent / (independent - 1) if independent > 1 else math.inf
    error = math.sqrt(variance) / n
    scaled = weights / max(weights.max(), np.finfo(np.float64).tiny)  # squares neither overflow nor vanish
    ess = float(scaled.sum() ** 2 / (scaled @ scaled)) if scaled.any() else 0.0
    return Estimate(value, error, (value - Z95 * error, value + Z95 * error), ess, n, _warning(ess, independent))


def _warning(ess: float, independent: int) -> str | None:
    if independent < MINIMUM_ESS:
        return f"Only {independent:,} independent logs: the interval is unsafe; collect at least {MINIMUM_ESS}."
    if ess < MINIMUM_ESS:
        advice = "lower the cap or collect logs closer to the policy."
        return f"ESS {ess:,.0f} of {independent:,}: the estimate is dominated by few logs; {advice}"
    return None
