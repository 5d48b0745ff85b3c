"""The written-out loops over time against the plain ones, and against numerical gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.scan import CfnScan, GruScan, cfn_steps, gru_steps

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
sizes = st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**30))


def drawn(steps: int, devices: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "gates": normal(devices, steps, 2 * width).requires_grad_(),
        "other": normal(devices, steps, width).requires_grad_(),
        "state": normal(devices, width),
        "recurrent": normal(2 * width, width),
        "reset": normal(width, width),
        "wanted": normal(devices, steps + 1, width),
    }


@quick
@given(sizes)
def test_cfn_is_the_plain_loop(size: tuple[int, int, int, int]) -> None:
    v = drawn(*size)
    arguments = (v["gates"], v["other"], v["state"], v["recurrent"])
    expect_same([cfn_steps(*arguments)], [CfnScan.apply(*arguments)], v)


@quick
@given(sizes)
def test_gru_is_the_plain_loop(size: tuple[int, int, int, int]) -> None:
    v = drawn(*size)
    arguments = (v["gates"], v["other"], v["state"], v["recurrent"], v["reset"])
    expect_same(list(gru_steps(*arguments)), list(GruScan.apply(*arguments)), v)


def expect_same(plain: list[Tensor], scanned: list[Tensor], v: dict[str, Tensor]) -> None:
    for one, other in zip(plain, scanned, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if v["gates"].shape[1]:
        leaves = (v["gates"], v["other"])
        expected = torch.autograd.grad((plain[0] * v["wanted"]).sum(), leaves)
        for one, other in zip(expected, torch.autograd.grad((scanned[0] * v["wanted"]).sum(), leaves), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scan", ["cfn", "gru"])
def test_gradients_are_numerical_ones(scan: str) -> None:
    v = drawn(4, 2, 3, 1)
    weights = (v["recurrent"],) if scan == "cfn" else (v["recurrent"], v["reset"])

    def states(gates: Tensor, other: Tensor) -> Tensor:
        found = (CfnScan if scan == "cfn" else GruScan).apply(gates, other, v["state"], *weights)
        return found if scan == "cfn" else found[0]

    assert torch.autograd.gradcheck(states, (v["gates"], v["other"]))
