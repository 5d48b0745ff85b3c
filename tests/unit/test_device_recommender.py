"""Recommendations on the device: the states moved on, the scores those of a simulation, offline from the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import interactions
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save

import client.recommender
from client.device_contents import Event, State
from client.device_store import DeviceStore
from client.recommender import Exploration, Recommender, advance, read_model, replay
from client.store_key import KeyFile
from common.errors import ModelError, SettingsError
from common.model import Parameters, initialise
from common.settings import Settings, parse_flat
from simulations.datasets.interactions import Interactions
from simulations.recommender import PolicyScorer

ITEMS, WINDOW, WIDTH = 40, 6, 4
LENGTHS = (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 25)
TINY = {
    "model.input_width": 5,
    "model.state_width": 7,
    "model.user_width": WIDTH,
    "training.window": WINDOW,
    "training.user_steps": 2,
    "objective.discount": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "gru": {"model.cell": "gru"},
    "no state": {"model.cell": "none"},
    "cross-entropy": {"objective.estimator": "cross-entropy"},
    "frequency": {"objective.estimator": "off-policy", "objective.behaviour": "frequency"},
    "direct": {"objective.estimator": "direct"},
    "critic's prior": {"objective.prior": "critic"},
    "no adaptation": {"training.user_steps": 0},
    "features": {"model.items": "features", "model.rank": 2, "model.feature_width": 16},
}


def settings_of(kind: str) -> Settings:
    return parse_flat(TINY | KINDS[kind])


def model(settings: Settings, seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {name: 2 * value for name, value in initialise(settings, ITEMS, generator).items()}


def population() -> Interactions:
    rng = np.random.default_rng(1)
    made = interactions([rng.integers(0, ITEMS, length).tolist() for length in LENGTHS], ITEMS)
    made.ratings[:] = rng.uniform(0.5, 5, len(made.ratings))
    return made


def events_of(histories: Interactions, user: int) -> list[Event]:
    own = slice(histories.offsets[user], histories.offsets[user + 1])
    columns = (histories.catalogue.ids[histories.items[own]], histories.ratings[own], histories.timestamps[own])
    return [Event(str(item), float(rating), int(at)) for item, rating, at in zip(*columns, strict=True)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeviceStore]:
    with DeviceStore.create(tmp_path / "device", KeyFile(tmp_path / "key")) as store:
        yield store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user", range(len(LENGTHS)))
def test_a_device_ranks_as_its_simulation(store: DeviceStore, kind: str, user: int) -> None:
    settings, histories = settings_of(kind), population()
    parameters = model(settings)
    users = torch.randn(len(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(3))
    expected = PolicyScorer(settings, parameters, users).scores(histories, np.arange(len(LENGTHS)))[user]
    store.save_user(users[user].numpy())
    recommender = Recommender(settings, parameters, histories.catalogue)
    for event in events_of(histories, user):
        store.add_events([event])
        recommender.catch_up(store)
    prepared = recommender.prepare(store)
    torch.testing.assert_close(recommender.scores(prepared), expected, rtol=1e-5, atol=1e-5)
    shown = recommender.recommend(prepared, 5, consumed=True)
    assert [one.item for one in shown] == histories.catalogue.ids[expected.topk(5).indices].tolist()
    np.testing.assert_allclose([one.score for one in shown], expected.topk(5).values, rtol=1e-5, atol=1e-5)


def test_a_device_without_an_embedding_has_that_of_a_new_user(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    parameters = model(settings)
    store.add_events(events_of(histories, 5))
    recommender = Recommender(settings, parameters, histories.catalogue)
    expected = PolicyScorer(settings, parameters, torch.zeros(6, WIDTH)).scores(histories, np.array([5]))[0]
    torch.testing.assert_close(recommender.scores(recommender.prepare(store)), expected, rtol=1e-5, atol=1e-5)


@given(
    kind=st.sampled_from(["default", "gru", "no state"]),
    pieces=st.lists(st.integers(0, WINDOW + 3), max_size=8),
    seed=st.integers(0, 100),
)
@examples(max_examples=60, deadline=None)
def test_moving_on_is_a_replay(kind: str, pieces: list[int], seed: int) -> None:
    settings, rng = settings_of(kind), np.random.default_rng(seed)
    parameters, length = model(settings, seed), sum(pieces)
    items, rewards = rng.integers(0, ITEMS, length), rng.uniform(-5, 5, length).astype(np.float32)
    states, at = torch.zeros(1, 7), 0
    for piece in pieces:
        states = advance(settings, parameters, states, items[at : at + piece], rewards[at : at + piece])
        at += piece
    whole = replay(settings, parameters, items, rewards)
    assert len(whole) == 1 + min(length, WINDOW)
    torch.testing.assert_close(states, whole, rtol=0, atol=1e-6)


def test_only_new_events_are_run(store: DeviceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, histories = settings_of("default"), population()
    lengths = []

    def counted(settings: Settings, parameters: Parameters, states: torch.Tensor, items: Any, rewards: Any) -> Any:
        lengths.append(len(items))
        return advance(settings, parameters, states, items, rewards)

    monkeypatch.setattr(client.recommender, "advance", counted)
    first, *others = events_of(histories, 5)
    recommender = Recommender(settings, model(settings), histories.catalogue)
    store.add_events(others)
    recommender.catch_up(store)
    store.add_events([first])
    recommender.catch_up(store)
    recommender.prepare(store)
    assert lengths == [24, 1]
    Recommender(settings, model(settings), histories.catalogue).catch_up(store)  # the same model, loaded again
    assert lengths == [24, 1]
    Recommender(settings, model(settings, seed=1), histories.catalogue).catch_up(store)
    assert lengths == [24, 1, 25]


def test_a_new_model_replays_the_history(store: DeviceStore) -> None:
    settings, histories = settings_of("gru"), population()
    store.add_events(events_of(histories, 5))
    Recommender(settings, model(settings), histories.catalogue).catch_up(store)
    other = Recommender(settings, model(settings, seed=1), histories.catalogue)
    expected = PolicyScorer(settings, model(settings, seed=1), torch.zeros(6, WIDTH)).scores(histories, np.array([5]))
    torch.testing.assert_close(other.scores(other.prepare(store)), expected[0], rtol=1e-5, atol=1e-5)
    state = store.load_state()
    assert state is not None and state.model == other.digest and state.events == 25


@pytest.mark.parametrize(
    "change", [{"data.rating_range": "0,10"}, {"training.window": 3}, {"model.cell": "gru"}, {"model.temperature": 2.0}]
)
def test_what_states_depend_on_is_in_the_digest(change: dict[str, Any]) -> None:
    histories, settings = population(), settings_of("default")
    other = parse_flat(TINY | change)
    digest = Recommender(settings, model(settings), histories.catalogue).digest
    assert digest == Recommender(parse_flat(TINY | {"training.rounds": 9}), model(settings), histories.catalogue).digest
    assert digest != Recommender(other, model(other), histories.catalogue).digest
    shuffled = interactions([], ITEMS + 1).catalogue
    assert digest != Recommender(settings, model(settings), shuffled).digest


def test_a_state_that_is_ahead_of_the_history_is_replayed(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    recommender = Recommender(settings, model(settings), histories.catalogue)
    store.save_state(State(recommender.digest, 3, np.ones((1, 7), np.float32)))
    assert (recommender.catch_up(store).values == 0).all()


def test_consumed_items_are_left_out_unless_asked_for(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    store.add_events(events_of(histories, 5))
    recommender = Recommender(settings, model(settings), histories.catalogue)
    prepared = recommender.prepare(store)
    consumed = {event.item for event in events_of(histories, 5)}
    left = ITEMS - len(consumed)
    shown = recommender.recommend(prepared, left)
    assert {one.item for one in shown} == set(histories.catalogue.ids.tolist()) - consumed
    assert [one.score for one in shown] == sorted((one.score for one in shown), reverse=True)
    assert {one.item for one in recommender.recommend(prepared, ITEMS, consumed=True)} >= consumed
    with pytest.raises(SettingsError, match="may be shown"):
        recommender.recommend(prepared, left + 1)


def test_exploration_shows_certain_items_first_and_draws_the_others(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    store.add_events(events_of(histories, 4))
    recommender = Recommender(settings, model(settings), histories.catalogue)
    prepared = recommender.prepare(store)
    ranked = [one.item for one in recommender.recommend(prepared, 12)]
    generator = torch.Generator().manual_seed(0)
    slates = {
        tuple(one.item for one in recommender.recommend(prepared, 5, exploration=Exploration(2, 12, generator)))
        for _ in range(50)
    }
    assert len(slates) > 10
    for slate in slates:
        assert list(slate[:2]) == ranked[:2]
        assert len(set(slate)) == 5 and set(slate) <= set(ranked)


def test_events_of_items_that_the_catalogue_has_not_are_passed_over(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    parameters = model(settings)
    recommender = Recommender(settings, parameters, histories.catalogue)
    for event in events_of(histories, 5):
        store.add_events([event, Event("unheard of", 4.0, 0)])
        recommender.catch_up(store)
    expected = PolicyScorer(settings, parameters, torch.zeros(6, WIDTH)).scores(histories, np.array([5]))[0]
    torch.testing.assert_close(recommender.scores(recommender.prepare(store)), expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_of_another_width_is_refused(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    store.save_user(np.zeros(WIDTH + 1, np.float32))
    with pytest.raises(ModelError, match="width 5"):
        Recommender(settings, model(settings), histories.catalogue).prepare(store)


def test_a_diverged_model_is_refused(store: DeviceStore) -> None:
    settings, histories = settings_of("default"), population()
    parameters = model(settings)
    parameters["policy.embedding"][3] = torch.nan
    recommender = Recommender(settings, parameters, histories.catalogue)
    with pytest.raises(ModelError, match="diverged"):
        recommender.recommend(recommender.prepare(store), 3)


def test_a_received_model_is_read_as_it_was_sent() -> None:
    settings = settings_of("default")
    parameters = model(settings)
    found = read_model(save(parameters), settings, ITEMS)
    assert list(found) == list(parameters)
    assert all(torch.equal(found[name], parameters[name]) for name in parameters)


def test_what_is_no_such_model_is_refused() -> None:
    settings = settings_of("default")
    parameters = model(settings)
    with pytest.raises(ModelError, match="safetensors"):
        read_model(b"nothing of the kind", settings, ITEMS)
    with pytest.raises(ModelError, match="shape"):
        read_model(save(parameters), settings, ITEMS + 1)
    with pytest.raises(ModelError, match="finite"):
        read_model(save(parameters | {"user.projection": torch.full((7, 4), torch.inf)}), settings, ITEMS)
    with pytest.raises(ModelError, match="parameters"):
        read_model(save(parameters | {"stowaway": torch.zeros(1)}), settings, ITEMS)
