"""The batched engine on a Ray cluster: shards of a cohort's blocks as tasks, wherever there is a core.

A shard comes back as an int64 vector, the fixed-point sum of its blocks, so that any cluster gives the integers that
one process gives. A task whose worker, or whose machine, dies is Ray's to repeat, and gives the same integers again;
the main process adds a shard's sum once, when it is there (tests/integration/test_ray.py).
"""

import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
import torch

from common.errors import AggregationError, RunError
from common.model import Parameters
from common.offer import Offer
from simulations.batched_cohort import Block, Job, compute_block
from simulations.processes import keep_freed_memory

_SHARDS_PER_CORE = 3  # so that the slowest core is not waited for long
_RETRIES = 10
_PATIENCE_SECONDS = 10.0


class RayShards:
    """A connection to a cluster, which ends with a ``with`` block.

    Args:
        address: ``host:port`` of the cluster's head, ``auto`` for the one of this machine, or ``local`` to start one.

    Raises:
        RunError: there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
        try:
            if ":" in address:  # Ray itself would wait for minutes
                host, port = address.rsplit(":", 1)
                socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:
            raise RunError(f"Expected a Ray cluster at {address}: {str(error).splitlines()[0]}") from None
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._cores = max(1, int(resources.get("CPU", 1)))

    def compute(self, offer: Offer, jobs: Iterable[Job], fixed: np.ndarray) -> list[Block]:
        """Add all jobs' clipped sums to `fixed`; the blocks in the jobs' order. Raises :class:`AggregationError`."""
        jobs = list(jobs)
        parameters = ray.put({name: value.numpy() for name, value in offer.parameters.items()})
        light = ray.put(replace(offer, parameters={}, server_noise=None))
        count = min(len(jobs), _SHARDS_PER_CORE * self._cores)
        shards = [_shard.remote(light, parameters, jobs[start::count]) for start in range(count)]
        blocks: list[Block | None] = [None] * len(jobs)
        try:
            for start, shard in enumerate(shards):
                total, blocks[start::count] = ray.get(shard)
                fixed += total
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AggregationError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise AggregationError(f"The Ray cluster failed, and nothing was released: {error}") from None
        return [block for block in blocks if block is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ray.shutdown()


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _shard(light: Offer, parameters: dict[str, np.ndarray], jobs: Sequence[Job]) -> tuple[np.ndarray, list[Block]]:
    torch.set_num_threads(1)
    keep_freed_memory()
    shared: Parameters = {name: torch.from_numpy(value.copy()) for name, value in parameters.items()}
    offer = replace(light, parameters=shared)
    fixed = np.zeros(offer.encoding.dimension, np.int64)
    return fixed, [compute_block(offer, *job, fixed) for job in jobs]
