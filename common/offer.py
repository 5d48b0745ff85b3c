"""What is public about one round: the server's offer, which every device checks and derives the same values from."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.model import Parameters
from common.privacy.encoding import Encoding
from common.privacy.randomness import Stream, seeded_stream, system_stream
from common.privacy.rotation import random_signs
from common.settings import Settings
from common.softmax import Negatives, draw_negatives


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
    def negatives(self) -> Negatives | None:
        """The round's shared negatives; None with the full softmax."""
        objective = self.settings.objective
        if objective.softmax == "full":
            return None
        generator = np.random.default_rng([_NEGATIVES, self.settings.training.seed, self.round])
        return draw_negatives(len(self.parameters["items.embedding"]), objective.negatives, generator)

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


_NEGATIVES = 0x6E6567
