"""The recurrent cells' loops over time, differentiated by hand.

Autograd would keep a node and a fresh tensor for each of some twenty operations of each step. Here a step works in
buffers that are there before the loop, time runs along the first axis, so that a step is one contiguous piece of
memory, and the backward loop makes what is asked for and nothing else: δ of the cell's linear outputs, from which ghost
norms and sums follow (:mod:`common.ghost`). No weight gets a gradient.

The plain loops, :func:`cfn_steps` and :func:`gru_steps`, are for whatever needs autograd, and the truth in
``tests/unit/test_scan.py``. B devices, T steps, input width x, states of width n; weights as in :mod:`common.model`.
"""

from typing import Protocol

import torch
from torch import Tensor

from common import kernels


class Scan(Protocol):
    """One cell, run over T steps from states of 0.

    Attributes:
        states: (T+1, B, n), before each step and after the last one.
        inputs: (T, B, x+1+n) what the gates read: [x, 1, state].
    """

    states: Tensor
    inputs: Tensor

    def backward(self, wanted: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """From the loss's gradient by the states, (T+1, B, n): δ of the inputs x, (T, B, x), and for each weight its
        name, δ (T, B, o) and inputs (T, B, i): the weight's gradient is Σ_t δ_t i_tᵀ."""


class CfnScan:
    """s' = z ⊙ tanh(s) + i ⊙ tanh(V x) with [z, i] = σ(W [x, 1, s]).

    Args:
        inputs: (T, B, x).
        gates: (2n, x+1+n), W.
        candidate: (n, x), V.
    """

    def __init__(self, inputs: Tensor, gates: Tensor, candidate: Tensor) -> None:
        steps, devices, x = inputs.shape
        n = len(candidate)
        self._gates, self._candidate, self._x = gates, candidate, x
        self.inputs, self.states = _with_states(inputs, n)
        self._opened = inputs.new_empty(steps, devices, 2 * n)
        self._driven = inputs.new_empty(steps, devices, n)
        self._squashed = inputs.new_empty(steps, devices, n)
        reads, drives = gates.T, candidate.T
        for t in range(steps):
            torch.mm(self.inputs[t], reads, out=self._opened[t])
            torch.mm(inputs[t], drives, out=self._driven[t])
            of_step = self._opened[t], self._driven[t], self._squashed[t]
            kernels.cfn_step(*of_step, self.states[t], self.states[t + 1])

    def backward(self, wanted: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """As :meth:`Scan.backward`."""
        x = self._x
        by_input, by_state = self._gates[:, :x].contiguous(), self._gates[:, x + 1 :].contiguous()
        gates, drives = torch.empty_like(self._opened), torch.empty_like(self._driven)
        later = wanted[-1].clone()  # what the state after the step is asked for
        for t in range(len(drives) - 1, -1, -1):
            of_step = self._opened[t], self._driven[t], self._squashed[t]
            kernels.cfn_back(later, *of_step, gates[t], drives[t], wanted[t])
            later.addmm_(gates[t], by_state)
        inputs = gates @ by_input + drives @ self._candidate
        return inputs, [("cell.gates", gates, self.inputs), ("cell.candidate", drives, self.inputs[..., :x])]


class GruScan:
    """s' = z ⊙ s + (1 − z) ⊙ tanh(V [x, 1, r ⊙ s]) with [z, r] = σ(W [x, 1, s]).

    Args:
        inputs: (T, B, x).
        gates: (2n, x+1+n), W.
        candidate: (n, x+1+n), V.
    """

    def __init__(self, inputs: Tensor, gates: Tensor, candidate: Tensor) -> None:
        steps, devices, x = inputs.shape
        n = len(candidate)
        self._gates, self._candidate, self._x = gates, candidate, x
        self.inputs, self.states = _with_states(inputs, n)
        self._left = self.inputs.clone()
        self._opened = inputs.new_empty(steps, devices, 2 * n)
        self._fresh = inputs.new_empty(steps, devices, n)
        reads, drives = gates.T, candidate.T
        for t in range(steps):
            torch.mm(self.inputs[t], reads, out=self._opened[t])
            kernels.gru_open(self._opened[t], self.states[t], self._left[t, :, x + 1 :])
            torch.mm(self._left[t], drives, out=self._fresh[t])
            kernels.gru_close(self._opened[t], self._fresh[t], self.states[t], self.states[t + 1])

    def backward(self, wanted: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """As :meth:`Scan.backward`."""
        x = self._x
        by_input, by_state = self._gates[:, :x].contiguous(), self._gates[:, x + 1 :].contiguous()
        of_input, of_left = self._candidate[:, :x].contiguous(), self._candidate[:, x + 1 :].contiguous()
        gates, candidates = torch.empty_like(self._opened), torch.empty_like(self._fresh)
        later = wanted[-1].clone()  # what the state after the step is asked for
        by_left = torch.empty_like(later)
        for t in range(len(candidates) - 1, -1, -1):
            opened, state = self._opened[t], self.states[t]
            kernels.gru_back(later, opened, self._fresh[t], state, gates[t], candidates[t])
            torch.mm(candidates[t], of_left, out=by_left)
            kernels.gru_back_left(later, by_left, opened, state, gates[t], wanted[t])
            later.addmm_(gates[t], by_state)
        inputs = gates @ by_input + candidates @ of_input
        return inputs, [("cell.gates", gates, self.inputs), ("cell.candidate", candidates, self._left)]


def _with_states(inputs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(T, B, x+1+n) of inputs (T, B, x): [x, 1, state], and (T+1, B, n) the states in there and after: 0 at first."""
    steps, devices, x = inputs.shape
    read = inputs.new_empty(steps + 1, devices, x + 1 + n)
    read[:steps, :, :x] = inputs
    read[..., x] = 1
    read[0, :, x + 1 :] = 0
    return read[:steps], read[..., x + 1 :]


def cfn_steps(inputs: Tensor, gates: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
    """(B, T+1, n) the states of :class:`CfnScan` on inputs (B, T, x), from `state` (B, n), differentiable."""
    x = inputs.shape[-1]
    opened, driven = _linear(inputs, gates[:, : x + 1]), torch.tanh(inputs @ candidate.T)
    states = [state]
    # unbind, not an index per step: each index would add a whole (B, T, ·) gradient to the backward pass.
    for gate, drive in zip(opened.unbind(1), driven.unbind(1), strict=True):
        keep, take = torch.sigmoid(torch.addmm(gate, states[-1], gates[:, x + 1 :].T)).chunk(2, -1)
        states.append(keep * torch.tanh(states[-1]) + take * drive)
    return torch.stack(states, 1)


def gru_steps(inputs: Tensor, gates: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
    """(B, T+1, n) the states of :class:`GruScan` on inputs (B, T, x), from `state` (B, n), differentiable."""
    x = inputs.shape[-1]
    opened, driven = _linear(inputs, gates[:, : x + 1]), _linear(inputs, candidate[:, : x + 1])
    states = [state]
    for gate, drive in zip(opened.unbind(1), driven.unbind(1), strict=True):
        keep, kept = torch.sigmoid(torch.addmm(gate, states[-1], gates[:, x + 1 :].T)).chunk(2, -1)
        fresh = torch.tanh(torch.addmm(drive, kept * states[-1], candidate[:, x + 1 :].T))
        states.append(keep * states[-1] + (1 - keep) * fresh)
    return torch.stack(states, 1)


def _linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """W [x, 1] of inputs (B, T, x) and W (o, x+1)."""
    return inputs @ weight[:, :-1].T + weight[:, -1]
