"""The work that engines are compared on: the same devices, the same model, the same clipped sum.

=============  =====================================================================================================
`reference`    Cross-entropy on the next item by a GRU, 32 numbers an item and a state of 64: half a million parameters
               with 5000 items. Each device has one sequence of items drawn by Zipf's law, takes one local step over all
               of it, and its update is clipped to norm 1. No user embeddings and no noise.
`full`         The default objective: top-K with β, warm-up over, a step of the user embedding; one rounding and noise
               for each sum.
=============  =====================================================================================================

Softmax: over all items, or sampled with 256 negatives that a round shares.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch

from common.catalogue import Catalogue
from common.errors import SettingsError
from common.item_slice import cut, slice_of
from common.model import Parameters, initialise, shapes
from common.offer import Offer
from common.privacy.encoding import Encoding
from common.settings import Settings, parse_flat
from simulations.datasets.interactions import Interactions
from simulations.population import Population

Name = Literal["reference", "full"]
Softmax = Literal["full", "sampled"]

_NEGATIVES = 256
_MOST_INPUT_ROWS = 8192
_SEED = 0
_ITEMS, _RATINGS, _MEMBERS = 1, 2, 3  # set generators apart
_NOISE_MULTIPLIER = 1.0

_REFERENCE: dict[str, Any] = {
    "model.cell": "gru",
    "model.ratings": False,
    "model.user_width": 1,
    "objective.estimator": "cross-entropy",
    "training.support_fraction": 0,
    "training.user_steps": 0,
    "privacy.mechanism": "none",
}
_FULL: dict[str, Any] = {"objective.warmup_rounds": 0, "privacy.noise_multiplier": _NOISE_MULTIPLIER}


@dataclass(frozen=True)
class Workload:
    """Raises :class:`SettingsError` for a cohort that is larger than the population.

    Attributes:
        devices: N, all of them.
        cohort: how many take part in a round.
        items: A, size of the catalogue.
        steps: T, interactions of each device.
        slice_items: S, items of a round's slice; 0: all of them.
    """

    name: Name
    softmax: Softmax
    devices: int
    cohort: int
    items: int
    steps: int
    slice_items: int = 0

    def __post_init__(self) -> None:
        if self.cohort > self.devices:
            raise SettingsError(f"Expected --cohort={self.cohort} to be at most --devices={self.devices}.")

    def limited(self, devices: int) -> Self:
        """Of the first so many devices, or fewer if the cohort is smaller: all of them take part in every round."""
        count = min(devices, self.cohort)
        return replace(self, devices=count, cohort=count)

    def scaled(self, size: str, factor: float) -> Self:
        """With another number of `devices`, say; a cohort is never larger than the population."""
        sizes = {name: getattr(self, name) for name in ("devices", "cohort", "items", "steps")}
        sizes[size] = max(1, round(sizes[size] * factor))
        sizes["cohort"] = min(sizes["cohort"], sizes["devices"])
        return replace(self, **sizes)

    @cached_property
    def settings(self) -> Settings:
        sizes = {
            "data.items": self.items,
            "model.input_width": 32,
            "model.state_width": 64,
            "objective.softmax": self.softmax,
            "objective.negatives": _NEGATIVES,
            "objective.slice_items": self.slice_items,
            "model.input_rows": min(self.slice_items, _MOST_INPUT_ROWS),
            "training.window": self.steps,
            "privacy.clip_norm": 1.0,
        }
        return parse_flat(sizes | (_REFERENCE if self.name == "reference" else _FULL))

    def parameters(self) -> Parameters:
        return initialise(self.settings, self.items, torch.Generator().manual_seed(_SEED))

    def offer(self, round_: int, parameters: Parameters, *, silent: bool = False) -> Offer:
        """Of one round; `silent` leaves the noise and its rounding out."""
        settings = self.settings
        if silent:
            privacy = settings.privacy.model_copy(update={"mechanism": "none"})
            settings = settings.model_copy(update={"privacy": privacy})
        item_slice = slice_of(settings, self.items, round_)
        sliced = cut(parameters, item_slice)
        dimension = sum(value.numel() for value in sliced.values())
        noise = _NOISE_MULTIPLIER if settings.private else 0.0
        encoding = Encoding.choose(dimension, settings.privacy.clip_norm, noise, self.cohort, 1.0, central=True)
        return Offer(round_, 1, sliced, encoding, settings, item_slice)

    @cached_property
    def dimension(self) -> int:
        """Numbers that a device is sent in a round, and numbers of its update."""
        rows = self.slice_items or self.items
        return sum(height * width for height, width in shapes(self.settings, rows).values())

    def members(self, round_: int) -> np.ndarray:
        """(cohort,) devices that take part in a round, ascending."""
        generator = np.random.default_rng([_MEMBERS, _SEED, round_])
        return np.sort(generator.choice(self.devices, self.cohort, replace=False))

    def population(self) -> Population:
        return Population(self.settings, self._histories())

    def _histories(self) -> Interactions:
        """Zipf's law for the items, half-stars at random; a device's history does not depend on how many there are."""
        events, mass = self.devices * self.steps, np.cumsum(1 / np.arange(1, self.items + 1))
        drawn = np.random.default_rng([_ITEMS, _SEED]).random(events) * mass[-1]
        items = np.searchsorted(mass, drawn, side="right")
        names = np.arange(self.items).astype(str)
        return Interactions(
            offsets=np.arange(0, events + 1, self.steps),
            items=np.minimum(items, self.items - 1).astype(np.int32),
            ratings=(np.random.default_rng([_RATINGS, _SEED]).integers(1, 11, events) / 2).astype(np.float32),
            timestamps=np.zeros(events, np.int64),
            user_ids=np.arange(self.devices).astype(str),
            catalogue=Catalogue(names, names),
        )
