"""log π(a|s) and log β(a|s) of logged items, by the full softmax or by a sampled one.

The sampled softmax replaces the normaliser Z = Σ_j exp(f_j) by the unbiased estimate

    Ẑ = exp(f_a) + Σ_{j ≠ a} c_j exp(f_j) / (m Q_j),

over the items j that came up c_j times in m draws with replacement from Q (logQ correction; Bengio & Senécal 2008).
The logged item enters with certainty and is left out of the drawn ones (an accidental hit). 1/Ẑ overestimates 1/Z by
Jensen's inequality, by O(1/m): ``tests/unit/test_softmax.py`` holds both statements.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.ghost import Dense, Sampled, Tape


@dataclass(frozen=True)
class Negatives:
    """Items drawn once a round and shared by all devices; public, and without any relation to their data.

    Attributes:
        ids: (m',) int64, unique, ascending.
        log_weights: (m',) float32, log(c_j / (m Q_j)).
        column: (A,) int64, where an item stands in `ids`, or -1.
    """

    ids: Tensor
    log_weights: Tensor
    column: Tensor


def log_uniform(items: int) -> np.ndarray:
    """(A,) probabilities Q(k) = log((k+2)/(k+1)) / log(A+1) of items ordered by falling frequency."""
    k = np.arange(items, dtype=np.float64)
    return np.asarray(np.log1p(1 / (k + 1)) / np.log(items + 1))


def draw_negatives(items: int, draws: int, generator: np.random.Generator) -> Negatives:
    """Draw `draws` items log-uniformly with replacement and merge the repeated ones."""
    probability = log_uniform(items)
    # The inverse of Q's distribution function log(k+1) / log(A+1).
    drawn = np.exp(generator.random(draws) * np.log(items + 1)).astype(np.int64) - 1
    ids, counts = np.unique(np.clip(drawn, 0, items - 1), return_counts=True)
    column = np.full(items, -1, dtype=np.int64)
    column[ids] = np.arange(len(ids))
    weights = np.log(counts) - np.log(draws * probability[ids])
    return Negatives(torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(column))


def log_probabilities(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, negatives: Negatives | None, tape: Tape
) -> Tensor:
    """(B, T) log-probability of each step's item.

    Args:
        weight: (A, n+1) the head's item embeddings.
        name: the weight's name, for the tape.
        queries: (B, T, n+1), see :func:`common.model.queries`.
        items: (B, T) int64.
        negatives: those of the sampled softmax; None for the full one.
    """
    if negatives is None:
        logits = tape.watch(queries @ weight.T)
        tape.uses.append(Dense(name, queries, logits))
        return _ItemLogSoftmax.apply(logits, items)  # type: ignore[no-any-return, no-untyped-call]
    drawn = tape.watch(queries @ weight[negatives.ids].T)
    own = tape.watch((queries * weight[items]).sum(-1))
    column = negatives.column[items]
    tape.uses.append(Sampled(name, queries, negatives.ids, items, column, drawn, own))
    log_probability: Tensor = _SampledLogSoftmax.apply(  # type: ignore[no-untyped-call]
        drawn, own, negatives.log_weights, column
    )[0]
    return log_probability


class _ItemLogSoftmax(torch.autograd.Function):
    """log softmax(logits)[items] with one pass over the logits each way: they are most of the memory traffic.

    Autograd's own chain would write the (B, T, A) gradient three times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, items: Tensor) -> Tensor:
        return logits.gather(-1, items.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, items, log_probability = ctx.saved_tensors
        (gradient,) = gradients
        at = items.unsqueeze(-1)
        log_normaliser = logits.gather(-1, at) - log_probability.unsqueeze(-1)
        delta = (logits - log_normaliser).exp_().mul_(-gradient.unsqueeze(-1))
        return delta.scatter_add_(-1, at, gradient.unsqueeze(-1)), None


class _SampledLogSoftmax(torch.autograd.Function):
    """own − log Ẑ, with the exponentials of the forward pass kept for the backward one: they are most of the work.

    A step's own item is masked among the negatives (`column`, or -1): an accidental hit counts for nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(drawn: Tensor, own: Tensor, log_weights: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        place = column.clamp(min=0).unsqueeze(-1)
        masses = drawn + log_weights
        kept = torch.where(column.unsqueeze(-1) >= 0, -torch.inf, masses.gather(-1, place))
        masses = masses.scatter(-1, place, kept)
        highest = torch.maximum(masses.amax(-1), own)
        masses = (masses - highest.unsqueeze(-1)).exp()
        normaliser = masses.sum(-1) + (own - highest).exp()
        return own - highest - normaliser.log(), masses / normaliser.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        log_probability, probabilities = output
        ctx.mark_non_differentiable(probabilities)
        ctx.save_for_backward(log_probability, probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_probability, probabilities = ctx.saved_tensors
        return probabilities * -gradient.unsqueeze(-1), gradient * (1 - log_probability.exp()), None, None
