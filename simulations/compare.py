"""`fedtopk compare`: the article's three estimators, trained federatedly with otherwise equal settings.

The figures of devices (losses, weights, norms) are seen only because one process simulates all of them.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError, SettingsError
from common.objective import WEIGHT_EDGES, propose_cap
from common.settings import Settings
from server.run_folder import RunFolder
from simulations.presets import load_with_presets
from simulations.recorded import Histogram, Recorded, recorded
from simulations.simulate import Watch, simulate

ESTIMATORS = {"reinforce": "no correction", "off-policy": "correction", "top-k": "top-K correction"}
"""What is compared, and what the article calls it."""

PRESETS = {"privacy.mechanism": "none", "objective.watch": "true"}
"""What a comparison changes of the defaults, unless the configuration or an override says otherwise: no noise, and β
and a critic in all three runs, also where nothing uses them."""

_LAST = 0.1
"""Share of the rounds, the last ones, over which final figures are means."""

_BANDS = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def settings_of(config: Path | None, overrides: Sequence[str]) -> dict[str, Settings]:
    """The settings of each run by its estimator. Raises :class:`SettingsError`."""
    if any(override.partition("=")[0].strip() == "objective.estimator" for override in overrides):
        raise SettingsError(f"Expected no objective.estimator: a comparison trains {', '.join(ESTIMATORS)}.")
    return {
        estimator: load_with_presets(config, PRESETS, [*overrides, f"objective.estimator={estimator}"])
        for estimator in ESTIMATORS
    }


def compare(
    out: Path, settings: dict[str, Settings], workers: int, watch_of: Callable[[str, int], Watch]
) -> dict[str, Any] | None:
    """Train every estimator into a run folder below `out`; the figures of all, or None if the user stopped a run.

    Runs that are there go on where they ended.

    Args:
        settings: as of :func:`settings_of`.
        watch_of: makes the watch of a run from its name and number of rounds.

    Raises:
        RunError: a run in `out` was begun with other settings.
        FedtopkError: whatever else the user can mend.
    """
    folders = {estimator: RunFolder(out / estimator) for estimator in settings}
    begun = {estimator for estimator, folder in folders.items() if folder.settings_file.exists()}
    for estimator in begun:
        if folders[estimator].settings() != settings[estimator]:
            raise RunError(
                f"Expected {folders[estimator].path} to have been begun with the settings of this comparison: "
                "give the same again, or pick another --out."
            )
    reports = {}
    for estimator, own in settings.items():
        watch = watch_of(ESTIMATORS[estimator], own.training.rounds)
        given = None if estimator in begun else own
        reports[estimator] = simulate(folders[estimator], watch, settings=given, workers=workers)
        if reports[estimator]["status"] in ("stopped", "aborted"):
            return None
    rows = {
        estimator: _row(settings[estimator], reports[estimator], recorded(folders[estimator])) for estimator in settings
    }
    comparison = _comparison(settings["reinforce"], reports["reinforce"], rows)
    return comparison | {"findings": findings(comparison)}


def _comparison(settings: Settings, report: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    shared, default = (_printable(tree) for tree in (settings, Settings()))
    return {
        "data": {"source": settings.data.source, "devices": report["devices"]},
        "device_figures": "simulation only: no real run releases them",
        "estimators": rows,
        "popularity": report["evaluation"]["popularity"],
        "markov": report["evaluation"]["markov"],
        "settings": shared,
        "differences": {
            key: {"here": value, "default": default[key]} for key, value in shared.items() if value != default[key]
        },
    }


def _printable(settings: Settings) -> dict[str, Any]:
    """What all runs share, as JSON knows it."""
    return {
        key: str(value) if value in (math.inf, -math.inf) else value
        for key, value in settings.flat().items()
        if key != "objective.estimator"
    }


def _row(settings: Settings, report: dict[str, Any], lines: list[Recorded]) -> dict[str, Any]:
    """One estimator's figures. What its run does not have, such as β without a correction, is absent.

    ``curves`` hold a number for each of ``rounds_recorded``; ``final`` their means over the last tenth of the rounds,
    whose steps ``histograms`` count; ``weight_cap_proposed`` is for the mean over the weights of one round.
    """
    seen = [line for line in lines if line.kind == "simulation"]
    last = seen[-max(1, round(_LAST * len(seen))) :]
    curves = {name: [line.figures[name] for line in seen] for name in (seen[0].figures if seen else ())}
    behaviour = curves.get(f"{settings.objective.head_of_behaviour}_loss")
    if behaviour is not None:
        curves["behaviour_log_probability"] = [-loss for loss in behaviour]
    histograms = {name: _sum([line.histograms[name] for line in last]) for name in (last[0].histograms if last else ())}
    if "weights" in histograms:
        weights, cap = [line.histograms["weights"] for line in seen], settings.objective.weight_cap
        curves["ess_share"] = [effective_share(histogram, cap) for histogram in weights]
        for name, share in _BANDS.items():
            curves[f"weight_{name}"] = [10 ** histogram.quantile(share) for histogram in weights]
    final = {name: float(np.mean(values[-len(last) :])) for name, values in curves.items()}
    if "weights" in histograms:
        counts, middles = histograms["weights"].counts / len(last), histograms["weights"].middles
        final |= {
            "steps": float(counts.sum()),
            "weight_mean": float(counts @ 10**middles / max(counts.sum(), 1)),
            "weight_cap_proposed": propose_cap(counts, WEIGHT_EDGES.numpy()),
        }
    evaluation = report["evaluation"]
    return {
        "name": ESTIMATORS[settings.objective.estimator],
        "status": report["status"],
        "rounds": report["rounds"],
        "privacy": report["privacy"],
        "evaluation": {key: value for key, value in evaluation.items() if key not in ("popularity", "markov")},
        "final": final,
        "final_rounds": len(last),
        "rounds_recorded": [line.round for line in seen],
        "curves": curves,
        "histograms": {
            name: {"bounds": histogram.bounds.tolist(), "counts": histogram.counts.tolist()}
            for name, histogram in histograms.items()
        },
    }


def effective_share(weights: Histogram, cap: float) -> float:
    """(Σw)²/(n Σw²) ∈ (0, 1] of n capped weights, each taken for the geometric middle of its bin; 0 of none."""
    capped, counts = np.minimum(10**weights.middles, cap), weights.counts
    return float((counts @ capped) ** 2 / max(counts.sum() * (counts @ capped**2), np.finfo(float).tiny))


def _sum(histograms: list[Histogram]) -> Histogram:
    return Histogram(np.sum([histogram.counts for histogram in histograms], axis=0), histograms[0].bounds)


def findings(comparison: dict[str, Any]) -> list[str]:
    """What the figures of a comparison say, one sentence each."""
    return [*_of_accuracy(comparison), *_of_weights(comparison), *_of_training(comparison)]


def _of_accuracy(comparison: dict[str, Any]) -> list[str]:
    rows = list(comparison["estimators"].values())
    intervals = {row["name"]: row["evaluation"]["hr@10_ci95"] for row in rows}
    measured = f"HR@10 of {rows[0]['evaluation']['users']} users, by 95 % intervals"
    baselines = {"popularity": comparison["popularity"], "first-order Markov": comparison["markov"]}
    sentences = []
    for baseline, figures in baselines.items():
        relations = (f"{name} is {_relation(own, figures['hr@10_ci95'])} it" for name, own in intervals.items())
        sentences.append(f"{measured}, against {baseline} ({figures['hr@10']:.3f}): {'; '.join(relations)}.")
    pairs = (f"{a} is {_relation(intervals[a], intervals[b])} {b}" for a, b in combinations(intervals, 2))
    sentences.append(f"{measured}, against each other: {'; '.join(pairs)}.")
    sentences.append(
        "Next-item accuracy does not judge a corrected policy, which is trained to be liked and not to repeat the log."
    )
    return sentences


def _relation(own: list[float], other: list[float]) -> str:
    return "above" if own[0] > other[1] else "below" if own[1] < other[0] else "not told apart from"


def _of_weights(comparison: dict[str, Any]) -> list[str]:
    sentences, settings = [], comparison["settings"]
    cap, slate_size = float(settings["objective.weight_cap"]), settings["objective.slate_size"]
    for estimator, row in comparison["estimators"].items():
        name, final = row["name"], row["final"]
        if "ess_share" in final:
            sentences.append(
                f"{name}: over the last {row['final_rounds']} rounds, four of five weights π/β lay between "
                f"{final['weight_p10']:.3g} and {final['weight_p90']:.3g}; their mean was {final['weight_mean']:.3g}, "
                f"1 if π and β are right. Capped at {cap:g}, the {final['steps']:.0f} "
                f"weights of a round are worth {_percent(final['ess_share'])} of as many equal ones (effective sample "
                f"size). For so many, propose_cap gives {final['weight_cap_proposed']:.3g}."
            )
            counts = row["histograms"]["multipliers"]["counts"]
            high = sum(counts[len(counts) // 2 :]) / max(sum(counts), 1)
            applied = "multiplied" if estimator == "top-k" else "would have multiplied"
            sentences.append(f"{name}: λ_K {applied} {_percent(high)} of those steps by over K/2 = {slate_size / 2:g}.")
        elif row["curves"]:
            sentences.append(f"{name}: it divides by no β, so that it has no weights and no β loss.")
    if settings["objective.warmup_rounds"] >= settings["training.rounds"]:
        sentences.append("The warm-up lasted for all rounds: no weight and no λ_K was ever applied.")
    return sentences


def _of_training(comparison: dict[str, Any]) -> list[str]:
    sentences, rows = [], list(comparison["estimators"].values())
    kind, losses = comparison["settings"]["aggregation.kind"], {"critic_loss": "value loss", "behaviour_loss": "β loss"}
    if any(row["curves"] for row in rows) and not any("critic_loss" in row["curves"] for row in rows):
        sentences.append("There is no critic and no value loss: --set objective.watch=true has both.")
    for row in rows:
        curves, final, last = row["curves"], row["final"], row["final_rounds"]
        if not curves:
            sentences.append(f"{row['name']}: aggregation.kind={kind} shows nothing of devices.")
            continue
        parts = [
            f"the {loss} went from {np.mean(curves[key][:last]):.3g} in the first {last} rounds to {final[key]:.3g}"
            for key, loss in losses.items()
            if key in curves
        ]
        parts.append(f"{_percent(final['clipped'])} of the updates were clipped")
        sentences.append(f"{row['name']}, last {last} rounds: {'; '.join(parts)}.")
    return sentences


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
