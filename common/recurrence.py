"""The recurrent cell over histories: a device's states before each interaction and after the last one.

Shapes: B devices, T steps, m input width, x what the cell reads (:mod:`common.model`), n state width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from common.ghost import Gradient, Scattered, cut, products
from common.model import Parameters, input_rows
from common.scan import CfnScan, GruScan, Scan, cfn_steps, gru_steps
from common.settings import ModelSettings
from common.trajectory import HIGHEST_REWARD


@dataclass(frozen=True)
class Recurrence:
    """A recurrent cell, run over whole trajectories or one interaction at a time."""

    model: ModelSettings

    def run(self, parameters: Parameters, items: Tensor, rewards: Tensor, start: Tensor | None = None) -> Tensor:
        """(B, T+1, n) states, differentiable by the parameters.

        Args:
            items: (B, T) catalogue indices.
            rewards: (B, T) in [-5, 5].
            start: (B, n) state to go on from; zeros at the beginning of a history.
        """
        state = rewards.new_zeros(len(items), self.model.state_width) if start is None else start
        if self.model.cell == "none":
            return state.unsqueeze(1).expand(-1, items.shape[1] + 1, -1)
        inputs = self._inputs(embedding(input_rows(self.model, items), parameters["items.embedding"]), rewards)
        steps = cfn_steps if self.model.cell == "cfn" else gru_steps
        return steps(inputs, parameters["cell.gates"], parameters["cell.candidate"], state)

    @torch.no_grad()
    def record(self, parameters: Parameters, items: Tensor, rewards: Tensor) -> "Recording":
        """The states from the beginning of the histories, with what it takes to differentiate them per device."""
        if self.model.cell == "none":
            return Recording(self.model, items, rewards, self.run(parameters, items, rewards), None)
        rows = input_rows(self.model, items)
        inputs = self._inputs(embedding(rows.T, parameters["items.embedding"]), rewards.T)
        kind = CfnScan if self.model.cell == "cfn" else GruScan
        scan: Scan = kind(inputs, parameters["cell.gates"], parameters["cell.candidate"])
        return Recording(self.model, rows, rewards, scan.states.transpose(0, 1), scan)

    def _inputs(self, embedded: Tensor, rewards: Tensor) -> Tensor:
        """(…, x) what the cell reads of embeddings (…, m) and rewards (…)."""
        if not self.model.ratings:
            return embedded
        rating = (rewards / HIGHEST_REWARD).unsqueeze(-1)
        return torch.cat([embedded, rating * embedded, rating], -1)


@dataclass(frozen=True)
class Recording:
    """What :meth:`Recurrence.record` saw.

    Attributes:
        rows: (B, T) of the input table.
        states: (B, T+1, n), without a graph.
    """

    model: ModelSettings
    rows: Tensor
    rewards: Tensor
    states: Tensor
    scan: Scan | None

    @torch.no_grad()
    def backward(self, wanted: Tensor) -> list[tuple[str, Gradient]]:
        """Each weight's name and the devices' gradients by it, from the loss's gradient by the states, (B, T+1, n)."""
        if self.scan is None:
            return []
        by_input, uses = self.scan.backward(wanted.transpose(0, 1))
        looked_up = Scattered(self._by_embedding(by_input).transpose(0, 1), self.rows)
        cell = [(name, products(cut(delta.transpose(0, 1)), inputs.transpose(0, 1))) for name, delta, inputs in uses]
        return [("items.embedding", looked_up), *cell]

    def _by_embedding(self, by_input: Tensor) -> Tensor:
        """(T, B, m) of the gradient by what the cell read, (T, B, x)."""
        if not self.model.ratings:
            return by_input
        plain, rated, _ = torch.split(by_input, [self.model.input_width, self.model.input_width, 1], -1)
        return torch.addcmul(plain, rated, (self.rewards.T / HIGHEST_REWARD).unsqueeze(-1))
