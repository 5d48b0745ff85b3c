"""What an audit may conclude from its counts: pure statistics, at a given error.

Every bound is one-sided at the given `error`: it is wrong with at most that probability, whatever the system is.
Tests: ``tests/unit/test_audit_bounds.py``, by exact cases and by simulation of mechanisms whose ε is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.stats import binom, binomtest, hypergeom, rankdata
from scipy.stats import t as student

CONFIDENCE = 0.999
"""With which all conclusions of one audit hold together, where nothing else is asked for."""


def error_of_each(confidence: float) -> float:
    """What each of an audit's seven conclusions may err with, so that all of them hold with `confidence`."""
    return (1 - confidence) / 7


FRACTIONS = (1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4)
"""Which part of the coins an auditor ventures a guess on, the surest ones; fixed before any audit, and paid for by
dividing the error among them."""

_STEP = 1e-3  # of ε, downwards


def guesses_p_value(coins: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How probable it is, at most, that so many guesses are right if the system is (ε, δ)-private.

    Each of `coins` fair coins decides whether a user is there; an auditor who sees what one run released guesses
    `guesses` of them and leaves the others out. P[right guesses ≥ v] ≤ P[B ≥ v] + 2mδ max_i P[v > B ≥ v − i]/i,
    B ~ Binomial(r, e^ε/(1 + e^ε)): Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", NeurIPS
    2023, theorem 5.2. Nothing is assumed of how the guesses depend on each other. Coins and guesses of several
    independent runs may be added up.
    """
    accuracy = 1 / (1 + math.exp(-epsilon))
    beyond = float(binom.sf(right - 1, guesses, accuracy))
    if not right:
        return 1.0
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beyond + 2 * coins * delta * steepest)


def guesses_bound(coins: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest ε that such guesses contradict at δ, rounded down to a thousandth: the lower bound on ε."""
    if not guesses or guesses_p_value(coins, guesses, right, 0.0, delta) >= error:
        return 0.0
    fits, exceeds = 0, 1
    while guesses_p_value(coins, guesses, right, exceeds * _STEP, delta) < error:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if guesses_p_value(coins, guesses, right, middle * _STEP, delta) < error:
            fits = middle
        else:
            exceeds = middle
    return fits * _STEP


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound on ε, with the guesses that it rests on."""

    epsilon: float
    coins: int
    guesses: int
    right: int


def epsilon_bound(attacks: Sequence[np.ndarray], present: np.ndarray, delta: float, error: float) -> EpsilonBound:
    """The best lower bound on ε of several attacks, each guessing "present" where its scores are highest.

    Args:
        attacks: (m,) scores each, high where the user seems to be present.
        present: (m,) bool, the fair coins.
    """
    coins, found = len(present), []
    sizes = sorted({max(1, int(coins * fraction)) for fraction in FRACTIONS})
    for scores in attacks:
        order = np.argsort(-scores, kind="stable")
        for guesses in sizes:
            right = int(np.count_nonzero(present[order[:guesses]]))
            bound = guesses_bound(coins, guesses, right, delta, error / (len(attacks) * len(sizes)))
            found.append(EpsilonBound(bound, coins, guesses, right))
    return max(found, key=lambda bound: bound.epsilon)


def largest_bound(coins: int, attacks: int, delta: float, error: float) -> float:
    """What :func:`epsilon_bound` gives at most, where all guesses are right: claims above it cannot be contradicted."""
    everybody = np.ones(coins, bool)
    return epsilon_bound([np.zeros(coins)] * attacks, everybody, delta, error).epsilon


def rate_interval(successes: int, trials: int, error: float) -> tuple[float, float]:
    """Clopper and Pearson's interval for a probability, each side at `error`."""
    interval = binomtest(successes, trials).proportion_ci(1 - 2 * error, "exact")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray, error: float) -> tuple[float, float]:
    """Student's interval for the mean of independent `values`, each side at `error`; everything for fewer than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    margin = float(student.isf(error, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - margin, float(values.mean()) + margin


def hits_p_value(hits: int, drawn: Sequence[int], population: int) -> float:
    """The probability that blind guesses hit at least so many: as many guesses as there are right answers, `drawn`, of
    a `population`, for each of several independent devices."""
    each = [hypergeom.pmf(np.arange(count + 1), population, count, count) for count in drawn]
    return float(reduce(np.convolve, each)[hits:].sum())


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores higher than a negative, ties counting half."""
    ranks, count = rankdata(scores), int(np.count_nonzero(positive))
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def true_positives(scores: np.ndarray, positive: np.ndarray, false_rate: float) -> tuple[int, int]:
    """How many positives, of how many, score above all but `false_rate` of the negatives."""
    threshold = np.quantile(scores[~positive], 1 - false_rate, method="higher")
    return int(np.count_nonzero(scores[positive] > threshold)), int(np.count_nonzero(positive))
