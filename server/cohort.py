"""The one way in which the server hears of its devices: the sum of a cohort's updates."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from common.offer import Offer
from common.privacy.encoding import Encoding, decode, top_up_noise


@dataclass(frozen=True)
class CohortSum:
    """What a cohort released.

    Attributes:
        total: (d,) float64, sum of the clipped updates in the scale of `privacy.group_scale`, plus noise of exactly
            `encoding.variance` per rotated coordinate, whatever the cohort, or the server's own; (d+1,) where the clip
            adapts, with the released coordinate of :mod:`common.privacy.adaptive_clip` behind the update.
        roster, survivors: members that were asked for an update, and members that the sum is made of; known to the
            server, no part of what is released.
        bytes_up, bytes_down: sent by and to one device, if anything was sent.
        simulation_metrics: means over the cohort, bin by bin for histograms, that only a simulation may look at.
    """

    total: np.ndarray
    roster: int
    survivors: int
    bytes_up: int | None = None
    bytes_down: int | None = None
    simulation_metrics: dict[str, float | list[float]] = field(default_factory=dict)


class Cohort(Protocol):
    """A population of devices that can be asked for sums."""

    @property
    def devices(self) -> int:
        """N, the number of devices."""

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        """The noisy sum of the members' updates.

        Without members: zero plus the full noise. Raises :class:`~common.errors.AggregationError` where too few
        members answer; nothing is released then.
        """

    def state(self) -> dict[str, Tensor]:
        """What the next checkpoint is to hold of what simulated devices keep between rounds, as of now; empty where
        devices keep it themselves."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""


def release(residues: np.ndarray, survivors: int, roster: int, offer: Offer) -> np.ndarray:
    """(d,) float64: top the summed residues up to exactly the encoding's variance, and decode them; or add the noise
    that is the server's alone.

    Args:
        residues: (2^m,) sum of the survivors' encoded updates modulo 2^bits.
        survivors, roster: members in the sum, and members that each member's share of the noise was computed for.
    """
    encoding: Encoding = offer.encoding
    if offer.server_noise is not None:
        return decode(residues.astype(np.int64) + offer.server_noise, encoding, offer.signs)
    noise = top_up_noise(encoding, roster, survivors, offer.stream("top-up"))
    return decode(residues.astype(np.int64) + noise, encoding, offer.signs)
