"""The `central` kind gives the same integers for any number of processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.model import initialise
from common.offer import Offer
from common.privacy.encoding import Encoding
from common.settings import Settings, load_settings
from simulations.batched_cohort import BatchedCohort
from simulations.datasets.synthetic import synthetic
from simulations.population import Population

SHORT = ["privacy.randomness=seeded", "objective.negatives=50", "training.window=20"]
SETTINGS, ADAPTIVE = (
    load_settings(None, [*SHORT, f"privacy.clip_quantile={quantile}", f"training.start={start}"])
    for quantile, start in ((0.0, "random"), (0.5, "popularity"))
)


def released(settings: Settings, workers: int, members: np.ndarray, rounds: int = 2) -> tuple[list[bytes], bytes]:
    """What the cohort releases in each round, and the private states after them."""
    interactions, _ = synthetic(800, 100, seed=3)
    population = Population(settings, interactions)
    parameters = initialise(settings, 100, torch.Generator().manual_seed(1))
    encoding = Encoding.choose(1, 1.0, 1.0, cohort=600, honest=0.8, central=True)

    def offered(number: int) -> Offer:
        offer = Offer(number, 1, parameters, encoding, settings)
        return replace(offer, encoding=replace(encoding, dimension=offer.length))

    with BatchedCohort(population, workers) as cohort:
        sums = [cohort.sum_updates(offered(number), members) for number in range(1, rounds + 1)]
    return [cohort_sum.total.tobytes() for cohort_sum in sums], population.users.numpy().tobytes()


@pytest.mark.parametrize(
    ("settings", "members"),
    [(ADAPTIVE, np.arange(0, 800, 2)), (SETTINGS, np.array([7]))],
)
def test_any_number_of_processes_gives_the_same_integers(settings: Settings, members: np.ndarray) -> None:
    one = released(settings, 1, members)
    assert released(settings, 2, members) == one
    assert released(settings, 3, members) == one
