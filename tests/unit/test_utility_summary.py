"""The arithmetic of ratios and their intervals, and what is said of them."""

from typing import Any

import numpy as np
import pytest

from simulations.utility_summary import mean_figure, privacy_words, ratio_figure, summarise, values_table

GENERATOR = np.random.default_rng(5)
PRIVACY = {
    "unit": "user",
    "delta": 1e-5,
    "epsilon_model": 8.0,
    "epsilon_server": 40.0,
    "noise_multiplier": 0.8,
    "noise": "cryptographic",
    "clip_norm": 0.1,
    "adjacency": {"epsilon_model": "one", "epsilon_server": "other"},
    "observer": {"epsilon_model": "readers", "epsilon_server": "the server"},
}


def test_over_seeds_it_is_students_interval_of_the_ratios() -> None:
    halves, ones = [np.array([0.1, 0.3]), np.array([0.4]), np.array([0.6, 0.6])], [np.array([1.0])] * 3
    found = ratio_figure(halves, ones)
    assert found["value"] == pytest.approx(0.4)
    assert found["ci95"] == pytest.approx([0.4 - 4.302653 * 0.2 / 3**0.5, 0.4 + 4.302653 * 0.2 / 3**0.5], rel=1e-6)


def test_of_one_seed_it_is_the_delta_method_over_users() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 2.0, 4.0, 4.0])
    found = ratio_figure([a], [b])
    half = 1.959964 * np.std([-1, 0, -1, 2], ddof=1) / 2 / 3  # a - b, as the ratio is 1
    assert found["value"] == pytest.approx(1.0)
    assert found["ci95"] == pytest.approx([1 - half, 1 + half], rel=1e-6)
    assert mean_figure([a])["ci95"] == pytest.approx([3 - 1.959964 * 2.160247 / 2, 3 + 1.959964 * 2.160247 / 2])


def test_the_interval_over_users_covers_the_true_ratio() -> None:
    """19 times of 20; pairing makes it narrow where the same users are liked by both."""
    covered, runs = 0, 400
    for _ in range(runs):
        b = GENERATOR.gamma(2.0, 1.0, 300)
        low, high = ratio_figure([0.9 * b + GENERATOR.normal(0, 0.2, 300)], [b])["ci95"]
        covered += low <= 0.9 <= high
        assert high - low < 0.04
    assert 0.91 * runs < covered < 0.985 * runs


def values(first: float, mean: float) -> dict[str, Any]:
    return {"values": {"first": [first, first], "mean": [mean, mean]}}


def found(private: float) -> dict[str, dict[str, Any]]:
    trained = {"seconds": 1.0, "parameters": 10}
    return {
        "popularity": values(0.2, 0.1),
        "best non-personal": values(0.3, 0.3),
        "DP popularity, epsilon 8": values(0.2, 0.05) | {"privacy": PRIVACY},
        "not private": values(0.6, 0.5) | trained | {"privacy": {"unit": "user", "mechanism": "none"}},
        "epsilon 8": values(0.3, private) | trained | {"privacy": PRIVACY, "signal_to_noise": 3.0},
    }


def test_a_row_has_the_ratio_and_what_is_learned_beyond_popularity() -> None:
    summary = summarise({0: found(0.48), 1: found(0.48)})
    (row,) = (row for row in summary["policies"] if row["policy"] == "epsilon 8")
    assert row["ratio"]["mean"]["value"] == pytest.approx(0.96)
    assert row["ratio"]["first"]["value"] == pytest.approx(0.5)
    assert row["learned"]["mean"]["value"] == pytest.approx(0.38 / 0.4)
    assert row["learned"]["first"]["value"] == pytest.approx(0.25)
    assert row["above_popularity"]["value"] == pytest.approx(0.43)
    assert row["seconds"] == [1.0, 1.0]
    assert summary["interval"] == "2 seeds"


@pytest.mark.parametrize(
    ("private", "sentence"), [((0.48, 0.48), "at least 95%"), ((0.4, 0.4), "less than 95%"), ((0.42, 0.5), "not told")]
)
def test_no_finding_goes_beyond_its_interval(private: tuple[float, float], sentence: str) -> None:
    first, second = summarise({seed: found(value) for seed, value in enumerate(private)})["findings"]
    assert first.startswith("Without privacy the policy is above the best ranking")
    assert sentence in second


def test_one_world_says_that_it_is_one() -> None:
    summary = summarise({3: found(0.4)}) | {"setup": {"slate_size": 10, "users": 9, "items": 5}}
    assert summary["interval"] == "2 users of one world"
    assert values_table(summary | {"rounds": 2, "cohort": 3}).row_count == 5
    words = privacy_words(summary)
    assert any("ε_server 40.0" in line for line in words)
    assert any(
        line.startswith("ε_server: unit one user; δ=1e-05; adjacency: other; observer: the server") for line in words
    )
