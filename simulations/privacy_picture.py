"""The picture of `fedtopk privacy plan`: expected signal-to-noise against ε_model."""

from pathlib import Path
from typing import Any

from common.errors import MissingDependency
from common.privacy.planning import AMPLE, NEEDED, USEFUL

try:
    from matplotlib.figure import Figure
except ImportError:
    raise MissingDependency("Expected matplotlib to draw the picture: pip install 'fedtopk[pictures]'.") from None

_COLOURS = ("#0072B2", "#E69F00", "#009E73")  # told apart by all kinds of colour vision (Okabe & Ito 2008)


def draw(curve: dict[str, list[tuple[float, float]]], plan: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Args:
        curve, plan: of :mod:`common.privacy.planning`.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(curve.items(), _COLOURS, strict=True):
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", label=name)
    axes.plot(plan["epsilon_model"], plan["signal_to_noise"], "D", color="black", label="the plan")
    axes.axhspan(axes.get_ylim()[0], NEEDED, color="#BBBBBB", alpha=0.4, label="the noise outweighs the signal")
    axes.axhline(USEFUL, color="#BBBBBB", linestyle=":", label="clearly above popularity")
    axes.axhline(AMPLE, color="#BBBBBB", linestyle="--", label="noise is not what limits quality")
    axes.set(xscale="log", yscale="log", ylabel="expected signal-to-noise (upper estimate)")
    axes.set_xlabel(f"ε_model: one user added or removed, for {plan['observer']['epsilon_model']}; each at its own δ")
    axes.set_title(
        f"{plan['users']:,} users, cohort {plan['cohort']:,}, {plan['rounds']:,} rounds, δ={plan['delta']:.2g}"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)
