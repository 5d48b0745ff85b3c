"""The compiled inner loops against PyTorch's operations in float64, which are the same functions' other half."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common import kernels
from common.scan import CfnScan, GruScan

compiled = pytest.mark.skipif(not kernels.available, reason="no C compiler was there when fedtopk was installed")
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
small = st.integers(1, 21)


def agree(function: Callable[..., Any], make: Callable[[], tuple[Any, ...]], tolerance: float = 2e-6) -> None:
    """What a function returns and what it leaves in its arguments, of two in float32 and of the same in float64."""
    single, double = make(), tuple(widened(value) for value in make())
    ours, theirs = function(*single), function(*double)
    for one, other in zip((*flat(ours), *flat(single)), (*flat(theirs), *flat(double)), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert one == other


def widened(value: Any) -> Any:
    """Of a tensor in longer rows, with rows that are as long."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    whole = torch.empty_strided(value.shape, value.stride(), dtype=torch.float64)
    return whole.copy_(value)


def flat(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


@compiled
@quick
@given(st.integers(2, 50), st.integers(0, 5), st.tuples(small, small), st.booleans(), st.integers(0, 2**30))
def test_the_scans(devices: int, steps: int, widths: tuple[int, int], plain: bool, seed: int) -> None:
    x, n = widths

    def scanned(kind: Any, wanted: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        scan = kind(*weights)
        by_input, uses = scan.backward(wanted)
        return scan.states, by_input, *(tensor for _, *use in uses for tensor in use)

    def make(candidate: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        shapes = (steps, devices, x), (2 * n, x + 1 + n), (n, candidate)
        drawn = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        wanted = torch.randn((devices, steps + 1, n), generator=generator).transpose(0, 1)
        return wanted.contiguous() if plain else wanted, *drawn

    agree(partial(scanned, CfnScan), lambda: make(x), 2e-5)
    agree(partial(scanned, GruScan), lambda: make(x + 1 + n), 2e-5)


@compiled
@pytest.mark.parametrize("kind", [CfnScan, GruScan])
def test_a_device_is_computed_alike_wherever_it_stands(kind: Any) -> None:
    """To the bit: a cohort's integers do not depend on who is in a block with whom."""
    steps, devices, x, n = 7, 60, 5, 6
    candidate = x if kind is CfnScan else x + 1 + n
    inputs, wanted = torch.randn(steps, devices, x), torch.randn(steps + 1, devices, n)
    gates, drive = torch.randn(2 * n, x + 1 + n), torch.randn(n, candidate)
    whole = kind(inputs, gates, drive)
    by_input, _ = whole.backward(wanted)
    order = torch.randperm(devices)[:41]
    some = kind(inputs[:, order], gates, drive)
    assert torch.equal(some.states, whole.states[:, order])
    assert torch.equal(some.backward(wanted[:, order])[0], by_input[:, order])


@compiled
@quick
@given(
    st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.sampled_from([0.1, 5.0, 200.0]), st.integers(0, 2**30)
)
def test_rows_of_a_softmax(users: int, steps: int, width: int, size: float, seed: int) -> None:
    def logits() -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return size * torch.randn(users, steps, width, generator=generator), generator

    def full() -> tuple[Tensor, Tensor]:
        values, generator = logits()
        return values, torch.randint(width, (users, steps), generator=generator)

    def sampled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, generator = logits()
        column = torch.randint(-1, width, (users, steps), generator=generator)
        weights, own = torch.randn(width, generator=generator), size * torch.randn(users, steps, generator=generator)
        return values, weights, column, own

    agree(kernels.softmax_rows, full, 3e-5)
    agree(kernels.sampled_rows, sampled, 3e-5)


@compiled
@quick
@given(
    st.integers(2, 5), st.integers(1, 30), st.integers(1, 27), st.integers(1, 27), st.booleans(), st.integers(0, 2**30)
)
def test_products(users: int, steps: int, outputs: int, width: int, by_time: bool, seed: int) -> None:
    def steps_of(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + shape[-1])
        if by_time:
            return torch.randn(shape[1], shape[0], shape[2], generator=generator).transpose(0, 1)
        return torch.randn(*shape, generator=generator)

    def forming() -> tuple[Tensor, ...]:
        values, squares = torch.empty(users, outputs, width), torch.empty(users)
        return steps_of(users, steps, outputs), steps_of(users, steps, width), values, squares

    agree(kernels.form, forming, 1e-5 * steps)
    agree(kernels.gram, lambda: (steps_of(users, steps, width).contiguous(),), 1e-5 * width)
    ids = torch.randint(max(steps // 2, 1), (users, steps), generator=torch.Generator().manual_seed(seed))
    for named in (ids, ids * 2**40):
        agree(kernels.row_squares, lambda named=named: (steps_of(users, steps, width), named), 1e-5 * steps)


@quick
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40), st.sampled_from([1.0, 2.0**30, 2.0**36 / 3])
)
def test_fixed_point_is_the_rounded_product_of_doubles(values: list[float], factor: float) -> None:
    fixed = np.arange(len(values), dtype=np.int64)
    assert kernels.add_fixed(torch.tensor(values), factor, fixed)
    assert fixed.tolist() == [place + round(value * factor) for place, value in enumerate(values)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -(2.0**51), 1e30])
def test_fixed_point_refuses_what_does_not_fit(bad: float) -> None:
    assert not kernels.add_fixed(torch.tensor([1.0, bad, 1.0]), 1.0, np.zeros(3, np.int64))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(devices: int, bad: float) -> None:
    """A diverged device is found by its norm, so that nothing may make it finite on the way."""
    logits = torch.zeros(devices, 1, 11)
    logits[0, 0, 3] = bad
    items = torch.zeros(devices, 1, dtype=torch.int64)
    assert not kernels.softmax_rows(logits.clone(), items)[0].isfinite().any()
    assert not kernels.sampled_rows(logits.clone(), torch.zeros(11), items - 1, torch.zeros(devices, 1))[0][
        0
    ].isfinite()
    inputs = torch.zeros(4, devices, 2)
    inputs[1, 0] = torch.nan
    for kind, candidate in ((CfnScan, 2), (GruScan, 6)):
        states = kind(inputs, torch.ones(6, 6), torch.ones(3, candidate)).states
        assert states[:2].isfinite().all() and states[2:, 0].isnan().all() and states[:, 1:].isfinite().all()


def test_a_device_by_itself_does_not_depend_on_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, items = torch.randn(1, 7, 33), torch.zeros(1, 7, dtype=torch.int64)
    ours = kernels.softmax_rows(logits.clone(), items)
    monkeypatch.setattr(kernels, "_library", None)
    assert torch.equal(ours, kernels.softmax_rows(logits.clone(), items))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_near_torchs_and_stays_finite(dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(-12, 12, 10_001), torch.tensor([0.0, 1e-6, -1e30, 1e30])]).to(dtype)
    difference = kernels.tanh_(values.clone()) - torch.tanh(values)
    assert difference.abs().max() <= 2 * torch.finfo(dtype).eps
