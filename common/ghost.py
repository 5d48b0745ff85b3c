"""Per-user gradients without forming them: ghost norms (Goodfellow 2015; Li et al. 2022).

A forward pass leaves on its :class:`Tape` every *use* of a shared weight, in which an output depends linearly on the
weight. One backward pass to those outputs gives δ, the loss's gradient there. From the uses' inputs and δ follow

* each user's squared gradient norm, from T×T Gram matrices: ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,t'} (δ_t·δ_t')(x_t·x_t'),
* any weighted sum of the users' gradients, one matrix product: (c δ)ᵀ x,

so a user's own gradient, as large as the model, is never formed. Exact: held to autograd and to opacus's per-sample
gradients by ``tests/unit/test_ghost.py``.

A weight may stand in several uses only if they touch different rows of it; otherwise cross terms would be missing.
Shapes: B users, T steps; a use's inputs and outputs are (B, T, ·).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Use(Protocol):
    """One linear use of the shared weight named `weight`."""

    weight: str

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Tensors whose gradients :meth:`square_norms` and :meth:`add_sum` take."""

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        """(B,) each user's squared gradient norm with respect to the weight."""

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        """Add Σ_u weights[u] · gradient_u to `into`, which has the weight's shape; weights: (B,)."""


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

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        return (_gram(deltas[0]) * _gram(self.inputs)).sum((1, 2))

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        into += _weighted(deltas[0], weights).T @ self.inputs.flatten(0, 1)


@dataclass
class Lookup:
    """y = W[ids]: ids (B, T), y (B, T, i)."""

    weight: str
    ids: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        return (_gram(deltas[0]) * _same(self.ids)).sum((1, 2))

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        into.index_add_(0, self.ids.flatten(), _weighted(deltas[0], weights))


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

    def _disjoint(self, deltas: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        negative, own = deltas
        hit = self.own_column >= 0
        moved = torch.where(hit, own, 0).unsqueeze(-1)
        negative = negative.scatter_add(-1, self.own_column.clamp(min=0).unsqueeze(-1), moved)
        return negative, torch.where(hit, 0, own)

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        negative, own = self._disjoint(deltas)
        return ((_gram(negative) + _picked_gram(own, self.ids)) * _gram(self.inputs)).sum((1, 2))

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        negative, own = self._disjoint(deltas)
        into.index_add_(0, self.negatives, _weighted(negative, weights).T @ self.inputs.flatten(0, 1))
        _add_picked(own, self.ids, self.inputs, weights, into)


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

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        return (_picked_gram(deltas[0], self.ids) * _gram(self.inputs)).sum((1, 2))

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        _add_picked(deltas[0], self.ids, self.inputs, weights, into)


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

    def square_norms(self, deltas: tuple[Tensor, ...]) -> Tensor:
        return (_gram(self._rows(deltas)) * _same(self.ids)).sum((1, 2))

    def add_sum(self, deltas: tuple[Tensor, ...], weights: Tensor, into: Tensor) -> None:
        into.index_add_(0, self.ids.flatten(), _weighted(self._rows(deltas), weights))

    def _rows(self, deltas: tuple[Tensor, ...]) -> Tensor:
        """(B, S, i) what each of the named rows gets; rows named twice come twice."""
        return deltas[0].transpose(1, 2) @ self.inputs


def _gram(values: Tensor) -> Tensor:
    """(B, T, T) inner products between a user's own steps."""
    return values @ values.transpose(1, 2)


def _same(ids: Tensor) -> Tensor:
    """(B, T, T) 1 where two steps name the same row."""
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).float()


def _picked_gram(delta: Tensor, ids: Tensor) -> Tensor:
    """(B, T, T) products of (B, T) deltas of steps that pick the same row."""
    return delta.unsqueeze(2) * delta.unsqueeze(1) * _same(ids)


def _add_picked(delta: Tensor, ids: Tensor, inputs: Tensor, weights: Tensor, into: Tensor) -> None:
    into.index_add_(0, ids.flatten(), _weighted(delta.unsqueeze(-1), weights) * inputs.flatten(0, 1))


def _weighted(delta: Tensor, weights: Tensor) -> Tensor:
    """(B·T, o) δ with each user's steps multiplied by that user's weight."""
    return (delta * weights.view(-1, 1, 1)).flatten(0, 1)
