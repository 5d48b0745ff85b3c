"""Choosing K of A items, and how probable a choice was (derivations in ``docs/formulas/slates.md``).

Logits are (B, A) for B users and A items, up to a constant per row the logarithm of π(a|s); π sharper or flatter is the
caller's `logits / temperature`. −inf stands for an item that may not be shown: it is never chosen, takes no share
of the probability and receives no gradient. A slate is a (B, K) int64 tensor of different items.

Draws are computed in float64 whatever the logits are: at 1e4 a float32 is too coarse to carry the noise. They take one
number per logit, row after row, so that splitting the rows into blocks changes nothing.
"""

import torch
from torch import Tensor

from common.errors import ModelError, SettingsError


def top_k(logits: Tensor, k: int) -> Tensor:
    """(B, K) the K highest items, highest first; equal logits always in the same, otherwise arbitrary order.

    Raises:
        ModelError: a logit is nan or +inf.
        SettingsError: a row has fewer than K items that may be shown.
    """
    _check(logits, k)
    return logits.topk(k).indices


def gumbel_top_k(logits: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """(B, K) items drawn by π one after the other without replacement (Plackett–Luce), in the order of drawing.

    They are the K highest of logits plus independent Gumbel noise (Kool et al. 2019, arXiv 1903.06059).

    Raises:
        ModelError: a logit is nan or +inf.
        SettingsError: a row has fewer than K items that may be shown.
    """
    _check(logits, k)
    return _perturb(logits, generator).topk(k).indices


def explore(logits: Tensor, k: int, certain: int, candidates: int, generator: torch.Generator) -> Tensor:
    """(B, K) slates of which the first K′ are the highest items and the others are drawn (Chen et al. 2019, section 6).

    The K − K′ others are drawn by π without replacement from what is left of the M highest items, or of all that may
    be shown where these are fewer. K′ = K is :func:`top_k`; K′ = 0 and M = A is :func:`gumbel_top_k`.

    Args:
        logits: (B, A).
        k: K, the length of a slate.
        certain: K′ in [0, K].
        candidates: M ≥ K.
        generator: draws the noise.

    Raises:
        ModelError: a logit is nan or +inf.
        SettingsError: K′ ≤ K ≤ M does not hold, or a row has fewer than K items that may be shown.
    """
    _check(logits, k)
    if not 0 <= certain <= k <= candidates:
        raise SettingsError(f"Expected 0 <= certain={certain} <= k={k} <= candidates={candidates}.")
    values, items = logits.topk(min(candidates, logits.shape[1]))
    drawn = gumbel_top_k(values[:, certain:], k - certain, generator)
    return torch.cat([items[:, :certain], items[:, certain:].gather(1, drawn)], 1)


def straight_through(logits: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """(B, A) 1 for the items of :func:`gumbel_top_k` and 0 for the others, with the gradient of a relaxed slate.

    The relaxation is the sum of K softmaxes of the perturbed logits, each with what the ones before have taken away
    (Xie & Ermon 2019, arXiv 1901.10517; K = 1 is the straight-through Gumbel-softmax of Jang et al. 2017, arXiv
    1611.01144). The gradient is biased; the lower the temperature, the less, and the higher its variance. Backward
    holds O(K) tensors like the logits, in float64.

    Args:
        logits: (B, A), may require a gradient.
        k: K, the length of a slate.
        temperature: > 0; from 1 upwards an item much above the others counts more than once in the relaxation.
        generator: draws the noise; the same state gives the items that :func:`gumbel_top_k` gives.

    Raises:
        ModelError: a logit is nan or +inf.
        SettingsError: the temperature is not positive, or a row has fewer than K items that may be shown.
    """
    _check(logits, k)
    if not temperature > 0:
        raise SettingsError(f"Expected temperature={temperature} > 0.")
    keys = _perturb(logits, generator)
    hard = torch.zeros_like(logits).scatter(1, keys.topk(k).indices, 1)
    relaxed = _relaxed_top_k(keys, k, temperature).to(logits.dtype)
    # In this order the bracket is exactly 0, and the result exactly 0 or 1.
    return hard + (relaxed - relaxed.detach())


def log_probability(logits: Tensor, slates: Tensor) -> Tensor:
    """(B,) log-probability that :func:`gumbel_top_k` draws each slate in this very order; differentiable.

    log P(a_1 … a_K) = Σ_i [f(a_i) − log Σ_j exp f(j)], j over the items that are not among a_1 … a_{i−1}.

    A slate with an item that may not be shown, or the same item twice, has −inf. How probable the same items are in
    any order, and how probable one item is to be among them, are sums over orders, which this module does not offer.

    Args:
        logits: (B, A).
        slates: (B, K) int64 in [0, A), in the order of drawing.

    Raises:
        ModelError: a logit is nan or +inf.
    """
    _check(logits)
    wide = logits.double()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, slates, True)
    own = wide.gather(1, slates)
    # The sums over what is left, from the last item drawn back to the first: adding to the items never drawn, and not
    # subtracting from the total, keeps them exact. The floor is finite because −inf − (−inf) is nan: a slate may name
    # all items, the last of them one that may not be shown.
    floor = torch.finfo(wide.dtype).min / 2
    never = wide.masked_fill(chosen, floor).logsumexp(1, keepdim=True)
    left = torch.cat([never, own.flip(1)], 1).logcumsumexp(1)[:, 1:].flip(1)
    repeated = chosen.sum(1) < slates.shape[1]
    return (own - left).sum(1).masked_fill(repeated, -torch.inf).to(logits.dtype)


def explored_log_probability(logits: Tensor, slates: Tensor, certain: int, candidates: int) -> Tensor:
    """(B,) log-probability that :func:`explore` gives each slate, its drawn part in this order; differentiable.

    −inf where the first K′ items are not the highest ones, or another one is not among the M − K′ left. The gradient
    takes which items these are as given.

    Args:
        logits: (B, A).
        slates: (B, K) int64 in [0, A).
        certain, candidates: as in :func:`explore`.

    Raises:
        ModelError: a logit is nan or +inf.
    """
    _check(logits)
    values, items = logits.topk(min(candidates, logits.shape[1]))
    left = torch.full_like(logits, -torch.inf).scatter(1, items[:, certain:], values[:, certain:])
    misplaced = (slates[:, :certain] != items[:, :certain]).any(1)
    return log_probability(left, slates[:, certain:]).masked_fill(misplaced, -torch.inf)


def inclusion(log_pi: Tensor, k: int) -> Tensor:
    """α = 1 − (1 − π)^K: the probability that K independent draws *with* replacement show an item; differentiable.

    The paper's own model of a slate, whose slope by π is :func:`common.objective.top_k_multiplier`. Any shape, k ≥ 1;
    accurate relative to α even where π is far below the rounding error of 1.
    """
    # The slope of log(1 − π) is infinite at π = 1, where that of α is finite.
    pi = log_pi.exp().clamp(max=1 - torch.finfo(log_pi.dtype).eps)
    return -torch.expm1(k * torch.log1p(-pi))


def _check(logits: Tensor, k: int = 0) -> None:
    if not (logits < torch.inf).all():
        raise ModelError("Expected logits that are finite, or -inf, found nan or inf: the model has diverged.")
    allowed = (logits > -torch.inf).sum(1)
    if (allowed < k).any():
        raise SettingsError(f"Expected k={k} to be at most the {int(allowed.min())} items that may be shown.")


def _perturb(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(B, A) float64, logits plus Gumbel(0, 1) noise."""
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    # A uniform 0 would give −inf, as if the item might not be shown.
    return logits - uniform.clamp(min=torch.finfo(torch.float64).tiny).log().neg().log()


def _relaxed_top_k(keys: Tensor, k: int, temperature: float) -> Tensor:
    """(B, A) non-negative, each row of sum K; tends to the indicator of the K highest keys as the temperature falls."""
    relaxed = torch.zeros_like(keys)
    for _ in range(k):
        log_p = (keys / temperature).log_softmax(1)
        relaxed = relaxed + log_p.exp()
        keys = keys + _log_complement(log_p)
    return relaxed


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 − p) of each row's probabilities: only the highest can come near 1, and is replaced by the others' sum."""
    top = log_p.argmax(1, keepdim=True)
    others = log_p.scatter(1, top, -torch.inf)
    return torch.log1p(-others.exp()).scatter(1, top, others.logsumexp(1, keepdim=True))
