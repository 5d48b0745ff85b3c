"""Federated beside central training of the same architecture, by full ranking on real data, over several seeds.

The seed draws the initial model, the cohorts and minibatches, the users' windows, and which of a user's interactions of
the same second counts as the last: the baselines, too, differ from seed to seed.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from common.settings import load_settings
from server.durable import replacing
from simulations.central import train_centrally
from simulations.evaluation import compare
from simulations.experiment import Job, in_words, mean_of, run_jobs
from simulations.federated import train
from simulations.recommender import PolicyScorer
from simulations.simulate import load_split

CASES: dict[str, list[str]] = {
    "cross-entropy": ["objective.estimator=cross-entropy"],
    "reinforce": ["objective.estimator=reinforce"],
    "off-policy": ["objective.estimator=off-policy"],
    "top-k": ["objective.estimator=top-k"],
    "cross-entropy, full softmax": ["objective.estimator=cross-entropy", "objective.softmax=full"],
    "cross-entropy, 256 log-uniform negatives": ["objective.estimator=cross-entropy", "objective.negatives=256"],
    "cross-entropy, 256 uniform negatives": [
        "objective.estimator=cross-entropy",
        "objective.negatives=256",
        "objective.negatives_from=uniform",
    ],
}
"""What each case changes of the settings."""

WAYS = ("federated", "central")
METRICS = ("hr@10", "ndcg@10")


def run_accuracy(
    out: Path,
    cases: list[str],
    seeds: int,
    overrides: list[str],
    *,
    workers: int,
    on_done: Callable[[int, str], None],
) -> dict[str, Any]:
    """Train every case both ways with every seed, each result into a file of `out`, and summarise them there.

    Raises:
        SettingsError, DataError: settings or data that cannot be used.
        RunError: `out` holds results of other settings.
    """
    # A user's mistake shows before the work.
    settings = [load_settings(None, [*_BASE, *overrides, *CASES[case]]) for case in cases]
    load_split(settings[0])
    jobs = [(f"{case} {way}", seed) for seed in range(seeds) for case in cases for way in WAYS]
    stamp = {"overrides": overrides}
    found = run_jobs(out, stamp, jobs, partial(_run, overrides), workers=workers, on_done=on_done)
    summary = {**stamp, "seeds": seeds, "rows": summarise(found, cases)}
    with replacing(out / "accuracy.json") as file:
        file.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary


def summarise(found: dict[Job, dict[str, Any]], cases: list[str]) -> list[dict[str, Any]]:
    """``[{"case", way: {metric: …}, "gap": {metric: …}}]``: the gap is how much of the central figure is missing."""
    rows: list[dict[str, Any]] = []
    by_seed = {seed: result for (_, seed), result in found.items()}
    for name in ("popularity", "markov"):
        figures = {m: mean_of([result[name][m] for result in by_seed.values()]) for m in METRICS}
        rows.append({"case": name, **figures})
    for case in cases:
        by_way = {
            way: {metric: [found[job][metric] for job in found if job[0] == f"{case} {way}"] for metric in METRICS}
            for way in WAYS
        }
        means = {way: {metric: mean_of(values) for metric, values in by_way[way].items()} for way in WAYS}
        values = {m: [means[way][m]["value"] for way in WAYS] for m in METRICS}
        gap = {m: 1 - federated / central for m, (federated, central) in values.items() if central}
        rows.append({"case": case, **means, "gap": gap})
    return rows


def accuracy_table(summary: dict[str, Any]) -> Table:
    """All cases, both ways, beside popularity and Markov."""
    table = Table(title=f"Full ranking on the test targets, seeds: {summary['seeds']}, 95 % intervals over seeds")
    for heading in ("", "HR@10 federated", "HR@10 central", "gap", "NDCG@10 federated", "NDCG@10 central", "gap"):
        table.add_column(heading)
    for row in summary["rows"]:
        if "gap" not in row:
            table.add_row(row["case"], "", in_words(row["hr@10"], 4), "", "", in_words(row["ndcg@10"], 4), "")
            continue
        cells = []
        for metric in METRICS:
            gap = f"{row['gap'][metric]:+.1%}" if metric in row["gap"] else "-"
            cells += [*(in_words(row[way][metric], 4) for way in WAYS), gap]
        table.add_row(row["case"], *cells)
    return table


_BASE = ["privacy.mechanism=none", "training.checkpoint_every=1000000"]


def _run(overrides: list[str], job: Job) -> dict[str, Any]:
    name, seed = job
    case, way = name.rsplit(" ", 1)
    settings = load_settings(None, [*_BASE, *overrides, *CASES[case], f"training.seed={seed}"])
    data = load_split(settings)
    trained = (train if way == "federated" else train_centrally)(settings, data.train)
    scorer = PolicyScorer(settings, trained.parameters, trained.population.users)
    return compare(scorer, data, "test", seed=seed)
