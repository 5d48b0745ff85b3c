"""What a simulated user has seen, and what π, β and popularity would show now. Of simulations only."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError
from common.model import Parameters
from common.ranking import top_items
from common.settings import Head, Settings
from server.checkpoint import load_latest
from server.run_folder import RunFolder
from simulations.baselines import Popularity
from simulations.private_states import PrivateStates
from simulations.recommender import PolicyScorer
from simulations.simulate import load_split
from simulations.splits import Split

_SHOWN = 10
_HISTORY = 15
_NAMES: dict[Head, str] = {"policy": "π, the policy", "behaviour": "β, the logging policy", "critic": "critic"}


@dataclass(frozen=True)
class _Data:
    settings: Settings
    split: Split


def preview(run: Path, user: str) -> dict[str, Any]:
    """A user's newest interactions and each recommender's ten best of what it has not seen, by the newest checkpoint.

    Args:
        user: as the data names it; empty for the first one.

    Returns:
        ``{"user", "next", "users", "round", "lists": {heading: [{"title", "value"}, …]}}``; `next` is another user.

    Raises:
        RunError: the run is no simulation, has no checkpoint yet, or no such user.
        FedtopkError: its data is gone.
    """
    data = _data(run)
    checkpoint = load_latest(run / "checkpoints")
    if checkpoint is None or "users" not in checkpoint.extra:
        raise RunError(f"Expected a checkpoint of a simulation in {run}: there is none yet, or its devices are real.")
    train = data.split.train
    states = PrivateStates(train.users, data.settings.model.user_width, RunFolder(run).user_embeddings)
    states.restore(checkpoint.extra)
    found = np.flatnonzero(train.user_ids == user) if user else np.zeros(1, int)
    if not len(found):
        raise RunError(f"Expected user={user} to be one of the {train.users:,} in the data of {run}.")
    place = int(found[0])
    own = train.places(np.array([place]))
    newest = zip(train.items[own][-_HISTORY:][::-1], train.ratings[own][-_HISTORY:][::-1], strict=True)
    heading = f"History, newest of {len(own)}"
    lists = {heading: [_row(data, item, f"rated {rating:g}") for item, rating in newest]}
    for head, name in _NAMES.items():
        if head in data.settings.heads:
            lists[name] = _best(data, place, _logits(data, checkpoint.model, states.rows, place, head))
    lists["popularity"] = _best(data, place, Popularity(train).scores(train, np.array([place])).log())
    names = {"user": str(train.user_ids[place]), "next": str(train.user_ids[(place + 1) % train.users])}
    return names | {"users": train.users, "round": checkpoint.round, "lists": lists}


@lru_cache(maxsize=2)
def _data(run: Path) -> _Data:
    settings = RunFolder(run).settings()
    return _Data(settings, load_split(settings))


def _logits(data: _Data, parameters: Parameters, users: Tensor, user: int, head: Head) -> Tensor:
    return PolicyScorer(data.settings, parameters, users, head).scores(data.split.train, np.array([user]))


def _best(data: _Data, user: int, logits: Tensor) -> list[dict[str, str]]:
    train = data.split.train
    seen = torch.from_numpy(train.items[train.places(np.array([user]))].astype(np.int64))
    finite = logits.clamp(min=torch.finfo(logits.dtype).min)
    found = top_items(finite, torch.stack([torch.zeros_like(seen), seen]), _SHOWN, torch.Generator().manual_seed(0))[0]
    probabilities = logits.double().softmax(-1)[0]
    return [_row(data, item, f"{100 * float(probabilities[item]):.2g} %") for item in found.tolist() if item >= 0]


def _row(data: _Data, item: int, value: str) -> dict[str, str]:
    catalogue = data.split.train.catalogue
    return {"title": str(catalogue.titles[item]), "value": value}
