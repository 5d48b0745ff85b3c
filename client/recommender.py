"""Recommendations for one user on their own device, offline.

The device keeps the recurrent states before each of the newest `training.window` interactions and after the last one:
what ranking and the adaptation of the user embedding read. New interactions move them on in O(new interactions);
another model makes them stale, and the history is replayed.

Guarantees:
    - scores are those that a simulation of the device ranks by (tests/unit/test_device_recommender.py
      ::test_a_device_ranks_as_its_simulation);
    - states moved on are those of a replay, to 1e-6 (::test_moving_on_is_a_replay).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from client.device_contents import Event, State, known
from client.device_store import DeviceStore
from client.local_update import adapt_users
from common.catalogue import Catalogue
from common.errors import ModelError
from common.item_tables import formed
from common.model import HEADS, Parameters, check_parameters, condition, policy_weight, queries, shapes
from common.recurrence import Recurrence
from common.settings import Settings
from common.slate import explore, top_k
from common.threads import one_thread
from common.trajectory import pad, rewards_of


@dataclass(frozen=True)
class Recommendation:
    """An item with the logit of the head that items are ranked by."""

    item: str
    title: str
    score: float


@dataclass(frozen=True)
class Exploration:
    """How a slate is drawn (:func:`common.slate.explore`).

    Attributes:
        certain: K′, how many of the highest items are shown for sure.
        candidates: M, from how many of the highest items the others are drawn.
        generator: draws them.
    """

    certain: int
    candidates: int
    generator: torch.Generator


@dataclass(frozen=True)
class Prepared:
    """A user at the end of a history.

    Attributes:
        local_query: (n+1,) what an item embedding is multiplied with.
        local_consumed: (T,) int64 catalogue indices of the history.
    """

    local_query: Tensor
    local_consumed: Tensor


def read_model(content: bytes, settings: Settings, items: int) -> Parameters:
    """The parameters in a safetensors file. Raises :class:`ModelError` if they are not those of such a model."""
    try:
        found = load(content)
    except SafetensorError as error:
        raise ModelError(f"Expected the received model to be safetensors: {error}.") from None
    expected = shapes(settings, items)
    parameters = {name: found[name] for name in expected if name in found} | found
    check_parameters(parameters, expected)
    return parameters


def replay(settings: Settings, parameters: Parameters, items: np.ndarray, rewards: np.ndarray) -> Tensor:
    """The states of a whole history of T interactions; arguments as of :func:`advance`."""
    return advance(settings, parameters, torch.zeros(1, settings.model.state_width), items, rewards)


def advance(
    settings: Settings, parameters: Parameters, states: Tensor, items: np.ndarray, rewards: np.ndarray
) -> Tensor:
    """The states after T more interactions: (r', n), r' = 1 + min(r − 1 + T, `training.window`); the last is newest.

    Args:
        states: (r, n) the states before; (1, n) zeros before the first interaction.
        items: (T,) catalogue indices of the new interactions, oldest first.
        rewards: (T,) float32 in [-5, 5].
    """
    recurrence = Recurrence(settings.model)
    new = (torch.from_numpy(np.asarray(items, np.int64)), torch.from_numpy(np.asarray(rewards, np.float32)))
    with one_thread(), torch.no_grad():
        more = recurrence.run(parameters, new[0].unsqueeze(0), new[1].unsqueeze(0), states[-1:])[0]
    return torch.cat([states, more[1:]])[-1 - settings.training.window :]


def query_of(
    settings: Settings, parameters: Parameters, states: Tensor, items: np.ndarray, rewards: np.ndarray, user: Tensor
) -> Tensor:
    """(n+1,) what an item embedding is multiplied with after the last interaction, at the adapted user embedding.

    As a round does it, the embedding is adapted first, here on the newest window and by the full softmax.

    Args:
        states: (r, n) of :func:`advance`.
        items, rewards: (T,) of the history, T ≥ r − 1, oldest first.
        user: (w,) the user embedding that the device keeps.
    """
    newest, own = len(states) - 1, user.unsqueeze(0)
    with one_thread():
        if newest:
            items, rewards = items[-newest:], rewards[-newest:]
            window = pad(items, rewards, rewards, np.array([0]), np.array([newest]), support_fraction=0)
            own = adapt_users(settings, parameters, states[:-1].unsqueeze(0), window, own)
        conditioned = condition(parameters, states[-1:].unsqueeze(0), own, None)
        return queries(conditioned, settings.model.temperature)[0, 0]


class Recommender:
    """Ranks one model's items for the user of a device.

    Args:
        parameters: the shared parameters that the device received last.
        catalogue: the items, in the order of the parameters' rows.
    """

    def __init__(self, settings: Settings, parameters: Parameters, catalogue: Catalogue) -> None:
        self._settings = settings
        self._shared, self._parameters = parameters, formed(parameters)
        self._catalogue = catalogue
        head = settings.serving_head
        tables = self._parameters
        self._weight = policy_weight(settings, tables) if head == "policy" else tables[HEADS[head]]
        self.digest = self._digest()

    def catch_up(self, store: DeviceStore) -> State:
        """The states at the end of the stored history, which are stored: moved on by the events that they have not
        seen, or, if they belong to something else than this model, replayed.

        Test: tests/unit/test_device_recommender.py::test_only_new_events_are_run.
        """
        state, count = store.load_state(), store.event_count
        if state is None or state.model != self.digest or state.events > count:
            seen, states = 0, torch.zeros(1, self._settings.model.state_width)
        else:
            seen, states = state.events, torch.from_numpy(state.values)
            if seen == count:
                return state
        states = advance(self._settings, self._parameters, states, *self._encode(store.events(seen)))
        state = State(self.digest, count, states.numpy())
        store.save_state(state)
        return state

    def prepare(self, store: DeviceStore) -> Prepared:
        """The user as of now: the states, caught up, and the adapted embedding, which is not stored.

        Raises :class:`ModelError` if the stored user embedding is not one of this model.
        """
        state = self.catch_up(store)
        stored, width = store.load_user(), self._settings.model.user_width
        user = torch.zeros(width) if stored is None else torch.from_numpy(stored)
        if len(user) != width:
            raise ModelError(f"Expected the stored user embedding of width {len(user)} to have the model's, {width}.")
        items, rewards = self._encode(store.events())
        query = query_of(self._settings, self._parameters, torch.from_numpy(state.values), items, rewards, user)
        return Prepared(query, torch.from_numpy(items))

    def scores(self, prepared: Prepared) -> Tensor:
        """(A,) logits of the head that items are ranked by."""
        with one_thread():
            return self._weight @ prepared.local_query

    def recommend(
        self, prepared: Prepared, k: int, *, consumed: bool = False, exploration: Exploration | None = None
    ) -> list[Recommendation]:
        """K items: the highest, highest first, or those that the exploration shows.

        Args:
            consumed: whether items of the history may be among them.

        Raises:
            ModelError: the model has diverged.
            SettingsError: fewer than K items may be shown.
        """
        scores = self.scores(prepared)
        allowed = scores if consumed else scores.index_fill(0, prepared.local_consumed, -torch.inf)
        if exploration is None:
            slate = top_k(allowed.unsqueeze(0), k)[0]
        else:
            chosen = (exploration.certain, exploration.candidates, exploration.generator)
            slate = explore(allowed.unsqueeze(0), k, *chosen)[0]
        ids, titles = self._catalogue.ids, self._catalogue.titles
        return [Recommendation(str(ids[item]), str(titles[item]), float(scores[item])) for item in slate.tolist()]

    def _encode(self, events: Sequence[Event]) -> tuple[np.ndarray, np.ndarray]:
        """(T,) catalogue indices and rewards of the events whose items the catalogue has."""
        items, ratings = known(events, self._catalogue)
        return items, rewards_of(ratings, self._settings.data.rating_range)

    def _digest(self) -> bytes:
        """32 bytes for all that states depend on: the cell and its parameters, the catalogue, the rewards' range."""
        settings = self._settings
        content = hashlib.sha256(f"{settings.model!r} {settings.data.rating_range} {settings.training.window}".encode())
        for name, value in self._shared.items():
            if name.startswith(("items", "cell", "features")):
                content.update(value.contiguous().numpy().tobytes())
        content.update("\0".join(self._catalogue.index).encode())
        return content.digest()
