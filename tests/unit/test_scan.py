"""The loops over time that are differentiated by hand against the plain ones and autograd."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.scan import CfnScan, GruScan, cfn_steps, gru_steps

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
sizes = st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**30))


@quick
@given(st.sampled_from(["cfn", "gru"]), sizes)
def test_a_scan_is_the_plain_loop_and_its_gradients_are_autograds(
    cell: str, size: tuple[int, int, int, int, int]
) -> None:
    steps, devices, x, n, seed = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(devices, steps, x).requires_grad_()
    gates = normal(2 * n, x + 1 + n).requires_grad_()
    candidate = normal(n, x if cell == "cfn" else x + 1 + n).requires_grad_()
    wanted = normal(devices, steps + 1, n)

    plain = (cfn_steps if cell == "cfn" else gru_steps)(inputs, gates, candidate, normal(devices, n) * 0)
    with torch.no_grad():
        scan = (CfnScan if cell == "cfn" else GruScan)(inputs.transpose(0, 1), gates, candidate)
        by_input, uses = scan.backward(wanted.transpose(0, 1))
    torch.testing.assert_close(scan.states.transpose(0, 1), plain, rtol=1e-12, atol=1e-12)
    assert [name for name, *_ in uses] == ["cell.gates", "cell.candidate"]
    if steps:
        expected = torch.autograd.grad((plain * wanted).sum(), (inputs, gates, candidate))
        found = [by_input.transpose(0, 1), *(torch.einsum("tbo,tbi->oi", delta, read) for _, delta, read in uses)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
