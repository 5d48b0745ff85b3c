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

from common import kernels

_CACHED = 2**16


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
        return Grams(deltas, inputs, torch.cat([kernels.gram(delta) for delta in deltas]))
    values, squares = inputs.new_empty(users, outputs, width), inputs.new_empty(users)
    start = 0
    for delta in deltas:
        some = slice(start, start := start + len(delta))
        kernels.form(delta, inputs[some], values[some], squares[some])
    return Formed(values, squares)


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
        return (self.delta_gram * kernels.gram(self.inputs)).sum((1, 2))

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
        return kernels.row_squares(self.delta, self.ids)

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


def few(steps: Tensor, width: int) -> list[slice]:
    """As many of the users of `steps` (B, T, …) at a time as have their T·`width` numbers in the processor's cache; one
    by itself only where there is no other."""
    users, numbers = len(steps), steps.shape[1] * width
    pieces = max(users // max(_CACHED // max(numbers, 1), 2), 1)
    return [slice(users * piece // pieces, users * (piece + 1) // pieces) for piece in range(pieces)]


def cut(values: Tensor) -> list[Tensor]:
    """(B, T, ·) a few users at a time."""
    return [values[some] for some in few(values, values.shape[2])]


def _weighted(delta: Tensor, weights: Tensor) -> Tensor:
    """(B·T, o) δ with each user's steps multiplied by that user's weight."""
    return (delta * weights.view(-1, 1, 1)).flatten(0, 1)
