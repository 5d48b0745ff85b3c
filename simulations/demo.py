"""`fedtopk demo`: what federated training reaches on MovieLens small, without privacy and under two budgets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from common.settings import load_settings
from server.run_folder import RunFolder
from simulations.simulate import Watch, simulate

RUNS = {
    "cross-entropy, not private": ["objective.estimator=cross-entropy", "privacy.mechanism=none"],
    "top-K, not private": ["privacy.mechanism=none"],
    "top-K, ε=8": ["privacy.target_epsilon=8", "training.rounds=200", "objective.warmup_rounds=100"],
    "top-K, ε=2": ["privacy.target_epsilon=2", "training.rounds=200", "objective.warmup_rounds=100"],
}
"""What each run changes of the default settings. At a given ε more rounds mean more noise in each and gain nothing."""


def demo(out: Path, workers: int, watch_of: Callable[[str, int], Watch]) -> dict[str, Any]:
    """Train all runs into folders below `out`; returns their reports by name.

    Args:
        watch_of: makes the watch of a run from its name and number of rounds.
    """
    reports = {}
    for number, (name, overrides) in enumerate(RUNS.items(), start=1):
        settings = load_settings(None, overrides)
        watch = watch_of(name, settings.training.rounds)
        folder = RunFolder(out / f"run-{number}")
        begun = folder.settings_file.exists()  # an earlier demo goes on where it ended
        reports[name] = simulate(folder, watch, settings=None if begun else settings, workers=workers)
        if reports[name]["status"] in ("stopped", "aborted"):
            break
    return reports


def results_table(reports: dict[str, Any]) -> Table:
    """All runs, with popularity and Markov on the same split."""
    evaluation = next(iter(reports.values()))["evaluation"]
    private = (report["privacy"] for report in reports.values() if "epsilon_model" in report["privacy"])
    table = Table(
        title=f"MovieLens small, {evaluation['users']} users, last interaction held out, full ranking",
        caption=next((_meaning(privacy) for privacy in private), None),
    )
    for heading in ("", "ε_model", "ε_server", "HR@10 [95 %]", "NDCG@10 [95 %]", "coverage"):
        table.add_column(heading)
    rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "popularity": ({}, evaluation["popularity"]),
        "first-order Markov": ({}, evaluation["markov"]),
    }
    rows |= {name: (report["privacy"], report["evaluation"]) for name, report in reports.items()}
    for name, (privacy, figures) in rows.items():
        spent = (f"{privacy[key]:.2f}" if key in privacy else "-" for key in ("epsilon_model", "epsilon_server"))
        cells = (f"{figures[key]:.3f} {_interval(figures, key)}" for key in ("hr@10", "ndcg@10"))
        table.add_row(name, *spent, *cells, f"{figures['coverage@10']:.2f}")
    return table


def _meaning(privacy: dict[str, Any]) -> str:
    figures = (
        f"{heading}: {privacy['adjacency'][key]}, for {privacy['observer'][key]}"
        for heading, key in (("ε_model", "epsilon_model"), ("ε_server", "epsilon_server"))
    )
    return f"Per {privacy['unit']}, δ={privacy['delta']:.2g}. {'. '.join(figures)}."


def verdict(reports: dict[str, Any]) -> str:
    """One sentence about what so many users can and cannot support, from the intervals themselves."""
    first = next(iter(reports.values()))
    popularity, parts = first["evaluation"]["popularity"], []
    for name, report in reports.items():
        low, high = report["evaluation"]["hr@10_ci95"]
        lowest, highest = popularity["hr@10_ci95"]
        relation = "above" if low > highest else "below" if high < lowest else "not told apart from"
        parts.append(f"{name}: {relation} popularity")
    return (
        f"What {first['devices']} users support, by 95 % intervals of HR@10: {'; '.join(parts)}. "
        "Next-item accuracy does not judge a corrected policy, which is trained to be liked and not to repeat the log."
    )


def _interval(figures: dict[str, Any], key: str) -> str:
    low, high = figures[f"{key}_ci95"]
    return f"\\[{low:.3f}, {high:.3f}]"
