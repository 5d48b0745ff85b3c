"""A simulated population: the histories and private states of all devices, in flat arrays.

Nothing is done for all devices in a round: a window's rewards and returns are computed when it is read, so that the
arrays of the histories may as well be memory-mapped.
"""

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
        self._histories = histories
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

    def window_lengths(self, round_: int, devices: np.ndarray) -> np.ndarray:
        """(B,) steps that each device reads in a round."""
        return np.asarray(np.minimum(self._lengths[devices], self._settings.window(round_)))

    def windows(self, round_: int, devices: np.ndarray) -> Trajectories:
        """The devices' windows of one round, a batch of B: work and memory for those, however many there are."""
        training, discount = self._settings.training, self._settings.objective.discount
        lengths, steps = self._lengths[devices], self.window_lengths(round_, devices)
        starts = window_starts(training.seed, round_, devices, lengths, self._settings.window(round_))
        read = lengths - starts if discount else steps  # a return looks ahead to the end of the history
        begins = np.cumsum(read) - read
        at = np.repeat(self._histories.offsets[devices] + starts - begins, read) + np.arange(read.sum())
        rewards = returns = rewards_of(self._histories.ratings[at], self._settings.data.rating_range)
        if discount:
            own = np.split(rewards, begins[1:])
            returns = np.concatenate([returns_of(values, discount) for values in own])
        return pad(self._histories.items[at], rewards, returns, begins, steps, training.support_fraction)
