"""The recurrent cells' loops over time, with their backward passes written out.

Autograd would keep a node and a fresh tensor for each of some twenty operations of each step. Here a step works in
buffers that are there before the loop, and the backward pass makes what is asked for and nothing else: the gradients of
the cell's linear outputs, from which ghost norms and sums follow (:mod:`common.ghost`). No weight gets a gradient.

Inside, time runs along the first axis, so that a step is one contiguous piece of memory. The plain loops,
:func:`cfn_steps` and :func:`gru_steps`, are for whatever needs more of autograd, and the truth in
``tests/unit/test_scan.py``. B devices, T steps, states of width n.
"""

from typing import Any

import torch
from torch import Tensor


class CfnScan(torch.autograd.Function):
    """s' = z ⊙ tanh(s) + i ⊙ d with [z, i] = σ(g + U s).

    ``apply(gates (B, T, 2n), driven (B, T, n), state (B, n), recurrent (2n, n))`` gives the states (B, T+1, n), with
    gradients of the first two.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, driven: Tensor, state: Tensor, recurrent: Tensor) -> Tensor:
        transposed = recurrent.T
        opened, driven = _by_time(gates), _by_time(driven)
        states = state.new_empty(len(opened) + 1, *state.shape)
        states[0] = state
        squashed = torch.empty_like(driven)
        for t in range(len(opened)):
            keep, take = opened[t].addmm_(states[t], transposed).sigmoid_().chunk(2, -1)
            torch.tanh(states[t], out=squashed[t])
            torch.mul(take, driven[t], out=states[t + 1])
            states[t + 1].addcmul_(keep, squashed[t])
        ctx.save_for_backward(driven, opened, squashed, recurrent)
        return states.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        driven, opened, squashed, recurrent = ctx.saved_tensors
        wanted = _by_time(gradients[0])
        width = driven.shape[-1]
        gates, drives = torch.empty_like(opened), torch.empty_like(driven)
        later = wanted[-1].clone()  # what the state after the step is asked for
        both, one = torch.empty_like(opened[0]), torch.empty_like(later)
        for t in range(len(driven) - 1, -1, -1):
            keep, take = opened[t].chunk(2, -1)
            torch.mul(later, take, out=drives[t])
            torch.mul(later, squashed[t], out=gates[t, :, :width])
            torch.mul(later, driven[t], out=gates[t, :, width:])
            torch.addcmul(opened[t], opened[t], opened[t], value=-1, out=both)  # σ' = σ − σ²
            gates[t].mul_(both)
            later.mul_(keep)
            torch.mul(later, squashed[t], out=one)
            later.addcmul_(one, squashed[t], value=-1)  # tanh' = 1 − tanh²
            later.addmm_(gates[t], recurrent).add_(wanted[t])
        return gates.transpose(0, 1), drives.transpose(0, 1), None, None


class GruScan(torch.autograd.Function):
    """s' = z ⊙ s + (1 − z) ⊙ tanh(c + V (r ⊙ s)) with [z, r] = σ(g + U s).

    ``apply(gates (B, T, 2n), candidates (B, T, n), state (B, n), recurrent U (2n, n), reset V (n, n))`` gives the
    states (B, T+1, n) and r ⊙ s (B, T, n), with gradients of the first two, by the states.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, candidates: Tensor, state: Tensor, recurrent: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        transposed, crossed = recurrent.T, reset.T
        opened, fresh = _by_time(gates), _by_time(candidates)
        states = state.new_empty(len(opened) + 1, *state.shape)
        states[0] = state
        left = torch.empty_like(fresh)
        for t in range(len(opened)):
            keep, kept = opened[t].addmm_(states[t], transposed).sigmoid_().chunk(2, -1)
            torch.mul(kept, states[t], out=left[t])
            torch.lerp(fresh[t].addmm_(left[t], crossed).tanh_(), states[t], keep, out=states[t + 1])
        ctx.save_for_backward(states, opened, fresh, recurrent, reset)
        outputs = states.transpose(0, 1), left.transpose(0, 1)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        states, opened, fresh, recurrent, reset = ctx.saved_tensors
        wanted = _by_time(gradients[0])
        width = fresh.shape[-1]
        gates, candidates = torch.empty_like(opened), torch.empty_like(fresh)
        later = wanted[-1].clone()  # what the state after the step is asked for
        both, one = torch.empty_like(opened[0]), torch.empty_like(later)
        for t in range(len(fresh) - 1, -1, -1):
            keep, kept = opened[t].chunk(2, -1)
            of_keep, of_kept = gates[t, :, :width], gates[t, :, width:]
            torch.sub(states[t], fresh[t], out=of_keep).mul_(later)
            torch.addcmul(later, later, keep, value=-1, out=one)  # of the candidate's tanh
            torch.mul(one, fresh[t], out=candidates[t])
            torch.addcmul(one, candidates[t], fresh[t], value=-1, out=candidates[t])  # tanh' = 1 − tanh²
            torch.mm(candidates[t], reset, out=one)  # of r ⊙ s
            torch.mul(one, states[t], out=of_kept)
            torch.addcmul(opened[t], opened[t], opened[t], value=-1, out=both)  # σ' = σ − σ²
            gates[t].mul_(both)
            later.mul_(keep).addcmul_(one, kept).addmm_(gates[t], recurrent).add_(wanted[t])
        return gates.transpose(0, 1), candidates.transpose(0, 1), None, None, None


def _by_time(values: Tensor) -> Tensor:
    """(T, B, ·) of (B, T, ·), a contiguous copy."""
    return values.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def cfn_steps(gates: Tensor, driven: Tensor, state: Tensor, recurrent: Tensor) -> Tensor:
    """As :class:`CfnScan`, differentiable by everything."""
    states = [state]
    # unbind, not an index per step: each index would add a whole (B, T, ·) gradient to the backward pass.
    for gate, drive in zip(gates.unbind(1), driven.unbind(1), strict=True):
        keep, take = torch.sigmoid(torch.addmm(gate, states[-1], recurrent.T)).chunk(2, -1)
        states.append(keep * torch.tanh(states[-1]) + take * drive)
    return torch.stack(states, 1)


def gru_steps(
    gates: Tensor, candidates: Tensor, state: Tensor, recurrent: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor]:
    """As :class:`GruScan`, differentiable by everything."""
    states, left = [state], list[Tensor]()
    for gate, drive in zip(gates.unbind(1), candidates.unbind(1), strict=True):
        keep, kept = torch.sigmoid(torch.addmm(gate, states[-1], recurrent.T)).chunk(2, -1)
        left.append(kept * states[-1])
        fresh = torch.tanh(torch.addmm(drive, left[-1], reset.T))
        states.append(keep * states[-1] + (1 - keep) * fresh)
    return torch.stack(states, 1), torch.stack(left, 1) if left else candidates
