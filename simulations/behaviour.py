"""Logging policies with exact propensities, and what users do with what they show.

A policy says with which probability it shows each item to each user; a log of its doings therefore comes with the true
probability of every logged action, which estimators of it can be held against. A trained policy is deployed the same
way, as :class:`Softmax` over its scores, and logged again: the closed loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from common.catalogue import Catalogue
from simulations.datasets.interactions import Interactions
from simulations.datasets.synthetic import labels_of
from simulations.environment import World, lowest, require

LIKED, NOT_LIKED = 5.0, 0.5
"""Ratings that stand for a user's liking or not: the ends of the default `data.rating_range`."""

_START, _DAY = 1_500_000_000, 86_400  # seconds
_LOG, _SHARE = 8, 9  # set the generators apart from others made from the same seed
_BLOCK = 256  # users logged together, always as many


class Policy(Protocol):
    """Whatever shows items to users."""

    def probabilities(self, users: np.ndarray, time: float) -> np.ndarray:
        """(B, A) float32 probabilities of showing each item to B users, given by index; each row sums to 1."""


@dataclass(frozen=True)
class Softmax:
    """A softmax of scores, mixed with the uniform policy.

    Attributes:
        scores: from (B,) users and a time to (B, A) logits.
        epsilon: share of the uniform policy, in [0, 1]; every item's probability is at least epsilon/A.
    """

    scores: Callable[[np.ndarray, float], np.ndarray]
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.epsilon <= 1, f"epsilon={self.epsilon:g} in [0, 1]")

    def probabilities(self, users: np.ndarray, time: float) -> np.ndarray:
        logits = np.asarray(self.scores(users, time), np.float32)
        shares: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares *= np.float32(1 - self.epsilon) / shares.sum(axis=1, keepdims=True)
        shares += np.float32(self.epsilon / shares.shape[1])
        return shares


def uniform(world: World) -> Softmax:
    """Every item alike."""
    return Softmax(lambda users, _: np.zeros((len(users), world.items), np.float32))


def popular(world: World, exponent: float = 1.0) -> Softmax:
    """In proportion to how often an item was interacted with in the data set, to the power of `exponent`."""
    return skewed(world, exponent, preference=0.0, epsilon=0.0)


def skewed(world: World, exponent: float = 1.0, preference: float = 0.5, epsilon: float = 0.05) -> Softmax:
    """A fair recommender in service: the popular, with a weight on the user's true preference, and some exploration."""
    popularity = np.float32(exponent) * world.popularity
    weight = np.float32(preference)
    return Softmax(lambda users, time: popularity + weight * world.preferences(users, time), epsilon)


@dataclass(frozen=True)
class Mixture:
    """One of several policies for every event anew, with the given weights; probabilities are the weighted sum."""

    policies: Sequence[Policy]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        _check_weights(self.policies, self.weights)

    def probabilities(self, users: np.ndarray, time: float) -> np.ndarray:
        shares = np.stack([policy.probabilities(users, time) for policy in self.policies])
        mixed: np.ndarray = np.tensordot(np.asarray(self.weights, np.float32), shares, 1)
        return mixed


@dataclass(frozen=True)
class Division:
    """One of several policies for every user, always the same; probabilities are those given the user.

    Attributes:
        policies: those there are.
        parts: (N,) which of them each user has.
    """

    policies: Sequence[Policy]
    parts: np.ndarray

    def probabilities(self, users: np.ndarray, time: float) -> np.ndarray:
        parts = self.parts[users]
        rows = {part: np.flatnonzero(parts == part) for part in np.unique(parts).tolist()}
        shares = np.concatenate([self.policies[part].probabilities(users[at], time) for part, at in rows.items()])
        return shares[np.argsort(np.concatenate(list(rows.values())))]


def divide(world: World, policies: Sequence[Policy], weights: Sequence[float], *, seed: int) -> Division:
    """Draw each user's policy with the given weights; a user's depends on the seed and her own number alone."""
    _check_weights(policies, weights)
    draws = np.random.default_rng([seed, _SHARE]).random(world.users)
    return Division(policies, np.minimum(np.cumsum(weights)[:-1].searchsorted(draws, "right"), len(weights) - 1))


def _check_weights(policies: Sequence[Policy], weights: Sequence[float]) -> None:
    fit = len(weights) == len(policies) > 0 and min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6
    require(fit, f"weights={list(weights)} to be {len(policies)} numbers ≥ 0 of sum 1")


@dataclass(frozen=True)
class Log:
    """What a policy did, E events in all.

    Attributes:
        interactions: items shown and looked at, rated LIKED or NOT_LIKED; an item may occur more than once for a user.
        propensities: (E,) float32 true probabilities of showing the logged items.
    """

    interactions: Interactions
    propensities: np.ndarray

    @property
    def liked(self) -> np.ndarray:
        """(E,) bool."""
        liked: np.ndarray = self.interactions.ratings == np.float32(LIKED)
        return liked


def log_events(
    world: World,
    policy: Policy,
    lengths: int | np.ndarray,
    *,
    seed: int,
    slate_size: int = 1,
    start: float = 0.0,
    pace: float = 0.0,
) -> Log:
    """Let a policy show items to all users and log what they do.

    A user's log depends on the seed, the policy and her own number alone, and a longer one begins with a shorter one.

    With slates, K different items are drawn one after the other, each in proportion to the policy's probabilities
    among those left; that share is its propensity. Logged are the items that the user looks at: those up to the first
    one that she likes, or all. The others say nothing. A user then has between `lengths` and K·`lengths` events.

    Args:
        lengths: how many items (or slates) each user is shown: a number ≥ 0, or (N,) of them.
        seed: other logs of the same world should have other seeds; the same seed compares policies by equal luck.
        slate_size: K. The policy should give at least K items a positive probability.
        start: time of the first event, in days.
        pace: days from one event to the next, in which tastes drift; 0 logs all at one time, and fast.

    Raises:
        SettingsError: an argument is out of range.
    """
    lengths = np.broadcast_to(lengths, world.users)
    require(bool((lengths >= 0).all()), f"lengths={lengths.min()} ≥ 0")
    require(1 <= slate_size <= world.items, f"slate_size={slate_size} in [1, {world.items}]")
    require(pace >= 0, f"pace={pace:g} ≥ 0")

    longest = int(lengths.max())
    spans = [(start, longest)] if pace == 0 else [(start + pace * step, 1) for step in range(longest)]
    counts, blocks = [], []
    for number, first in enumerate(range(0, world.users, _BLOCK)):
        users = np.arange(first, min(first + _BLOCK, world.users))
        events = _events(world, policy, users, spans, slate_size, np.random.default_rng([seed, _LOG, number]))
        unseen = np.cumsum(events.liked, axis=2) - events.liked > 0
        logged = (np.arange(longest) < lengths[users, None])[:, :, None] & ~unseen
        counts.append(logged.sum(axis=(1, 2)))
        blocks.append(_Events(*(column[logged] for column in events)))

    items, propensities, liked, seconds = (np.concatenate(column) for column in zip(*blocks, strict=True))
    ids = np.arange(world.items).astype(np.str_)
    interactions = Interactions(
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        items=items.astype(np.int32),
        ratings=np.where(liked, LIKED, NOT_LIKED).astype(np.float32),
        timestamps=_START + seconds,
        user_ids=np.arange(world.users).astype(np.str_),
        catalogue=Catalogue(ids, np.array([f"Item {name}" for name in ids.tolist()]), labels_of(world.characters)),
    )
    return Log(interactions, propensities)


class _Events(NamedTuple):
    """What a block of users was shown; each (B, T, K)."""

    items: np.ndarray
    propensities: np.ndarray
    liked: np.ndarray
    seconds: np.ndarray


def _events(
    world: World,
    policy: Policy,
    users: np.ndarray,
    spans: Sequence[tuple[float, int]],
    size: int,
    generator: np.random.Generator,
) -> _Events:
    """Show B users slates of `size`, in spans of (time, number of slates)."""
    choosing, liking = generator.spawn(2)
    parts = []
    for time, steps in spans:
        shares = policy.probabilities(users, time)
        items, propensities = (
            _draw_items(shares, steps, choosing) if size == 1 else _draw_slates(shares, steps, size, choosing)
        )
        likes = world.likes_of(users, items.reshape(len(users), steps * size), time).reshape(items.shape)
        liked = liking.random((steps, _BLOCK, size)).swapaxes(0, 1)[: len(users)] < likes
        parts.append(_Events(items, propensities, liked, np.full(items.shape, round(time * _DAY))))
    events = _Events(*(np.concatenate(column, axis=1) for column in zip(*parts, strict=True)))
    order = np.arange(events.items[0].size).reshape(events.items[0].shape)  # one second apart if at the same time
    return events._replace(seconds=events.seconds + order)


def _draw_items(shares: np.ndarray, steps: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(B, `steps`, 1) items drawn with these (B, A) probabilities, and their probabilities."""
    draws = generator.random((steps, _BLOCK)).T[: len(shares)]
    bounds = np.cumsum(shares, axis=1, dtype=np.float64)
    bounds /= bounds[:, -1:]
    items = np.stack([row.searchsorted(draw, "right") for row, draw in zip(bounds, draws, strict=True)])
    return items[:, :, None], np.take_along_axis(shares, items, 1)[:, :, None]


def _draw_slates(
    shares: np.ndarray, steps: int, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(B, `steps`, `size`) different items in the order of drawing, and their probabilities among those left."""
    slates = np.empty((len(shares), steps, size), np.int64)
    for step in range(steps):  # the items whose exponential clocks ring first
        clocks = generator.standard_exponential((_BLOCK, shares.shape[1]), np.float32)[: len(shares)]
        with np.errstate(divide="ignore"):
            slates[:, step] = lowest(clocks / shares, size)
    drawn = np.take_along_axis(shares[:, None], slates, 2).astype(np.float64)
    left = shares.sum(axis=1, dtype=np.float64)[:, None, None] - (np.cumsum(drawn, axis=2) - drawn)
    return slates, (drawn / left).astype(np.float32)
