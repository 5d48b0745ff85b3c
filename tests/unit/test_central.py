"""Central training against federated training, where both must do the same, and on its own."""

from typing import Any

import numpy as np
import pytest
import torch
from handmade import interactions

from client.local_update import losses_of
from common.model import flatten
from common.settings import Settings, parse_flat
from simulations.central import train_centrally
from simulations.datasets.interactions import Interactions
from simulations.federated import Trained, train

ITEMS = 12
SMALL = {
    "model.input_width": 4,
    "model.state_width": 5,
    "model.user_width": 3,
    "objective.negatives": 8,
    "objective.warmup_rounds": 0,
    "objective.self_normalised": False,
    "training.optimizer": "sgd",
    "training.learning_rate": 0.5,
    "training.cohort_rate": 1,
    "training.window": 6,
    "training.rounds": 3,
    "privacy.mechanism": "none",
    "privacy.clip_norm": float("inf"),
}


def settings_of(**more: Any) -> Settings:
    return parse_flat(SMALL | {name.replace("__", "."): value for name, value in more.items()})


def histories(users: int = 40) -> Interactions:
    """0 to 9 interactions each with items of falling frequency; some histories are longer than the window."""
    generator = np.random.default_rng(0)
    drawn = [generator.geometric(0.4, size=user % 10).clip(max=ITEMS) - 1 for user in range(users)]
    logged = interactions([items.tolist() for items in drawn], ITEMS)
    logged.ratings[:] = generator.uniform(2, 5, len(logged.ratings))
    return logged


def loss(trained: Trained) -> float:
    """The mean loss of all users, by the full softmax."""
    everybody = np.arange(len(trained.population))
    windows = trained.population.windows(1, everybody)
    losses, _ = losses_of(trained.settings, trained.parameters, windows, trained.population.users, None, warm=True)
    return float(losses.mean())


@pytest.mark.parametrize("softmax", ["full", "sampled", "nce"])
@pytest.mark.parametrize("estimator", ["cross-entropy", "top-k"])
def test_rounds_of_everybody_are_central_full_batch_steps(softmax: str, estimator: str) -> None:
    settings = settings_of(objective__softmax=softmax, objective__estimator=estimator)
    federated, central = train(settings, histories()), train_centrally(settings, histories())
    assert list(federated.parameters) == list(central.parameters)
    start = flatten(train_centrally(settings, histories(), steps=0).parameters)
    moved = flatten(federated.parameters) - start
    assert moved.norm() > 0.1
    torch.testing.assert_close(flatten(central.parameters) - start, moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(central.population.users, federated.population.users, rtol=0, atol=1e-5)
    assert federated.population.users.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_minibatches_lower_the_loss(optimizer: str) -> None:
    rate = 0.5 if optimizer == "sgd" else 0.02
    settings = settings_of(
        objective__estimator="cross-entropy", training__optimizer=optimizer, training__learning_rate=rate
    )
    before = train_centrally(settings, histories(), steps=0)
    after = train_centrally(settings, histories(), steps=40, batch=16)
    assert loss(after) < loss(before) - 0.2


def test_privacy_plays_no_part() -> None:
    private = settings_of(privacy__mechanism="skellam", privacy__clip_norm=0.1)
    found = train_centrally(private, histories())
    torch.testing.assert_close(
        flatten(found.parameters), flatten(train_centrally(settings_of(), histories()).parameters)
    )
