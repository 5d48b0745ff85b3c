"""The ClientApp of `flwr run .`: the real one, over one device of a simulated population.

A simulated node's partition is its device's number. A process loads the data set when it first trains, and torch with
it: what only keeps the protocol going starts without either.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from client.app import make_app
from client.guard import Policy
from client.ledger import Charge
from common.catalogue import Catalogue
from common.errors import SettingsError
from common.secagg.member import Identity
from common.settings import Settings
from simulations.identities import simulated_identity, simulated_publisher

if TYPE_CHECKING:
    from common.trajectory import Trajectories
    from simulations.population import Population

_LOCAL_USER, _CHARGES = "local_user", "charges"


@lru_cache(maxsize=1)
def _open(settings: Settings) -> "tuple[Catalogue, Population]":
    """The items and the users."""
    from simulations.population import Population
    from simulations.simulate import load_split

    train = load_split(settings).train
    return train.catalogue, Population(settings, train)


class RecordedDevice:
    """What a device keeps, in Flower's state of a node.

    Args:
        records: by name.
    """

    def __init__(self, records: MutableMapping[str, ConfigRecord]) -> None:
        self.records = records
        self.revoked: frozenset[int] = frozenset()

    def charges(self) -> list[Charge]:
        record: Mapping[str, Any] = self.records.get(_CHARGES) or {"entries": []}
        return [Charge.parse(entry) for entry in record["entries"]]

    def charge(self, charge: Charge) -> None:
        entries = [known.to_json() for known in self.charges()]
        self.records[_CHARGES] = ConfigRecord({"entries": [*entries, charge.to_json()]})


@dataclass
class _SimulatedDevice(RecordedDevice):
    number: int
    settings: Settings
    state: RecordDict

    def __post_init__(self) -> None:
        super().__init__(self.state.config_records)

    @property
    def identity(self) -> Identity:
        return simulated_identity(self.settings.training.seed, self.number)

    @property
    def publisher(self) -> bytes:
        return simulated_publisher(self.settings.training.seed).public_key().public_bytes_raw()

    @property
    def policy(self) -> Policy:
        return Policy.of(self.settings)

    @property
    def catalogue(self) -> Catalogue:
        return _open(self.settings)[0]

    def window(self, round_: int) -> "Trajectories":
        return _open(self.settings)[1].windows(round_, np.array([self.number]))

    def load_user(self) -> np.ndarray | None:
        arrays = self.state.array_records.get(_LOCAL_USER)
        return None if arrays is None else arrays["user"].numpy().copy()

    def save_user(self, user: np.ndarray) -> None:
        self.state[_LOCAL_USER] = ArrayRecord({"user": Array(user)})

    def keep_model(self, content: bytes, metadata: Mapping[str, str]) -> None:
        """A simulated device recommends nothing by itself."""

    def expect_willing(self) -> None:
        """It always is."""


def _open_device(settings: Settings, context: Context) -> _SimulatedDevice:
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or number < 0:
        raise SettingsError(f"Expected partition-id={number!r} to be the number of a user.")
    return _SimulatedDevice(number, settings, context.state)


client_app = make_app(_open_device)
