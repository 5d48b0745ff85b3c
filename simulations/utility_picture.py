"""The picture of `fedtopk privacy utility`: true value against ε_model, beside what needs no training."""

from pathlib import Path
from typing import Any

from common.errors import MissingDependency
from simulations.utility_summary import BEST_FIXED, DP_POPULARITY, NOT_PRIVATE, POPULARITY, trained_privately

try:
    from matplotlib.figure import Figure
except ImportError:
    raise MissingDependency("Expected matplotlib to draw the picture: pip install 'fedtopk[pictures]'.") from None

_BLUE, _ORANGE = "#0072B2", "#E69F00"  # told apart by all kinds of colour vision (Okabe & Ito 2008)
_LEVELS = {NOT_PRIVATE: "-", BEST_FIXED: "--", POPULARITY: ":", "oracle": "-."}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write a PNG of a summary as of :func:`simulations.utility.run_study`."""
    rows = {row["policy"]: row for row in summary["policies"]}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    private = trained_privately(summary["policies"])
    rivals = [rows[f"{DP_POPULARITY}, {row['policy']}"] for row in private]
    for found, name, colour in ((private, "private training", _BLUE), (rivals, DP_POPULARITY, _ORANGE)):
        found = sorted(found, key=_epsilon)
        values = [row["mean"]["value"] for row in found]
        reach = [[abs(row["mean"]["ci95"][end] - row["mean"]["value"]) for row in found] for end in (0, 1)]
        axes.errorbar([_epsilon(row) for row in found], values, reach, color=colour, marker="o", capsize=4, label=name)
    for name, style in _LEVELS.items():
        axes.axhline(rows[name]["mean"]["value"], color="#555555", linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_xticks(list(map(_epsilon, private)), [f"{_epsilon(row):.2g}" for row in private])
    axes.minorticks_off()
    axes.set(ylabel="true value: mean of the slate", ylim=(0, None))
    privacy, setup = private[0]["privacy"], summary["setup"]
    axes.set_xlabel(
        f"ε_model: one {privacy['unit']}, {privacy['adjacency']['epsilon_model']}; δ={privacy['delta']:.2g}"
    )
    axes.set_title(f"{setup['users']:,} devices, {setup['items']:,} items; 95 % intervals over {summary['interval']}")
    figure.legend(loc="outside right upper", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def _epsilon(row: dict[str, Any]) -> float:
    return float(row["privacy"]["epsilon_model"])
