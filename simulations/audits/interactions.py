"""Audit 3, interactions: which items were in the windows of those who took part, from the released sum.

The attacker ranks all items by how far the sum moved them, and its rival by how often they are in the windows of all
*other* devices that round: popularity, without any release. What counts is the difference of the two areas under the
ROC curve for one member's items, averaged over the members of a round. Rounds have their own coins and noise, so they
are the independent trials of the interval. Short trainings are repeated, each from its own initial model, until there
are :data:`ROUNDS` of them: over ten rounds of twelve members, Student's interval misses a system without any noise in
every seventh try.
"""

from dataclasses import dataclass

import numpy as np

from simulations.audits.bounds import area, mean_interval
from simulations.audits.evidence import items_moved, items_read
from simulations.audits.finding import Finding, verdict_of
from simulations.audits.system import Seen, System, devices_of, train

ROUNDS = 40


@dataclass(frozen=True)
class Excess:
    """Of the attacker over its rival.

    Attributes:
        by_round: (R,) the mean difference of the areas in each round that had members.
        popularity: the rival's mean area.
    """

    by_round: np.ndarray
    popularity: float

    def interval(self, error: float) -> list[float]:
        """Of the mean, within what a difference of two areas can be."""
        return [float(side) for side in np.clip(mean_interval(self.by_round, error), -1, 1)]

    def mean(self) -> float:
        return float(self.by_round.mean()) if len(self.by_round) else 0.0


def audit_interactions(own: Excess, unprotected: Excess, error: float) -> Finding:
    """What the attack got from the system; `unprotected`: from the same without noise, where it has to succeed."""
    low, high = own.interval(error)
    unprotected_low, _ = unprotected.interval(error)
    return Finding(
        name="interactions",
        statistic="area under the ROC curve of a member's items from one sum, minus the popularity adversary's",
        value=own.mean(),
        lower_bound=low,
        limit=0.0,
        verdict=verdict_of(low, 0.0, works=unprotected_low > 0),
        detects="sums that tell more of a member's items than their popularity does",
        cannot_detect="leaks that need more than one round, or more than the order of the items by how far they moved; "
        "an ε of tens promises no zero here",
        details={
            "rounds": len(own.by_round),
            "interval": [low, high],
            "popularity_area": own.popularity,
            "without_noise": unprotected.mean(),
            "without_noise_lower_bound": unprotected_low,
        },
    )


def excess_by_round(system: System, seed: int) -> Excess:
    """The attack on at least :data:`ROUNDS` rounds, of as many trainings as that takes."""
    trainings = -(-ROUNDS // system.settings.training.rounds)
    excess: list[float] = []
    rivals: list[float] = []
    for training in range(trainings):
        _attack(system.seeded(seed * trainings + training), excess, rivals)
    return Excess(np.array(excess), float(np.mean(rivals)) if rivals else 0.0)


def _attack(system: System, excess: list[float], rivals: list[float]) -> None:
    """One training; adds one number a round to each list."""
    population = system.population()
    everybody = np.arange(len(population))

    def see(seen: Seen) -> None:
        windows = population.windows(seen.offer.round, everybody)
        read = np.stack([items_read(windows, int(device), system.items) for device in everybody])
        popularity, evidence = read.sum(0), items_moved(seen.total, system.settings, system.items)
        areas = [
            (area(evidence, read[device]), area(popularity - read[device], read[device]))
            for device in seen.members
            if 0 < read[device].sum() < system.items
        ]
        if areas:
            ours, theirs = np.mean(areas, 0)
            excess.append(ours - theirs)
            rivals.append(theirs)

    train(system, devices_of(system), system.examples, see)
