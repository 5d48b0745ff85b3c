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

_BLOCK = 32
"""Users whose histories are read together."""
_LOGITS = 2**24
"""Most logits of all the steps of those who are adapted together; a few copies of them are held."""


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
        self._together = max(_LOGITS // (settings.training.window * len(self._weight)), 1)

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        """(B, A) logits of the head after the last interaction of each user's history."""
        result = torch.empty(len(users), len(histories.catalogue))
        by_length = np.argsort(histories.lengths()[users], kind="stable")
        for start in range(0, len(users), _BLOCK):
            block = by_length[start : start + _BLOCK]
            result[torch.from_numpy(block)] = self._block(histories, users[block])
        return result

    def _block(self, histories: Interactions, users: np.ndarray) -> Tensor:
        places, lengths = histories.places(users), histories.lengths()[users]
        items = histories.items[places]
        rewards = rewards_of(histories.ratings[places], self._settings.data.rating_range)
        ends = np.cumsum(lengths)
        everything = pad(items, rewards, rewards, ends - lengths, lengths, support_fraction=0)
        recurrence = Recurrence(self._settings.model)
        states = recurrence.record(self._parameters, everything.items, everything.rewards).states
        newest = np.minimum(lengths, self._settings.training.window)
        adapted = []
        for part in np.array_split(np.arange(len(users)), -(-len(users) // self._together)):
            window = pad(items, rewards, rewards, (ends - newest)[part], newest[part], support_fraction=0)
            at = torch.from_numpy((lengths - newest)[part]).unsqueeze(-1) + torch.arange(window.items.shape[1])
            index = at.clamp(max=states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
            own = self._users[torch.from_numpy(users[part])]
            adapted.append(adapt_users(self._settings, self._parameters, states[part].gather(1, index), window, own))
        last = states[torch.arange(len(users)), torch.from_numpy(lengths)].unsqueeze(1)
        conditioned = condition(self._parameters, last, torch.cat(adapted), None)
        return (queries(conditioned, self._settings.model.temperature) @ self._weight.T)[:, 0]
