"""A world as a Gymnasium environment, and actors in it: what they know, what they show, and that they learn."""

import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from gymnasium.utils.env_checker import check_env

from common.errors import MissingDependency, SettingsError
from simulations.actors import (
    HORIZON,
    REACH,
    ActorPolicy,
    fit_of,
    observation,
    observations,
    remembered,
    train_actor,
)
from simulations.behaviour import log_events, uniform
from simulations.datasets.synthetic import synthetic
from simulations.environment import World, fit_world, slate_value
from simulations.recommendation_env import RecommendationEnv


@pytest.fixture(scope="module")
def world() -> World:
    return fit_world(synthetic(300, 120, seed=3)[0], 300, 100, seed=0)


# The environment


@pytest.mark.parametrize(
    "arguments", [{}, {"slate_size": 4, "pace": 0.1}, {"action": "slate", "slate_size": 3, "horizon": 2}]
)
def test_gymnasium_finds_no_fault(world: World, arguments: dict[str, object]) -> None:
    check_env(RecommendationEnv(world, **arguments), skip_render_check=True)  # type: ignore[arg-type]


def test_an_episode(world: World) -> None:
    env = RecommendationEnv(world, action="slate", slate_size=3, horizon=200)
    seen, info = env.reset(seed=1)
    assert not seen.any()
    user, rewards = info["user"], []
    slate = world.best_slates(np.array([user]), 2)[0]
    for step in range(1, 201):
        seen, reward, terminated, truncated, info = env.step(np.array([slate[0], slate[0], slate[1]]))
        assert (terminated, truncated) == (False, step == 200)
        assert info["user"] == user and info["slate"].tolist() == slate.tolist()
        assert reward == (info["position"] >= 0)
        rewards.append(reward)
    assert seen[-1] == 1
    assert seen in env.observation_space
    chance = float(slate_value(world.likes_of(np.array([user]), slate)).consumed[0])
    assert np.mean(rewards) == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 200))


def test_only_items_looked_at_are_remembered(world: World) -> None:
    env = RecommendationEnv(world, action="slate", slate_size=3)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        slate = world.best_slates(np.array([info["user"]]), 3)[0]
        seen, *_, info = env.step(slate)
        memory = np.zeros((1, 2, 16), np.float32)
        for place, item in enumerate(slate[: info["position"] % 3 + 1]):  # all of them if none was liked
            memory = remembered(memory, world.characters[None, item], np.array([place == info["position"]]))
        np.testing.assert_allclose(seen[:-1], memory.ravel(), atol=1e-6)


def test_a_proto_action_shows_what_fits(world: World) -> None:
    env = RecommendationEnv(world, slate_size=10)
    _, info = env.reset(seed=2)
    user = np.array([info["user"]])
    *_, info = env.step(np.append(world.tastes_at(user)[0], 1).astype(np.float32))
    np.testing.assert_array_equal(info["slate"], world.best_slates(user, 10)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"slate_size": 0}, "slate_size=0 in"), ({"horizon": 0}, "horizon=0 ≥ 1"), ({"pace": -1}, "pace=-1 ≥ 0")],
)
def test_bad_environments(world: World, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RecommendationEnv(world, **arguments)  # type: ignore[arg-type]


# Actors


def test_memory_holds_decayed_sums() -> None:
    one, other = np.array([[1.0, 2.0]]), np.array([[-1.0, 0.0]])
    memory = np.zeros((1, 2, 2), np.float32)
    for characters, liked in ((one, True), (other, False), (other, True)):
        memory = remembered(memory, characters, np.array([liked]))
    np.testing.assert_allclose(memory, [[0.9 * other[0], 0.81 * one[0] + other[0]]], rtol=1e-6)
    seen = observation(memory, np.array([0.25]))
    np.testing.assert_allclose(seen, [[*memory.ravel(), 0.25]])


def test_no_observation_leaves_its_bounds() -> None:
    memory = np.zeros((1, 2, 1), np.float32)
    for _ in range(1000):
        memory = remembered(memory, np.ones((1, 1), np.float32), np.array([True]))
    assert 0.99 * REACH < memory.max() <= REACH


def test_a_log_and_an_episode_tell_the_same(world: World) -> None:
    env = RecommendationEnv(world, action="slate", horizon=HORIZON)
    _, info = env.reset(seed=4)
    log = log_events(world, uniform(world), 9, seed=0)
    user = info["user"]
    events = list(log.interactions.slices())[user]
    seen = np.zeros(0)
    for item in log.interactions.items[events]:
        seen, reward, *_ = env.step(np.array([item]))
        log.interactions.ratings[events.start] = 5.0 if reward else 0.5
        events = slice(events.start + 1, events.stop)
    np.testing.assert_allclose(observations(world, log)[user], seen, rtol=1e-5)


def test_an_actors_propensities_are_exact_and_positive(world: World) -> None:
    proto = np.random.default_rng(0).uniform(-1, 1, (2, 17)).astype(np.float32)
    known = np.arange(world.users) % 2
    policy = ActorPolicy(world, lambda rows: proto[rows], known, nearest=7, temperature=0.5, epsilon=0.1)
    shares = policy.probabilities(np.array([4, 9]), 0.0)
    assert shares.dtype == np.float32
    for row, action in zip(shares, proto, strict=True):
        fit = world.characters @ action[:16] + world.appeal * action[16]
        expected = np.full(world.items, 0.1 / world.items)
        near = np.argsort(-fit)[:7]
        expected[near] += 0.9 * np.exp(fit[near] / 0.5) / np.exp(fit[near] / 0.5).sum()
        np.testing.assert_allclose(row, expected, rtol=1e-4)
    log = log_events(world, policy, 40, seed=1)
    users = np.repeat(np.arange(world.users), 40)
    terms = log.liked / log.propensities / world.items
    likes = world.likes(slice(None)).mean(axis=1)[users]
    assert abs(terms.mean() - likes.mean()) < 4 * terms.std() / np.sqrt(len(terms))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nearest": 0}, r"nearest=0 in \[1, 100\]"),
        ({"temperature": 0}, "temperature=0 > 0"),
        ({"epsilon": -0.1}, r"epsilon=-0.1 in \[0, 1\]"),
    ],
)
def test_bad_actor_policies(world: World, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"^Expected {message}\.$"):
        ActorPolicy(world, lambda rows: rows, np.zeros((300, 33)), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ddpg", "td3"])
def test_trained_actors_show_better_than_random_items(world: World, kind: str) -> None:
    actor = train_actor(world, kind, 400, seed=0)  # type: ignore[arg-type]
    known = observations(world, log_events(world, uniform(world), HORIZON, seed=1))
    actions = actor(known)
    assert actions.shape == (300, 17)
    assert np.abs(actions).max() <= 1
    best = np.argsort(-fit_of(world, actions), axis=1)[:, :5]
    assert slate_value(world.likes_of(slice(None), best)).mean.mean() > 1.2 * world.mean_likes().mean()
    shares = ActorPolicy(world, actor, known).probabilities(np.arange(300), 0.0)
    assert shares.min() >= 0.99 * 0.05 / world.items
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)


def test_training_needs_steps_and_libraries(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^Expected steps=0 ≥ 1\.$"):
        train_actor(world, "td3", 0, seed=0)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingDependency, match=r"pip install 'fedtopk\[environment\]'"):
        train_actor(world, "td3", 1, seed=0)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "simulations.recommendation_env")
    with pytest.raises(MissingDependency, match=r"pip install 'fedtopk\[environment\]'"):
        importlib.import_module("simulations.recommendation_env")
