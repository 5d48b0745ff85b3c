"""The model card: both figures with all that they mean, and no claim that the report does not make."""

from typing import Any

from common.privacy.budget import make_budget
from common.settings import Settings, load_settings
from server.model_card import model_card

QUALITY = {"hr@10": 0.1, "hr@10_ci95": [0.08, 0.12], "ndcg@10": 0.05, "ndcg@10_ci95": [0.04, 0.06]}


def report(settings: Settings, **changes: Any) -> dict[str, Any]:
    return {
        "status": "finished",
        "rounds": 4,
        "devices": 100,
        "client_updates": 40,
        "parameters": 50,
        "privacy": make_budget(settings, 100, 50).statement(4, 4),
        "aggregation": {"kind": "central", "dropouts": 0},
    } | changes


def test_both_figures_stand_with_unit_delta_adjacency_and_observer() -> None:
    settings = load_settings(None, ["privacy.noise_multiplier=2.0", "privacy.delta=1e-4"])
    made = report(settings)
    card = model_card(made, settings)
    figures = [line for line in card.splitlines() if "ε_model |" in line or "ε_server |" in line]
    assert len(figures) == 2
    for line, name in zip(figures, ("epsilon_model", "epsilon_server"), strict=True):
        privacy = made["privacy"]
        for part in (
            f"{privacy[name]:.4g}",
            "0.0001",
            "one user",
            privacy["adjacency"][name],
            privacy["observer"][name],
        ):
            assert f"| {part} |" in line
    assert "Not measured." in card and "seed" not in card


def test_what_protects_nobody_is_said() -> None:
    settings = load_settings(None, ["privacy.noise_multiplier=2.0", "privacy.randomness=seeded"])
    assert "neither figure holds" in model_card(report(settings), settings)
    settings = load_settings(None, ["privacy.mechanism=none"])
    card = model_card(report(settings), settings)
    assert "No noise was added" in card and "| ε_model" not in card


def test_the_course_of_an_adaptive_clip_is_told() -> None:
    settings = load_settings(None, ["privacy.noise_multiplier=2.0", "privacy.clip_quantile=0.5"])
    made = report(settings, clip={"quantile": 0.5, "by_round": [[1, 100.0], [2, 30.0], [3, 7.0]]})
    assert "the 0.5 quantile of" in model_card(made, settings)
    assert "100 in round 1, 30 in round 2, 7 in round 3." in model_card(made, settings)


def test_quality_stands_beside_popularity() -> None:
    settings = load_settings(None, ["privacy.noise_multiplier=2.0"])
    rows = {"popularity": QUALITY, "markov": QUALITY}
    same = QUALITY | {"protocol": "leave-last-out", "users": 100} | rows
    assert "not shown to be better than popularity" in model_card(report(settings, evaluation=same), settings)
    better = same | {"hr@10": 0.3, "hr@10_ci95": [0.25, 0.35]}
    card = model_card(report(settings, evaluation=better), settings)
    assert "| this model | 0.300 [0.250, 0.350] | 0.050 [0.040, 0.060] |" in card
    assert "not shown to be better" not in card
