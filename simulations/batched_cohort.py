"""The `central` kind: a cohort's clipped sum by the batched engine, without a per-device update.

The members are cut into blocks that depend on the members and the lengths of their windows alone. Each block's float32
sum becomes an int64 fixed-point vector, and integers add up to the same total in any order: one process or many give
the same integers (``tests/contract/test_workers.py``), and so does a cluster (:mod:`simulations.ray_shards`). Rotation,
rounding and noise happen once, on the total.
"""

import math
import multiprocessing
import pickle
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from multiprocessing.queues import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from client.local_update import Gradients, update_of
from common import kernels
from common.errors import AggregationError
from common.model import Parameters, flatten, items_in, unflatten
from common.objective import histogram
from common.offer import Offer
from common.privacy.adaptive_clip import SHARE, clip_of, within
from common.privacy.clipping import clip_factor
from common.privacy.encoding import release_central
from common.settings import ObjectiveSettings
from common.threads import one_thread
from common.trajectory import Trajectories
from server.cohort import CohortSum
from simulations.population import Population
from simulations.processes import keep_freed_memory, start_worker

_BLOCK_LOGITS = {"full": 640_000, "sampled": 65_536, "nce": 65_536}
"""Candidates times devices of a block: many, for the loop over time, but all logits are kept, a hundred megabytes."""


def block_devices(objective: ObjectiveSettings, items: int) -> int:
    """Devices per block, 8 to 256."""
    candidates = items if objective.softmax == "full" else min(objective.negatives, items)
    return min(max(_BLOCK_LOGITS[objective.softmax] // candidates, 8), 256)


@dataclass(frozen=True)
class Block:
    """One block's result: who it was, their new private embeddings, and what the simulation may look at."""

    devices: np.ndarray
    local_users: Tensor
    metrics: dict[str, Tensor]


Job = tuple[np.ndarray, Trajectories, Tensor]
"""Arguments of :func:`compute_block`: devices, their windows, their embeddings."""


class Pool(Protocol):
    """Computes blocks somewhere else."""

    def compute(self, offer: Offer, jobs: Iterable[Job], fixed: np.ndarray) -> list[Block]:
        """Add all jobs' clipped sums to `fixed`; the blocks in the jobs' order. Raises :class:`AggregationError`."""


class BatchedCohort:
    """All devices of a population, computed in blocks by `workers` processes of one thread each, or by a pool.

    Use as a context manager: worker processes end with it.
    """

    def __init__(self, population: Population, workers: int = 1, pool: Pool | None = None) -> None:
        keep_freed_memory()
        self._population = population
        self._processes = _Pool(workers) if workers > 1 and pool is None else None
        self._pool = pool or self._processes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=kind is None)

    @property
    def devices(self) -> int:
        return len(self._population)

    def state(self) -> dict[str, Tensor]:
        return self._population.states.checkpoint()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._population.states.restore(state)

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        fixed, metrics = self.clipped_sum(offer, members)
        return CohortSum(release(offer, fixed), len(members), len(members), simulation_metrics=metrics)

    def clipped_sum(self, offer: Offer, members: np.ndarray) -> tuple[np.ndarray, dict[str, float | list[float]]]:
        """(d,) int64 the members' clipped sum in fixed point, before noise, and the means of their metrics.

        (d+1,) where C adapts, as all sums here: the last is how many norms were within C less how many were not.
        """
        fixed = np.zeros(offer.encoding.dimension, np.int64)
        blocks = list(self._compute(offer, members, fixed))
        for block in blocks:
            self._population.states.keep(block.devices, block.local_users)
        return fixed, _means(blocks)

    def _compute(self, offer: Offer, members: np.ndarray, fixed: np.ndarray) -> Iterator[Block]:
        """Add the members' clipped sum to `fixed`; blocks come in their fixed order."""
        size = block_devices(offer.settings.objective, items_in(offer.parameters))
        order = members[np.argsort(self._population.window_lengths(offer.round, members), kind="stable")]
        cuts = [order[start : start + size] for start in range(0, len(order), size)]
        jobs = (  # one after the other: the first ones are computed while later ones are read
            (devices, self._population.windows(offer.round, devices), self._population.users[devices])
            for devices in cuts
        )
        if self._pool is not None and len(cuts) > 1:
            yield from self._pool.compute(offer, jobs, fixed)
            return
        with one_thread():
            for job in jobs:
                yield compute_block(offer, *job, fixed)


def fixed_point_scale(clip_norm: float) -> float:
    """Units per 1.0 of a block sum's fixed point: room for 2^26 devices at the clip, and never coarser than 2^-24."""
    return max(2.0**36 / clip_norm, 2.0**24)


def compute_block(offer: Offer, devices: np.ndarray, windows: Trajectories, users: Tensor, fixed: np.ndarray) -> Block:
    """Compute one block, on one torch thread, and add its clipped sum to `fixed`."""
    clip, update = offer.clip, update_of(offer, windows, users)
    norms, metrics = add_clipped(offer, update.gradients, fixed), update.local_metrics
    if not offer.counting:  # histograms all have the norm C
        metrics |= {"clipped": (norms > clip).float(), "norm": norms, "norms": _norm_bin(norms, clip)}
    return Block(devices, update.local_users, {name: value.double().sum(0) for name, value in metrics.items()})


def add_clipped(offer: Offer, gradients: Gradients, fixed: np.ndarray) -> Tensor:
    """Add the devices' gradients, each clipped to C, to `fixed` (d,) int64, and where C adapts what they say of it;
    returns (B,) their norms."""
    clip = offer.clip
    norms = gradients.norms()
    if not bool(torch.isfinite(norms).all()):
        raise _diverged(offer, "a device's gradient is not finite")
    total = gradients.weighted_sum(torch.from_numpy(clip_factor(norms.numpy(), clip)).float())
    if not kernels.add_fixed(total, fixed_point_scale(clip), fixed[: len(total)]):
        raise _diverged(offer, f"a sum reaches {float(total.abs().max()) * fixed_point_scale(clip):.3g} of 2^51 units")
    if offer.adaptive:
        fixed[-1] += round(SHARE * clip_of(offer.encoding) * fixed_point_scale(clip)) * within(norms, clip).sum()
    return norms


def release(offer: Offer, fixed: np.ndarray) -> np.ndarray:
    """(d,) float64 what is released of a fixed-point sum: with noise, unless the run is without."""
    total = fixed / fixed_point_scale(offer.clip)
    if offer.settings.private:
        return release_central(total, offer.encoding, offer.signs, offer.stream("central"), offer.server_noise)
    return np.asarray(total)


NORM_EDGES = torch.logspace(-2, 2, 17)
"""Edges of the histogram of norms over the clip (over 1 without a clip), four to a factor of ten; outer bins open."""


def _norm_bin(norms: Tensor, clip: float) -> Tensor:
    """(B, 18) 1 in the bin of each device's norm."""
    every = torch.ones(len(norms), 1, dtype=torch.bool)
    return histogram((norms / (clip if math.isfinite(clip) else 1)).unsqueeze(1), every, NORM_EDGES)


def _diverged(offer: Offer, sign: str) -> AggregationError:
    return AggregationError(
        f"Training diverged by round {offer.round} ({sign}): lower training.learning_rate="
        f"{offer.settings.training.learning_rate} or set a finite privacy.clip_norm."
    )


def _means(blocks: list[Block]) -> dict[str, float | list[float]]:
    """Each metric's mean over the devices; of a histogram, each bin's."""
    devices = sum(len(block.devices) for block in blocks)
    if not devices:
        return {}
    names = blocks[0].metrics
    return {name: (torch.stack([block.metrics[name] for block in blocks]).sum(0) / devices).tolist() for name in names}


class _Pool:
    """Worker processes that share the round's parameters and each own one int64 accumulator."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def compute(self, offer: Offer, jobs: Iterable[Job], fixed: np.ndarray) -> list[Block]:
        if self._executor is None:
            self._start(offer)
        self._shared.copy_(flatten(offer.parameters))
        self._sums.zero_()
        # The parameters travel through shared memory, not with every job.
        light = replace(offer, parameters={}, server_noise=None)
        futures = []
        try:
            try:
                with _signals_held_back():  # the workers that this starts inherit it: Ctrl-C is the main process's
                    for job in jobs:
                        futures.append(self._executor.submit(_work, light, _packed(job)))  # type: ignore[union-attr]
            finally:
                wait(futures)  # before any error is raised: a straggler must not write into the next round's sums
            blocks = [pickle.loads(future.result()) for future in futures]
        except BrokenProcessPool:
            self._executor = None
            raise AggregationError("A worker process died during the round; nothing was released.") from None
        for sums in self._sums.numpy():
            fixed += sums[: len(fixed)]
        return blocks

    def _start(self, offer: Offer) -> None:
        shapes = {name: (value.shape[0], value.shape[1]) for name, value in offer.parameters.items()}
        self._shared = _shared(flatten(offer.parameters))
        most = max(offer.encoding.dimension, offer.dimension + 1)  # a first round that counts is of another length
        self._sums = _shared(torch.zeros(self._workers, most, dtype=torch.int64))
        context = multiprocessing.get_context("spawn")
        slots = context.SimpleQueue()
        for slot in range(self._workers):
            slots.put(slot)
        self._executor = ProcessPoolExecutor(
            self._workers, context, _start_worker, (self._shared, self._sums, shapes, slots)
        )

    def shutdown(self, wait: bool) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=wait, cancel_futures=True)


def _shared(values: Tensor) -> Tensor:
    values.share_memory_()  # type: ignore[no-untyped-call]
    return values


def _start_worker(shared: Tensor, sums: Tensor, shapes: dict[str, tuple[int, int]], slots: "SimpleQueue[int]") -> None:
    global _worker
    start_worker()
    _worker = _Worker(unflatten(shared, shapes), sums[slots.get()].numpy())


@contextmanager
def _signals_held_back() -> Iterator[None]:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@dataclass
class _Worker:
    parameters: Parameters
    sums: np.ndarray


_worker: _Worker


def _work(light: Offer, packed: bytes) -> bytes:
    job: Job = pickle.loads(packed)
    return _packed(
        compute_block(replace(light, parameters=_worker.parameters), *job, _worker.sums[: light.encoding.dimension])
    )


class _Pickler(pickle.Pickler):
    """Tensors as numpy's arrays: by themselves each takes a tenth of a millisecond, or a piece of shared memory."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _packed(value: object) -> bytes:
    packed = BytesIO()
    _Pickler(packed, protocol=5).dump(value)
    return packed.getvalue()
