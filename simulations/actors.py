"""Actors with proto-actions: DDPG and TD3 recommend by a vector, and the items that fit it best are shown.

That is how the RecNN article recommends (after Dulac-Arnold et al. 2015). Here such an actor serves as a logging policy
like no softmax over items: what it shows is bunched in the space of characters. Its propensities are exact since the
choice among the best fitting items is drawn, with known probabilities.

An actor knows of a user what she was shown and whether she liked it, never her taste. It knows items well, by their
true character and appeal: what is hard here is the user.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import MissingDependency
from simulations.behaviour import Log
from simulations.environment import World, lowest, require

HORIZON = 20
"""Steps of an episode; a user's clock stands at 1 after so many."""

REACH = 10.0
"""No number in an observation is further from 0."""

_DECAY = 1 - 1 / REACH  # of what is remembered, per item looked at
_DISCOUNT = 0.0  # what is shown changes no taste, and with 0.9 either agent learns no better than one for everybody
_EXPLORATION = 0.3  # standard deviation of the noise on a proto-action in training
_HIDDEN = [64, 64]

Actor = Callable[[np.ndarray], np.ndarray]
"""From (B, 2f+1) observations to (B, f+1) proto-actions in [−1, 1], both float32."""


def remembered(memory: np.ndarray, characters: np.ndarray, liked: np.ndarray) -> np.ndarray:
    """(B, 2, f) memories after B users looked at items of (B, f) characters, and (B,) liked them or not.

    A memory holds decayed sums of the characters that were not liked and of those that were. It begins at 0.
    """
    after = _DECAY * memory
    after[np.arange(len(memory)), liked.astype(np.int64)] += characters
    return np.asarray(after, np.float32)


def observation(memory: np.ndarray, clock: np.ndarray) -> np.ndarray:
    """(B, 2f+1) float32: what is known of users from (B, 2, f) memories and (B,) clocks in [0, 1]."""
    return np.column_stack([memory.reshape(len(memory), -1), clock]).astype(np.float32)


def observations(world: World, log: Log) -> np.ndarray:
    """(N, 2f+1) what is known of all users after a log; her number of events stands for the steps."""
    lengths, offsets, items = log.interactions.lengths(), log.interactions.offsets, log.interactions.items
    memory = np.zeros((world.users, 2, world.characters.shape[1]), np.float32)
    for step in range(lengths.max(initial=0)):
        users = np.flatnonzero(lengths > step)
        events = offsets[users] + step
        memory[users] = remembered(memory[users], world.characters[items[events]], log.liked[events])
    return observation(memory, np.minimum(lengths / HORIZON, 1))


def fit_of(world: World, actions: np.ndarray) -> np.ndarray:
    """(B, A) how well items fit (B, f+1) proto-actions: the inner product with their character and appeal.

    That is a preference: of a user whose taste is the action's first f numbers, with the last one as weight of appeal.
    """
    fit: np.ndarray = actions[:, :-1] @ world.characters.T + actions[:, -1:] * world.appeal
    return fit


@dataclass(frozen=True)
class ActorPolicy:
    """Shows one of the items that fit an actor's proto-action best, by a softmax of their fit; sometimes any item.

    It acts on what was known of users before; a longer acquaintance is another policy.

    Attributes:
        actor: gives the proto-actions.
        known: (N, 2f+1) what is known of each user, from :func:`observations`.
        nearest: M, how many items come into question.
        temperature: > 0, by which their fit is divided.
        epsilon: share of the uniform policy, in [0, 1].
    """

    world: World
    actor: Actor
    known: np.ndarray
    nearest: int = 50
    temperature: float = 0.2
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        require(1 <= self.nearest <= self.world.items, f"nearest={self.nearest} in [1, {self.world.items}]")
        require(self.temperature > 0, f"temperature={self.temperature:g} > 0")
        require(0 <= self.epsilon <= 1, f"epsilon={self.epsilon:g} in [0, 1]")

    def probabilities(self, users: np.ndarray, time: float) -> np.ndarray:
        fit = fit_of(self.world, self.actor(self.known[users]))
        near = lowest(-fit, self.nearest)
        fit = np.take_along_axis(fit, near, 1)
        best = np.exp((fit - fit[:, :1]) / self.temperature)
        shares = np.full((len(users), self.world.items), self.epsilon / self.world.items, np.float32)
        near_shares = (1 - self.epsilon) * best / best.sum(axis=1, keepdims=True)
        np.put_along_axis(shares, near, np.take_along_axis(shares, near, 1) + near_shares, 1)
        return shares


def train_actor(world: World, kind: Literal["ddpg", "td3"], steps: int, *, seed: int) -> Actor:
    """Train an actor on users of a world for `steps` ≥ 1 items shown, of which the first tenth at random.

    Stable-Baselines3 seeds the global generators of Python, NumPy and PyTorch with `seed`.

    Raises:
        MissingDependency: stable-baselines3 or gymnasium is missing.
    """
    require(steps >= 1, f"steps={steps} ≥ 1")
    try:
        from stable_baselines3 import DDPG, TD3
        from stable_baselines3.common.noise import NormalActionNoise
    except ImportError as error:
        hint = "pip install 'fedtopk[environment]'"
        raise MissingDependency(f"Expected stable-baselines3 to train an actor ({hint}): {error}.") from None
    from simulations.recommendation_env import RecommendationEnv

    width = world.characters.shape[1] + 1
    model = {"ddpg": DDPG, "td3": TD3}[kind](
        "MlpPolicy",
        RecommendationEnv(world),
        gamma=_DISCOUNT,
        learning_starts=steps // 10,
        action_noise=NormalActionNoise(np.zeros(width), np.full(width, _EXPLORATION)),
        policy_kwargs={"net_arch": _HIDDEN},
        seed=seed,
        device="cpu",
    )
    model.learn(steps)
    return lambda observations: model.predict(observations, deterministic=True)[0]
