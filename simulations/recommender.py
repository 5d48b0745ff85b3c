"""The trained model as a scorer of every item for many devices at once: what evaluation ranks by."""

import numpy as np
import torch
from torch import Tensor

from client.local_update import adapt_users
from common.item_tables import formed
from common.model import HEADS, Parameters, condition, policy_weight, queries
from common.recurrence import Recurrence
from common.settings import Head, Settings
from common.trajectory import pad, rewards_of
from simulations.datasets.interactions import Interactions

_BLOCK, _BLOCK_LOGITS = 32, 2**24
"""Most users adapted at once, and most logits of all their steps, of which a few copies are held."""


class PolicyScorer:
    """Scores for devices that serve from their whole history and their adapted user embedding.

    Args:
        users: (N, w) the user embeddings that the devices kept.
        head: whose scores; by default that which items are ranked by.
    """

    def __init__(self, settings: Settings, parameters: Parameters, users: Tensor, head: Head | None = None) -> None:
        self._settings = settings
        self._parameters = tables = formed(parameters)
        self._users = users
        head = head or settings.serving_head
        self._weight = policy_weight(settings, tables) if head == "policy" else tables[HEADS[head]]

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        """(B, A) logits of the head after the last interaction of each user's history."""
        lengths = histories.lengths()[users]
        result = torch.empty(len(users), len(histories.catalogue))
        by_length = np.argsort(lengths, kind="stable")
        logits = self._settings.training.window * len(self._weight)  # of one user
        size = min(max(_BLOCK_LOGITS // logits, 1), _BLOCK)
        for start in range(0, len(users), size):
            block = by_length[start : start + size]
            result[torch.from_numpy(block)] = self._block(histories, users[block])
        return result

    def _block(self, histories: Interactions, users: np.ndarray) -> Tensor:
        places, lengths = histories.places(users), histories.lengths()[users]
        items = histories.items[places]
        rewards = rewards_of(histories.ratings[places], self._settings.data.rating_range)
        starts = np.cumsum(lengths) - lengths
        everything = pad(items, rewards, rewards, starts, lengths, support_fraction=0)
        recurrence = Recurrence(self._settings.model)
        states = recurrence.run(self._parameters, everything.items, everything.rewards)
        newest = np.minimum(lengths, self._settings.training.window)
        window = pad(items, rewards, rewards, starts + lengths - newest, newest, support_fraction=0)
        at = torch.from_numpy(lengths - newest).unsqueeze(-1) + torch.arange(window.items.shape[1])
        index = at.clamp(max=states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        adapted = adapt_users(
            self._settings, self._parameters, states.gather(1, index), window, self._users[torch.from_numpy(users)]
        )
        last = states[torch.arange(len(users)), torch.from_numpy(lengths)].unsqueeze(1)
        conditioned = condition(self._parameters, last, adapted, None)
        return (queries(conditioned, self._settings.model.temperature) @ self._weight.T)[:, 0]
