"""Adaptive clipping: what one user can change, what it costs in noise, and where C goes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model import initialise
from common.offer import Offer
from common.privacy.accounting import skellam_excess
from common.privacy.adaptive_clip import (
    SHARE,
    AdaptiveClip,
    at,
    clip_of,
    joint,
    share_noise,
    share_within,
    with_its_bit,
    within,
)
from common.privacy.budget import make_budget
from common.privacy.encoding import Encoding, decode, encode, top_up_noise
from common.privacy.randomness import seeded_stream
from common.privacy.rotation import random_signs
from common.settings import Settings, load_settings
from simulations.batched_cohort import BatchedCohort, fixed_point_scale
from simulations.datasets.synthetic import synthetic
from simulations.population import Population

CHEAP = ("privacy.noise_multiplier=1.5", "training.rounds=20", "objective.negatives=20")
"""Without a search for z."""
clips = st.floats(1e-4, 1e4)


def settings_of(*overrides: str) -> Settings:
    return load_settings(None, ["privacy.clip_quantile=0.5", *CHEAP, *overrides])


@given(st.integers(1, 300), clips, st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_one_user_moves_the_sum_by_the_sensitivity_at_most(dimension: int, clip: float, size: float, seed: int) -> None:
    """Of a real device: its residues without noise are what a sum has more with it than without."""
    update = np.random.default_rng(seed).normal(size=dimension)
    update *= size * clip / np.linalg.norm(update)
    update = update.astype(np.float32)
    sent = with_its_bit(update, clip)
    assert np.linalg.norm(sent) <= joint(clip) * (1 + 1e-12)
    assert sent[-1] == (SHARE * clip if np.linalg.norm(update.astype(np.float64)) <= clip else -SHARE * clip)
    encoding = at(Encoding.choose(dimension + 1, joint(1.0), 0.0, 10, 0.8), clip)
    signs = random_signs(dimension + 1, seeded_stream(seed, "signs"))
    residues = encode(sent, encoding, 10, signs, seeded_stream(seed, "rounding"), seeded_stream(seed, "noise"))
    half = 1 << (encoding.bits - 1)
    moved = (residues.astype(object) + half) % (2 * half) - half
    assert sum(moved * moved) <= encoding.squared_bound
    np.testing.assert_allclose(decode(residues, encoding, signs), sent, atol=1e-3 * clip)


@pytest.mark.parametrize("clip", [0.05, 0.4, 20.0])
def test_one_user_moves_the_batched_sum_by_the_sensitivity_at_most(clip: float) -> None:
    """Every user in turn, added to all the others of a cohort whose norms are on both sides of C."""
    settings, users = settings_of("training.window=20"), 12
    population = Population(settings, synthetic(users, 40, seed=3)[0])
    parameters = initialise(settings, 40, torch.Generator().manual_seed(1))
    first = make_budget(settings, users, sum(value.numel() for value in parameters.values())).encoding
    offer = Offer(3, 1, parameters, at(first, clip), settings)
    everybody, scale = np.arange(users), fixed_point_scale(offer.clip)
    total, metrics = BatchedCohort(population).clipped_sum(offer, everybody)
    beyond = round(float(metrics["clipped"]) * users)  # type: ignore[arg-type]
    assert total[-1] / scale == pytest.approx(SHARE * clip * (users - 2 * beyond), rel=1e-9)
    population.users.zero_()
    for user in everybody:
        others, _ = BatchedCohort(population).clipped_sum(offer, np.delete(everybody, user))
        population.users.zero_()
        assert np.linalg.norm((total - others) / scale) <= joint(clip) * (1 + 1e-4)
        assert abs(total[-1] - others[-1]) / scale == pytest.approx(SHARE * clip, rel=1e-9)


@given(st.integers(2, 2**21), clips, clips, st.floats(0.3, 30), st.booleans())
def test_every_clip_has_the_noise_of_the_first(
    dimension: int, first_clip: float, clip: float, z: float, central: bool
) -> None:
    first = Encoding.choose(dimension, joint(first_clip), z, 100, 0.8, 32, central=central)
    later = at(first, clip)
    assert clip_of(later) == pytest.approx(clip, rel=1e-12)
    assert first.sensitivity * (1 - 1e-6) <= later.sensitivity <= first.sensitivity
    assert later.variance == first.variance and later.noise_multiplier >= first.noise_multiplier
    assert (later.padded, later.bits, later.honest) == (first.padded, first.bits, first.honest)
    assert skellam_excess(later) <= skellam_excess(first) * (1 + 1e-6)


def test_an_adaptive_clip_costs_half_a_percent_of_noise_and_no_epsilon() -> None:
    fixed, adaptive = (
        make_budget(settings_of(f"privacy.clip_quantile={quantile}"), 1000, 5000) for quantile in (0.0, 0.5)
    )
    noise = [math.sqrt(budget.encoding.variance) / budget.encoding.scale for budget in (fixed, adaptive)]
    assert noise[1] / noise[0] == pytest.approx(math.sqrt(1.01), abs=1e-3)
    for name in ("epsilon_model", "epsilon_server"):
        assert adaptive.statement(20, 20)[name] == pytest.approx(fixed.statement(20, 20)[name], abs=1e-3)


def test_the_share_has_the_stated_noise_and_no_bias() -> None:
    """Of rosters that Poisson coins draw, through the released noise itself."""
    z, users, rate, clip, rounds = 1.5, 400, 0.25, 3.0, 3000
    encoding = at(Encoding.choose(3, joint(1.0), z, users * rate, 0.8), clip)
    signs = random_signs(3, seeded_stream(1))
    random, stream = np.random.default_rng(5), seeded_stream(7)
    bits = np.repeat([1, -1], [300, 100])  # a share of .75 within C
    shares = []
    for _ in range(rounds):
        told = SHARE * clip * bits[random.random(users) < rate].sum()
        noise = decode(top_up_noise(encoding, 0, 0, stream), encoding, signs)[-1]
        shares.append(share_within(told + noise, clip, users * rate))
    expected = math.hypot(share_noise(z, users * rate), math.sqrt((1 - rate) / (users * rate)) / 2)
    assert np.mean(shares) == pytest.approx(0.75, abs=4 * expected / math.sqrt(rounds))
    assert np.std(shares) == pytest.approx(expected, rel=4 / math.sqrt(2 * rounds) + 0.02)


@pytest.mark.parametrize("z", [0.0, 2.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("first", [100.0, 0.01])
def test_the_clip_converges_to_the_quantile_of_known_norms(first: float, quantile: float, z: float) -> None:
    random, users, rate = np.random.default_rng(3), 2000, 0.1
    norms = random.lognormal(0.3, 0.6, users)
    rule = AdaptiveClip.of(settings_of(f"privacy.clip_norm={first}", f"privacy.clip_quantile={quantile}"))
    assert rule is not None
    clip, course = first, []
    for _ in range(400):
        told = SHARE * clip * within(norms[random.random(users) < rate], clip).sum()
        noise = z * joint(clip) * random.standard_normal()
        clip = rule.following(clip, share_within(told + noise, clip, users * rate))
        course.append(clip)
    share = np.mean(norms <= np.exp(np.mean(np.log(course[-150:]))))
    assert share == pytest.approx(quantile, abs=0.03)


def test_whatever_the_noise_says_the_clip_stays_within_its_bounds() -> None:
    rule = AdaptiveClip.of(settings_of("privacy.clip_norm=2", "guard.maximum_clip=5"))
    assert rule is not None
    assert rule.following(2.0, -1e9) == rule.highest == 5.0
    assert rule.following(2.0, 1e9) == rule.lowest == 2e-4
    assert rule.following(2.0, 0.5) == pytest.approx(2.0)
    for highest in np.random.default_rng(0).uniform(2, 100, 1000).tolist():  # e^log x may be above x
        assert replace(rule, highest=highest).following(2.0, -1e9) == highest
    assert AdaptiveClip.of(Settings()) is None
