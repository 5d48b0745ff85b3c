"""The closed loop over several seeds: which learner's policy is worth what, with intervals."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from common.errors import SettingsError
from server.durable import replacing
from simulations.closed_loop import FULL_INFORMATION, LEARNERS, Setup, references, run_learner
from simulations.experiment import Job, in_words, mean_of, run_jobs

MEASURES = ("first", "mean", "consumed")
COMPARISONS = [
    ("top-k", "off-policy"),
    ("top-k", "reinforce"),
    ("off-policy", "cross-entropy"),
    ("reinforce", "cross-entropy"),
    ("off-policy", "best non-personal"),
    ("reinforce", "best non-personal"),
    ("top-k", "best non-personal"),
    ("top-k on the critic", "direct"),
    ("top-k on the critic", "top-k"),
]
"""Pairs whose difference is shown: the same world, users and log for each seed, so that they are compared in pairs."""

PROPENSITIES = ("true propensities", "estimated propensities")
ESTIMATORS = ("ips", "clipped", "snips", "direct", "doubly robust")
ESTIMATED_SLATES = ("ips", "clipped")

_REFERENCES = "references"


def run_closed_loop(
    out: Path,
    setup: Setup,
    learners: list[str],
    seeds: int,
    overrides: list[str],
    *,
    valued: int,
    workers: int,
    on_done: Callable[[int, str], None],
) -> dict[str, Any]:
    """Run every learner on every seed's world, each result into a file of `out`, and summarise them there.

    Args:
        learners: names; all of them if there are none.
        valued: users on whom policies are valued, at most all.

    Raises:
        SettingsError: an unknown learner, or more users to value than there are.
        RunError: `out` holds results of another setup.
    """
    known = [*LEARNERS, FULL_INFORMATION]
    for name in learners:
        if name not in known:
            raise SettingsError(f"Expected the learner {name!r} to be one of {', '.join(known)}.")
    if not 1 <= valued <= setup.users:
        raise SettingsError(f"Expected valued={valued} in [1, {setup.users}].")
    stamp = {"setup": asdict(setup), "overrides": overrides, "valued": valued}
    # One seed after the other: a process keeps its last world, and the next learner needs the same one.
    jobs = [(name, seed) for seed in range(seeds) for name in [_REFERENCES, *(learners or known)]]
    found = run_jobs(out, stamp, jobs, partial(_run, setup, overrides, valued), workers=workers, on_done=on_done)
    summary = {**stamp, "seeds": seeds, **summarise(found)}
    with replacing(out / "closed-loop.json") as file:
        file.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary


def jobs_of(learners: list[str], seeds: int) -> int:
    """How many results there will be."""
    return seeds * (1 + len(learners or [*LEARNERS, FULL_INFORMATION]))


def summarise(found: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """``{"rows": [{"policy", "generation", measure: {"value", "ci95"}…}], "comparisons": […], "off_policy": […]}``."""
    values: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for (name, seed), result in found.items():
        if name == _REFERENCES:
            for policy, value in result.items():
                values.setdefault((policy, 0), {})[seed] = value
        else:
            for number, value in enumerate(result["generations"], start=1):
                values.setdefault((name, number), {})[seed] = value
    rows = [
        {"policy": policy, "generation": generation}
        | {measure: mean_of([value[measure] for value in by_seed.values()]) for measure in MEASURES}
        for (policy, generation), by_seed in values.items()
    ]
    comparisons = []
    for better, worse in COMPARISONS:
        first, second = (values.get((name, 1)) or values.get((name, 0)) for name in (better, worse))
        if first and second:
            differences = [first[seed]["mean"] - second[seed]["mean"] for seed in first]
            comparisons.append({"better": better, "worse": worse, **mean_of(differences)})
    return {"rows": rows, "comparisons": comparisons, "off_policy": _off_policy(found)}


def _off_policy(found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """``[{"policy", "true", propensities: {estimator: error}, "slate": {…}, "behaviour": {…}}]``, means over seeds."""
    reports: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in found.items():
        if result.get("off_policy", {}):
            reports.setdefault(name, []).append(result["off_policy"])
    rows = []
    for policy, seeds in reports.items():
        row: dict[str, Any] = {"policy": policy, "true": mean_of([report["true"] for report in seeds])}
        for kind in PROPENSITIES:
            for name in seeds[0].get(kind, {}):
                errors = [report[kind][name]["value"] - report["true"] for report in seeds]
                row.setdefault(kind, {})[name] = mean_of(errors)
        slates = [report["slate"] for report in seeds]
        row["slate"] = {
            name: mean_of([slate[name]["value"] - slate["true"] for slate in slates]) for name in ESTIMATED_SLATES
        }
        for name in seeds[0].get("behaviour", {}):
            row.setdefault("behaviour", {})[name] = mean_of([report["behaviour"][name] for report in seeds])
        rows.append(row)
    return rows


def off_policy_table(summary: dict[str, Any]) -> Table:
    """How far each estimate is from the truth, with true propensities and with β's."""
    table = Table(title="Off-policy estimates of π after each history, less its true value", show_lines=True)
    for heading in ("policy", "true value", "propensities", *ESTIMATORS):
        table.add_column(heading)
    for row in summary["off_policy"]:
        for kind in PROPENSITIES:
            if kind in row:
                cells = [in_words(row[kind][name]) if name in row[kind] else "-" for name in ESTIMATORS]
                table.add_row(row["policy"], in_words(row["true"]), kind.split()[0], *cells)
    return table


def behaviour_table(summary: dict[str, Any]) -> Table:
    """How well β̂ knows the logging policy."""
    table = Table(
        "policy", "calibration error × A", "log-loss", "entropy of the logging policy", "KL", title="β̂ in nats"
    )
    for row in summary["off_policy"]:
        if "behaviour" in row:
            found = row["behaviour"]
            relative = found["ece"]["value"] / found["mean_probability"]["value"]
            cells = (in_words(found[name]) for name in ("log_loss", "entropy", "kl"))
            table.add_row(row["policy"], f"{relative:.3f}", *cells)
    return table


def values_table(summary: dict[str, Any]) -> Table:
    """True values of all policies, the best mean last."""
    setup = summary["setup"]
    table = Table(
        title=f"True value of slates of {setup['slate_size']}: {setup['users']:,} devices, {setup['items']:,} items, "
        f"{setup['events']} logged events each, seeds: {summary['seeds']}, 95 % intervals"
    )
    for heading in ("policy", "generation", "first item", "mean of the slate", "one consumed"):
        table.add_column(heading)
    for row in sorted(summary["rows"], key=lambda row: float(row["mean"]["value"])):
        table.add_row(row["policy"], str(row["generation"] or "-"), *(in_words(row[measure]) for measure in MEASURES))
    return table


def comparisons_table(summary: dict[str, Any]) -> Table:
    """Differences of the mean over the slate, in pairs."""
    table = Table("difference of the mean of the slate", "value", "")
    for row in summary["comparisons"]:
        low, high = row.get("ci95", (-1, 1))
        relation = "above" if low > 0 else "below" if high < 0 else "not told apart"
        table.add_row(f"{row['better']} − {row['worse']}", in_words(row, 4), relation)
    return table


def _run(setup: Setup, overrides: list[str], valued: int, job: Job) -> dict[str, Any]:
    name, seed = job
    if name == _REFERENCES:
        return references(setup, seed, valued)
    return run_learner(setup, name, overrides, seed, valued=valued)
