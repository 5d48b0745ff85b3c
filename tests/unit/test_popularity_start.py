"""A start from popularity: what a device says in the first round, what it costs, and what becomes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import interactions
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from client.histogram import histograms_of
from common.errors import ProtocolError
from common.item_slice import cut, slice_of
from common.item_tables import formed
from common.model import initialise
from common.offer import Offer, read_offer
from common.privacy.budget import Budget, make_budget
from common.privacy.encoding import Encoding
from common.secagg.terms import Terms
from common.settings import Settings, load_settings
from common.trajectory import Trajectories
from server.popularity_start import shrunk_counts, starts
from server.run import open_training
from server.run_folder import RunFolder
from server.store import open_store
from simulations.batched_cohort import BatchedCohort
from simulations.central import train_centrally
from simulations.plain_cohort import PlainCohort
from simulations.population import Population

ITEMS = 7
CRITIC = ["objective.estimator=reinforce", "objective.critic=baseline"]
HISTORY = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.floats(-5, 5, width=32)), max_size=300)


def settings_of(*overrides: str) -> Settings:
    return load_settings(None, ["training.start=popularity", "privacy.delta=1e-4", *overrides])


def window(*histories: list[tuple[int, float]]) -> Trajectories:
    lengths = torch.tensor([len(own) for own in histories])
    items = torch.zeros(len(histories), max(1, int(lengths.max())), dtype=torch.int64)
    rewards = torch.zeros(items.shape)
    for row, own in enumerate(histories):
        for step, (item, reward) in enumerate(own):
            items[row, step], rewards[row, step] = item, reward
    return Trajectories(items, rewards, rewards, lengths, torch.zeros_like(lengths))


@examples(deadline=None)
@given(HISTORY, st.sampled_from([0.01, 1.0, 300.0]), st.sampled_from([[], CRITIC]), st.randoms())
def test_whatever_a_device_holds_its_histogram_has_the_norm_of_the_clip(
    history: list[tuple[int, float]], clip: float, more: list[str], random: Any
) -> None:
    settings, shuffled = settings_of(*more), random.sample(history, len(history))
    found = histograms_of(settings, window(history, shuffled, [(3, 5.0)] * 2), ITEMS, clip)
    own, other = (found.weighted_sum(torch.eye(3)[row]) for row in (0, 1))
    assert float(own.norm()) == pytest.approx(clip if history else 0, rel=1e-12)
    torch.testing.assert_close(own, other, rtol=0, atol=1e-9 * clip)
    assert found.norms().tolist() == pytest.approx([float(own.norm()), float(own.norm()), clip])


def test_a_histogram_is_of_counts_and_of_rewards_above_the_guess() -> None:
    history = [(2, 5.0), (2, -1.0), (0, 2.5)]
    found = histograms_of(settings_of(*CRITIC), window(history), ITEMS, 1.0).weighted_sum(torch.ones(1))
    expected = torch.zeros(2 * ITEMS, dtype=torch.float64)
    expected[[0, 2]] = torch.tensor([1.0, 2], dtype=torch.float64)  # of rewards 1, 0 and .5 against .5 nothing is left
    torch.testing.assert_close(found, expected / 5**0.5)


@pytest.mark.parametrize(("kind", "length"), [("central", 200_000), ("secure", 3), ("secure", 5000)])
def test_the_budget_is_that_of_a_run_without(kind: str, length: int) -> None:
    """z, δ and the rounds allowed to the last bit; ε as far as Skellam noise differs from the Gaussian, under 1e-3."""
    settings = settings_of(f"aggregation.kind={kind}", "training.rounds=50")
    without, counting = (make_budget(settings, 2000, 30_000, histogram=size) for size in (0, length))
    assert counting.histogram is not None and counting.histogram.dimension == length
    assert counting.histogram.clip == settings.privacy.clip_norm
    assert counting.histogram.noise_multiplier == pytest.approx(without.encoding.noise_multiplier)

    def exact(budget: Budget) -> tuple[object, ...]:
        return budget.noise_multiplier, budget.allowed_releases, budget.delta, budget.encoding

    assert exact(counting) == exact(without)
    figures = [budget.statement(50, 50) for budget in (counting, without)]
    for name in ("epsilon_model", "epsilon_server"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3)
        assert figures[0][name] >= figures[1][name]
    assert figures[0].pop("first_release")


@examples(deadline=None)
@given(st.lists(st.floats(-9, 40), min_size=2, max_size=30), st.floats(0.05, 5))
def test_shrunk_counts_are_positive_and_keep_the_order(noisy: list[float], noise: float) -> None:
    found, weight = shrunk_counts(np.array(noisy), noise, 10.0)
    assert (found > 0).all() and 0 < weight <= 1
    assert (np.diff(found[np.argsort(noisy)]) >= -1e-9).all()


@pytest.mark.parametrize("value", [-3.0, 0.4, 9.0])
def test_a_shrunk_count_is_the_posterior_mean(value: float) -> None:
    """Under an exponential prior, by numerical integration."""
    noisy, noise = np.array([value, 1.0, 5 - value]), 1.5

    def posterior(count: float) -> float:
        return float(np.exp(-count / 2) * norm.pdf(value, count, noise))

    mean = quad(lambda count: count * posterior(count), 0, 60)[0] / quad(posterior, 0, 60)[0]
    assert shrunk_counts(noisy, noise, 10.0)[0][0] == pytest.approx(mean, rel=1e-6)


def logit(share: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(share / (1 - share)))


def test_with_many_devices_a_start_is_how_popular_and_how_liked_items_are() -> None:
    settings = settings_of(*CRITIC, "model.temperature=0.5", "objective.critic_start=0.3")
    popularity, liked = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.5, 0.9, 0.3])
    counts = 1e6 * popularity
    released = np.concatenate([counts, counts * (liked - 0.3)])
    found = {name: value.numpy()[:, 0] for name, value in starts(settings, released, 1.2, 3e5).items()}
    np.testing.assert_allclose(found["start.policy.embedding"] / 0.5, np.log(4 * popularity), atol=1e-3)
    np.testing.assert_allclose(found["start.critic.embedding"] / 0.5, logit(liked) - logit(np.array(0.3)), atol=1e-3)


def test_where_nothing_is_known_all_items_start_alike() -> None:
    settings = settings_of(*CRITIC)
    noise = np.random.default_rng(1).normal(size=2 * 5000)
    for released, deviation, apart in ((np.zeros(20), 0.0, 0), (np.zeros(20), 1.0, 0), (noise, 1.0, 0.05)):
        for column in starts(settings, released, deviation, 50.0).values():
            assert float(column.std()) <= apart + 1e-6


HISTORIES = interactions([list(range(13 - user)) for user in range(12)], 13)
"""Of twelve devices all hold item 0 and item 1, eleven item 2, ten item 3, …"""
TINY = ("model.input_width=4", "model.state_width=6", "model.user_width=3", "objective.negatives=20")


def trained(folder: Path, settings: Settings, plain: bool = False) -> dict[str, torch.Tensor]:
    """The model of twelve devices."""
    population = Population(settings, HISTORIES)
    folder.mkdir(exist_ok=True)
    with open_store(folder, durable=False) as store:
        cohort = PlainCohort(population) if plain else BatchedCohort(population)
        training = open_training(settings, RunFolder(folder), store, cohort, 13)
        training.run(lambda: False, lambda progress: None)
        return training.current()


@pytest.mark.parametrize("tables", [[], ["model.items=features"], ["model.rank=2"]])
@pytest.mark.parametrize("plain", [False, True])
def test_the_first_round_lets_biases_follow_the_histogram(tmp_path: Path, tables: list[str], plain: bool) -> None:
    """In either engine, for tables of any make; the same numbers without noise, up to rounding."""
    kind = "plain" if plain else "central"
    own = [*TINY, *tables, "training.rounds=1", "training.cohort_rate=1", "privacy.mechanism=none"]
    settings = settings_of(*own, f"aggregation.kind={kind}")
    model = trained(tmp_path, settings, plain)
    begin = initialise(settings, 13, torch.Generator().manual_seed(settings.training.seed))
    assert all(torch.equal(model[name], value) for name, value in begin.items() if not name.startswith("start."))
    for head in ("policy.embedding", "behaviour.embedding"):
        bias = formed(model)[head][:, -1] - formed(begin)[head][:, -1]
        weights = [torch.tensor([13.0 - user for user in range(12) if item < 13 - user]).rsqrt() for item in range(13)]
        shares = torch.stack([own.sum() for own in weights])
        assert (bias.diff() <= 1e-6).all() and float(bias[0] - bias[12]) > 1.5
        # Half an interaction is added to each item, so that rare ones seem less rare.
        torch.testing.assert_close(bias[:6] - bias[0], (shares[:6] / shares[0]).log(), rtol=0.15, atol=1e-4)


def test_engines_and_central_training_count_the_same(tmp_path: Path) -> None:
    own = [*TINY, *CRITIC, "training.rounds=1", "training.cohort_rate=1", "privacy.mechanism=none"]
    one, other = (
        trained(tmp_path / kind, settings_of(*own, f"aggregation.kind={kind}"), kind == "plain")
        for kind in ("plain", "central")
    )
    pooled = train_centrally(settings_of(*own), HISTORIES, batch=12).parameters
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, pooled[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_on_slices_counts_all_items(tmp_path: Path, plain: bool) -> None:
    kind = "plain" if plain else "central"
    own = [*TINY, *CRITIC, "training.cohort_rate=1", "privacy.mechanism=none", "model.input_rows=13"]
    own += [f"aggregation.kind={kind}", "training.rounds=1"]
    whole = trained(tmp_path / "whole", settings_of(*own), plain)
    sliced = trained(tmp_path / "sliced", settings_of(*own, "objective.slice_items=4"), plain)
    for name, value in whole.items():
        torch.testing.assert_close(sliced[name], value, rtol=1e-5, atol=1e-6)


def test_biases_of_a_slice_are_those_of_its_items() -> None:
    settings = settings_of(*TINY, "objective.slice_items=3", "model.input_rows=5")
    parameters = initialise(settings, ITEMS, torch.Generator().manual_seed(1))
    parameters["start.policy.embedding"] = torch.arange(ITEMS).float().unsqueeze(1)
    item_slice = slice_of(settings, ITEMS, 2)
    assert item_slice is not None
    found = formed(cut(parameters, item_slice))["policy.embedding"]
    torch.testing.assert_close(found, formed(parameters)["policy.embedding"][item_slice.ids])


@pytest.mark.parametrize("slices", [[], ["objective.slice_items=3", "model.input_rows=5"]])
@pytest.mark.parametrize("round_", [1, 2])
def test_a_device_counts_in_the_first_round_and_in_no_other(round_: int, slices: list[str]) -> None:
    """Whatever length the server asks for: of a gradient in the first round, or of a histogram in a later one."""
    settings = settings_of(*TINY, *slices)
    whole = initialise(settings, ITEMS, torch.Generator().manual_seed(1))
    parameters = cut(whole, slice_of(settings, ITEMS, round_))
    encoding = Encoding.choose(1, 1.0, 1.0, 5, 0.8)
    lengths = {1: ITEMS, 2: Offer(2, 1, parameters, encoding, settings).dimension}

    def read(length: int) -> Offer:
        offered = Offer(round_, 1, parameters, replace(encoding, dimension=length), settings)
        terms = Terms(round_, 1, 5, 0.1, 0.1, False, offered.encoding, offered.model)
        return read_offer(terms, {name: value.numpy() for name, value in parameters.items()}, settings, ITEMS)

    assert read(lengths[round_]).counting == (round_ == 1)
    with pytest.raises(ProtocolError, match=f"to be {lengths[round_]}"):
        read(lengths[3 - round_])
