"""From a first round's noisy histogram to where the items' biases start (:mod:`common.popularity`).

Every number here follows from what was released and from what is public: z, C, the expected cohort. Nothing is charged.

What is released of item a is c̃_a = c_a + σε and, with a critic, s̃_a = s_a + σε: sums over members of their scaled
counts, and of their scaled rewards above the critic's first guess g. σ is known.

**Popularity.** With m the mean of c̃, no less than its own noise σ/√A, and an exponential prior of mean m on c_a, which
is what is least assumed of a positive number of which the mean is known (Jaynes 1957), the posterior is a Gaussian
around c̃_a − σ²/m, cut off at 0: its mean ĉ_a is positive, rises with c̃_a, and is max(c̃_a, 0) without noise. Half an
interaction is added to each item's (Krichevsky and Trofimov 1981; one interaction weighs w, about what a member sends
over its norm squared, M/(A m) for M members), so that no logarithm is of 0; and a bias starts at log(A p_a), 0 for an
item that is as popular as the average.

**How much it is liked.** (s_a − ρ c_a) is c_a times how far item a's mean of r⁺/5 is from the overall mean, g + ρ; that
distance has the prior variance τ² = 1/12, as uniform numbers do, and is seen through σ and through c_a/w interactions,
which differ by 1/4 at most: the posterior mean is τ² c s/(τ² c² + c w/4 + σ²). ρ itself is found by the same formula
from the sums over all items. The critic's bias starts at the logit of the mean, relative to that of g.

With σ → ∞ all of it is 0: the start of a run without a histogram.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.item_tables import START
from common.model import HEADS
from common.popularity import histogram_blocks
from common.settings import Settings

Numbers = NDArray[np.float64]

_VARIANCE, _OF_ONE = 1 / 12, 1 / 4
_EXTREME = 0.01
"""No item starts as liked by less, or by all but less."""


def starts(settings: Settings, released: Numbers, noise: float, expected: float) -> dict[str, Tensor]:
    """The ``start.`` parameters, (A, 1) each, by their names.

    Args:
        released: (l,) what the round released, over C.
        noise: σ, the standard deviation of the noise on each number of it.
        expected: M = qN, the expected cohort.
    """
    items = len(released) // histogram_blocks(settings)
    counts, weight = shrunk_counts(released[:items], noise, expected)
    found = {}
    for head in settings.heads:
        if head == "critic":
            column = liking(released[items:], counts, noise, weight, settings.objective.critic_start)
        elif head == "policy" and settings.objective.prior == "critic":
            column = np.zeros(items)  # its logits are what is to be added to the critic's
        else:
            column = log_popularity(counts, weight)
        scale = 1.0 if head == "frequency" else settings.model.temperature  # which logits are divided by
        found[START + HEADS[head]] = torch.from_numpy(scale * column).float().unsqueeze(-1)
    return found


def shrunk_counts(noisy: Numbers, noise: float, expected: float) -> tuple[Numbers, float]:
    """(A,) ĉ > 0, or ≥ 0 without noise, of the (A,) `noisy` counts; and w, what one interaction weighs in them."""
    mean = max(float(noisy.mean()), noise / math.sqrt(len(noisy)))
    weight = min(1.0, expected / (len(noisy) * mean)) if mean > 0 else 1.0
    if not noise:
        return noisy.clip(min=0), weight
    below = torch.from_numpy((noise / mean - noisy / noise) / math.sqrt(2))  # of 0, in deviations over √2
    above = math.sqrt(2 / math.pi) / torch.special.erfcx(below) - math.sqrt(2) * below
    return noise * above.numpy(), weight


def log_popularity(counts: Numbers, weight: float) -> Numbers:
    """(A,) log(A p) of counts with half an interaction more each."""
    smoothed = counts + weight / 2
    return np.asarray(np.log(smoothed / smoothed.mean()))


def liking(noisy: Numbers, counts: Numbers, noise: float, weight: float, guess: float) -> Numbers:
    """(A,) logits of how much items are liked, less that of the `guess`, from the (A,) `noisy` sums above the guess."""

    def distance(above: Numbers, count: Numbers, variance: float) -> Numbers:
        seen = _VARIANCE * count**2 + count * weight * _OF_ONE + variance
        return np.divide(_VARIANCE * count * above, seen, out=np.zeros_like(seen), where=seen > 0)

    total, all_counts = np.array([noisy.sum()]), np.array([counts.sum()])
    overall = distance(total, all_counts, len(noisy) * noise**2)
    mean = guess + overall + distance(noisy - overall * counts, counts, noise**2)
    mean = mean.clip(_EXTREME, 1 - _EXTREME)
    return np.asarray(np.log(mean / (1 - mean)) - math.log(guess / (1 - guess)))
