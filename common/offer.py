"""What is public about one round: the server's offer, which every device checks and derives the same values from."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from common.model import HEADS, Parameters, items_in
from common.privacy.encoding import Encoding
from common.privacy.randomness import Stream, seeded_stream, system_stream
from common.privacy.rotation import random_signs
from common.settings import Settings
from common.softmax import Candidates, InBatch, draw_negatives, log_uniform


@dataclass(frozen=True)
class Offer:
    """One attempt at one round.

    Attributes:
        round: from 1.
        attempt: from 1; a round that released nothing is tried again under the next number.
        parameters: the shared parameters at the beginning of the round.
        encoding: how updates are clipped, rounded and noised.
        settings: of the run.
    """

    round: int
    attempt: int
    parameters: Parameters
    encoding: Encoding
    settings: Settings

    @property
    def warm(self) -> bool:
        """Whether the warm-up rounds are over."""
        return self.round > self.settings.objective.warmup_rounds

    @cached_property
    def candidates(self) -> Candidates:
        """What the round's softmax is normalised over."""
        return candidates_of(self.settings, self.parameters, self.round)

    @cached_property
    def signs(self) -> np.ndarray:
        """The round's public random signs of the rotation."""
        return random_signs(self.encoding.dimension, seeded_stream(self.settings.training.seed, "rotation", self.round))

    def stream(self, *labels: str | int) -> Stream:
        """Randomness for rounding and noise: the operating system's, unless the run is reproducible.

        The attempt is not part of a reproducible stream: a repeated round then releases the same numbers again.
        """
        if not self.settings.reproducible:
            return system_stream()
        return seeded_stream(self.settings.training.seed, self.round, *labels)


def candidates_of(settings: Settings, parameters: Parameters, round_: int) -> Candidates:
    """What a round's softmax is normalised over: shared negatives, the device's own items, or all items."""
    objective = settings.objective
    if objective.softmax == "full":
        return None
    items, source = items_in(parameters), objective.negatives_from
    if source == "log-uniform":
        probability = log_uniform(items)
    elif source == "uniform":
        probability = np.full(items, 1 / items)
    else:
        log_q = torch.log_softmax(parameters[HEADS["frequency"]].detach().squeeze(-1), 0)
        if source == "in-batch":
            return InBatch(log_q)
        probability = log_q.double().exp().numpy()
    generator = np.random.default_rng([_NEGATIVES, settings.training.seed, round_])
    return draw_negatives(probability, objective.negatives, generator, contrast=objective.softmax == "nce")


_NEGATIVES = 0x6E6567
