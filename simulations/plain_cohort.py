"""The `plain` kind: devices one by one through a real device's own encoder, summed in integers without masks.

The exact reference of secure aggregation: what the masked sum must be, bit for bit.
"""

import numpy as np
import torch
from torch import Tensor

from client.device import participate
from common.offer import Offer
from common.privacy.encoding import add_residues
from server.cohort import CohortSum, release
from simulations.population import Population


class PlainCohort:
    """All devices of a population, each computed as on its own."""

    def __init__(self, population: Population) -> None:
        self._population = population

    @property
    def devices(self) -> int:
        return len(self._population)

    def state(self) -> dict[str, Tensor]:
        return self._population.states.checkpoint()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._population.states.restore(state)

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        users = self._population.users
        residues = np.zeros(offer.encoding.padded, np.uint32)
        committed = torch.zeros(len(members), users.shape[1])
        for row, device in enumerate(members.tolist()):
            window = self._population.windows(offer.round, np.array([device]))
            part = participate(offer, len(members), device, window, users[device])
            add_residues(residues, part.residues, offer.encoding.bits)
            committed[row] = part.local_user
        self._population.states.keep(members, committed)
        roster = len(members)
        return CohortSum(release(residues, roster, roster, offer), roster, roster)
