"""What a study of utility under privacy found: values, ratios to the run without privacy, intervals; as tables.

With several seeds an interval is Student's over seeds: worlds, logs, noise and coins all differ. With one it is over
the valued users of that world (delta method for a ratio of means, paired), and says nothing of the luck of the others.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from simulations.experiment import in_words, mean_of

MEASURES = ("first", "mean")
"""Probability that the first item is liked; mean over the slate of it."""

NOT_PRIVATE, POPULARITY, BEST_FIXED = "not private", "popularity", "best non-personal"
DP_POPULARITY = "DP popularity"
TARGET = 0.95
"""Part of the value without privacy that a private policy is asked to keep."""

Found = dict[int, dict[str, dict[str, Any]]]
"""By seed, by policy: ``values`` by measure and user, and of what was released ``privacy``; of trainings more."""


def summarise(found: Found) -> dict[str, Any]:
    """``{"interval", "seeds", "policies": [row], "findings": [sentence]}``.

    A row: ``{"policy", measure: figure, "ratio": {measure: figure}, "learned": {measure: figure},
    "above_popularity": figure, "privacy"?, "signal_to_noise"?, "parameters"?, "seconds"?}``, a figure ``{"value",
    "ci95"}``. ``ratio`` is the value over that without privacy; ``learned`` the same with popularity's taken off both;
    ``above_popularity`` the mean of the slate less popularity's, for a private policy less DP popularity's at that ε.
    """
    seeds, first = list(found), next(iter(found.values()))

    def values(policy: str, measure: str) -> list[np.ndarray]:
        return [np.array(found[seed][policy]["values"][measure]) for seed in seeds]

    rows = []
    for policy, result in first.items():
        row: dict[str, Any] = {"policy": policy, "ratio": {}, "learned": {}}
        for measure in MEASURES:
            own, best, popular = (values(name, measure) for name in (policy, NOT_PRIVATE, POPULARITY))
            row[measure] = mean_figure(own)
            row["ratio"][measure] = ratio_figure(own, best)
            row["learned"][measure] = ratio_figure(_less(own, popular), _less(best, popular))
        rival = f"{DP_POPULARITY}, {policy}" if "signal_to_noise" in result else POPULARITY
        row["above_popularity"] = mean_figure(_less(values(policy, "mean"), values(rival, "mean")))
        row |= {key: result[key] for key in ("privacy", "signal_to_noise", "parameters") if key in result}
        if "seconds" in result:
            row["seconds"] = [found[seed][policy]["seconds"] for seed in seeds]
        rows.append(row)
    users = len(values(NOT_PRIVATE, "mean")[0])
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else f"{users:,} users of one world"
    gain = mean_figure(_less(values(NOT_PRIVATE, "mean"), values(BEST_FIXED, "mean")))
    return {"interval": over, "seeds": seeds, "policies": rows, "findings": [*_findings(rows, gain)]}


def ratio_figure(numerators: Sequence[np.ndarray], denominators: Sequence[np.ndarray]) -> dict[str, Any]:
    """The ratio of two means over users, averaged over seeds, with its 95 % interval.

    Args:
        numerators, denominators: one array for each seed, of the same users' values.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    ratios = [float(a.mean() / b.mean()) for a, b in pairs]
    if len(pairs) > 1:
        return mean_of(ratios)
    (a, b), ratio = pairs[0], ratios[0]
    half = float(stats.norm.ppf(0.975) * np.std(a - ratio * b, ddof=1) / len(a) ** 0.5 / abs(b.mean()))
    return {"value": ratio, "ci95": [ratio - half, ratio + half]}


def mean_figure(values: Sequence[np.ndarray]) -> dict[str, Any]:
    """As :func:`ratio_figure`, of a mean."""
    return ratio_figure(values, [np.ones_like(own) for own in values])


def _less(values: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [own - other for own, other in zip(values, others, strict=True)]


def _findings(rows: list[dict[str, Any]], gain: dict[str, Any]) -> Iterator[str]:
    sign = "above" if gain["ci95"][0] > 0 else "below" if gain["ci95"][1] < 0 else "not told apart from"
    yield (
        f"Without privacy the policy is {sign} the best ranking that is the same for everyone: a difference of "
        f"{_bare(gain)} in the mean of the slate."
        + ("" if sign == "above" else " A ratio to it says nothing of what can be learned privately.")
    )
    for row in trained_privately(rows):
        low, high = row["ratio"]["mean"]["ci95"]
        relation = (
            f"at least {TARGET:.0%}"
            if low >= TARGET
            else f"less than {TARGET:.0%}"
            if high < TARGET
            else f"not told apart from {TARGET:.0%}"
        )
        lower, upper = row["above_popularity"]["ci95"]
        rival = "above" if lower > 0 else "below" if upper < 0 else "not told apart from"
        yield (
            f"{row['policy']}: {_bare(row['ratio']['mean'])} of the value without privacy (mean of the slate), "
            f"{relation}; {_bare(row['learned']['mean'])} of what is learned beyond popularity; {rival} DP popularity "
            "at the same ε."
        )


def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of trainings."""
    return [row for row in rows if "seconds" in row]


def trained_privately(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of private trainings."""
    return [row for row in rows if "signal_to_noise" in row]


def values_table(summary: dict[str, Any]) -> Table:
    """All policies, the best mean last."""
    setup = summary["setup"]
    table = Table(
        title=f"True value of slates of {setup['slate_size']}: {setup['users']:,} devices, {setup['items']:,} items, "
        f"{summary['rounds']} rounds, cohort {summary['cohort']:,}; 95 % intervals over {summary['interval']}"
    )
    for heading in ("policy", "first item", "mean of the slate", "ratio", "learned"):
        table.add_column(heading)
    for row in sorted(summary["policies"], key=lambda row: float(row["mean"]["value"])):
        figures = [*(row[measure] for measure in MEASURES), *(row[name]["mean"] for name in ("ratio", "learned"))]
        table.add_row(row["policy"], *map(in_words, figures))
    return table


def privacy_words(summary: dict[str, Any]) -> list[str]:
    """What was spent, on what, and what the ε mean, a line each."""
    rows = [row for row in summary["policies"] if "privacy" in row and "epsilon_model" in row["privacy"]]
    lines = []
    for row in rows:
        privacy = row["privacy"]
        lines.append(
            f"{row['policy']}: ε_model {privacy['epsilon_model']:.2f}, ε_server {privacy['epsilon_server']:.1f}, "
            f"noise multiplier {privacy['noise_multiplier']:.4g} ({privacy['noise']}), C={privacy['clip_norm']:g}"
        )
    for row in trained(summary["policies"]):
        ratio = f", planned signal-to-noise {row['signal_to_noise']:.2g}" if "signal_to_noise" in row else ""
        seconds = ", ".join(f"{one:.0f}" for one in row["seconds"])
        lines.append(f"{row['policy']}: {row['parameters']:,} parameters{ratio}, trained in {seconds} s")
    privacy = rows[0]["privacy"]
    lines += [
        f"{name.replace('epsilon', 'ε')}: unit one {privacy['unit']}; δ={privacy['delta']:.3g}; "
        f"adjacency: {privacy['adjacency'][name]}; observer: {privacy['observer'][name]}"
        for name in ("epsilon_model", "epsilon_server")
    ]
    return lines


def _bare(figure: dict[str, Any]) -> str:
    return in_words(figure).replace("\\[", "[")
