"""What a forward pass leaves behind: the uses of the shared weights, in which an output depends linearly on a weight.

One backward pass to the uses' outputs gives δ, the loss's gradient there, and each use makes the users' gradients of it
(:mod:`common.ghost`). A weight may stand in several uses only if they touch different rows of it; otherwise cross terms
would be missing. Shapes: B users, T steps; a use's inputs and outputs are (B, T, ·).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.ghost import Both, Gradient, Rows, Scattered, cut, products


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
class _OneOutput:
    """What most uses have: the weight's name, what was multiplied with it, and what came out."""

    weight: str
    inputs: Tensor
    output: Tensor

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (self.output,)


@dataclass
class Dense(_OneOutput):
    """y = x Wᵀ: x (B, T, i), y (B, T, o)."""

    def gradient(self, *deltas: Tensor) -> Gradient:
        return products(cut(deltas[0]), self.inputs)


@dataclass
class LogSoftmax(_OneOutput):
    """ℓ_t = log softmax(x_t W[rows]ᵀ) at the step's own item: x (B, T, i), ℓ (B, T).

    The residual (B, T, C), in `residuals` some users at a time, is −∂ℓ/∂logits, the probabilities less 1 at the own
    item. A step's gradient by W is −δ_t residual_t x_tᵀ: nothing as large as the logits is made but the residual, by
    the forward pass.
    """

    residuals: list[Tensor]

    def gradient(self, *deltas: Tensor) -> Gradient:
        return products(self.residuals, -deltas[0].unsqueeze(-1) * self.inputs)


@dataclass
class SampledLogSoftmax(_OneOutput):
    """The same over some rows, the `negatives` (C,), and the step's own, W[ids], ids (B, T).

    The residual (B, T, C) belongs to the negatives, an own item among them included; `missing` (B, T) is 1 less the
    probability of an own item that is none of them, and 0 otherwise: both parts touch different rows.
    """

    negatives: Tensor
    residuals: list[Tensor]
    ids: Tensor
    missing: Tensor

    def gradient(self, *deltas: Tensor) -> Gradient:
        scaled = -deltas[0].unsqueeze(-1) * self.inputs
        picked = Scattered(-self.missing.unsqueeze(-1) * scaled, self.ids)
        return Both(Rows(products(self.residuals, scaled), self.negatives), picked)


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
        picked = Scattered(torch.where(hit, 0, own).unsqueeze(-1) * self.inputs, self.ids)
        return Both(Rows(products(cut(negative), self.inputs), self.negatives), picked)


@dataclass
class Picked(_OneOutput):
    """One row per step: y = x · W[ids]: x (B, T, i), ids and y (B, T)."""

    ids: Tensor

    def gradient(self, *deltas: Tensor) -> Gradient:
        return Scattered(deltas[0].unsqueeze(-1) * self.inputs, self.ids)


@dataclass
class Crossed(_OneOutput):
    """Every step's input against the rows of all of the user's steps: y = x W[ids]ᵀ: x (B, T, i), ids (B, S),
    y (B, T, S)."""

    ids: Tensor

    def gradient(self, *deltas: Tensor) -> Gradient:
        return Scattered(deltas[0].transpose(1, 2) @ self.inputs, self.ids)  # rows named twice come twice
