"""The picture of `fedtopk paper`: what was logged, what was learned from it, and what should have been."""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import MissingDependency
from simulations.paper import SIMULATIONS

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise MissingDependency("Expected matplotlib to draw the picture: pip install 'fedtopk[pictures]'.") from None

_GREY, _BLUE, _ORANGE = "#BBBBBB", "#0072B2", "#E69F00"  # told apart by all kinds of colour vision (Okabe & Ito 2008)

_TITLES = {
    "uncorrected": "REINFORCE on the log, uncorrected",
    "corrected": "off-policy corrected",
    "corrected_capped": "corrected, weights capped at e³",
    "k1": "top-K corrected, K = 1",
    "k2": "top-K corrected, K = 2",
}


def draw(answer: dict[str, Any], path: Path) -> None:
    """Write a PNG, one panel for each case and a row for each simulation.

    Args:
        answer: of :func:`simulations.paper.run_paper`.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    for simulation, row in zip(SIMULATIONS, panels, strict=True):
        for case, axes in zip(simulation.cases, row, strict=False):
            found = answer[simulation.name][case.name]
            handles = _panel(axes, found)
            values = f"E[r] = {found['value']:.2f}, exact {found['exact']['value']:.2f}"
            axes.set_title(f"{simulation.name}: {_TITLES[case.name]}\n{values}", fontsize=11)
            axes.set_xticks(range(len(simulation.rewards)), [f"{reward:g}" for reward in simulation.rewards])
            axes.set_xlabel("reward of items 1 to 10")
        row[0].set_ylabel("probability")
    panels[1, 2].axis("off")
    panels[1, 2].legend(handles=handles, loc="center", frameon=False, fontsize=12)
    figure.suptitle("The simulations of Chen et al. 2019 (WSDM), trained federatedly", fontsize=14)
    figure.savefig(path, format="png", dpi=130)


def _panel(axes: Axes, row: dict[str, Any]) -> list[Any]:
    """Draw one case; returns what the legend is to explain."""
    items = np.arange(len(row["policy"]))
    spread, seeds = np.std(row["policy_by_seed"], 0), row["seeds"]
    axes.set_ylim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    label = f"π, federated: mean ± deviation, {seeds} seeds"
    (central,) = axes.plot(items + 0.2, row["central"]["policy"], "D", color=_ORANGE, mec="black", ms=5, zorder=3)
    central.set_label("π, central")
    return [
        axes.bar(items - 0.2, row["logged"]["policy"], 0.4, color=_GREY, label="β, which logged"),
        axes.bar(items + 0.2, row["policy"], 0.4, yerr=spread, capsize=3, color=_BLUE, label=label),
        central,
        axes.hlines(row["exact"]["policy"], items - 0.1, items + 0.5, color="black", linewidth=2, label="π, exact"),
    ]
