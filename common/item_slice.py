"""Public slices of a large catalogue: the items of one round, the only ones that it trains the heads' rows of.

With `objective.slice_items` = S a round's model holds S rows of each head in place of A, and so does its update: what a
device downloads, computes and uploads does not depend on the catalogue. A slice is public, the same for all devices,
and a function of the run's seed and the round alone. The update is dense inside of it, so that nothing shows whose
items are there. Steps whose item is outside of the slice count for nothing in a round's losses; they still move the
recurrent state, whose input table is hashed (:func:`common.model.input_rows`). A first round that counts
(:mod:`common.popularity`) counts all items: that upload alone has a number or two for each of the catalogue.

Items take turns: ⌊A/S⌋ rounds cut one random permutation of the catalogue into pieces. Each slice is a uniformly random
set of S items, and no item comes twice in those rounds.

Given that a slice holds the logged item a, its other items are a uniform draw of S−1 of the A−1 others, so that

    Ẑ = exp f_a + (A−1)/(S−1) Σ_{j in the slice, j ≠ a} exp f_j

is an unbiased estimate of the normaliser over all items: the logQ correction of :mod:`common.softmax`, once more.

Guarantees (``tests/unit/test_item_slice.py``):
    - Ẑ is unbiased over the slices that hold a; 1/Ẑ is not, as with any sampled softmax;
    - a device's update, scattered over the catalogue, is on average over all slices the update of the whole catalogue
      times the chance that the slice holds any of its items: exactly for a loss without Ẑ and items that differ;
    - a batch of devices is its devices one by one.
A device derives the slice itself, and refuses a model that its publisher did not sign for the rows of that slice
(``tests/unit/test_guard.py::test_a_slice_that_is_not_the_rounds_is_refused_before_anything_is_charged``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.item_tables import FACTORS, START
from common.model import HEADS, Parameters
from common.privacy.randomness import seeded_stream
from common.secagg.identity import digest
from common.settings import Settings

_SLICED = frozenset(name for table in HEADS.values() for name in (table, f"{table}.{FACTORS}", f"{START}{table}"))


@dataclass(frozen=True)
class ItemSlice:
    """S of A items, 1 < S < A.

    Attributes:
        ids: (S,) int64 catalogue indices, ascending: a slice's tables are in the order of the catalogue's.
        items: A, the size of the catalogue.
    """

    ids: Tensor
    items: int

    @property
    def log_expansion(self) -> float:
        """log((A−1)/(S−1)): for how many others an item stands beside the logged one."""
        return math.log((self.items - 1) / (len(self.ids) - 1))

    def positions(self, items: Tensor) -> Tensor:
        """Where items of the catalogue stand in the slice, or −1; int64 of the same shape."""
        at = torch.searchsorted(self.ids, items.contiguous()).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[at] == items, at, -1)


def slice_of(settings: Settings, items: int, round_: int) -> ItemSlice | None:
    """The slice of a round, from 1, of a catalogue of A items; None: all of them, where there are no more."""
    size = settings.objective.slice_items
    if not 0 < size < items:
        return None
    turns, turn = divmod(round_ - 1, items // size)
    # By a stream that no version of a library changes: server and devices must come to the same items.
    words = seeded_stream(settings.training.seed, "item slice", turns).words(items)
    chosen = np.argsort(words, kind="stable")[turn * size : (turn + 1) * size]
    return ItemSlice(torch.from_numpy(np.sort(chosen)), items)


def cut(parameters: Mapping[str, Tensor], item_slice: ItemSlice | None) -> Parameters:
    """The model of a round: the heads' rows of the slice, and everything else."""
    if item_slice is None:
        return dict(parameters)
    return {name: value[item_slice.ids] if name in _SLICED else value for name, value in parameters.items()}


def scatter(update: Parameters, item_slice: ItemSlice | None, model: Mapping[str, Tensor]) -> Parameters:
    """A round's update as one of the whole `model`: 0 in the rows outside of the slice."""
    if item_slice is None:
        return update
    return {
        name: torch.zeros_like(model[name]).index_copy_(0, item_slice.ids, value) if name in _SLICED else value
        for name, value in update.items()
    }


def rows_digest(catalogue: bytes, item_slice: ItemSlice | None) -> bytes:
    """32 bytes that tell the items that a model's rows belong to: a catalogue's own digest, or that of its slice."""
    if item_slice is None:
        return catalogue
    return digest("item slice", catalogue, item_slice.ids.numpy().astype("<i8").tobytes())
