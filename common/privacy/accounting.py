"""What a run's releases cost: ε of those who see the models, and ε of the server.

=================  ===================================  ==============================================================
figure             observer; adjacency                  mechanism
=================  ===================================  ==============================================================
ε_model            sees every released model;           Poisson-subsampled Gaussian at the effective multiplier, rate
                   a user is added or removed           q, one release a round: :func:`epsilon_model`
ε_server           the server, which sees who takes     Gaussian at z√(1−γ−δ), κ contributions, no amplification:
                   part; a member's updates become 0    :func:`epsilon_server`
=================  ===================================  ==============================================================

Unit: one user. Skellam noise is accounted as Gaussian noise whose variance is smaller by the factor 1 + κ_s
(:func:`skellam_excess`); that subsampling amplifies it as it does the Gaussian is an assumption of the threat model.
Losses of δ by encoding (:attr:`common.privacy.encoding.Encoding.delta_loss`) are for the caller to take off δ, once
for each release. Tests are those of ``tests/unit/test_accounting.py``.

opacus brings all of torch's distributed training, which takes seconds to import: only what needs it does, and a device,
which accounts for ε_server alone, never.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, reduce

import numpy as np
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from scipy.optimize import brentq
from scipy.stats import binom

from common.errors import BudgetExceeded, PrivacyError
from common.privacy.encoding import Encoding

History = tuple[tuple[float, float, int], ...]
"""What other runs over the same users spent: noise multiplier z > 0, rate q in (0, 1] and releases of each."""

EXCESS_LIMIT = 1e-3
"""Largest κ_s that is accepted."""

PRV_ERROR = 0.01
"""Error of the PRV accountant's ε, contained in its upper bound; smaller targets cannot be certified."""

PRV_LARGEST = 200.0
"""Of ε by RDP: beyond it the PRV accountant's tables grow too large, and overflow."""

_RDP_ORDERS = np.arange(2, 257)
_PLD_INTERVAL = 1e-3
_LARGEST_MULTIPLIER = 1e6  # noise in which nothing can be learned


def skellam_excess(encoding: Encoding) -> float:
    """κ_s: by how much the noise's Rényi divergence may exceed the Gaussian's, relatively, at any integer α ≤ 256.

    The bound (Agarwal, Kairouz and Liu, "The Skellam mechanism for differentially private federated learning", NeurIPS
    2021, corollary 4.1) is αΔ₂²/2μ + min(((2α−1)Δ₂² + 6Δ₁)/4μ², 3Δ₁/2μ), and Δ₁ ≤ min(√2^m·Δ₂, Δ₂²) for integers. It
    is taken at μ = V·honest, the least noise that either figure rests on.
    Test: ``test_the_excess_of_skellam_is_that_of_the_formula``.

    Raises :class:`PrivacyError` where there is no noise or κ_s ≥ 1e-3.
    """
    mu = encoding.variance * encoding.honest
    if not mu > 0:
        raise PrivacyError(f"Expected the noise's variance={mu} > 0 for an account of it.")
    found = excess(mu, float(encoding.squared_bound), encoding.padded)
    if found >= EXCESS_LIMIT:
        raise PrivacyError(
            f"Expected the Skellam noise's excess={found:.3g} over the Gaussian < {EXCESS_LIMIT}: "
            f"allow more aggregation.bits or raise privacy.noise_multiplier."
        )
    return found


def excess(variance: float, squared: float, size: int) -> float:
    """κ_s of Skellam noise of a variance μ > 0 on (size,) integers that somebody moves by Δ₂² = `squared` > 0."""
    absolute = min(math.sqrt(size * squared), squared)
    gaussian = _RDP_ORDERS * squared / (2 * variance)
    beyond = np.minimum(
        ((2 * _RDP_ORDERS - 1) * squared + 6 * absolute) / (4 * variance**2), 3 * absolute / (2 * variance)
    )
    return float(np.max(beyond / gaussian))


def effective_multiplier(encoding: Encoding) -> float:
    """z/√(1 + κ_s): the Gaussian's noise multiplier that stands for the encoding's noise of z = √V/Δ₂."""
    return encoding.noise_multiplier / math.sqrt(1 + skellam_excess(encoding))


@lru_cache(maxsize=4096)
def epsilon_model(noise_multiplier: float, rate: float, releases: int, delta: float, spent: History = ()) -> float:
    """Upper bound on ε_model at δ, of `releases` Poisson-subsampled Gaussians of `noise_multiplier` at rate q.

    Together with what other runs over the same users have `spent`: all of it composes, also adaptively.

    By opacus's PRV accountant, at most 0.02 above the truth; exactly for q = 1. Where that accountant fails, for a
    δ near 1e-15, or would need tables too large, for an ε of hundreds, by opacus's RDP accountant: an upper bound
    too, if a loose one. 0 for no release, inf without noise.
    Tests: ``test_epsilon_model_of_a_known_case_by_both_accountants``, ``test_the_two_accountants_agree``.

    Raises :class:`PrivacyError` as :func:`check_mechanism` does.
    """
    check_mechanism(noise_multiplier, rate, releases, delta)
    history = _with(spent, noise_multiplier, rate, releases)
    if not history:
        return 0.0
    if any(z == 0 for z, _, _ in history):
        return math.inf
    if all(q == 1 for _, q, _ in history):
        return _gaussian(1 / math.sqrt(sum(times / z**2 for z, _, times in history)), delta)
    from opacus.accountants import PRVAccountant

    bound = rough_epsilon(history, delta)
    if bound > PRV_LARGEST:
        return bound
    exact = PRVAccountant()
    exact.history = list(history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of overflow far out in the tails
        try:
            return max(0.0, float(exact.get_epsilon(delta, eps_error=PRV_ERROR)))
        except (RuntimeError, ValueError):  # what opacus raises where its numbers would be wrong
            return bound


def epsilon_model_pld(noise_multiplier: float, rate: float, releases: int, delta: float, spent: History = ()) -> float:
    """The cross-check of :func:`epsilon_model`: an upper bound by dp-accounting's privacy loss distributions.

    z > 0. From ε = 0.5 up it agrees with :func:`epsilon_model` to 0.02 wherever that one is by PRV; below, its own
    grid makes it up to 0.04 larger. It needs much time and memory for z below 0.1.
    """
    check_mechanism(noise_multiplier, rate, releases, delta)
    losses = [_losses(*mechanism) for mechanism in _with((), noise_multiplier, rate, releases)]
    losses += [_composed(spent)] if spent else []
    return float(reduce(lambda one, other: one.compose(other), losses).get_epsilon_for_delta(delta)) if losses else 0.0


@lru_cache(maxsize=256)
def noise_multiplier_for(target_epsilon: float, rate: float, releases: int, delta: float, spent: History = ()) -> float:
    """A z for which `releases` of an encoding with it have ε_model ≤ `target_epsilon` at δ; 0 for no release.

    Together with what other runs have `spent`.

    Found with the fast accountant, then certified with the other: :func:`epsilon_model` of z/√(1 + 1e-3) is at most
    the target, and so is that of the :func:`effective_multiplier`, whose κ_s is below 1e-3. For targets from 0.1 up it
    is within 1 % of the smallest such z.

    Raises :class:`PrivacyError` if the target is too small to be certified (0.01 or little more), or above 100, and
    :class:`BudgetExceeded` if it is spent.
    """
    check_mechanism(1.0, rate, releases, delta)
    if not PRV_ERROR < target_epsilon <= 100:
        raise PrivacyError(f"Expected target_epsilon={target_epsilon} to be above {PRV_ERROR} and at most 100.")
    if releases == 0:
        return 0.0
    already = epsilon_model(1.0, 1.0, 0, delta, spent)
    goal = target_epsilon - (PRV_ERROR if rate < 1 else 0.0)  # which the certifying accountant will add
    low = high = rough_multiplier(target_epsilon, rate, releases, delta)
    while goal > already and epsilon_model_pld(low, rate, releases, delta, spent) < target_epsilon:
        low, high = low / 1.2, low
    while goal > already:
        while epsilon_model_pld(high, rate, releases, delta, spent) >= goal and high < _LARGEST_MULTIPLIER:
            high *= 1.2
        if high >= _LARGEST_MULTIPLIER:
            break
        multiplier = _root(lambda z: epsilon_model_pld(z, rate, releases, delta, spent), goal, low, high)
        over = epsilon_model(multiplier, rate, releases, delta, spent) - target_epsilon
        if over <= 0:
            return multiplier * math.sqrt(1 + EXCESS_LIMIT)
        goal -= over + 1e-4 * target_epsilon
    if spent:
        raise BudgetExceeded(
            f"Expected other runs over this population to leave something of ε_model={target_epsilon:g} at "
            f"δ={delta:.3g} (one user added or removed, for who sees every model): they spent {already:.4g}."
        )
    raise PrivacyError(f"Expected target_epsilon={target_epsilon} to be large enough to be certified.")


def releases_within(
    budget: float, noise_multiplier: float, rate: float, delta: float, at_most: int, spent: History = ()
) -> int:
    """The largest number of releases, at most `at_most`, whose :func:`epsilon_model` is at most `budget`."""
    exceeds, over = at_most, epsilon_model(noise_multiplier, rate, at_most, delta, spent)
    if over <= budget:
        return at_most
    fits, power = 0, 2.0
    while exceeds - fits > 1:  # ε grows like a power of the number of releases, to begin with like its root
        guess = int(exceeds * (budget / over) ** power)
        middle = (fits + exceeds) // 2 if spent else min(max(guess, fits + 1), exceeds - 1)
        epsilon = epsilon_model(noise_multiplier, rate, middle, delta, spent)
        if 0 < epsilon < over:
            power = math.log(exceeds / middle) / math.log(over / epsilon)
        if epsilon <= budget:
            fits = middle
        else:
            exceeds, over = middle, epsilon
    return fits


def contributions(rate: float, rounds: int) -> int:
    """κ = ⌈qT + 5√(qT)⌉, at most T: how many uploads ε_server is computed for, in T rounds at rate q.

    An honest coin exceeds it with a probability below 1e-6 where qT ≫ 1, and up to 1e-4 where qT < 1. It is a bound
    only where devices count, and refuse the upload after the κ-th.
    """
    expected = rate * rounds
    return min(rounds, math.ceil(expected + 5 * math.sqrt(expected)))


def epsilon_server(noise_multiplier: float, honest: float, contributions: int, delta: float) -> float:
    """ε_server at δ of κ `contributions`: exactly that of one Gaussian at z√honest/√κ, for an effective z.

    Gaussian mechanisms compose to a Gaussian one, also adaptively; no sampling amplifies, since the server sees who
    takes part. honest = 1 − γ − δ in (0, 1]. 0 without contributions, inf without noise.
    Tests: ``test_epsilon_server_is_that_of_the_gaussian``, ``test_epsilon_server_of_known_cases``.
    """
    check_mechanism(noise_multiplier, honest, contributions, delta)
    if contributions == 0:
        return 0.0
    return _gaussian(noise_multiplier * math.sqrt(honest / contributions), delta)


def epsilon_server_gdp(noise_multiplier: float, honest: float, contributions: int, delta: float) -> float:
    """The cross-check of :func:`epsilon_server`: opacus's dual of Gaussian differential privacy, for ε up to 500."""
    from opacus.accountants.analysis.gdp import delta_eps_mu, eps_from_mu

    check_mechanism(noise_multiplier, honest, contributions, delta)
    if contributions == 0:
        return 0.0
    mu = math.sqrt(contributions / honest) / noise_multiplier
    return float(eps_from_mu(mu=mu, delta=delta)) if delta_eps_mu(eps=0.0, mu=mu) > delta else 0.0


def threshold_delta(minimum: int, rate: float, users: int, releases: int, epsilon: float) -> float:
    """What a minimum cohort of m costs of δ, over all releases.

    With m − 1 others drawn, one user decides whether their updates are in the sum at all, and moves it by up to m·C.
    That happens in a release with probability P[Binomial(N − 1, q) = m − 1]; outside of it the user moves the sum by C
    at most, so (ε, δ) becomes (ε, δ + (1 + e^ε) Σ P). 0 for m = 1: alone, a user moves the sum by C.
    """
    if minimum <= 1:
        return 0.0
    return float((1 + math.exp(epsilon)) * releases * binom.pmf(minimum - 1, users - 1, rate))


def default_delta(users: int) -> float:
    """δ = N^-1.1 for N ≥ 1 users, at most 1/2."""
    if users < 1:
        raise PrivacyError(f"Expected users={users} ≥ 1.")
    return min(math.pow(users, -1.1), 0.5)


def rough_epsilon(history: History, delta: float) -> float:
    """By opacus's RDP accountant: an upper bound, in milliseconds."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of orders at the end of the range
        return float(accountant.get_epsilon(delta))


def rough_multiplier(target_epsilon: float, rate: float, releases: int, delta: float) -> float:
    """A z that is enough, in milliseconds: by RDP, which asks for 4–24 % more of it, or without any sampling."""
    low = enough = float(get_sigma_gaussian(target_epsilon, delta)) * math.sqrt(releases)
    while rough_epsilon(((low, rate, releases),), delta) < target_epsilon:
        low /= 2
    if low == enough:
        return enough
    return _root(lambda z: rough_epsilon(((z, rate, releases),), delta), target_epsilon, low, enough)


def _with(spent: History, noise_multiplier: float, rate: float, releases: int) -> History:
    return (*spent, (noise_multiplier, rate, releases)) if releases else spent


@lru_cache(maxsize=64)
def _composed(history: History) -> PrivacyLossDistribution:
    return reduce(lambda one, other: one.compose(other), (_losses(*mechanism) for mechanism in history))


@lru_cache(maxsize=64)
def _losses(noise_multiplier: float, rate: float, releases: int) -> PrivacyLossDistribution:
    single = from_gaussian_mechanism(noise_multiplier, sampling_prob=rate, value_discretization_interval=_PLD_INTERVAL)
    return single.self_compose(releases)


def _gaussian(multiplier: float, delta: float) -> float:
    with np.errstate(all="ignore"):
        return float(get_epsilon_gaussian(multiplier, delta))


def _root(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a falling function of z takes a value, to 1e-4 of z."""
    logarithm = brentq(lambda log: function(math.exp(log)) - value, math.log(low), math.log(high), xtol=1e-4)
    return math.exp(logarithm)


def check_mechanism(noise_multiplier: float, rate: float, times: int, delta: float) -> None:
    """Raises :class:`PrivacyError` unless z ≥ 0, 0 < q ≤ 1, releases ≥ 0 and 0 < δ < 1."""
    if not 0 <= noise_multiplier < math.inf:
        raise PrivacyError(f"Expected noise_multiplier={noise_multiplier} to be ≥ 0 and finite.")
    if not 0 < rate <= 1:
        raise PrivacyError(f"Expected the rate or honest part={rate} to be in (0, 1].")
    if times < 0:
        raise PrivacyError(f"Expected releases={times} ≥ 0.")
    if not 0 < delta < 1:
        raise PrivacyError(f"Expected delta={delta} to be in (0, 1).")
