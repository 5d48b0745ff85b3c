"""A device's encoded update is the same from either path, and the plain sum is the sum of the batched one."""

import numpy as np
import pytest
import torch

from client.device import participate
from client.local_update import compute_update
from common.model import initialise
from common.offer import Offer
from common.privacy.adaptive_clip import sent
from common.privacy.encoding import Encoding, encode
from common.settings import load_settings
from simulations.batched_cohort import BatchedCohort
from simulations.datasets.synthetic import synthetic
from simulations.plain_cohort import PlainCohort
from simulations.population import Population

SETTINGS = load_settings(None, ["privacy.randomness=seeded", "objective.negatives=50", "training.window=30"])
ITEMS, USERS = 300, 24


def offer(noise_multiplier: float, central: bool) -> Offer:
    parameters = initialise(SETTINGS, ITEMS, torch.Generator().manual_seed(1))
    dimension = sum(value.numel() for value in parameters.values())
    encoding = Encoding.choose(dimension, 1.0, noise_multiplier, cohort=USERS, honest=0.8, central=central)
    return Offer(5, 1, parameters, encoding, SETTINGS)


def population() -> Population:
    return Population(SETTINGS, synthetic(USERS, ITEMS, seed=3)[0])


def test_one_device_encodes_the_same_from_either_path() -> None:
    """Equal but for ±1 on at most 1e-4 of the coordinates, with the same randomness."""
    round_ = offer(noise_multiplier=1.0, central=False)
    people = population()
    everybody = np.arange(USERS)
    batch = compute_update(
        SETTINGS, round_.parameters, people.windows(5, everybody), people.users, round_.candidates, round_.warm
    )
    different, coordinates = 0, 0
    for device in range(USERS):
        alone = participate(round_, USERS, device, people.windows(5, np.array([device])), people.users[device])
        one_hot = torch.zeros(USERS)
        one_hot[device] = 1
        vector = batch.gradients.weighted_sum(one_hot).numpy()
        streams = round_.stream("rounding", device), round_.stream("noise", device)
        together = encode(vector, round_.encoding, USERS, round_.signs, *streams)
        half = 2 ** (round_.encoding.bits - 1)
        gap = (together.astype(np.int64) - alone.residues + half) % (2 * half) - half
        assert np.abs(gap).max() <= 1
        different += np.count_nonzero(gap)
        coordinates += len(gap)
        torch.testing.assert_close(batch.local_users[device], alone.local_user, rtol=1e-5, atol=1e-6)
    assert different <= 1e-4 * coordinates


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_plain_and_central_sum_the_same_updates(quantile: float) -> None:
    """Without noise they differ by rounding alone; what they say of an adaptive clip is of the same devices."""
    words = ["privacy.mechanism=none", "objective.negatives=50", "training.window=30", "privacy.clip_norm=2.1"]
    silent = load_settings(None, [*words, f"privacy.clip_quantile={quantile}"])
    sums, users = [], []
    for central, kind in ((True, BatchedCohort), (False, PlainCohort)):
        round_ = offer(noise_multiplier=0.0, central=central)
        length, bound = sent(silent.privacy, round_.dimension)
        encoding = Encoding.choose(length, bound, 0.0, cohort=USERS, honest=0.8, central=central)
        round_ = Offer(round_.round, 1, round_.parameters, encoding, silent)
        people = population()
        sums.append(kind(people).sum_updates(round_, np.arange(USERS)).total)
        users.append(people.users)
    assert np.linalg.norm(sums[0] - sums[1]) <= 1e-4 * np.linalg.norm(sums[0])
    torch.testing.assert_close(users[0], users[1], rtol=1e-5, atol=1e-6)
    if quantile:
        within = sums[0][-1] / (0.1 * 2.1)
        assert within == pytest.approx(round(within), abs=1e-6) and abs(within) < USERS
        assert sums[1][-1] / (0.1 * 2.1) == pytest.approx(within, abs=1e-2)
