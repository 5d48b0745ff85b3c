"""What the log says of a trained policy, beside the truth: off-policy estimates, with true propensities and with β̂, and
how well β̂ is calibrated.

The events are new ones of the logging policy, after the histories that devices trained on: q̂ has not seen their
rewards, and every state is the last one of its user.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from common.calibration import cross_entropy, expected_calibration_error, kl_divergence
from common.ope import LoggedEvents, direct_method, doubly_robust, inclusion_probability, ips, snips
from common.settings import Head
from simulations.behaviour import Policy
from simulations.datasets.interactions import Interactions
from simulations.environment import World
from simulations.federated import Trained
from simulations.recommender import PolicyScorer

CAP = 20.0
"""Of a weight, for the clipped estimators."""

_BLOCK = 256  # users at once
_DRAWS = 10  # events of each user
_EVENTS = 0x6F7065


def evaluate_off_policy(
    world: World,
    logging: Policy,
    trained: Trained,
    histories: Interactions,
    users: np.ndarray,
    slate_size: int,
    seed: int,
) -> dict[str, Any]:
    """Estimates for the stochastic policy π after each user's history.

    Returns:
        ``{"true", "true propensities": {estimator: {"value", "ci95", …}}, "estimated propensities": {…}, "slate":
        {"true", "ips", "clipped"}, "behaviour": {"ece", "mean_probability", "log_loss", "entropy", "kl"}}``; what needs
        a head that the model doesn't have is missing.
    """
    generator = np.random.default_rng([seed, _EVENTS])
    blocks = [
        _block(world, logging, trained, histories, block, slate_size, generator)
        for block in np.array_split(users, max(1, len(users) // _BLOCK))
    ]
    events = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    slate = inclusion_probability(events["target"], slate_size)
    logged = LoggedEvents(events["rewards"], events["propensities"], events["users"])
    report: dict[str, Any] = {
        "true": float(events["value"].mean()),
        "true propensities": _estimates(events, events["propensities"]),
        "slate": {
            "true": float(events["slate_value"].mean()),
            "ips": asdict(ips(logged, slate)),
            "clipped": asdict(ips(logged, slate, cap=CAP * slate_size)),
        },
    }
    if "behaviour" in events:
        report["estimated propensities"] = _estimates(events, events["behaviour"])
        loss, divergence = (
            cross_entropy(events["behaviour"]),
            kl_divergence(events["propensities"], events["behaviour"]),
        )
        report["behaviour"] = {
            "ece": expected_calibration_error(events["forecasts"], events["outcomes"]),
            "mean_probability": float(events["forecasts"].mean()),
            "log_loss": loss,
            "entropy": loss - divergence,
            "kl": divergence,
        }
    return report


def _block(
    world: World,
    logging: Policy,
    trained: Trained,
    histories: Interactions,
    users: np.ndarray,
    slate_size: int,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Events of some users as columns of B·_DRAWS rows; `forecasts` and `outcomes` have B·A, of one draw a user."""

    def scores(head: Head) -> torch.Tensor:
        scorer = PolicyScorer(trained.settings, trained.parameters, trained.population.users, head)
        return scorer.scores(histories, users).double()

    shares, likes = logging.probabilities(users, 0.0).astype(np.float64), world.likes(users)
    thresholds = generator.random((len(users), _DRAWS)) * shares.sum(axis=1, keepdims=True)
    actions = np.stack([np.searchsorted(*pair) for pair in zip(shares.cumsum(axis=1), thresholds, strict=True)])
    actions = actions.clip(max=shares.shape[1] - 1)
    liked = generator.random(actions.shape) < np.take_along_axis(likes, actions, 1)
    pi = torch.softmax(scores(trained.settings.serving_head), -1).numpy()

    def logged(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, actions, 1).ravel()

    def mean(values: np.ndarray, weights: np.ndarray = pi) -> np.ndarray:
        return np.repeat((weights * values).sum(axis=1), _DRAWS)

    columns = {
        "users": np.repeat(users, _DRAWS),
        "rewards": liked.astype(np.float64).ravel(),
        "propensities": logged(shares / shares.sum(axis=1, keepdims=True)),
        "target": logged(pi),
        "value": mean(likes),
        "slate_value": mean(likes, inclusion_probability(pi.ravel(), slate_size).reshape(pi.shape)),
    }
    if "critic" in trained.settings.heads:
        q = torch.sigmoid(scores("critic")).numpy()
        columns |= {"predicted": logged(q), "expected": mean(q)}
    if "behaviour" in trained.settings.heads:
        behaviour = torch.softmax(scores("behaviour"), -1).numpy()
        outcomes = np.zeros(behaviour.shape, np.int64)
        np.put_along_axis(outcomes, actions[:, :1], 1, axis=1)
        columns |= {"behaviour": logged(behaviour), "forecasts": behaviour.ravel(), "outcomes": outcomes.ravel()}
    return columns


def _estimates(events: dict[str, np.ndarray], propensities: np.ndarray) -> dict[str, dict[str, Any]]:
    logged, target = LoggedEvents(events["rewards"], propensities, events["users"]), events["target"]
    found = {"ips": ips(logged, target), "clipped": ips(logged, target, cap=CAP), "snips": snips(logged, target)}
    if "predicted" in events:
        found["direct"] = direct_method(logged, events["expected"])
        found["doubly robust"] = doubly_robust(logged, target, events["expected"], events["predicted"])
    return {name: asdict(estimate) for name, estimate in found.items()}
