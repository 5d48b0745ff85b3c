"""The ServerApp and the ClientApps of `flwr run .`: the real ones, over a simulated population.

A simulated node's partition is its device's number. Each process loads the data set once.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Context

from client.app import make_app as make_client_app
from common.errors import SettingsError
from common.model import Parameters
from common.settings import Settings
from common.trajectory import Trajectories
from server.app import Deployment
from server.app import make_app as make_server_app
from simulations.population import Population
from simulations.simulate import evaluate_model, load_split
from simulations.splits import Split


@lru_cache(maxsize=1)
def _open(settings: Settings) -> tuple[Split, Population]:
    data = load_split(settings)
    return data, Population(settings, data.train)


@dataclass(frozen=True)
class _SimulatedDevice:
    number: int
    items: int
    population: Population

    def window(self, round_: int) -> Trajectories:
        return self.population.windows(round_, np.array([self.number]))


def _open_device(settings: Settings, context: Context) -> _SimulatedDevice:
    data, population = _open(settings)
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < len(population):
        raise SettingsError(f"Expected partition-id={number!r} to be the number of one of {len(population)} users.")
    return _SimulatedDevice(number, len(data.train.catalogue), population)


def _deploy(settings: Settings) -> Deployment:
    data, population = _open(settings)

    def evaluate(parameters: Parameters) -> dict[str, Any]:
        """With user embeddings adapted from 0: the trained ones are the devices'."""
        return evaluate_model(settings, parameters, population, data)

    return Deployment(len(data.train.catalogue), settings.data.users or None, evaluate)


server_app = make_server_app(_deploy)
client_app = make_client_app(_open_device)
