"""log π(a|s) and log β(a|s) of logged items: by the full softmax, a sampled one, or noise contrast.

The sampled softmax replaces the normaliser Z = Σ_j exp(f_j) by the unbiased estimate

    Ẑ = exp(f_a) + Σ_{j ≠ a} c_j exp(f_j) / (m Q_j),

over the items j that came up c_j times in m draws with replacement from Q (logQ correction; Bengio & Senécal 2008).
The logged item enters with certainty and is left out of the drawn ones (an accidental hit). 1/Ẑ overestimates 1/Z by
Jensen's inequality, by O(1/m): ``tests/unit/test_softmax.py`` holds both statements.

Noise contrast (Gutmann & Hyvärinen 2010; Mnih & Teh 2012) fits f itself to be log π: it tells the logged item from the
m drawn ones by logistic regression on f_j − log(m Q_j), so that the normaliser is learned and not estimated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from common import kernels
from common.candidates import Candidates, InBatch, Negatives
from common.ghost import few
from common.slate import inclusion
from common.tape import Crossed, Dense, LogSoftmax, Sampled, SampledLogSoftmax, Tape


@dataclass(frozen=True)
class ItemLikelihood:
    """What one head says of B users' T logged items.

    Attributes:
        log_probability: (B, T) log-probability of each step's item.
        fit: (B, T) what training raises: `log_probability`, or the log-likelihood of noise contrast.
    """

    log_probability: Tensor
    fit: Tensor


@dataclass(frozen=True)
class CandidateLikelihood(ItemLikelihood):
    """What it says of the candidates beside.

    Attributes:
        own: (B, T) logit of each step's item.
        logits: (B, T, C) logits of the candidates.
        log_weights: (C,) log of how many items each candidate stands for; None: the candidates are all items, the
            step's own among them.
        column: (B, T) the candidate that is the step's item and counts for nothing, since that counts by itself; or -1.
    """

    own: Tensor
    logits: Tensor
    log_weights: Tensor | None = None
    column: Tensor | None = None

    def expected_value(self, slate_size: int, own: Tensor, candidates: Tensor) -> Tensor:
        """(B, T) Σ_a α_K(π(a)) q(a), α_K = 1 − (1 − π)^K: what K independent draws from π bring; K = 1: E_π[q].

        Differentiable in the logits. `own` (B, T) and `candidates` (B, T, C) are the values q of the step's item and
        of the candidates.
        """
        log_normaliser = self.own - self.log_probability
        shown = inclusion(self.logits - log_normaliser.unsqueeze(-1), slate_size)
        if self.log_weights is None or self.column is None:
            return (shown * candidates).sum(-1)
        weighted = candidates * self.log_weights.exp()
        place = self.column.clamp(min=0).unsqueeze(-1)
        kept = torch.where(self.column.unsqueeze(-1) >= 0, 0, weighted.gather(-1, place))
        weighted = weighted.scatter(-1, place, kept)
        return (shown * weighted).sum(-1) + inclusion(self.log_probability, slate_size) * own


def likelihood(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, mask: Tensor, candidates: Candidates, tape: Tape | None
) -> ItemLikelihood:
    """What a head says of each step's item.

    Args:
        weight: (A, i) the head's item embeddings.
        name: the weight's name, for the tape.
        queries: (B, T, i), see :func:`common.model.queries`.
        items: (B, T) int64.
        mask: (B, T) bool, the steps that are real.
        candidates: what to normalise over.
        tape: takes the uses of the weight, which then gets no gradient by itself; None: it does, by autograd.
    """
    if isinstance(candidates, InBatch):
        return _in_batch(weight, name, queries, items, mask, candidates, tape)
    if tape is None or (candidates is not None and candidates.contrast):
        return candidate_likelihood(weight, name, queries, items, candidates, tape)
    with torch.no_grad():
        if candidates is None:
            log_probability, slope, residuals = _log_softmax(weight, queries, items)
        else:
            log_probability, slope, residuals, missing = _sampled_log_softmax(weight, queries, items, candidates)
    log_probability = tape.watch(_Sloped.apply(queries, log_probability, slope))  # type: ignore[no-untyped-call]
    if candidates is None:
        tape.uses.append(LogSoftmax(name, queries, log_probability, residuals))
    else:
        ids = candidates.ids
        tape.uses.append(SampledLogSoftmax(name, queries, log_probability, ids, residuals, items, missing))
    return ItemLikelihood(log_probability, log_probability)


def candidate_likelihood(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, candidates: Negatives | None, tape: Tape | None
) -> CandidateLikelihood:
    """As :func:`likelihood`, with the candidates' logits, for what reads more of them than log π."""
    if candidates is None:
        logits = queries @ weight.T
        if tape is not None:
            tape.uses.append(Dense(name, queries, tape.watch(logits)))
        own = logits.gather(-1, items.unsqueeze(-1)).squeeze(-1)
        log_probability = own - logits.logsumexp(-1)
        return CandidateLikelihood(log_probability, log_probability, own, logits)
    drawn, own = queries @ weight[candidates.ids].T, (queries * embedding(items, weight)).sum(-1)
    column = candidates.column[items]
    if tape is not None:
        use = Sampled(name, queries, candidates.ids, items, column, tape.watch(drawn), tape.watch(own))
        tape.uses.append(use)
    masses = _without(column, drawn + candidates.log_weights)
    log_probability = own - torch.cat([masses, own.unsqueeze(-1)], -1).logsumexp(-1)
    fit = log_probability
    if candidates.contrast:
        expected = candidates.log_expected
        counts = (candidates.log_weights + expected[candidates.ids]).exp()
        noise = (counts * logsigmoid(expected[candidates.ids] - drawn)).sum(-1)
        fit = logsigmoid(own - expected[items]) + noise
    return CandidateLikelihood(log_probability, fit, own, drawn, candidates.log_weights, column)


def _without(column: Tensor, masses: Tensor) -> Tensor:
    """Log-masses (B, T, C) without each step's own item: an accidental hit counts for nothing."""
    place = column.clamp(min=0).unsqueeze(-1)
    kept = torch.where(column.unsqueeze(-1) >= 0, -torch.inf, masses.gather(-1, place))
    return masses.scatter(-1, place, kept)


def _in_batch(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, mask: Tensor, candidates: InBatch, tape: Tape | None
) -> ItemLikelihood:
    logits = queries @ weight[items].transpose(1, 2)
    if tape is not None:
        tape.uses.append(Crossed(name, queries, tape.watch(logits), items))
    own = logits.diagonal(dim1=1, dim2=2)
    draws = mask.sum(-1, keepdim=True) - 1  # the other steps
    log_weights = (-candidates.log_q[items] - draws.clamp(min=1).log()).unsqueeze(1)
    usable = mask.unsqueeze(1) & (items.unsqueeze(1) != items.unsqueeze(2))
    log_weights = torch.where(usable, log_weights, -torch.inf)
    log_probability = own - torch.cat([logits + log_weights, own.unsqueeze(-1)], -1).logsumexp(-1)
    return ItemLikelihood(log_probability, log_probability)


def _log_softmax(weight: Tensor, queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log softmax(q Wᵀ)[items] (B, T), its slope by the queries (B, T, i) and its residuals, see
    :class:`common.tape.LogSoftmax`.

    The logits are most of the memory traffic: a few users at a time, they become the residual in place, whose product
    with the weight is made while it is in the cache.
    """
    log_probability, slope, residuals = torch.empty_like(queries[..., 0]), torch.empty_like(queries), []
    for some in few(items, len(weight)):
        residual = (queries[some] * kernels.LOG2E) @ weight.T
        log_probability[some] = kernels.softmax_rows(residual, items[some])
        slope[some] = residual @ weight
        residuals.append(residual)
    return log_probability, slope.neg_(), residuals


def _sampled_log_softmax(
    weight: Tensor, queries: Tensor, items: Tensor, negatives: Negatives
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """own − log Ẑ (B, T), its slope by the queries (B, T, i), its residuals and what is `missing`, see
    :class:`common.tape.SampledLogSoftmax`."""
    rows, own_rows, column = weight[negatives.ids], embedding(items, weight), negatives.column[items]
    scaled, log_weights = queries * kernels.LOG2E, negatives.log_weights.to(queries.dtype) * kernels.LOG2E
    own = (scaled * own_rows).sum(-1)
    log_probability, missing, slope = torch.empty_like(own), torch.empty_like(own), torch.empty_like(queries)
    residuals = []
    for some in few(items, len(rows)):
        residual = scaled[some] @ rows.T
        likely = kernels.sampled_rows(residual, log_weights, column[some], own[some])
        log_probability[some], missing[some] = likely
        slope[some] = residual @ rows
        residuals.append(residual)
    return log_probability, (own_rows * missing.unsqueeze(-1)).sub_(slope), residuals, missing


class _Sloped(torch.autograd.Function):
    """``apply(queries (…, i), values (…), slope (…, i))``: the values, whose gradient by the queries is the slope."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * slope, None, None
