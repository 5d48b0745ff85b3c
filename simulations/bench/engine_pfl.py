"""pfl-research on the same work: its simulated backend trains the users of a cohort one after the other.

Federated averaging over a federated dataset, each user's update clipped by pfl, its loss the plain loop's. Of several
processes each takes a part of every cohort, and torch.distributed adds the parts up over loopback. The learning rate on
a device is 1, so that its update is the negative gradient; the server's is 0, so that the model stays as it is.

Not installed with fedtopk; the README says how.
"""

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.local_update import losses_of
from common.flower_tasks import free_port
from common.offer import Offer
from common.trajectory import Trajectories
from simulations.bench.engine_loops import CHECKED, batched_sum, expect_equal
from simulations.bench.engine_workloads import Workload
from simulations.bench.meter import Effort, Measured, peak_rss_mib, rate
from simulations.processes import start_worker

_NEVER = 1 << 62


def measure_pfl(workload: Workload, effort: Effort) -> Measured:
    """Whole rounds, after one over the few devices that are checked.

    Args:
        workload: `reference`.

    Raises:
        AggregationError: its sum is not the batched engine's.
    """
    begin, checked = time.monotonic(), workload.limited(CHECKED)
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(effort.workers)]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, _join, (rank, addresses)))
            for rank in range(effort.workers)
        ]

        def everywhere(work: Callable[..., Any], *arguments: object) -> list[Any]:
            answers = [process.submit(work, *arguments) for process in processes]
            return [answer.result() for answer in answers]

        def play() -> int:
            everywhere(_play, workload.cohort)
            return workload.cohort

        totals = everywhere(_start, workload, checked.cohort)
        startup = time.monotonic() - begin
        rates = [rate(play, effort.seconds) for _ in range(effort.runs)]
        peak = sum(everywhere(peak_rss_mib))
    for total in totals:
        expect_equal("pfl simulation", total, batched_sum(checked))
    return Measured(rates, startup, peak)


class _Recommender(torch.nn.Module):
    """What pfl takes a model to be: a loss of one user's tensors, and metrics of them."""

    def __init__(self, offer: Offer, user: Tensor) -> None:
        super().__init__()
        self._offer, self._user = offer, user
        self.shared = torch.nn.ParameterList(offer.parameters.values())

    def loss(self, *window: Tensor) -> Tensor:
        offer, model = self._offer, dict(zip(self._offer.parameters, self.shared, strict=True))
        loss, _ = losses_of(
            offer.settings, model, Trajectories(*window), self._user, offer.candidates, offer.warm, offer.item_slice
        )
        return loss.sum()

    def metrics(self, *window: Tensor) -> dict[str, Any]:
        from pfl.metrics import Weighted

        return {"loss": Weighted(self.loss(*window).item(), 1)}


class _Simulation:
    """This process's part."""

    def __init__(self, workload: Workload) -> None:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.pytorch import PyTorchTensorDataset
        from pfl.data.sampling import MinimizeReuseUserSampler
        from pfl.model.pytorch import PyTorchModel
        from pfl.privacy.privacy_mechanism import NormClippingOnly

        population, offer = workload.population(), workload.offer(1, workload.parameters())

        def dataset_of(user: int) -> PyTorchTensorDataset:
            window = population.windows(offer.round, np.array([user]))
            tensors = (window.items, window.rewards, window.returns, window.lengths, window.support)
            return PyTorchTensorDataset(tensors, user_id=str(user))

        users = FederatedDataset(dataset_of, MinimizeReuseUserSampler(range(workload.devices)))
        clip = NormClippingOnly(2, offer.settings.privacy.clip_norm)
        self._backend = SimulatedBackend(users, users, postprocessors=[clip])
        self._recommender = _Recommender(offer, population.users[:1])
        server = torch.optim.SGD(self._recommender.parameters(), lr=0.0)
        self._model = PyTorchModel(self._recommender, torch.optim.SGD, server)
        self._algorithm, self._round = FederatedAveraging(), 0

    def play(self, cohort: int) -> np.ndarray:
        """One round. Returns (d,) the sum over the cohort, as the server's optimizer has it."""
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.hyperparam import NNTrainHyperParams

        self._round += 1
        self._algorithm.run(
            NNAlgorithmParams(self._round, _NEVER, cohort, None),
            self._backend,
            self._model,
            NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
            send_metrics_to_platform=False,
        )
        gradients = [value.grad for value in self._recommender.shared if value.grad is not None]
        return torch.cat([value.flatten() for value in gradients]).double().numpy() * cohort


_simulation: _Simulation


def _join(rank: int, addresses: list[str]) -> None:
    """Where pfl is distributed it reads from the environment, when it is imported."""
    start_worker()
    multiprocessing.current_process().name = "MainProcess"  # pfl takes all others for a data loader's
    warnings.filterwarnings("ignore", category=FutureWarning, module="pfl")  # of how it calls PyTorch
    os.environ |= {
        "PFL_WORKER_RANK": str(rank),
        "PFL_WORKER_ADDRESSES": ",".join(addresses),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _start(workload: Workload, devices: int) -> np.ndarray:
    """Make this process's part. Returns the sum over the first devices."""
    global _simulation
    _simulation = _Simulation(workload)
    return _simulation.play(devices)


def _play(cohort: int) -> None:
    _simulation.play(cohort)
