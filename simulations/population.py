"""A simulated population: the histories and private states of all devices, in flat arrays."""

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError
from common.objective import returns_of
from common.settings import Settings
from common.trajectory import Trajectories, pad, rewards_of, window_starts
from simulations.datasets.interactions import Interactions


class Population:
    """What N devices hold. One object plays them all; a device's row is read and written only for that device.

    Attributes:
        users: (N, w) float32 user embeddings.
    """

    def __init__(self, settings: Settings, histories: Interactions) -> None:
        self._settings = settings
        self._lengths = histories.lengths()
        self._offsets = histories.offsets
        self._items = histories.items
        self._rewards = rewards_of(histories.ratings, settings.data.rating_range)
        self._returns = self._rewards.copy()
        for own in histories.slices():
            self._returns[own] = returns_of(self._rewards[own], settings.objective.discount)
        self.users = torch.zeros(histories.users, settings.model.user_width)

    def __len__(self) -> int:
        return len(self._lengths)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the embeddings from a checkpoint. Raises :class:`RunError` if they are not this population's."""
        users = state.get("users")
        if users is None or users.shape != self.users.shape:
            found = "none" if users is None else f"shape {tuple(users.shape)}"
            raise RunError(
                f"Expected the checkpoint's user embeddings of shape {tuple(self.users.shape)}, found {found}."
            )
        self.users.copy_(users)

    def window_lengths(self, devices: np.ndarray) -> np.ndarray:
        """(B,) steps that each device trains on in one round."""
        return np.asarray(np.minimum(self._lengths[devices], self._settings.training.window))

    def windows(self, round_: int, devices: np.ndarray) -> Trajectories:
        """The devices' windows of one round, a batch of B."""
        training = self._settings.training
        starts = window_starts(training.seed, round_, devices, self._lengths[devices], training.window)
        return pad(
            self._items,
            self._rewards,
            self._returns,
            self._offsets[devices] + starts,
            self.window_lengths(devices),
            training.support_fraction,
        )
