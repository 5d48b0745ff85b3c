"""The ClientApp of `flwr run .`: the real one, over one device of a simulated population.

A simulated node's partition is its device's number. A process loads the data set when it first trains, and torch with
it: what only keeps the protocol going starts without either.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context

from client.app import make_app
from client.guard import Policy
from common.errors import SettingsError
from common.secagg.member import Identity
from common.settings import Settings
from simulations.identities import simulated_identity

if TYPE_CHECKING:
    from common.trajectory import Trajectories
    from simulations.population import Population


@lru_cache(maxsize=1)
def _open(settings: Settings) -> "tuple[int, Population]":
    """The catalogue's size and the population."""
    from simulations.population import Population
    from simulations.simulate import load_split

    train = load_split(settings).train
    return len(train.catalogue), Population(settings, train)


@dataclass(frozen=True)
class _SimulatedDevice:
    number: int
    settings: Settings

    @property
    def identity(self) -> Identity:
        return simulated_identity(self.settings.training.seed, self.number)

    @property
    def policy(self) -> Policy:
        return Policy.of(self.settings)

    @property
    def items(self) -> int:
        return _open(self.settings)[0]

    def window(self, round_: int) -> "Trajectories":
        _, population = _open(self.settings)
        return population.windows(round_, np.array([self.number]))


def _open_device(settings: Settings, context: Context) -> _SimulatedDevice:
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or number < 0:
        raise SettingsError(f"Expected partition-id={number!r} to be the number of a user.")
    return _SimulatedDevice(number, settings)


client_app = make_app(_open_device)
