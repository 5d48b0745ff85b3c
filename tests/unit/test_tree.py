"""Correlated noise: its covariance, its sensitivity over all patterns of participation, and what it is worth."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PrivacyError, SettingsError
from common.privacy import NOT_OFFERED
from common.privacy.budget import Budget, make_budget
from common.privacy.encoding import Encoding, encode
from common.privacy.planning import correlation_gain, make_plan
from common.privacy.randomness import Stream, seeded_stream
from common.privacy.rotation import random_signs
from common.privacy.skellam import skellam
from common.privacy.tree import (
    CorrelatedNoise,
    Tree,
    best_band,
    coefficients,
    error_of_sums,
    error_of_total,
    participations,
)
from common.settings import load_settings
from server.sampling import draw_roster
from server.verification import largest_movement

UNIT = 1 << 16


@dataclass(frozen=True)
class Fixed:
    """A key that is known."""

    content: bytes = bytes(range(32))

    def read(self) -> bytes:
        return self.content

    def erase(self) -> None:
        pass


def tree_of(band: int, separation: int, dimension: int = 500, z: float = 2.0) -> Tree:
    encoding = Encoding(dimension, 1.0, 2000.0, 32, 0.0, 0.8)
    tree = Tree(encoding, coefficients(band), separation, 1.0)
    return replace(tree, variance=(z * tree.sensitivity) ** 2)


def matrix_of(band: tuple[int, ...], rounds: int) -> np.ndarray:
    """C, with the rows of the rounds after the last one: (T + b − 1, T)."""
    matrix = np.zeros((rounds + len(band) - 1, rounds))
    for column in range(rounds):
        matrix[column : column + len(band), column] = np.array(band) / UNIT
    return matrix


def budget_of(*changes: str, devices: int = 60, dimension: int = 300) -> Budget:
    own = ("privacy.mechanism=tree", "training.rounds=20", "training.cohort_rate=0.25", "privacy.delta=1e-5")
    return make_budget(load_settings(None, [*own, *changes]), devices, dimension)


def test_the_coefficients_are_those_of_the_square_root() -> None:
    assert coefficients(5) == tuple(round(c * UNIT) for c in (1, 1 / 2, 3 / 8, 5 / 16, 35 / 128))
    square = np.convolve(coefficients(32), coefficients(32))[:32] / UNIT**2
    np.testing.assert_allclose(square, 1, atol=1e-3)  # (1 − x)^(−1/2) squared is 1 + x + x² + …


@pytest.mark.parametrize(("band", "separation"), [(1, 1), (1, 2), (2, 2), (3, 3), (2, 4), (4, 4)])
def test_sensitivity_by_every_pattern_of_participation(band: int, separation: int) -> None:
    """By brute force over all patterns whose rounds are apart: none moves Cx by more than √κ‖c‖, and one does."""
    rounds, own = 9, coefficients(band)
    matrix, norms = matrix_of(own, rounds), []
    for pattern in itertools.product((0, 1), repeat=rounds):
        taken = np.flatnonzero(pattern)
        if (np.diff(taken) >= separation).all():
            norms.append(float(np.linalg.norm(matrix @ np.array(pattern))))
    expected = math.sqrt(participations(rounds, separation)) * math.hypot(*own) / UNIT
    assert max(norms) == pytest.approx(expected, rel=1e-12)
    assert largest_movement([a / UNIT for a in own], separation, rounds) == pytest.approx(expected, rel=1e-12)


def test_a_band_that_is_longer_than_the_separation_is_refused() -> None:
    with pytest.raises(PrivacyError, match="a band of 3 to be at most the separation=2"):
        tree_of(3, 2)
    overlapping = largest_movement([1.0, 0.5, 0.375], 2, 9)
    assert overlapping > math.sqrt(5) * math.hypot(1, 0.5, 0.375)  # and the second accountant would notice


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_a_user_moves_what_the_noise_hides_by_no_more_than_the_sensitivity(seed: int, band: int) -> None:
    """One device's very encoder, and all later rounds of its band, for any releases before and any dither."""
    tree, draw = tree_of(band, band, dimension=60), np.random.default_rng(seed)
    encoding, signs = tree.encoding, random_signs(60, seeded_stream(seed, "signs"))
    update = draw.normal(size=60) * draw.choice([1e-3, 1.0, 1e3])
    residues = encode(update, encoding, 1, signs, seeded_stream(seed, "rounding"), seeded_stream(seed, "noise"))
    v = residues.astype(np.int32).astype(np.int64)  # 32 bits: the residues are two's complements
    squares = float(v @ v)
    for a in tree.coefficients[1:]:
        past, dither = draw.integers(-(2**40), 2**40, v.shape), draw.integers(0, UNIT, v.shape)
        moved = ((past + dither) >> 16) - ((past - a * v + dither) >> 16)
        squares += float(moved @ moved)
    assert squares <= tree.sensitivity**2


def test_the_noise_is_independent_once_it_is_multiplied_with_c() -> None:
    """CN = Z but for the rounding, by exact algebra; so its covariance is V·C⁻¹C⁻ᵀ, which a sample agrees with."""
    tree, rounds = tree_of(4, 5, dimension=2**15), 7
    source = CorrelatedNoise(tree, Fixed())
    noise = np.array([source.of(round_) for round_ in range(1, rounds + 1)])
    drawn = np.array(
        [
            skellam(tree.variance, 2**15, Stream(Fixed().content, round_.to_bytes(8, "big") + bytes(8)))
            for round_ in range(1, rounds + 1)
        ]
    )
    square = matrix_of(tree.coefficients, rounds)[:rounds]
    off = square @ noise - drawn
    assert (abs(off) < 1).all() and off[1:].std() > 0.2 and (noise[0] == drawn[0]).all()
    inverse = np.linalg.inv(square)
    np.testing.assert_allclose(np.cov(noise) / tree.variance, inverse @ inverse.T, atol=0.04)
    np.testing.assert_allclose(np.corrcoef(drawn), np.eye(rounds), atol=0.03)


def test_the_noise_of_a_round_is_always_the_same() -> None:
    tree = tree_of(3, 3)
    source = CorrelatedNoise(tree, Fixed())
    first = [source.of(round_).copy() for round_ in (1, 2, 3, 4, 5)]
    for round_ in (5, 3, 4, 1):  # again, back, on, and back to the start
        np.testing.assert_array_equal(source.of(round_), first[round_ - 1])
    np.testing.assert_array_equal(CorrelatedNoise(tree, Fixed()).of(4), first[3])  # another process, resumed there
    assert not any((one == other).all() for one, other in itertools.combinations(first, 2))
    assert (CorrelatedNoise(tree, Fixed(bytes(32))).of(1) != first[0]).any()


@pytest.mark.parametrize(("separation", "rounds"), [(1, 20), (3, 30), (10, 200), (60, 200), (200, 100)])
def test_sums_err_less_than_with_independent_noise_at_the_same_epsilon(separation: int, rounds: int) -> None:
    band, alone = best_band(separation, rounds), coefficients(1)
    assert 1 <= len(band) <= min(separation, rounds, 32)
    assert error_of_sums(alone, rounds) == pytest.approx(math.sqrt((rounds + 1) / 2))
    assert error_of_total(alone, rounds) == pytest.approx(math.sqrt(rounds))
    assert error_of_sums(band, rounds) / error_of_sums(alone, rounds) <= {1: 1, 3: 0.7, 10: 0.41}.get(separation, 0.35)
    assert correlation_gain(separation, rounds) >= 1 == correlation_gain(0, rounds)
    matrix = matrix_of(band, rounds)[:rounds]
    sums = np.tri(rounds) @ np.linalg.inv(matrix)  # the definition, in place of the series
    norm = math.hypot(*band) / UNIT
    assert error_of_sums(band, rounds) == pytest.approx(norm * math.sqrt((sums**2).sum() / rounds), rel=1e-6)
    assert error_of_total(band, rounds) == pytest.approx(norm * math.sqrt((sums[-1] ** 2).sum()), rel=1e-6)


def test_the_sums_of_drawn_noise_err_as_the_series_says() -> None:
    budget = budget_of("privacy.noise_multiplier=3", "privacy.target_epsilon=100", dimension=2**13)
    assert budget.tree is not None
    source = CorrelatedNoise(budget.tree, Fixed())
    total = sum(source.of(round_).astype(float) for round_ in range(1, 21)) / budget.encoding.scale
    exact = 3 * error_of_total(budget.tree.coefficients, 20)  # with C = 1
    assert exact * 0.98 < total.std() < exact * 1.13  # roundings inflate the noise by at most a tenth
    assert total.std() < 3 * math.sqrt(20) * 0.8


def test_one_gaussian_over_all_turns_of_a_user() -> None:
    budget = budget_of("privacy.noise_multiplier=4", "privacy.target_epsilon=50")
    assert budget.account is not None and budget.tree is not None and budget.tree.separation == 4
    assert budget.tree.noise_multiplier == pytest.approx(4) and budget.encoding.variance == 0
    for releases, times in ((0, 0), (1, 1), (4, 1), (5, 2), (20, 5)):
        expected = get_epsilon_gaussian(4 / math.sqrt(times), 1e-5) if times else 0.0
        assert budget.account.epsilon_model(releases) == pytest.approx(expected, rel=2e-3)
    statement = budget.statement(20, 23)
    assert statement["epsilon_server"] == NOT_OFFERED and statement["contributions"] == 5
    assert budget.account.epsilon_server(23) is None


def test_the_noise_for_a_target_uses_it_up() -> None:
    budget = budget_of("privacy.target_epsilon=4")
    assert budget.allowed_releases == 20
    assert 3.96 < budget.statement(20, 20)["epsilon_model"] <= 4
    given = budget_of("privacy.noise_multiplier=2", "privacy.target_epsilon=4")
    assert given.account is not None and given.allowed_releases == 12  # three turns of each device
    assert given.account.epsilon_model(12) <= 4 < given.account.epsilon_model(13)
    spent = budget.spending(20, 20)
    assert spent.statement(1e-5)["epsilon_model"] == pytest.approx(budget.statement(20, 20)["epsilon_model"], rel=1e-3)
    assert spent.statement(1e-5)["epsilon_server"] == NOT_OFFERED
    with pytest.raises(PrivacyError, match=r"guard\.minimum_cohort=15 to be below the 15 devices of a turn"):
        budget_of("guard.minimum_cohort=15")


@pytest.mark.parametrize("kind", ["central", "secure"])
@pytest.mark.parametrize(("devices", "dimension", "z"), [(3, 1, 0.3), (60, 300, 1.0), (10**6, 2**17, 5.0)])
def test_every_size_has_an_encoding_in_which_noise_fits(kind: str, devices: int, dimension: int, z: float) -> None:
    changes = (f"aggregation.kind={kind}", f"privacy.noise_multiplier={z}", "privacy.target_epsilon=1000")
    tree = budget_of(*changes, devices=devices, dimension=dimension).tree
    assert tree is not None
    assert tree.sensitivity <= 1.101 * math.hypot(*tree.coefficients) / UNIT * tree.encoding.scale
    deviation = CorrelatedNoise(tree, Fixed()).of(6).std() if dimension > 1 else 0
    assert 6 * deviation + devices / 4 * tree.encoding.scale / math.sqrt(dimension) < 2.0 ** (tree.encoding.bits - 1)


def test_more_noise_than_a_width_holds_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"Expected 16 bits to hold a cohort of 15 with noise_multiplier=500"):
        budget_of("privacy.noise_multiplier=500", "aggregation.bits=16")


def test_turns_are_apart_and_depend_on_no_data() -> None:
    settings = load_settings(None, ["privacy.mechanism=tree", "training.cohort_rate=0.3", "guard.minimum_cohort=2"])
    assert settings.separation == 3 and settings.rate == 1 / 3
    rosters = [draw_roster(settings, round_, 11) for round_ in range(1, 30)]
    for device in range(11):
        rounds = [round_ for round_, roster in enumerate(rosters, 1) if device in roster]
        assert set(np.diff(rounds)) == {3} and len(rounds) in (9, 10)
    assert load_settings().separation == 0
    every = load_settings(None, ["privacy.mechanism=tree", "training.cohort_rate=1.0"])
    assert every.separation == 1 and len(draw_roster(every, 5, 11)) == 11


@pytest.mark.parametrize(
    "change",
    ["training.coins=device", "objective.slice_items=20", "privacy.clip_quantile=0.5", "training.start=popularity"],
)
def test_what_does_not_go_with_turns_is_refused(change: str) -> None:
    with pytest.raises(SettingsError, match=r"with privacy\.mechanism=tree"):
        load_settings(None, ["privacy.mechanism=tree", "model.input_rows=20", change])


def test_a_plan_offers_no_epsilon_to_the_server_and_counts_what_correlation_gains() -> None:
    plan = make_plan(10_000, 500, 200, 8.0, overrides=["privacy.mechanism=tree"])
    assert plan["epsilon_server"] == NOT_OFFERED and plan["epsilon_model"] <= 8
    assert plan["noise_multiplier"] == pytest.approx(
        math.sqrt(10) * make_plan(10_000, 10_000, 1, 8.0)["noise_multiplier"], rel=0.02
    )
    levers = {lever["change"]: lever["signal_to_noise"] for lever in plan["levers"]}
    assert levers["10 × the users"] > 5 * plan["signal_to_noise"]
