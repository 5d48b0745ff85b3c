"""Charts as data, whoever draws them: lines with intervals, and shares of histograms over rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

POINTS = 300
"""Of a line: longer ones are cut into as many stretches, of which the means are shown."""
COLUMNS = 100
"""Of a histogram over rounds, by the same rule."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
"""Okabe and Ito's, told apart with any colour vision; the yellow is darker, for white paper."""
DASHES = ("solid", "dashed", "dotted")

Numbers = Sequence[float | None] | np.ndarray
"""Those that are missing are None or NaN."""


@dataclass(frozen=True)
class Line:
    """One series: (n,) `x` ascending, (n,) `y`; (n,) bounds of its 95 % interval."""

    name: str
    x: Sequence[float]
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False
    colour: int = -1
    """In the palette; by default the line's place in its chart."""


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis; or bars, of which each line's `x` are the places of `categories`."""

    id: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    x: str = "round"
    note: str = ""
    log: bool = False
    categories: tuple[str, ...] = ()
    zero: bool = True
    """Whether the axis begins at 0."""


@dataclass(frozen=True)
class Heat:
    """A histogram over rounds: (n, bins) `shares` of each of the (n,) rounds, between (bins+1,) ascending `bounds`."""

    id: str
    title: str
    unit: str
    x: Sequence[float]
    bounds: Sequence[float]
    shares: np.ndarray
    note: str = ""


def thinned(line: Line) -> Line:
    """At most :data:`POINTS` of a line: means of stretches of equal length, each at its last place."""
    if len(line.x) <= POINTS:
        return line
    cuts = np.linspace(0, len(line.x), POINTS + 1).astype(int)
    x = [line.x[stop - 1] for stop in cuts[1:]]
    low, high = (None if bound is None else _means(bound, cuts) for bound in (line.low, line.high))
    return replace(line, x=x, y=_means(line.y, cuts), low=low, high=high)


def thinned_heat(heat: Heat) -> Heat:
    """At most :data:`COLUMNS` columns of a histogram over rounds."""
    if len(heat.x) <= COLUMNS:
        return heat
    cuts = np.linspace(0, len(heat.x), COLUMNS + 1).astype(int)
    shares = np.add.reduceat(heat.shares, cuts[:-1]) / np.diff(cuts)[:, None]
    x = [heat.x[stop - 1] for stop in cuts[1:]]
    return replace(heat, x=x, shares=shares)


def _means(values: Numbers, cuts: np.ndarray) -> np.ndarray:
    numbers = np.array(values, float)
    known = np.isfinite(numbers)
    sums = np.add.reduceat(np.where(known, numbers, 0), cuts[:-1])
    counts = np.add.reduceat(known.astype(int), cuts[:-1])
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def option(chart: Chart | Heat) -> dict[str, Any]:
    """What ECharts is told, but for the colours of light and dark; of a :class:`Heat` all `shares`."""
    return _heat_option(thinned_heat(chart)) if isinstance(chart, Heat) else _lines_option(chart)


def _lines_option(chart: Chart) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for place, line in enumerate(map(thinned, chart.lines)):
        colour = PALETTE[(place if line.colour < 0 else line.colour) % len(PALETTE)]
        if line.low is not None and line.high is not None:
            series += _band(line, colour)
        if chart.categories:
            series.append({"type": "bar", "name": line.name, "data": _rounded(line.y), "itemStyle": {"color": colour}})
            continue
        points = [[x, y] for x, y in zip(line.x, _rounded(line.y), strict=True)]
        style = {"width": 2, "type": "dashed" if line.dashed else DASHES[place // len(PALETTE) % len(DASHES)]}
        look = {"lineStyle": style, "itemStyle": {"color": colour}, "symbol": "circle", "symbolSize": 5}
        series.append({"type": "line", "name": line.name, "data": points, "showSymbol": len(points) < 30} | look)
    axis = (
        {"type": "category", "data": list(chart.categories)}
        if chart.categories
        else {"type": "value", "min": "dataMin", "max": "dataMax"}
    )
    return {
        "xAxis": axis | {"name": chart.x},
        "yAxis": {"type": "log" if chart.log else "value", "name": chart.unit, "scale": not chart.zero},
        "legend": {"data": [line.name for line in chart.lines]},
        "series": series,
    }


def _band(line: Line, colour: str) -> list[dict[str, Any]]:
    """A line's interval: an unseen line at its lower bound, with the area up to the upper one stacked on it."""
    low, high = np.array(line.low, float), np.array(line.high, float)
    unseen = {"type": "line", "stack": line.name, "symbol": "none", "lineStyle": {"opacity": 0}, "silent": True}
    unseen |= {"tooltip": {"show": False}, "stackStrategy": "all"}
    lower, width = _rounded(low), _rounded(high - low)
    return [
        unseen | {"data": [[x, y] for x, y in zip(line.x, lower, strict=True)]},
        unseen
        | {
            "data": [[x, y] for x, y in zip(line.x, width, strict=True)],
            "areaStyle": {"color": colour, "opacity": 0.18},
        },
    ]


def _heat_option(heat: Heat) -> dict[str, Any]:
    names = [f"{float(f'{low:.2g}'):g} up" for low in heat.bounds[:-1]]
    return {
        "xAxis": {"type": "category", "data": [int(x) for x in heat.x], "name": "round"},
        "yAxis": {"type": "category", "data": names, "name": heat.unit},
        "visualMap": {"min": 0, "max": float(f"{max(heat.shares.max(initial=0), 1e-9):.3g}")},
        "series": [{"type": "heatmap", "data": heat.shares.round(2).tolist(), "name": heat.title}],
    }


def _rounded(values: Numbers) -> list[float | None]:
    """Four digits are what an eye can tell, and half of the bytes."""
    numbers: list[float] = np.array(values, float).tolist()
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in numbers]
