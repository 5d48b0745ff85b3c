"""Audit 3, interactions: which items were in the windows of those who took part, from the released sum.

The attacker ranks all items by how far the sum moved them, and its rival by how often they are in the windows of all
*other* devices that round: popularity, without any release. What counts is the difference of the two areas under the
ROC curve for one member's items, averaged over the members of a round. Rounds have their own coins and noise, so they
are the independent trials of the interval.
"""

import numpy as np

from simulations.audits.bounds import ERROR, area, mean_interval
from simulations.audits.evidence import items_moved, items_read
from simulations.audits.finding import Finding, verdict_of
from simulations.audits.flaws import without_noise
from simulations.audits.system import Seen, System, devices_of, train


def audit_interactions(system: System, control: System, seed: int) -> Finding:
    """Two trainings: the system's, and `control`'s without its noise, on which the attack has to succeed."""
    own, rival = _excess_by_round(system, seed)
    unprotected, _ = _excess_by_round(control, seed)
    low, high = np.clip(mean_interval(own, ERROR), -1, 1).tolist()  # the difference of two areas
    unprotected_low = float(np.clip(mean_interval(unprotected, ERROR)[0], -1, 1))
    return Finding(
        name="interactions",
        statistic="area under the ROC curve of a member's items from one sum, minus the popularity adversary's",
        value=float(own.mean()) if len(own) else 0.0,
        lower_bound=low,
        limit=0.0,
        verdict=verdict_of(low, 0.0, works=unprotected_low > 0),
        detects="sums that tell more of a member's items than their popularity does",
        cannot_detect="leaks that need more than one round, or more than the order of the items by how far they moved; "
        "an ε of tens promises no zero here",
        details={
            "rounds": len(own),
            "interval": [low, high],
            "popularity_area": rival,
            "without_noise": float(unprotected.mean()) if len(unprotected) else 0.0,
            "without_noise_lower_bound": unprotected_low,
        },
    )


def control_of(system: System) -> System:
    """The system without noise."""
    return System(system.settings, system.histories, without_noise)


def _excess_by_round(system: System, seed: int) -> tuple[np.ndarray, float]:
    """(R,) the mean difference of the areas in each round that had members, and the popularity adversary's mean."""
    again = system.seeded(seed)
    population = again.population()
    everybody = np.arange(len(population))
    excess, rivals = [], []

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

    train(again, devices_of(again), system.examples, see)
    return np.array(excess), float(np.mean(rivals)) if rivals else 0.0
