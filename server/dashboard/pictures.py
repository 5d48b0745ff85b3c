"""Charts as matplotlib draws them."""

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from server.dashboard.charts import PALETTE, Chart, Heat

_SIZE = (6.4, 3.6)


def picture(chart: Chart | Heat) -> Figure:
    """One figure, white, with title, units and legend."""
    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_title(chart.title)
    axes.set_ylabel(chart.unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(fill(chart.note, 110), fontsize=7)
    if isinstance(chart, Heat):
        axes.set_xlabel("round")
        edges = np.append(chart.x, chart.x[-1] + 1)
        mesh = axes.pcolormesh(edges, chart.bounds, chart.shares.T, cmap="viridis_r")
        if chart.bounds[0] > 0 and chart.bounds[-1] > 100 * chart.bounds[0]:
            axes.set_yscale("log")
        figure.colorbar(mesh, label="% of the round")
        return figure
    axes.set_xlabel(chart.x)
    width = 0.8 / max(len(chart.lines), 1)
    for place, line in enumerate(chart.lines):
        colour = PALETTE[(place if line.colour < 0 else line.colour) % len(PALETTE)]
        y = np.array(line.y, float)
        if chart.categories:
            axes.bar(
                np.arange(len(y)) + (place - (len(chart.lines) - 1) / 2) * width,
                y,
                width,
                color=colour,
                label=line.name,
            )
            continue
        marker = "o" if len(y) < 30 else None
        axes.plot(line.x, y, "--" if line.dashed else "-", color=colour, marker=marker, markersize=4, label=line.name)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, np.array(line.low, float), np.array(line.high, float), color=colour, alpha=0.18)
    if chart.categories:
        axes.set_xticks(range(len(chart.categories)), chart.categories)
    if chart.log:
        axes.set_yscale("log")
    elif chart.zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure
