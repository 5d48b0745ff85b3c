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

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


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
    """Collects the uses of one forward pass; an idle tape leaves the computation as it is."""

    recording: bool = True
    uses: list[Use] = field(default_factory=list)

    def watch(self, output: Tensor) -> Tensor:
        """Make sure that a use's output is a node of the autograd graph."""
        if self.recording and not output.requires_grad:
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
        return products(deltas[0], self.inputs)


@dataclass
class Lookup:
    """y = W[ids]: ids (B, T), y (B, T, i)."""

    weight: str
    ids: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def gradient(self, *deltas: Tensor) -> Gradient:
        return _Scattered(deltas[0], self.ids)


@dataclass
class Sampled:
    """The logits of a sampled softmax: y_j = x · W[negatives_j] and, for each step's own item, z = x · W[ids].

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
        picked = _PickedRows(torch.where(hit, 0, own), self.ids, self.inputs)
        return _Both(_Rows(products(negative, self.inputs), self.negatives), picked)


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
        return _PickedRows(deltas[0], self.ids, self.inputs)


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
        return _Scattered(deltas[0].transpose(1, 2) @ self.inputs, self.ids)  # rows named twice come twice


def products(delta: Tensor, inputs: Tensor) -> Gradient:
    """Gradients Σ_t δ_t x_tᵀ of δ (B, T, o) and x (B, T, i), formed where they are no larger than what they are made of
    and the Gram matrices, which takes half the arithmetic; by their Gram matrices otherwise."""
    steps, outputs, width = delta.shape[1], delta.shape[2], inputs.shape[2]
    if outputs * width <= steps * (outputs + width) + 2 * steps * steps:
        return _Formed(delta.transpose(1, 2) @ inputs)
    return _Gram(delta, inputs)


@dataclass
class _Formed:
    """(B, o, i) gradients as they are."""

    values: Tensor

    def square_norms(self) -> Tensor:
        flat = self.values.flatten(1)
        squares: Tensor = torch.linalg.vecdot(flat, flat)
        return squares

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into += (weights @ self.values.flatten(1)).view_as(into)


@dataclass
class _Gram:
    """Σ_t δ_t x_tᵀ, never formed."""

    delta: Tensor
    inputs: Tensor

    def square_norms(self) -> Tensor:
        return (_gram(self.delta) * _gram(self.inputs)).sum((1, 2))

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        # The inputs are the narrower ones: of the full softmax, δ is a megabyte a device.
        into += self.delta.flatten(0, 1).T @ _weighted(self.inputs, weights)


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
        return (_gram(self.delta) * _same(self.ids)).sum((1, 2))

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into.index_add_(0, self.ids.flatten(), _weighted(self.delta, weights))


@dataclass
class _PickedRows:
    """Row ids[t] gets δ_t x_t with δ (B, T)."""

    delta: Tensor
    ids: Tensor
    inputs: Tensor

    def square_norms(self) -> Tensor:
        same = self.delta.unsqueeze(2) * self.delta.unsqueeze(1) * _same(self.ids)
        return (same * _gram(self.inputs)).sum((1, 2))

    def add_sum(self, weights: Tensor, into: Tensor) -> None:
        into.index_add_(0, self.ids.flatten(), _weighted(self.delta.unsqueeze(-1), weights) * self.inputs.flatten(0, 1))


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


def _gram(values: Tensor) -> Tensor:
    """(B, T, T) inner products between a user's own steps."""
    return values @ values.transpose(1, 2)


def _same(ids: Tensor) -> Tensor:
    """(B, T, T) 1 where two steps name the same row."""
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).float()


def _weighted(delta: Tensor, weights: Tensor) -> Tensor:
    """(B·T, o) δ with each user's steps multiplied by that user's weight."""
    return (delta * weights.view(-1, 1, 1)).flatten(0, 1)
