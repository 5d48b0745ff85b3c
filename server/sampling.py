"""Who takes part in a round: independent coins (Poisson sampling), on which the amplification of ε_model rests, or
turns, on whose distance the sensitivity of correlated noise rests (:mod:`common.privacy.tree`)."""

import numpy as np

from common.privacy.randomness import seeded_stream, system_stream
from common.privacy.sampling import poisson_sample
from common.settings import Settings


def draw_roster(settings: Settings, round_: int, devices: int) -> np.ndarray:
    """The devices whose coin of probability `training.cohort_rate` came up, ascending.

    Nobody where fewer than `guard.minimum_cohort` came up: such a round releases noise alone.

    Amplification needs the coins to be secret from whoever sees the models. So they come from the operating system,
    anew for each attempt, unless the run is reproducible, where they follow from the seed and the round alone.
    Real devices that flip their own coins are all asked. Work and memory are those of the members, however many devices
    there are (:mod:`common.privacy.sampling`).

    Turns are public: device i takes part in the rounds t with t ≡ i (mod s), whatever anybody's data is. Guarantee: s
    rounds apart, ⌈T/s⌉ times in T rounds (``test_tree.py::test_turns_are_apart_and_depend_on_no_data``).
    """
    if settings.separation:
        return np.flatnonzero(np.arange(devices) % settings.separation == round_ % settings.separation)
    if settings.training.coins == "device" and settings.aggregation.kind == "secure":
        return np.arange(devices)
    stream = seeded_stream(settings.training.seed, "roster", round_) if settings.reproducible else system_stream()
    members = poisson_sample(settings.training.cohort_rate, devices, stream)
    return members if len(members) >= settings.guard.minimum_cohort else members[:0]
