"""The `central` kind gives the same integers for any number of processes."""

import numpy as np
import pytest
import torch

from common.model import initialise
from common.offer import Offer
from common.privacy.encoding import Encoding
from common.settings import load_settings
from simulations.batched_cohort import BatchedCohort
from simulations.datasets.synthetic import synthetic
from simulations.population import Population

SETTINGS = load_settings(None, ["privacy.randomness=seeded", "objective.negatives=50", "training.window=20"])


def released(workers: int, members: np.ndarray, rounds: int = 2) -> tuple[list[bytes], bytes]:
    """What the cohort releases in each round, and the private states after them."""
    interactions, _ = synthetic(800, 100, seed=3)
    population = Population(SETTINGS, interactions)
    parameters = initialise(SETTINGS, 100, torch.Generator().manual_seed(1))
    dimension = sum(value.numel() for value in parameters.values())
    encoding = Encoding.choose(dimension, 1.0, 1.0, cohort=600, honest=0.8, central=True)
    with BatchedCohort(population, workers) as cohort:
        sums = [
            cohort.sum_updates(Offer(number, 1, parameters, encoding, SETTINGS), members)
            for number in range(1, rounds + 1)
        ]
    return [cohort_sum.total.tobytes() for cohort_sum in sums], population.users.numpy().tobytes()


@pytest.mark.parametrize("members", [np.arange(0, 800, 2), np.array([7])])
def test_any_number_of_processes_gives_the_same_integers(members: np.ndarray) -> None:
    one = released(1, members)
    assert released(2, members) == one
    assert released(3, members) == one
