"""The batched engine's inner loops: compiled (``kernels.c``) for a batch in float32, PyTorch's operations otherwise.

Each is there twice and computes the same to a few ulp (``tests/unit/test_kernels.py``). The compiled one passes once
over numbers that are in the cache, where PyTorch passes five or ten times. PyTorch's is the reference, and serves where
nothing was compiled, in float64, and for a device by itself, whose numbers so do not depend on a compiler.

The loops over time are in :mod:`common.scan`.

Shapes: B devices, T steps, C candidates; "…" stands for the steps of some devices. Everything is contiguous, where
nothing else is said.
"""

import ctypes
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from math import e, log2
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOG2E: Final = log2(e)
"""exp(x) is 2^(x log2 e), and PyTorch computes powers of 2 in half the time."""

_CACHED = 2**14  # numbers that are converted at a time: they stay in the cache
_MOST_STEPS = 2**15  # whose squares are counted in 32 bits


def softmax_rows(logits: Tensor, items: Tensor) -> Tensor:
    """(…) log-probability of each row's item (…), from `logits` (…, C) in units of 1/log2 e, which become the residual
    in place: the probabilities less 1 at the item."""
    if compiled(logits):
        log_probability = torch.empty_like(items, dtype=logits.dtype)
        call("softmax_rows", items.numel(), logits.shape[-1], logits, items.contiguous(), log_probability)
        return log_probability
    at = items.unsqueeze(-1)
    highest = logits.amax(-1, keepdim=True)
    own = logits.gather(-1, at) - highest
    normaliser = logits.sub_(highest).exp2_().sum(-1, keepdim=True)
    logits.div_(normaliser).scatter_add_(-1, at, logits.new_full((), -1).expand_as(at))
    return (own / LOG2E - normaliser.log()).squeeze(-1)


def sampled_rows(logits: Tensor, log_weights: Tensor, column: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(…) log of the own item's estimated probability, and (…) what is missing, of :func:`common.softmax.likelihood`.

    Args:
        logits: (…, C) of the candidates, in units of 1/log2 e, which become the residual in place.
        log_weights: (C,) that are added to them, in the same units.
        column: (…) the candidate that is the step's own item and counts for nothing, or -1.
        own: (…) logit of the own item, in the same units.
    """
    if compiled(logits):
        log_probability, missing = torch.empty_like(own), torch.empty_like(own)
        arguments = logits, log_weights, column.contiguous(), own.contiguous(), log_probability, missing
        call("sampled_rows", own.numel(), logits.shape[-1], *arguments)
        return log_probability, missing
    hits, place = column >= 0, column.clamp(min=0).unsqueeze(-1)
    logits.add_(log_weights).scatter_add_(-1, place, torch.where(hits, -torch.inf, 0).to(own.dtype).unsqueeze(-1))
    highest = torch.maximum(logits.amax(-1), own)
    others = logits.sub_(highest.unsqueeze(-1)).exp2_().sum(-1)
    normaliser = others + (own - highest).exp2()
    missing = others / normaliser
    logits.div_(normaliser.unsqueeze(-1)).scatter_add_(-1, place, torch.where(hits, -missing, 0).unsqueeze(-1))
    return (own - highest) / LOG2E - normaliser.log(), missing.masked_fill_(hits, 0)


def form(delta: Tensor, inputs: Tensor, values: Tensor, squares: Tensor) -> None:
    """Σ_t δ_t x_tᵀ of δ (B, T, o) and x (B, T, i), anywhere in memory, into `values` (B, o, i), and its squared norm
    into `squares` (B,)."""
    users, steps, outputs = delta.shape
    width = inputs.shape[-1]
    if compiled(values) and steps and delta.stride(2) == inputs.stride(2) == 1:
        scratch = delta.new_empty(steps * (outputs + 8 + width))
        strides = delta.stride(0), delta.stride(1), inputs, inputs.stride(0), inputs.stride(1)
        call("form", users, steps, outputs, width, delta, *strides, values, squares, scratch)
        return
    # Copied, because the steps of one user may be far apart in memory, on the same cache lines.
    torch.bmm(delta.contiguous().transpose(1, 2), inputs.contiguous(), out=values)
    torch.linalg.vector_norm(values, dim=(1, 2), out=squares).square_()


def row_squares(delta: Tensor, ids: Tensor) -> Tensor:
    """(B,) each user's squared norm of what its steps' δ (B, T, i) add to the rows `ids` (B, T)."""
    users, steps, width = delta.shape
    squares = delta.new_zeros(users)
    if compiled(delta) and delta.stride(2) == 1 and 0 < steps < _MOST_STEPS:
        bits = steps.bit_length() + 1
        sums, slots = delta.new_empty(steps * width), ids.new_empty(2**bits, dtype=torch.int32)
        strides = delta.stride(0), delta.stride(1)
        call("row_squares", users, steps, width, delta, *strides, ids.contiguous(), squares, sums, slots, bits)
        return squares
    rows = delta.new_zeros(ids.numel(), width).index_add_(0, _slots(ids), delta.flatten(0, 1))
    torch.linalg.vector_norm(rows.view(users, -1), dim=1, out=squares)
    return squares.square_()


def add_fixed(total: Tensor, factor: float, fixed: NDArray[np.int64]) -> bool:
    """Add `total` (d,) times the factor, rounded, to `fixed` (d,); whether all that was added is below 2^51."""
    if compiled(total):
        return call("add_fixed", len(total), total, factor, torch.from_numpy(fixed)) == 0
    fits = True
    for start in range(0, len(total), _CACHED):
        part = total[start : start + _CACHED].double().mul_(factor).round_().numpy()
        fits &= bool(np.abs(part).max() < 2.0**51)
        fixed[start : start + _CACHED] += part.astype(np.int64)
    return fits


def gram(values: Tensor) -> Tensor:
    """(B, T, T) inner products between a user's own steps, of (B, T, ·)."""
    users, steps, width = values.shape
    if compiled(values) and values.is_contiguous():
        products = values.new_empty(users, steps, steps)
        call("gram", users, steps, width, values, products)
        return products
    return values @ values.transpose(1, 2)


def tanh_(values: Tensor) -> Tensor:
    """tanh in place, as 2σ(2x) − 1, which PyTorch computes in less than half the time, to 2 ulp of 1."""
    return values.mul_(2).sigmoid_().mul_(2).sub_(1)


def _load() -> ctypes.CDLL | None:
    built = [file for suffix in EXTENSION_SUFFIXES for file in Path(__file__).parent.glob(f"_kernels{suffix}")]
    fits = platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return ctypes.CDLL(str(built[0])) if built and fits else None


_library = _load()

available = _library is not None
"""Whether this machine runs the compiled ones."""


def compiled(values: Tensor) -> bool:
    """Whether the compiled loops serve these numbers of B devices, the first axis."""
    return _library is not None and values.dtype == torch.float32 and len(values) > 1


def call(name: str, *arguments: int | float | Tensor) -> int:
    """Call a function of ``kernels.c``, where it is :data:`available`, with numbers and where tensors lie."""
    function = getattr(_library, name)
    function.restype = ctypes.c_int64
    return int(function(*map(_as_c, arguments)))


def _as_c(value: int | float | Tensor) -> ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value.data_ptr() if isinstance(value, Tensor) else value)


def _slots(ids: Tensor) -> Tensor:
    """(B·T,) numbers that two steps share if they are of one user and name the same row."""
    users, steps = ids.shape
    ordered, order = ids.sort(dim=1)
    changes = torch.zeros_like(ids)
    changes[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    of_user = torch.empty_like(ids).scatter_(1, order, changes.cumsum(1))
    return (of_user + steps * torch.arange(users).unsqueeze(1)).flatten()
