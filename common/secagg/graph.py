"""Who masks with whom: how many neighbours a device has, how many of them must agree, and which ones they are.

A server that colludes with c = ⌊corrupt·n⌋ of n devices must not gather `threshold` shares of both of a device's
secrets, and d = ⌊dropout·n⌋ devices that fall silent must not stop a round.

Up to :data:`COMPLETE` devices the graph is complete. A device counts its own signature, so any two sets of t signers
share an honest one if 2t > n + c, and t ≤ n − d signers remain.

Beyond that, devices lie in random order on a circle, next to the k/2 before and the k/2 after them (Harary's graph
H(k, n)), and (k, t) is the smallest even k with the smallest t for which

1. security: n P(X ≥ 2t − k) ≤ 2^-σ, X ~ Hypergeometric(n − 1, c marked, k draws) being a device's corrupt neighbours:
   they serve both secrets and an honest neighbour serves one, so both need k + X ≥ 2t;
2. correctness: n P(Y > k − t) ≤ 2^-η, Y ~ Hypergeometric(n, d marked, k draws) being a device's silent neighbours;
3. connectivity: C(n, 2) C(b, k) / C(n, k) ≤ 2^-σ, with b = c + d. Two honest survivors that follow each other on the
   circle are neighbours unless k/2 devices or more between them are corrupt or silent, and a circle falls apart only
   if that happens at two places. Each place has k/2 consecutive bad devices just before the next honest survivor;
   these two stretches are disjoint, can be chosen in C(n, 2) ways at most, and k given devices are all bad with
   probability C(b, k) / C(n, k). Never binding at σ = 40, η = 20 for the fractions in the table of the tests.

The third bound takes silence to be independent of the circle. A server that chooses whom to call silent after it has
seen the circle still needs t answers from the neighbours of the devices v and w at both ends of the piece it cuts
off, hence at most k − t silent and at least t − k/2 corrupt ones on either's outer side, 2t − k together: by the
first condition, for all n² pairs (v, w), that has probability n 2^-σ at most.

All tails are sums of integers, so every machine finds the same (k, t).
Sources: Bell et al. 2020 (CCS), "Secure single-server aggregation with (poly)logarithmic overhead"; its parameters
are reproduced in ``tests/unit/test_secagg_graph.py``.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import AggregationError
from common.privacy.randomness import Stream

COMPLETE = 64
"""The largest cohort whose graph is complete."""


@dataclass(frozen=True, slots=True)
class Degree:
    """`neighbours` (k) hold shares of a device's secrets; `threshold` (t) shares reveal one, t signatures agree.

    `complete`: everybody is everybody's neighbour, and a device's own signature counts among the t. Cohorts that bear
    no silent device may have t = k + 1: nothing is ever reconstructed there.
    """

    neighbours: int
    threshold: int
    complete: bool

    @property
    def quorum(self) -> int:
        """How many neighbours' signatures a device waits for."""
        return self.threshold - self.complete


@lru_cache(maxsize=256)
def degree(n: int, corrupt: float, dropout: float, *, sigma: int = 40, eta: int = 20) -> Degree:
    """k and t of `n` ≥ 1 devices for fractions of corrupt and silent ones in [0, 1).

    Raises :class:`AggregationError` if no (k, t) is both secure and able to finish.
    """
    if n > COMPLETE:
        return sparse_degree(n, corrupt, dropout, sigma, eta)
    threshold = (n + _count(corrupt, n)) // 2 + 1
    if threshold > n - _count(dropout, n):
        raise _impossible(n, corrupt, dropout)
    return Degree(n - 1, threshold, complete=True)


def sparse_degree(n: int, corrupt: float, dropout: float, sigma: int, eta: int) -> Degree:
    """The smallest even k < n, with the smallest t, that meets the three conditions above. Raises as :func:`degree`.

    A t exists for k if and only if k ≥ q + 2r, with q the smallest number such that n P(X ≥ q) ≤ 2^-σ and r that such
    that n P(Y > r) ≤ 2^-η. Neither falls as k grows, so raising k to q + 2r until it stays never passes a solution.
    """
    corrupted, dropped = _count(corrupt, n), _count(dropout, n)
    k = _connected(n, corrupted + dropped, sigma)
    while k < n:
        q = _quantile(n - 1, corrupted, k, n << sigma)
        r = _quantile(n, dropped, k, n << eta) - 1
        if k >= q + 2 * r:
            return Degree(k, (k + q + 1) // 2, complete=False)
        k = q + 2 * r + (q & 1)
    raise _impossible(n, corrupt, dropout)


def neighbours(root: bytes, n: int, k: int) -> NDArray[np.int64]:
    """(n, k): the positions next to each position 0 … n − 1, ascending, in the graph seeded by `root` (32 bytes).

    k is even, or n − 1. Raises :class:`ValueError`.
    """
    return _rows(root, n, k, np.arange(n))


def neighbours_of(root: bytes, n: int, k: int, position: int) -> NDArray[np.int64]:
    """(k,): the row of :func:`neighbours` for one position. Raises :class:`ValueError`."""
    if not 0 <= position < n:
        raise ValueError(f"Expected position={position} to be in [0, {n}).")
    row: NDArray[np.int64] = _rows(root, n, k, np.array([position]))[0]
    return row


def _rows(root: bytes, n: int, k: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    if not 0 <= k < n or (k % 2 and k != n - 1):
        raise ValueError(f"Expected k={k} to be even and below n={n}, or n - 1.")
    if k == n - 1:
        others = np.arange(k)
        return others + (others >= positions[:, None])
    words = Stream(hashlib.sha256(b"fedtopk graph" + root).digest()).words(n)
    circle = np.argsort(words, kind="stable")
    place = np.empty(n, np.int64)
    place[circle] = np.arange(n)
    half = np.arange(1, k // 2 + 1)
    steps = np.concatenate([-half, half])
    return np.sort(circle[(place[positions, None] + steps) % n], axis=1)


def _count(fraction: float, n: int) -> int:
    """⌊fraction·n⌋, where 0.29 · 100 is 29."""
    if n < 1 or not 0 <= fraction < 1:
        raise AggregationError(f"Expected n={n} ≥ 1 devices and a fraction={fraction} of them in [0, 1).")
    return math.floor(fraction * n + 1e-9)


def _quantile(population: int, marked: int, draws: int, odds: int) -> int:
    """The smallest q with P(X ≥ q) ≤ 1/odds, X ~ Hypergeometric(population, marked, draws) and odds > 1."""
    total = math.comb(population, draws)
    x = min(marked, draws)
    ways = math.comb(marked, x) * math.comb(population - marked, draws - x)  # of drawing x marked ones
    tail = ways
    while tail * odds <= total:
        ways = ways * x * (population - marked - draws + x) // ((marked - x + 1) * (draws - x + 1))
        tail += ways
        x -= 1
    return x + 1


def _connected(n: int, bad: int, sigma: int) -> int:
    """The smallest even k ≥ 2 with C(n, 2) C(bad, k) / C(n, k) ≤ 2^-sigma; n or more if none is below n."""
    k, numerator, denominator = 0, math.comb(n, 2) << sigma, 1
    while k < 2 or (k < n and numerator > denominator):
        numerator *= max(bad - k, 0) * max(bad - k - 1, 0)
        denominator *= (n - k) * (n - k - 1)
        k += 2
    return k


def _impossible(n: int, corrupt: float, dropout: float) -> AggregationError:
    return AggregationError(
        f"Expected n={n} devices to bear corrupt={corrupt} and dropout={dropout}: "
        "take a larger cohort or lower aggregation.corrupt_fraction or aggregation.dropout_fraction."
    )
