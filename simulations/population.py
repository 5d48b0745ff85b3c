"""A simulated population: the histories and private states of all devices.

Nothing is done for all devices in a round: a window's rewards and returns are computed when it is read, and histories
and states may be memory-mapped.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from common.objective import returns_of
from common.settings import Settings
from common.trajectory import Trajectories, pad, rewards_of, window_starts
from simulations.datasets.interactions import Interactions
from simulations.private_states import PrivateStates


class Population:
    """What N devices hold. One object plays them all; a device's row is read and written only for that device.

    Args:
        file: where the user embeddings are kept between rounds (:class:`simulations.private_states.PrivateStates`);
            None: in memory, and the run cannot be resumed.
    """

    def __init__(self, settings: Settings, histories: Interactions, file: Path | None = None) -> None:
        self._settings = settings
        self._lengths = histories.lengths()
        self._histories = histories
        self.states = PrivateStates(histories.users, settings.model.user_width, file)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def users(self) -> Tensor:
        """(N, w) float32 user embeddings, as they are now."""
        return self.states.rows

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
