"""What is public about one round: the server's offer, which every device checks and derives the same values from."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from common.candidates import Candidates, InBatch, draw_negatives, every_item, log_uniform, take_turns
from common.errors import ProtocolError
from common.item_slice import ItemSlice, slice_of
from common.item_tables import formed
from common.model import HEADS, Parameters, check_parameters, dimension_of, items_in, shapes
from common.popularity import histogram_length
from common.privacy.adaptive_clip import clip_of, sent
from common.privacy.encoding import Encoding
from common.privacy.randomness import Stream, seeded_stream, system_stream
from common.privacy.rotation import random_signs
from common.secagg.terms import Terms
from common.settings import Settings


@dataclass(frozen=True)
class Offer:
    """One attempt at one round.

    Attributes:
        round: from 1.
        attempt: from 1; a round that released nothing is tried again under the next number.
        parameters: the shared parameters at the beginning of the round.
        encoding: how updates are clipped, rounded and noised.
        settings: of the run.
        item_slice: the items that the heads have rows for; None: all.
        server_noise: (2^m,) int64 what the server adds to the sum (:mod:`common.privacy.tree`); its secret, and no part
            of what any device is sent.
    """

    round: int
    attempt: int
    parameters: Parameters
    encoding: Encoding
    settings: Settings
    item_slice: ItemSlice | None = None
    server_noise: np.ndarray | None = field(default=None, repr=False)

    @property
    def warm(self) -> bool:
        """Whether the warm-up rounds are over."""
        return self.round > self.settings.objective.warmup_rounds

    @property
    def counting(self) -> bool:
        """Whether a histogram is released in place of a gradient (:mod:`common.popularity`)."""
        return self.settings.counting(self.round)

    @property
    def adaptive(self) -> bool:
        """Whether members tell if their norm was within C (:mod:`common.privacy.adaptive_clip`)."""
        return self.settings.privacy.clip_quantile > 0 and not self.counting

    @property
    def items(self) -> int:
        """A, the size of the catalogue: in a round on a slice, more than the model has rows for."""
        return items_in(self.parameters) if self.item_slice is None else self.item_slice.items

    @property
    def dimension(self) -> int:
        """d, how many of the parameters are trained: the length of a gradient."""
        return dimension_of(self.settings, self.parameters)

    @property
    def length(self) -> int:
        """How many numbers each member sends."""
        if self.counting:
            return histogram_length(self.settings, self.items)
        return sent(self.settings.privacy, self.dimension)[0]

    @property
    def clip(self) -> float:
        """C, what updates are clipped to; inf where they are not. One value for both sides: the encoding's."""
        if math.isinf(self.settings.privacy.clip_norm):
            return math.inf
        return clip_of(self.encoding) if self.adaptive else self.encoding.clip

    @cached_property
    def model(self) -> bytes:
        """32 bytes, the digest of the parameters: names, shapes and every bit of the numbers."""
        content = hashlib.sha256()
        for name, value in sorted(self.parameters.items()):
            array = value.detach().contiguous().numpy()
            content.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            content.update(array.tobytes())
        return content.digest()

    @cached_property
    def candidates(self) -> Candidates:
        """What the round's softmax is normalised over."""
        return candidates_of(self.settings, self.parameters, self.round, self.item_slice)

    @cached_property
    def signs(self) -> np.ndarray:
        """The round's public random signs of the rotation; the run's, where noise is correlated between rounds."""
        round_ = 0 if self.settings.separation else self.round
        return random_signs(self.encoding.dimension, seeded_stream(self.settings.training.seed, "rotation", round_))

    def stream(self, *labels: str | int) -> Stream:
        """Randomness for rounding and noise: the operating system's, unless the run is reproducible.

        The attempt is not part of a reproducible stream: a repeated round then releases the same numbers again.
        """
        if not self.settings.reproducible:
            return system_stream()
        return seeded_stream(self.settings.training.seed, self.round, *labels)


def read_offer(terms: Terms, arrays: Mapping[str, np.ndarray], settings: Settings, items: int) -> Offer:
    """The offer that a device has agreed to, with the model that came for it; its slice of the items is the device's
    own.

    Args:
        items: A, the size of the catalogue.

    Raises:
        ModelError: the arrays are not the parameters of such a model.
        ProtocolError: they are not those that the terms name.
    """
    item_slice = slice_of(settings, items, terms.round)
    expected = shapes(settings, items if item_slice is None else len(item_slice.ids))
    ordered = {name: arrays[name] for name in expected if name in arrays} | dict(arrays)
    parameters = {name: torch.from_numpy(array.copy()) for name, array in ordered.items()}
    check_parameters(parameters, expected)
    offer = Offer(terms.round, terms.attempt, parameters, terms.encoding, settings, item_slice)
    if terms.encoding.dimension != offer.length:
        raise ProtocolError(f"Expected the encoding's dimension={terms.encoding.dimension} to be {offer.length}.")
    if offer.model != terms.model:
        raise ProtocolError("Expected the model to be the one that the round was agreed on.")
    return offer


def candidates_of(
    settings: Settings, parameters: Parameters, round_: int, item_slice: ItemSlice | None = None
) -> Candidates:
    """What a round's softmax is normalised over: shared negatives, the device's own items, or all items; of a slice,
    each item stands for several."""
    drawn = _drawn(settings, parameters, round_)
    if item_slice is None:
        return drawn
    return (every_item(items_in(parameters)) if drawn is None else drawn).expanded(item_slice.log_expansion)


def _drawn(settings: Settings, parameters: Parameters, round_: int) -> Candidates:
    objective = settings.objective
    if objective.softmax == "full":
        return None
    items, source = items_in(parameters), objective.negatives_from
    contrast, seed = objective.softmax == "nce", settings.training.seed
    if source == "uniform":
        return take_turns(items, objective.negatives, round_, seed, contrast)
    if source == "log-uniform":
        probability = log_uniform(items)
    else:
        log_q = torch.log_softmax(formed(parameters)[HEADS["frequency"]].detach().squeeze(-1), 0)
        if source == "in-batch":
            return InBatch(log_q)
        probability = log_q.double().exp().numpy()
    generator = np.random.default_rng([_NEGATIVES, seed, round_])
    return draw_negatives(probability, objective.negatives, generator, contrast)


_NEGATIVES = 0x6E6567
