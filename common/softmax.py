"""log π(a|s) and log β(a|s) of logged items: by the full softmax, a sampled one, or noise contrast.

The sampled softmax replaces the normaliser Z = Σ_j exp(f_j) by the unbiased estimate

    Ẑ = exp(f_a) + Σ_{j ≠ a} c_j exp(f_j) / (m Q_j),

over the items j that came up c_j times in m draws with replacement from Q (logQ correction; Bengio & Senécal 2008).
The logged item enters with certainty and is left out of the drawn ones (an accidental hit). 1/Ẑ overestimates 1/Z by
Jensen's inequality, by O(1/m): ``tests/unit/test_softmax.py`` holds both statements.

Noise contrast (Gutmann & Hyvärinen 2010; Mnih & Teh 2012) fits f itself to be log π: it tells the logged item from the
m drawn ones by logistic regression on f_j − log(m Q_j), so that the normaliser is learned and not estimated.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.ghost import Crossed, Dense, Sampled, Tape
from common.slate import inclusion


@dataclass(frozen=True)
class Negatives:
    """Items drawn once a round and shared by all devices; public, and without any relation to their data.

    Attributes:
        ids: (m',) int64, unique, ascending.
        log_weights: (m',) float32, log(c_j / (m Q_j)).
        column: (A,) int64, where an item stands in `ids`, or -1.
        log_expected: (A,) float32, log(m Q_j) of every item.
        contrast: whether they serve noise contrast instead of the sampled softmax.
    """

    ids: Tensor
    log_weights: Tensor
    column: Tensor
    log_expected: Tensor
    contrast: bool = False

    def expanded(self, log_factor: float) -> "Negatives":
        """Of a sample of the items, in which each stands for exp(`log_factor`) others."""
        return replace(self, log_weights=self.log_weights + log_factor, log_expected=self.log_expected - log_factor)


@dataclass(frozen=True)
class InBatch:
    """A device's own other logged items stand in for draws; they never leave it.

    Attributes:
        log_q: (A,) float32, log of the probability with which each item is logged.
    """

    log_q: Tensor

    def expanded(self, log_factor: float) -> "InBatch":
        """As :meth:`Negatives.expanded`."""
        return InBatch(self.log_q - log_factor)


Candidates = Negatives | InBatch | None
"""What log π is normalised over; None: all items."""


@dataclass(frozen=True)
class ItemLikelihood:
    """What one head says of B users' T logged items.

    Attributes:
        log_probability: (B, T) log-probability of each step's item.
        fit: (B, T) what training raises: `log_probability`, or the log-likelihood of noise contrast.
        own: (B, T) logit of each step's item.
        logits: (B, T, C) logits of the candidates.
        log_weights: (C,) or (B, T, C) log of how many items each candidate stands for; None: the candidates are all
            items, the step's own among them.
        column: (B, T) the candidate that is the step's item and counts for nothing, since that counts by itself; or -1.
    """

    log_probability: Tensor
    fit: Tensor
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
        if self.log_weights is None:
            return (shown * candidates).sum(-1)
        weighted = candidates * self.log_weights.exp()
        if self.column is not None:
            place = self.column.clamp(min=0).unsqueeze(-1)
            kept = torch.where(self.column.unsqueeze(-1) >= 0, 0, weighted.gather(-1, place))
            weighted = weighted.scatter(-1, place, kept)
        return (shown * weighted).sum(-1) + inclusion(self.log_probability, slate_size) * own


def log_uniform(items: int) -> np.ndarray:
    """(A,) probabilities Q(k) = log((k+2)/(k+1)) / log(A+1) of items ordered by falling frequency."""
    k = np.arange(items, dtype=np.float64)
    return np.asarray(np.log1p(1 / (k + 1)) / np.log(items + 1))


def draw_negatives(
    probability: np.ndarray, draws: int, generator: np.random.Generator, contrast: bool = False
) -> Negatives:
    """Draw `draws` items with replacement by their (A,) probabilities and merge the repeated ones."""
    drawn = np.searchsorted(np.cumsum(probability), generator.random(draws), side="right")
    return _negatives(np.minimum(drawn, len(probability) - 1), probability, contrast)


def take_turns(items: int, draws: int, round_: int, seed: int, contrast: bool = False) -> Negatives:
    """The `draws` negatives of a round, from 1, when every item has its turn before any has another one.

    Rounds cut a sequence of random permutations of the A items into pieces. In each round every item is expected
    draws/A times, as when drawn uniformly, so that nothing changes in expectation; but what one round leaves out the
    next ones bring, and the error of several rounds falls much faster than that of independent draws.
    """
    places = np.arange((round_ - 1) * draws, round_ * draws)
    passes, within = np.divmod(places, items)
    permutations = {
        int(turn): np.random.default_rng([seed, int(turn)]).permutation(items) for turn in np.unique(passes)
    }
    drawn = np.concatenate([permutations[turn][within[passes == turn]] for turn in permutations])
    return _negatives(drawn, np.full(items, 1 / items), contrast)


def every_item(items: int) -> Negatives:
    """All A items, each once: the full softmax, for items that are a sample themselves."""
    return _negatives(np.arange(items), np.full(items, 1 / items), False)


def _negatives(drawn: np.ndarray, probability: np.ndarray, contrast: bool) -> Negatives:
    items, draws = len(probability), len(drawn)
    ids, counts = np.unique(drawn, return_counts=True)
    column = np.full(items, -1, dtype=np.int64)
    column[ids] = np.arange(len(ids))
    log_expected = np.log(draws * probability)
    return Negatives(
        torch.from_numpy(ids),
        torch.from_numpy((np.log(counts) - log_expected[ids]).astype(np.float32)),
        torch.from_numpy(column),
        torch.from_numpy(log_expected.astype(np.float32)),
        contrast,
    )


def likelihood(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, mask: Tensor, candidates: Candidates, tape: Tape
) -> ItemLikelihood:
    """What a head says of each step's item.

    Args:
        weight: (A, i) the head's item embeddings.
        name: the weight's name, for the tape.
        queries: (B, T, i), see :func:`common.model.queries`.
        items: (B, T) int64.
        mask: (B, T) bool, the steps that are real.
        candidates: what to normalise over.
    """
    if isinstance(candidates, Negatives):
        return _sampled(weight, name, queries, items, candidates, tape)
    if isinstance(candidates, InBatch):
        return _in_batch(weight, name, queries, items, mask, candidates, tape)
    logits = tape.watch(queries @ weight.T)
    tape.uses.append(Dense(name, queries, logits))
    log_probability: Tensor = _ItemLogSoftmax.apply(logits, items)  # type: ignore[no-untyped-call]
    own = logits.gather(-1, items.unsqueeze(-1)).squeeze(-1)
    return ItemLikelihood(log_probability, log_probability, own, logits)


def _sampled(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, negatives: Negatives, tape: Tape
) -> ItemLikelihood:
    drawn = tape.watch(queries @ weight[negatives.ids].T)
    own = tape.watch((queries * weight[items]).sum(-1))
    column = negatives.column[items]
    tape.uses.append(Sampled(name, queries, negatives.ids, items, column, drawn, own))
    log_probability: Tensor = _SampledLogSoftmax.apply(  # type: ignore[no-untyped-call]
        drawn, own, negatives.log_weights, column
    )[0]
    fit = log_probability
    if negatives.contrast:
        expected = negatives.log_expected
        counts = (negatives.log_weights + expected[negatives.ids]).exp()
        noise = (counts * logsigmoid(expected[negatives.ids] - drawn)).sum(-1)
        fit = logsigmoid(own - expected[items]) + noise
    return ItemLikelihood(log_probability, fit, own, drawn, negatives.log_weights, column)


def _in_batch(
    weight: Tensor, name: str, queries: Tensor, items: Tensor, mask: Tensor, candidates: InBatch, tape: Tape
) -> ItemLikelihood:
    logits = tape.watch(queries @ weight[items].transpose(1, 2))
    tape.uses.append(Crossed(name, queries, items, logits))
    own = logits.diagonal(dim1=1, dim2=2)
    draws = mask.sum(-1, keepdim=True) - 1  # the other steps
    log_weights = (-candidates.log_q[items] - draws.clamp(min=1).log()).unsqueeze(1)
    usable = mask.unsqueeze(1) & (items.unsqueeze(1) != items.unsqueeze(2))
    log_weights = torch.where(usable, log_weights, -torch.inf)
    log_probability = own - torch.cat([logits + log_weights, own.unsqueeze(-1)], -1).logsumexp(-1)
    return ItemLikelihood(log_probability, log_probability, own, logits, log_weights)


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
        masses = masses.scatter(-1, place, kept)  # in place from here on: a copy costs as much as the exponentials
        highest = torch.maximum(masses.amax(-1), own)
        masses.sub_(highest.unsqueeze(-1)).exp_()
        normaliser = masses.sum(-1) + (own - highest).exp()
        return own - highest - normaliser.log(), masses.div_(normaliser.unsqueeze(-1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        log_probability, probabilities = output
        ctx.mark_non_differentiable(probabilities)
        ctx.save_for_backward(log_probability, probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_probability, probabilities = ctx.saved_tensors
        return probabilities * -gradient.unsqueeze(-1), gradient * (1 - log_probability.exp()), None, None
