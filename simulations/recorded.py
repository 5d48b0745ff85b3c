"""What a run recorded of its rounds: figures and histograms, read back from its events.

What devices measured (the kind ``simulation``) is seen only because one process simulates all of them: no real run
releases it.
"""

from dataclasses import dataclass

import numpy as np

from client.local_loss import MULTIPLIER_BINS
from common.objective import WEIGHT_EDGES
from server.events import EventReader
from server.run_folder import RunFolder
from server.store import open_store_read_only
from simulations.batched_cohort import NORM_EDGES

_KINDS = ("round", "simulation", "validation")
HISTOGRAMS = ("weights", "multipliers", "norms")


@dataclass(frozen=True)
class Histogram:
    """Counts of one round's steps.

    Attributes:
        counts: (bins,) ≥ 0.
        bounds: (bins+1,) ascending; of log10 for the weights π/β and for the norms over their clip.
    """

    counts: np.ndarray
    bounds: np.ndarray

    @property
    def middles(self) -> np.ndarray:
        """(bins,) what stands for the steps of a bin."""
        middles: np.ndarray = (self.bounds[:-1] + self.bounds[1:]) / 2
        return middles

    def quantile(self, share: float) -> float:
        """Below which `share` of the steps lie, which are taken to be spread evenly over their bins."""
        below = np.concatenate(([0.0], np.cumsum(self.counts)))
        return float(np.interp(share * below[-1], below, self.bounds))


@dataclass(frozen=True)
class Recorded:
    """What one event tells of its round.

    Attributes:
        kind: ``round``, ``simulation`` or ``validation``.
        time: seconds since the epoch.
        figures: numbers by name; of devices, means over the cohort.
        histograms: ``norms``, ``weights`` and ``multipliers``, where the estimator has any: summed over the cohort.
    """

    kind: str
    round: int
    time: float
    figures: dict[str, float]
    histograms: dict[str, Histogram]


def recorded(folder: RunFolder) -> list[Recorded]:
    """The events of a run's rounds, in order; of a round that was run again after a crash, the last ones.

    Raises :class:`RunError` where there is no run.
    """
    slate_size = folder.settings().objective.slate_size
    with open_store_read_only(folder.path) as store:
        events = {(event.round or 0, event.kind): event for event in EventReader(store).read(kinds=_KINDS)}
    lines = []
    for (round_, kind), event in sorted(events.items()):
        figures, histograms = {}, {}
        for name, value in event.fields.items():
            if name in HISTOGRAMS:
                members = events[round_, "round"].fields["members"]
                histograms[name] = Histogram(members * np.array(value, dtype=float), bounds_of(name, slate_size))
            elif isinstance(value, int | float):  # no intervals, baselines or estimates
                figures[name] = float(value)
        lines.append(Recorded(kind, round_, event.time, figures, histograms))
    return lines


def bounds_of(name: str, slate_size: int) -> np.ndarray:
    """(bins+1,) bounds of a histogram: of λ_K, 0 to K; of log10 of weights and norms, whose open outer bins are drawn
    as wide as the others."""
    if name == "multipliers":
        return np.linspace(0, slate_size, MULTIPLIER_BINS + 1)
    inner = np.log10((WEIGHT_EDGES if name == "weights" else NORM_EDGES).numpy().astype(float))
    width = inner[1] - inner[0]
    return np.concatenate(([inner[0] - width], inner, [inner[-1] + width]))
