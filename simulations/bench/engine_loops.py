"""Two of the engines that are compared: the batched one, and the loop over devices that anybody would write first.

Both are in processes that were started for them, so that memory and the time to start are their own.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from client.local_update import losses_of
from common.errors import AggregationError
from common.model import Parameters, flatten
from common.offer import Offer
from common.trajectory import Trajectories
from simulations.batched_cohort import BatchedCohort
from simulations.bench.engine_workloads import Workload
from simulations.bench.meter import Effort, Measured, peak_rss_mib, rate
from simulations.processes import start_worker

CHECKED = 8
"""Devices whose sum a plain loop computes first: for the check, and to get warm."""

_TOLERANCE = 1e-4


def measure_batched(workload: Workload, effort: Effort) -> Measured:
    """:meth:`BatchedCohort.sum_updates` of whole cohorts. Raises :class:`AggregationError`."""
    begin = time.monotonic()  # of the machine: another process reads the same clock
    with _process() as process:
        return process.submit(_batched, workload, effort, begin).result()


def measure_plain(workload: Workload, effort: Effort) -> Measured:
    """The plain loop, over as many devices as there is time for.

    A cohort's one release, rounding and noise, is left out.

    Raises:
        AggregationError: its sum is not the batched engine's.
    """
    checked = workload.limited(CHECKED)
    return measure_apart("plain loop", checked, effort, partial(_start_plain, workload, checked.devices), _run_plain)


def measure_apart(
    engine: str,
    checked: Workload,
    effort: Effort,
    start: Callable[[], np.ndarray],
    run: Callable[[float], float],
    initializer: Callable[[], None] = start_worker,
) -> Measured:
    """What independent processes do together.

    Args:
        checked: whose sum each process's start is to return.
        run: devices per second of a process for at least so many seconds.
        initializer: of a process.

    Raises:
        AggregationError: a sum is not the batched engine's.
    """
    begin = time.monotonic()
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(initializer)) for _ in range(effort.workers)]
        starts = [process.submit(start) for process in processes]
        sums = [each.result() for each in starts]
        startup = time.monotonic() - begin
        rates = []
        for _ in range(effort.runs):
            shares = [process.submit(run, effort.seconds) for process in processes]
            rates.append(sum(share.result() for share in shares))
        peak = sum(process.submit(peak_rss_mib).result() for process in processes)
    for total in sums:
        expect_equal(engine, total, batched_sum(checked))
    return Measured(rates, startup, peak)


def batched_sum(workload: Workload) -> np.ndarray:
    """(d,) float64: the clipped sum of round 1 over all devices, without noise."""
    with BatchedCohort(workload.population()) as cohort:
        offer = workload.offer(1, workload.parameters(), silent=True)
        return cohort.sum_updates(offer, np.arange(workload.devices)).total


def expect_equal(engine: str, total: np.ndarray, expected: np.ndarray) -> None:
    """Raise :class:`AggregationError` unless two (d,) sums agree in L2, relatively, to 1e-4."""
    off = float(np.linalg.norm(total - expected) / np.linalg.norm(expected))
    if not off <= _TOLERANCE:
        raise AggregationError(
            f"Expected the {engine}'s sum to be the batched engine's to {_TOLERANCE:g}; it is off by {off:.2g}."
        )


def clipped_gradient(
    offer: Offer, model: dict[str, torch.nn.Parameter], window: Trajectories, user: Tensor
) -> tuple[Parameters, Tensor]:
    """One device's part by autograd: its clipped gradient by parameter, and its (1, w) adapted embedding.

    Args:
        offer: for everything but the parameters.
        window: a batch of one.
        user: (1, w) its embedding.
    """
    for value in model.values():
        value.grad = None
    loss, user = losses_of(offer.settings, dict(model), window, user, offer.candidates, offer.warm, offer.item_slice)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.values(), offer.settings.privacy.clip_norm)
    return {name: value.grad for name, value in model.items() if value.grad is not None}, user


def _process(initializer: Callable[[], None] = start_worker) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer)


def _batched(workload: Workload, effort: Effort, begin: float) -> Measured:
    """Rounds from 1; the first one starts the workers and does not count."""
    parameters, round_ = workload.parameters(), 0
    with BatchedCohort(workload.population(), effort.workers) as cohort:

        def play() -> int:
            nonlocal round_
            round_ += 1
            members = workload.members(round_)
            cohort.sum_updates(workload.offer(round_, parameters), members)
            return len(members)

        warm = play()
        ready = time.monotonic()
        rates = [rate(play, effort.seconds) for _ in range(effort.runs)]
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        peak = peak_rss_mib(["self", *workers])
    return Measured(rates, ready - begin - warm / median(rates), peak)


class _PlainLoop:
    """Device after device: forward, backward, clip, add."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._population = workload.population()
        self._offer = workload.offer(1, workload.parameters())
        self._model = {name: torch.nn.Parameter(value) for name, value in self._offer.parameters.items()}
        self._sum = {name: torch.zeros_like(value) for name, value in self._offer.parameters.items()}
        self._next = 0

    def step(self) -> int:
        device = np.array([self._next % self._workload.devices])
        window, user = self._population.windows(self._offer.round, device), self._population.users[device]
        gradient, user = clipped_gradient(self._offer, self._model, window, user)
        for name, value in gradient.items():
            self._sum[name] += value
        self._population.users[device] = user
        self._next += 1
        return 1

    @property
    def total(self) -> np.ndarray:
        return flatten(self._sum).double().numpy()


_loop: _PlainLoop


def _start_plain(workload: Workload, devices: int) -> np.ndarray:
    """Make this process's loop. Returns the sum over the first devices."""
    global _loop
    _loop = _PlainLoop(workload)
    for _ in range(devices):
        _loop.step()
    return _loop.total


def _run_plain(seconds: float) -> float:
    return rate(_loop.step, seconds)
