"""The recurrent cells' loops over time, differentiated by hand.

Autograd would keep a node and a fresh tensor for each of some twenty operations of each step. Here a step works in
buffers that are there before the loop, time runs along the first axis, so that a step is one contiguous piece of
memory, and the backward loop makes what is asked for and nothing else: δ of the cell's linear outputs, from which ghost
norms and sums follow (:mod:`common.ghost`). No weight gets a gradient. For several devices in float32 the loops are
compiled (:mod:`common.kernels`): a few devices at a time go through all steps, with the weights in the cache.

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
        self._gates, self._candidate, self._x = gates.contiguous(), candidate.contiguous(), x
        self.inputs, self.states = _with_states(inputs, n)
        self._opened = inputs.new_empty(steps, devices, 2 * n)
        self._driven = inputs.new_empty(steps, devices, n)
        self._squashed = inputs.new_empty(steps, devices, n)
        self._compiled = kernels.compiled(inputs.transpose(0, 1))
        if self._compiled:
            self._scratch = _scratch(self.inputs, n)
            results = self.inputs, self._opened, self._driven, self._squashed
            sizes = steps, devices, n, x + 1 + n
            kernels.call("cfn_scan", *sizes, *results, self._gates, self._candidate, self._scratch)
            return
        reads, drives = gates.T, candidate.T
        for t in range(steps):
            torch.mm(self.inputs[t], reads, out=self._opened[t]).sigmoid_()
            kernels.tanh_(torch.mm(inputs[t], drives, out=self._driven[t]))
            keep, take = self._opened[t].chunk(2, -1)
            squashed = kernels.tanh_(self._squashed[t].copy_(self.states[t]))
            torch.mul(take, self._driven[t], out=self.states[t + 1]).addcmul_(keep, squashed)

    def backward(self, wanted: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """As :meth:`Scan.backward`."""
        x = self._x
        gates, drives = torch.empty_like(self._opened), torch.empty_like(self._driven)
        steps, devices, n = drives.shape
        if self._compiled:
            inputs = drives.new_empty(steps, devices, x)
            forward = self._opened, self._driven, self._squashed, self._gates, self._candidate
            results = gates, drives, inputs, self._scratch
            kernels.call("cfn_scan_back", steps, devices, n, x, *forward, *_strided(wanted), *results)
        else:
            by_input, by_state = self._gates[:, :x].contiguous(), self._gates[:, x + 1 :].contiguous()
            later = wanted[-1].clone()  # what the state after the step is asked for
            for t in range(steps - 1, -1, -1):
                opened, driven, squashed = self._opened[t], self._driven[t], self._squashed[t]
                keep, take = opened.chunk(2, -1)
                torch.mul(later, squashed, out=gates[t, :, :n])
                torch.mul(later, driven, out=gates[t, :, n:])
                gates[t].mul_(opened - opened * opened)  # σ' = σ − σ²
                torch.mul(later, take, out=drives[t])
                drives[t].addcmul_(drives[t] * driven, driven, value=-1)  # tanh' = 1 − tanh²
                later.mul_(keep)
                later.addcmul_(later * squashed, squashed, value=-1).add_(wanted[t]).addmm_(gates[t], by_state)
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
        self._gates, self._candidate, self._x = gates.contiguous(), candidate.contiguous(), x
        self.inputs, self.states = _with_states(inputs, n)
        self._left = self.inputs.clone()
        self._opened = inputs.new_empty(steps, devices, 2 * n)
        self._fresh = inputs.new_empty(steps, devices, n)
        self._compiled = kernels.compiled(inputs.transpose(0, 1))
        if self._compiled:
            self._scratch = _scratch(self.inputs, n)
            results = self.inputs, self._left, self._opened, self._fresh
            sizes = steps, devices, n, x + 1 + n
            kernels.call("gru_scan", *sizes, *results, self._gates, self._candidate, self._scratch)
            return
        reads, drives = gates.T, candidate.T
        for t in range(steps):
            keep, kept = torch.mm(self.inputs[t], reads, out=self._opened[t]).sigmoid_().chunk(2, -1)
            torch.mul(kept, self.states[t], out=self._left[t, :, x + 1 :])
            fresh = kernels.tanh_(torch.mm(self._left[t], drives, out=self._fresh[t]))
            torch.lerp(fresh, self.states[t], keep, out=self.states[t + 1])

    def backward(self, wanted: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """As :meth:`Scan.backward`."""
        x = self._x
        gates, candidates = torch.empty_like(self._opened), torch.empty_like(self._fresh)
        steps, devices, n = candidates.shape
        if self._compiled:
            inputs = candidates.new_empty(steps, devices, x)
            forward = self.inputs, self._opened, self._fresh, self._gates, self._candidate
            results = gates, candidates, inputs, self._scratch
            kernels.call("gru_scan_back", steps, devices, n, x + 1 + n, *forward, *_strided(wanted), *results)
        else:
            by_input, by_state = self._gates[:, :x].contiguous(), self._gates[:, x + 1 :].contiguous()
            of_input, of_left = self._candidate[:, :x].contiguous(), self._candidate[:, x + 1 :].contiguous()
            later = wanted[-1].clone()  # what the state after the step is asked for
            for t in range(steps - 1, -1, -1):
                state, fresh = self.states[t], self._fresh[t]
                keep, kept = self._opened[t].chunk(2, -1)
                torch.sub(state, fresh, out=gates[t, :, :n]).mul_(later).mul_(keep - keep * keep)  # σ' = σ − σ²
                torch.addcmul(later, later, keep, value=-1, out=candidates[t])
                candidates[t].addcmul_(candidates[t] * fresh, fresh, value=-1)  # tanh' = 1 − tanh²
                by_left = candidates[t] @ of_left
                torch.mul(by_left, state, out=gates[t, :, n:]).mul_(kept - kept * kept)
                later.mul_(keep).addcmul_(by_left, kept).add_(wanted[t]).addmm_(gates[t], by_state)
            inputs = gates @ by_input + candidates @ of_input
        return inputs, [("cell.gates", gates, self.inputs), ("cell.candidate", candidates, self._left)]


def _scratch(read: Tensor, n: int) -> Tensor:
    """Room for the weights and a few devices' numbers of the compiled scans, which read rows of (…, x+1+n)."""
    row = read.shape[-1]
    return read.new_empty((row + 3 * n + _MARGIN) * (2 * n + row + _MARGIN))


_MARGIN = 96  # of the devices that are computed together, and what rows are filled up by


def _strided(wanted: Tensor) -> tuple[Tensor, int, int]:
    """(T+1, B, n), as compiled loops take it: with how far steps and devices are apart."""
    wanted = wanted if wanted.stride(2) == 1 else wanted.contiguous()
    return wanted, wanted.stride(0), wanted.stride(1)


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
