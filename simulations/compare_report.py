"""A comparison to look at: one picture, and one self-contained page with the picture in it.

The picture needs the extra: pip install 'fedtopk[pictures]'.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from common.errors import MissingDependency
from server.durable import replacing

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter
except ImportError:
    hint = "pip install 'fedtopk[pictures]'"
    raise MissingDependency(f"Expected matplotlib to draw a comparison ({hint}).") from None

_LOOKS = {"reinforce": ("#0072B2", "o"), "off-policy": ("#D55E00", "s"), "top-k": ("#009E73", "^")}
"""Colour and marker: Okabe and Ito's palette, told apart with any colour vision."""
_GREY = "#555555"
_SMOOTHED = 0.05
"""Share of the rounds over which the lines are running means."""


def write_report(comparison: dict[str, Any], out: Path) -> dict[str, str]:
    """Write ``compare.json``, ``.png`` and ``.html`` into `out`; their paths. Raises :class:`RunError`."""
    paths = {kind: out / f"compare.{kind}" for kind in ("json", "png", "html")}
    with replacing(paths["json"]) as file:
        file.write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(paths["png"]) as file:
        picture(comparison).savefig(file, format="png", dpi=110, metadata={"Software": None})
    with replacing(paths["html"]) as file:
        file.write_text(page(comparison, paths["png"].read_bytes()), encoding="utf-8")
    return {kind: str(path) for kind, path in paths.items()}


def picture(comparison: dict[str, Any]) -> Figure:
    """Nine panels, as ``docs/formulas/comparison.md`` explains them."""
    figure = Figure(figsize=(15, 12), layout="constrained", facecolor="white")
    losses, rest, last = figure.subplots(3, 3)
    _course(
        losses[0],
        comparison,
        "Policy loss (scales differ: so do the weights)",
        "−c log π, mean per step",
        ["policy_loss"],
    )
    losses[0].set_yscale("symlog", linthresh=1)
    _course(losses[1], comparison, "Value loss", "cross-entropy, nats", ["critic_loss"])
    _course(losses[2], comparison, "β loss", "cross-entropy, nats", ["behaviour_loss"])
    _course(
        rest[0], comparison, "Logged items: log π and, dotted, log β", "nats", ["log_pi", "behaviour_log_probability"]
    )
    _weights(rest[1], comparison)
    _course(rest[2], comparison, "Effective sample size of the capped weights", "share of the steps", ["ess_share"])
    _multipliers(last[0], comparison)
    _course(last[1], comparison, "Updates whose norm was clipped", "share of the updates", ["clipped"])
    _accuracy(last[2], comparison)
    for axes in (rest[2], last[1]):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    rows, data = comparison["estimators"], comparison["data"]
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker=marker, linewidth=2, label=rows[estimator]["name"])
            for estimator, (colour, marker) in _LOOKS.items()
        ],
        title=f"REINFORCE on {data['source']}, {data['devices']} devices, "
        f"privacy mechanism: {comparison['settings']['privacy.mechanism']}",
        title_fontsize=15,
        fontsize=13,
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    figure.supxlabel(
        "All but HR@10 is seen in a simulation only; no real run releases it. "
        "Lines are running means over a twentieth of the rounds; the warm-up is grey.",
        fontsize=11,
        color=_GREY,
    )
    return figure


def _course(axes: Axes, comparison: dict[str, Any], title: str, unit: str, curves: list[str]) -> None:
    """Curves over the rounds, the first one of each estimator full and the second one dotted."""
    for estimator, row in comparison["estimators"].items():
        for name, style in zip(curves, ("-", ":"), strict=False):
            if name in row["curves"]:
                smooth = _running_mean(row["curves"][name])
                axes.plot(row["rounds_recorded"], smooth, style, **_look(estimator, len(smooth)))
    _finish(axes, title, "round", unit)
    _name_absent(axes, [row["name"] for row in comparison["estimators"].values() if curves[0] not in row["curves"]])
    _shade_warm_up(axes, comparison["settings"])


def _weights(axes: Axes, comparison: dict[str, Any]) -> None:
    """Median and 10 to 90 % band of π/β over the rounds, and the cap."""
    rows, cap = comparison["estimators"], float(comparison["settings"]["objective.weight_cap"])
    for estimator, row in rows.items():
        if "weight_p50" in row["curves"]:
            low, middle, high = (_running_mean(row["curves"][f"weight_{p}"]) for p in ("p10", "p50", "p90"))
            look, rounds = _look(estimator, len(middle)), row["rounds_recorded"]
            axes.fill_between(rounds, low, high, color=look["color"], alpha=0.2, linewidth=0)
            axes.plot(rounds, middle, **look)
            axes.set_yscale("log")
    _finish(axes, "Correction π/β before its cap: median, 10 to 90 % band", "round", "π/β")
    if axes.lines and np.isfinite(cap):
        axes.axhline(cap, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"cap {cap:g}", (0.98, cap), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    _name_absent(axes, [row["name"] for row in rows.values() if "weight_p50" not in row["curves"]])
    _shade_warm_up(axes, comparison["settings"])


def _multipliers(axes: Axes, comparison: dict[str, Any]) -> None:
    """Shares of the last steps by their λ_K."""
    rows = comparison["estimators"]
    for estimator, row in rows.items():
        if "multipliers" in row["histograms"]:
            histogram = row["histograms"]["multipliers"]
            counts = np.array(histogram["counts"])
            axes.stairs(counts / max(counts.sum(), 1), histogram["bounds"], color=_LOOKS[estimator][0], linewidth=2)
            axes.set_yscale("log")
    _finish(axes, "λ_K in the last tenth of the rounds (used by top-K alone)", "λ_K", "share of the steps")
    _name_absent(axes, [row["name"] for row in rows.values() if "multipliers" not in row["histograms"]])


def _accuracy(axes: Axes, comparison: dict[str, Any]) -> None:
    """HR@10 of the last model with its 95 % interval, beside both baselines."""
    bars = [(row["name"], row["evaluation"], *_LOOKS[estimator]) for estimator, row in comparison["estimators"].items()]
    bars += [("popularity", comparison["popularity"], _GREY, "D"), ("Markov", comparison["markov"], _GREY, "v")]
    for place, (_, figures, colour, marker) in enumerate(bars):
        low, high = figures["hr@10_ci95"]
        axes.plot([low, high], [place, place], color=colour, linewidth=3)
        axes.plot(figures["hr@10"], place, marker, color=colour, markersize=9)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    _finish(axes, "HR@10 of the last model, 95 % intervals", "HR@10, held-out interaction, full ranking", "")


def _look(estimator: str, rounds: int) -> dict[str, Any]:
    """Colour and a few markers, which stand beside each other where lines coincide."""
    (colour, marker), every = _LOOKS[estimator], max(1, rounds // 6)
    first = list(_LOOKS).index(estimator) * every // len(_LOOKS)
    return {"color": colour, "marker": marker, "markevery": (first, every), "markersize": 6}


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _name_absent(axes: Axes, names: list[str]) -> None:
    if names:
        missing = "" if len(names) == len(_LOOKS) else f": {', '.join(names)}"
        axes.set_title(f"{axes.get_title()}\nnot recorded{missing}", fontsize=11)


def _shade_warm_up(axes: Axes, settings: dict[str, Any]) -> None:
    axes.set_xlim(0, settings["training.rounds"])
    axes.axvspan(0, settings["objective.warmup_rounds"], color="black", alpha=0.06, linewidth=0)


def _running_mean(values: list[float]) -> np.ndarray:
    """Means over a twentieth of the rounds around each; over what there is of them at the ends."""
    window = np.ones(max(1, round(_SMOOTHED * len(values))))
    sums, counts = (np.convolve(row, window, "same") for row in (values, np.ones(len(values))))
    means: np.ndarray = sums / counts
    return means


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem }
img { width: 100%; height: auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
caption { text-align: left; color: #555 }
"""

_FIGURES = {
    "policy_loss": "policy loss",
    "critic_loss": "value loss, nats",
    "behaviour_loss": "β loss, nats",
    "behaviour_log_probability": "log β of the logged item, nats",
    "log_pi": "log π of the logged item, nats",
    "weight_p10": "π/β, 10 % quantile",
    "weight_p50": "π/β, median",
    "weight_p90": "π/β, 90 % quantile",
    "weight_mean": "π/β, mean (1 if π and β are right)",
    "steps": "steps of a round",
    "ess_share": "effective sample size, share of the steps",
    "weight_cap_proposed": "weight cap that propose_cap gives",
    "clipped": "clipped updates, share",
    "norm": "norm of an update before its clip",
}
"""Final figures by their names in ``compare.json``."""

_ACCURACY_HEADS = ["", "HR@10 [95 %]", "NDCG@10 [95 %]", "coverage@10"]


def page(comparison: dict[str, Any], png: bytes) -> str:
    """The page: words, picture, tables and settings. It refers to nothing outside of itself."""
    rows = comparison["estimators"].values()
    names = [row["name"] for row in rows]
    final = [[label, *(_number(row["final"].get(key)) for row in rows)] for key, label in _FIGURES.items()]
    differences = [[key, *pair.values()] for key, pair in comparison["differences"].items()]
    findings = "".join(f"<li>{escape(sentence)}</li>" for sentence in comparison["findings"])
    data = comparison["data"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fedtopk compare</title><style>{_STYLE}</style></head><body>
<h1>Top-K off-policy correction: three ways compared</h1>
<p>REINFORCE without correction, with the correction π/β, and with the top-K correction λ_K π/β, trained federatedly on
{escape(data["source"])} ({data["devices"]} devices) with otherwise equal settings.</p>
<h2>What is seen</h2>
<ul>{findings}</ul>
<h2>Over the rounds</h2>
<img alt="Nine panels of losses, weights and accuracy" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Figures</h2>
{_table("Full ranking of the held-out interaction", _ACCURACY_HEADS, _accuracy_rows(comparison))}
{_table(f"Means over the last tenth of the rounds. {comparison['device_figures'].capitalize()}.", ["", *names], final)}
<h2>Settings</h2>
{_table("What differs from the defaults", ["setting", "here", "default"], differences)}
<details><summary>All settings</summary>
{_table("", ["setting", "here"], [[key, value] for key, value in comparison["settings"].items()])}</details>
</body></html>
"""


def results_table(comparison: dict[str, Any]) -> Table:
    """The accuracy of the three and of both baselines, for a terminal."""
    data = comparison["data"]
    table = Table(title=f"{data['source']}, {data['devices']} devices, full ranking of the held-out interaction")
    for heading in _ACCURACY_HEADS:
        table.add_column(heading)
    for row in _accuracy_rows(comparison):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _accuracy_rows(comparison: dict[str, Any]) -> list[list[str]]:
    evaluations = {row["name"]: row["evaluation"] for row in comparison["estimators"].values()}
    evaluations |= {"popularity": comparison["popularity"], "Markov": comparison["markov"]}
    rows = []
    for name, figures in evaluations.items():
        intervals = (
            f"{figures[key]:.3f} [{figures[f'{key}_ci95'][0]:.3f}, {figures[f'{key}_ci95'][1]:.3f}]"
            for key in ("hr@10", "ndcg@10")
        )
        rows.append([name, *intervals, f"{figures['coverage@10']:.3f}"])
    return rows


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tr>{heads}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
