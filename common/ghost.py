"""Per-user gradients without forming them: ghost norms (Goodfellow 2015; Li et al. 2022).

A forward pass leaves on its :class:`Tape` every *use* of a shared weight, in which an output depends linearly on the
weight. One backward pass to those outputs gives δ, the loss's gradient there. From the uses' inputs and δ follow

* each user's squared gradient norm, from T×T Gram matrices: ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (δ_t·δ_t')(x_t·x_t'),
* any weighted sum of the users' gradients, one matrix product: (c δ)ᵀ x,

so a user's own gradient, as large as the model, is never formed; only the parts of it that are smaller than their Gram
matrices are (:func:`products`). Exact: held to autograd and to opacus's per-sample gradients by
``tests/unit/test_ghost.py``.

A weight may stand in several uses only if they touch different rows of it; otherwise cross terms would be missing.
Shapes: B users, T steps; a use's inputs and outputs are (B, T, ·).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_CACHED = 2**17


class Gradient(Protocol):
    """The B users' gradients by one use of a weight."""

    def square_norms(self) -> Tensor:
        """(B,) each user's squared norm."""

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        """Add Σ_u weights[u] · gradient_u to `into`, which has the weight's shape; weights: (B,)."""


class Use(Protocol):
    """One linear use of the shared weight named `weight`."""

    weight: str

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Tensors whose gradients :meth:`gradient` takes."""

    def gradient(self, *deltas: Tensor) -> Gradient:
        """The users' gradients with respect to the weight."""


@dataclass
class Tape:
    """Collects the uses of one forward pass, whose weights need no gradients of their own."""

    uses: list[Use] = field(default_factory=list)

    def watch(self, output: Tensor) -> Tensor:
        """Make sure that a use's output is a node of the autograd graph."""
        if not output.requires_grad:
            output.requires_grad_()
        return output


@dataclass
class Dense:
    """y = x Wᵀ: x (B, T, i), y (B, T, o)."""

    weight: str
    inputs: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        return products(cut(deltas[0]), self.inputs)


@dataclass
class LogSoftmax:
    """ℓ_t = log softmax(x_t W[rows]ᵀ) at the step's own item: x (B, T, i), ℓ (B, T).

    The residual (B, T, C), in `residuals` some users at a time, is −∂ℓ/∂logits, the probabilities less 1 at the own
    item. A step's gradient by W is −δ_t residual_t x_tᵀ: nothing as large as the logits is made but the residual, by
    the forward pass, which also makes its Gram matrices `grams` (B, T, T) while it is at hand.
    """

    weight: str
    inputs: Tensor
    residuals: list[Tensor]
    grams: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        return _Gram(self.residuals, -deltas[0].unsqueeze(-1) * self.inputs, self.grams)


@dataclass
class SampledLogSoftmax:
    """The same over some rows, the `negatives` (C,), and the step's own, W[ids], ids (B, T).

    The residual (B, T, C) belongs to the negatives, an own item among them included; `missing` (B, T) is 1 less the
    probability of an own item that is none of them, and 0 otherwise: both parts touch different rows.
    """

    weight: str
    inputs: Tensor
    negatives: Tensor
    residuals: list[Tensor]
    ids: Tensor
    missing: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        scaled = -deltas[0].unsqueeze(-1) * self.inputs
        picked = _picked(-self.missing, self.ids, scaled)
        return _Both(_Rows(products(self.residuals, scaled), self.negatives), picked)


@dataclass
class Sampled:
    """The logits themselves: y_j = x · W[negatives_j] and, for each step's own item, z = x · W[ids].

    A step's own item may be a negative of the other steps: `own_column` (B, T) is its column among the (unique)
    negatives, or -1. The own δ is moved into that column, so that both parts touch different rows.
    """

    weight: str
    inputs: Tensor
    negatives: Tensor
    ids: Tensor
    own_column: Tensor
    negative_logits: Tensor
    own_logits: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.negative_logits, self.own_logits)

    def gradient(self, *deltas: Tensor) -> Gradient:
        negative, own = deltas
        hit = self.own_column >= 0
        moved = torch.where(hit, own, 0).unsqueeze(-1)
        negative = negative.scatter_add(-1, self.own_column.clamp(min=0).unsqueeze(-1), moved)
        picked = _picked(torch.where(hit, 0, own), self.ids, self.inputs)
        return _Both(_Rows(products(cut(negative), self.inputs), self.negatives), picked)


@dataclass
class Picked:
    """One row per step: y = x · W[ids]: x (B, T, i), ids and y (B, T)."""

    weight: str
    inputs: Tensor
    ids: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        return _picked(deltas[0], self.ids, self.inputs)


@dataclass
class Crossed:
    """Every step's input against the rows of all of the user's steps: y = x W[ids]ᵀ: x (B, T, i), ids (B, S),
    y (B, T, S)."""

    weight: str
    inputs: Tensor
    ids: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        return scattered(deltas[0].transpose(1, 2) @ self.inputs, self.ids)  # rows named twice come twice


def products(deltas: Sequence[Tensor], inputs: Tensor) -> Gradient:
    """Gradients Σ_t δ_t x_tᵀ of x (B, T, i) and δ (B, T, o), of which each tensor has some users', in order.

    They are formed where they are no larger than what they are made of and the Gram matrices, which takes half the
    arithmetic; their norms follow from Gram matrices otherwise.
    """
    users, steps, width = inputs.shape
    outputs = deltas[0].shape[2]
    if outputs * width > steps * (outputs + width) + 2 * steps * steps:
        return _Gram(deltas, inputs, torch.cat([gram(delta) for delta in deltas]))
    values, squares = inputs.new_empty(users, outputs, width), inputs.new_empty(users)
    start = 0
    for delta in deltas:
        some = slice(start, start := start + len(delta))
        # Copied, because the steps of one user may be far apart in memory, on the same cache lines.
        torch.bmm(delta.contiguous().transpose(1, 2), inputs[some].contiguous(), out=values[some])
        torch.linalg.vector_norm(values[some], dim=(1, 2), out=squares[some])
    return _Formed(values, squares.square_())


def scattered(delta: Tensor, ids: Tensor) -> Gradient:
    """Gradients of a table whose row ids[t] gets δ_t: δ (B, T, i), ids (B, T)."""
    return _Scattered(delta, ids)


def _picked(delta: Tensor, ids: Tensor, inputs: Tensor) -> Gradient:
    """Row ids[t] gets δ_t x_t: δ (B, T), x (B, T, i)."""
    return scattered(delta.unsqueeze(-1) * inputs, ids)


@dataclass
class _Formed:
    """(B, o, i) gradients as they are, and their (B,) squared norms."""

    values: Tensor
    squares: Tensor

    def square_norms(self) -> Tensor:
        return self.squares

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into.view(-1).addmv_(self.values.flatten(1).T, weights)


@dataclass
class _Gram:
    """Σ_t δ_t x_tᵀ, never formed; `delta_gram` (B, T, T) are the inner products of δ."""

    deltas: Sequence[Tensor]
    inputs: Tensor
    delta_gram: Tensor

    def square_norms(self) -> Tensor:
        return (self.delta_gram * gram(self.inputs)).sum((1, 2))

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        weighted = self.inputs * weights.view(-1, 1, 1)
        total = into.new_zeros(into.shape[1], into.shape[0])  # transposed: what is added to most often stays in cache
        for some, delta in zip(torch.split(weighted, [len(delta) for delta in self.deltas]), self.deltas, strict=True):
            total.addmm_(some.flatten(0, 1).T, delta.flatten(0, 1))
        into += total.T


@dataclass
class _Rows:
    """Gradients of some rows of the weight, the same ones for all users."""

    inner: Gradient
    ids: Tensor

    def square_norms(self) -> Tensor:
        return self.inner.square_norms()

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        rows = into.new_zeros(len(self.ids), into.shape[1])
        self.inner.add_sum(weights, rows)
        into.index_add_(0, self.ids, rows)


@dataclass
class _Scattered:
    """Row ids[t] gets δ_t (B, T, i)."""

    delta: Tensor
    ids: Tensor

    def square_norms(self) -> Tensor:
        rows = self.delta.new_zeros(self.ids.numel(), self.delta.shape[2])
        rows.index_add_(0, _slots(self.ids), self.delta.flatten(0, 1))
        norms: Tensor = torch.linalg.vector_norm(rows.view(len(self.ids), -1), dim=1)
        return norms.square()

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into.index_add_(0, self.ids.flatten(), _weighted(self.delta, weights))


@dataclass
class _Both:
    """Gradients of rows that differ."""

    one: Gradient
    other: Gradient

    def square_norms(self) -> Tensor:
        return self.one.square_norms() + self.other.square_norms()

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        self.one.add_sum(weights, into)
        self.other.add_sum(weights, into)


def gram(values: Tensor) -> Tensor:
    """(B, T, T) inner products between a user's own steps, of (B, T, ·)."""
    return values @ values.transpose(1, 2)


def few(numbers: int) -> int:
    """Of how many users the `numbers` that each of them has stay in the processor's cache."""
    return max(_CACHED // max(numbers, 1), 1)


def cut(values: Tensor) -> tuple[Tensor, ...]:
    """(B, T, ·) a few users at a time."""
    return torch.split(values, few(values.shape[1] * values.shape[2]))


def _slots(ids: Tensor) -> Tensor:
    """(B·T,) numbers that two steps share if they are of one user and name the same row."""
    users, steps = ids.shape
    ordered, order = ids.sort(dim=1)
    changes = torch.zeros_like(ids)
    changes[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    of_user = torch.empty_like(ids).scatter_(1, order, changes.cumsum(1))
    return (of_user + steps * torch.arange(users).unsqueeze(1)).flatten()


def _weighted(delta: Tensor, weights: Tensor) -> Tensor:
    """(B·T, o) δ with each user's steps multiplied by that user's weight."""
    return (delta * weights.view(-1, 1, 1)).flatten(0, 1)
