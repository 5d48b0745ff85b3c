"""Per-user gradients without forming them: ghost norms (Goodfellow 2015; Li et al. 2022).

A forward pass leaves every *use* of a shared weight, in which an output depends linearly on the weight
(:mod:`common.tape`). One backward pass to those outputs gives δ, the loss's gradient there. From the uses' inputs and δ
follow

* each user's squared gradient norm, from T×T Gram matrices: ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (δ_t·δ_t')(x_t·x_t'),
* any weighted sum of the users' gradients, one matrix product: (c δ)ᵀ x,

so a user's own gradient, as large as the model, is never formed; only the parts of it that are smaller than their Gram
matrices are (:func:`products`). Exact: held to autograd and to opacus's per-sample gradients by
``tests/unit/test_ghost.py``.

Shapes: B users, T steps; inputs and δ are (B, T, ·).
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


def products(deltas: Sequence[Tensor], inputs: Tensor) -> Gradient:
    """Gradients Σ_t δ_t x_tᵀ of x (B, T, i) and δ (B, T, o), of which each tensor has some users', in order.

    They are formed where they are no larger than what they are made of and the Gram matrices, which takes half the
    arithmetic; their norms follow from Gram matrices otherwise.
    """
    users, steps, width = inputs.shape
    outputs = deltas[0].shape[2]
    if outputs * width > steps * (outputs + width) + 2 * steps * steps:
        return Grams(deltas, inputs, torch.cat([gram(delta) for delta in deltas]))
    values, squares = inputs.new_empty(users, outputs, width), inputs.new_empty(users)
    start = 0
    for delta in deltas:
        some = slice(start, start := start + len(delta))
        # Copied, because the steps of one user may be far apart in memory, on the same cache lines.
        torch.bmm(delta.contiguous().transpose(1, 2), inputs[some].contiguous(), out=values[some])
        torch.linalg.vector_norm(values[some], dim=(1, 2), out=squares[some])
    return Formed(values, squares.square_())


@dataclass
class Formed:
    """(B, o, i) gradients as they are, and their (B,) squared norms."""

    values: Tensor
    squares: Tensor

    def square_norms(self) -> Tensor:
        return self.squares

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into.view(-1).addmv_(self.values.flatten(1).T, weights)


@dataclass
class Grams:
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
class Rows:
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
class Scattered:
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
class Both:
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
