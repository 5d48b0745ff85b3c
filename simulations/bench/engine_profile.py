"""Where the batched engine's time goes, on one thread, beside what its arithmetic would take at best.

The floor is the time of the matrix products alone at the speed of one large product on the same core. What is above it:
products of small matrices are slower than large ones, exponentials, copies and gathers cost what they cost, and the
rest is Python's and PyTorch's work around each operation. Products of the compiled loops (:mod:`common.kernels`) count
among the products, their other work by itself; the compiled scans are a part of their own, products and the rest.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common import kernels
from common.threads import one_thread
from simulations.batched_cohort import block_devices, compute_block
from simulations.bench.engine_workloads import Workload
from simulations.bench.machine import machine
from simulations.processes import keep_freed_memory

_BLOCKS = 8
_SQUARE = 1000

_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "addmv_", "mv", "dot"}
_PARTS = {
    "exponentials": {"exp", "exp_", "exp2", "exp2_", "sigmoid", "sigmoid_", "tanh", "tanh_", "log", "logsumexp"},
    "gathers": {"index", "index_select", "gather", "index_add_", "scatter", "scatter_", "scatter_add_", "sort"},
    "copies": {"copy_", "cat", "clone", "fill_", "zero_", "_to_copy", "contiguous", "index_put_"},
}


def profile_engine(workload: Workload) -> dict[str, Any]:
    """Of one block: ``{"softmax", "block", "microseconds", "floor_microseconds", "ratio", "megaflops", "gigaflops",
    "parts"}``, CPU times per device on one thread and each part's share; `gigaflops`: of a large product, a second.
    """
    keep_freed_memory()
    population, offer = workload.population(), workload.offer(1, workload.parameters(), silent=True)
    devices = np.arange(min(block_devices(offer.settings.objective, workload.items), workload.devices))
    windows, fixed = population.windows(1, devices), np.zeros(workload.dimension, np.int64)

    def block() -> None:
        compute_block(offer, devices, windows, population.users[devices], fixed)

    with one_thread():
        seconds = _timed(block) / len(devices)
        large = torch.ones(_SQUARE, _SQUARE)
        rate = 2 * _SQUARE**3 / _timed(lambda: torch.mm(large, large))
        with (
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
            _watched_loops() as compiled,
        ):
            start = time.perf_counter()  # as the profiler counts: of a busy machine also what others take
            block()
            profiled = (time.perf_counter() - start) * 1e6
    shares: dict[str, float] = defaultdict(float)
    flops = 0
    for part, microseconds, operations in compiled:
        shares[part] += microseconds / profiled
        flops += operations
    for event in profiler.key_averages(group_by_input_shape=True):
        operation = event.key.removeprefix("aten::")
        shares[_part(operation)] += event.self_cpu_time_total / profiled
        if operation in _PRODUCTS:
            flops += event.count * _flops(event.input_shapes)
    shares["Python"] = max(0.0, 1 - sum(shares.values()))
    floor = flops / len(devices) / rate
    return {
        "softmax": workload.softmax,
        "block": len(devices),
        "microseconds": round(seconds * 1e6, 1),
        "floor_microseconds": round(floor * 1e6, 1),
        "ratio": round(seconds / floor, 2),
        "megaflops": round(flops / len(devices) / 1e6, 2),
        "gigaflops": round(rate / 1e9, 1),
        "parts": {part: round(share, 3) for part, share in sorted(shares.items(), key=lambda part: -part[1])},
    }


@contextmanager
def _watched_loops() -> Iterator[list[tuple[str, float, int]]]:
    """Of each call of a compiled loop: the part that it belongs to, its microseconds, its products' operations."""
    seen: list[tuple[str, float, int]] = []
    call = kernels.call

    def watched(name: str, *arguments: int | float | Tensor) -> int:
        start = time.perf_counter()
        result = call(name, *arguments)
        microseconds = (time.perf_counter() - start) * 1e6
        match name, arguments:
            case "form", (int(users), int(steps), int(outputs), int(width), *_):
                seen.append(("products", microseconds, 2 * users * steps * outputs * width))
            case "gram", (int(users), int(steps), int(width), *_):
                seen.append(("products", microseconds, users * steps * (steps + 1) * width))
            case "gru_scan", (int(steps), int(devices), int(n), int(row), *_):
                seen.append(("scans", microseconds, 2 * steps * devices * 3 * n * row))
            case "gru_scan_back", (int(steps), int(devices), int(n), int(row), *_):
                seen.append(("scans", microseconds, 2 * steps * devices * 3 * n * (row - 1)))
            case "cfn_scan", (int(steps), int(devices), int(n), int(row), *_):
                seen.append(("scans", microseconds, 2 * steps * devices * n * (2 * row + row - n - 1)))
            case "cfn_scan_back", (int(steps), int(devices), int(n), int(x), *_):
                seen.append(("scans", microseconds, 2 * steps * devices * n * (2 * (n + x) + x)))
            case _:
                seen.append(("compiled loops", microseconds, 0))
        return result

    kernels.call = watched
    try:
        yield seen
    finally:
        kernels.call = call


def profiled(workloads: list[Workload]) -> dict[str, Any]:
    """``{"machine", "workload", "profile": [as of :func:`profile_engine`]}``."""
    where = machine("torch", "numpy")
    return {"machine": where, "workload": workloads[0].name, "profile": [profile_engine(one) for one in workloads]}


def profile_table(results: dict[str, Any]) -> Table:
    """The profile for people."""
    table = Table(title=f"Workload {results['workload']}: a device on one thread")
    for heading in ("softmax", "block", "µs", "floor µs", "ratio", "MFLOP", "GFLOP/s at best", "parts"):
        table.add_column(heading, justify="left" if heading in ("softmax", "parts") else "right")
    for row in results["profile"]:
        parts = ", ".join(f"{part} {share:.0%}" for part, share in row["parts"].items())
        numbers = ("block", "microseconds", "floor_microseconds", "ratio", "megaflops", "gigaflops")
        table.add_row(row["softmax"], *(str(row[name]) for name in numbers), parts)
    return table


def _timed(work: Callable[[], object]) -> float:
    """Seconds of CPU time of one call, the median of some, after two that do not count."""
    taken = []
    for _ in range(_BLOCKS + 2):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return median(taken[2:])


def _part(operation: str) -> str:
    if operation in _PRODUCTS:
        return "products"
    return next((part for part, operations in _PARTS.items() if operation in operations), "other operations")


def _flops(shapes: list[list[int]]) -> int:
    """Of one product, by the shapes of its arguments: the last two matrices (or matrix and vector) that meet."""
    operands = [shape for shape in shapes if len(shape) >= 1]
    for left, right in pairwise(operands):
        inner = right[0] if len(right) == 1 else right[-2]
        if len(left) >= 2 and left[-1] == inner and len(right) <= len(left):
            return 2 * int(np.prod(left)) * (1 if len(right) == 1 else right[-1])
    return 0
