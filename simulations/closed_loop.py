"""The closed loop: train federatedly from a log, deploy the policy to the simulated devices, log again, retrain.

The world's preferences are known (:mod:`simulations.environment`), so that a policy's true value is an exact
expectation and not an estimate: every learner is held to the logging policy, to popularity, to the best ranking that is
the same for everyone, to the same architecture trained on the true probabilities (*full information*), to an oracle.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from common.settings import load_settings
from common.slate import gumbel_top_k
from simulations import datasets
from simulations.behaviour import Log, Policy, Softmax, log_events, skewed
from simulations.datasets.interactions import Interactions
from simulations.environment import World, fit_world, slate_value
from simulations.federated import Trained, train
from simulations.full_information import train_on_truth
from simulations.off_policy import evaluate_off_policy
from simulations.recommender import PolicyScorer

LEARNERS: dict[str, list[str]] = {
    "cross-entropy": ["objective.estimator=cross-entropy"],
    "likelihood": ["objective.estimator=likelihood", "objective.likelihood_weights=inverse-propensity"],
    "direct": ["objective.estimator=direct"],
    "reinforce": ["objective.estimator=reinforce"],
    "off-policy": ["objective.estimator=off-policy"],
    "top-k": ["objective.estimator=top-k"],
    "top-k on the critic": [
        "objective.estimator=top-k",
        "objective.prior=critic",
        "objective.critic=baseline",
        "objective.self_normalised=false",
        "objective.weight_cap=100",
        "objective.warmup_rounds=430",
    ],
}
"""What each learner changes of the settings."""

FULL_INFORMATION = "full information"

_BLOCK = 512  # users scored together

BASE = [
    "privacy.mechanism=none",
    "privacy.clip_norm=inf",
    "training.schedule=cosine",
    "training.learning_rate=0.03",
    "training.rounds=500",
    "training.cohort_rate=0.001875",
    "model.input_width=16",
    "model.state_width=32",
    "objective.negatives_from=uniform",
    "objective.negatives=256",
    "training.checkpoint_every=1000000",
    "training.support_fraction=0",
    "training.user_steps=0",
    "objective.warmup_rounds=0",
]
"""What all learners share beyond the defaults: the question is what can be learned, apart from privacy."""


@dataclass(frozen=True)
class Setup:
    """The world and how it is logged.

    Attributes:
        source: `data.source` that the world is fitted to.
        users, items: N and A of the world.
        events: what each device has logged before the first training, and logs anew in each generation.
        slate_size: K, items shown at once when policies are valued.
        generations: trainings; after each but the last the trained policy is deployed and logged.
        factors, personal_share, base_rate, scale: of :func:`simulations.environment.fit_world`.
        skew, preference, epsilon: of the logging policy (:func:`simulations.behaviour.skewed`).
    """

    source: str = "movielens-small"
    users: int = 160_000
    items: int = 2_000
    events: int = 40
    slate_size: int = 10
    generations: int = 1
    factors: int = 4
    personal_share: float = 0.9
    base_rate: float = 0.15
    scale: float = 2.0
    skew: float = 1.5
    preference: float = 0.3
    epsilon: float = 0.05

    def world(self, seed: int) -> World:
        """The truth."""
        data = load_settings(None, [f"data.source={self.source}", f"data.items={self.items}"]).data
        interactions = datasets.load(data, seed=0)
        return fit_world(
            interactions,
            self.users,
            self.items,
            seed=seed,
            factors=self.factors,
            personal_share=self.personal_share,
            base_rate=self.base_rate,
            scale=self.scale,
        )

    def logging_policy(self, world: World) -> Softmax:
        return skewed(world, self.skew, self.preference, self.epsilon)


@lru_cache(maxsize=1)
def first_log(setup: Setup, seed: int) -> tuple[World, Log]:
    """The world of a seed and its first log; kept for the next learner of the same seed."""
    world = setup.world(seed)
    return world, log_events(world, setup.logging_policy(world), setup.events, seed=seed)


def value_of(world: World, slates: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """The true value of (B, K) slates, in order, for (B,) users: means of the first item, of the slate, and of at least
    one being consumed."""
    value = slate_value(world.likes_of(users, slates))
    return {
        "first": float(value.first.mean()),
        "mean": float(value.mean.mean()),
        "consumed": float(value.consumed.mean()),
    }


def references(setup: Setup, seed: int, valued: int) -> dict[str, dict[str, float]]:
    """What no learner is needed for, by name."""
    world, _ = first_log(setup, seed)
    slates = reference_slates(setup, seed, valued)
    return {name: value_of(world, shown, np.arange(valued)) for name, shown in slates.items()}


def reference_slates(setup: Setup, seed: int, valued: int) -> dict[str, np.ndarray]:
    """(B, K) what the first B = `valued` users are shown where no learner is needed, by name."""
    world, log = first_log(setup, seed)
    users, size = np.arange(valued), setup.slate_size

    shares = torch.from_numpy(setup.logging_policy(world).probabilities(users, 0.0))
    drawn = gumbel_top_k(shares.log(), size, torch.Generator().manual_seed(seed)).numpy()
    counts = np.bincount(log.interactions.items, minlength=setup.items)
    return {
        "logging policy": drawn,
        "popularity": for_everyone(np.argsort(-counts, kind="stable")[:size], valued),
        "best non-personal": for_everyone(world.best_ranking(size), valued),
        "oracle": world.best_slates(users, size),
    }


def for_everyone(ranking: np.ndarray, users: int) -> np.ndarray:
    """(B, K) the same (K,) slate for all users."""
    return np.broadcast_to(ranking, (users, len(ranking)))


def run_learner(setup: Setup, learner: str, overrides: list[str], seed: int, *, valued: int) -> dict[str, Any]:
    """Train one learner from the first log, then deploy, log and retrain it as often as the setup says.

    Args:
        overrides: settings of the user's, above those of the loop and below those that make the learner.
        valued: the first so many users, on whom policies are valued.

    Returns:
        ``{"learner", "seed", "generations": [{"first", "mean", "consumed"}], "off_policy": …}``, the last as
        :func:`simulations.off_policy.evaluate_off_policy` says of the first generation.
    """
    world, log = first_log(setup, seed)
    changes = LEARNERS.get(learner, ["objective.estimator=direct"])
    settings = load_settings(None, [*BASE, *overrides, *changes, f"training.seed={seed}"])
    users, generations = np.arange(valued), []
    off_policy: dict[str, Any] = {}
    for generation in range(1, setup.generations + 1):
        histories = log.interactions
        if learner == FULL_INFORMATION:
            trained = train_on_truth(settings, histories, world)
        else:
            trained = train(settings, histories)
        generations.append(value_of(world, slates_of(trained, histories, users, setup.slate_size), users))
        if not off_policy:
            logging, size = setup.logging_policy(world), setup.slate_size
            off_policy = evaluate_off_policy(world, logging, trained, histories, users, size, seed)
        if generation < setup.generations:
            policy, later = deployed(trained, histories, setup.epsilon), seed + 1000 * generation
            log = joined(log, log_events(world, policy, setup.events, seed=later, start=float(generation)))
    return {"learner": learner, "seed": seed, "generations": generations, "off_policy": off_policy}


def slates_of(trained: Trained, histories: Interactions, users: np.ndarray, size: int) -> np.ndarray:
    """(B, `size`) what the model shows users after their histories, best first."""
    scorer = PolicyScorer(trained.settings, trained.parameters, trained.population.users)
    blocks = np.array_split(users, max(1, len(users) // _BLOCK))
    return np.concatenate([torch.topk(scorer.scores(histories, block), size).indices.numpy() for block in blocks])


def deployed(trained: Trained, histories: Interactions, epsilon: float) -> Policy:
    """The trained policy in service: it draws items by π, mixed with some exploration, from the states that the devices
    had when it was deployed."""
    scorer = PolicyScorer(trained.settings, trained.parameters, trained.population.users)
    return Softmax(lambda users, time: scorer.scores(histories, users).numpy(), epsilon)


def joined(first: Log, second: Log) -> Log:
    """The log of the same users' first and then second events."""
    old, new = first.interactions, second.interactions
    lengths = old.lengths() + new.lengths()
    order = np.argsort(np.concatenate([_owners(old), _owners(new)]), kind="stable")

    def column(name: str) -> np.ndarray:
        return np.asarray(np.concatenate([getattr(old, name), getattr(new, name)])[order])

    interactions = replace(
        old,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=column("items"),
        ratings=column("ratings"),
        timestamps=column("timestamps"),
    )
    return Log(interactions, np.concatenate([first.propensities, second.propensities])[order])


def _owners(interactions: Interactions) -> np.ndarray:
    return np.repeat(np.arange(interactions.users), interactions.lengths())
