"""`fedtopk bench pages`: how soon the page of a long run is there, and for how long it may keep from answering.

A browser without a window opens the page of a recorded run, scrolls through it and points at each of its charts. It
takes the time from the request until every chart on the screen is drawn, and all tasks that kept the page from
answering for more than 50 ms (the browser's own `longtask` entries).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from common.errors import MissingDependency
from simulations.bench.dashboard import serving
from simulations.bench.machine import machine
from simulations.bench.recorded_run import write_run

PHASES = ("open", "scroll", "point")

_SCREEN = {"width": 1280, "height": 900}
_PATIENCE = 120_000
"""Milliseconds."""
_SETTLED = 300
"""Milliseconds after which what an action set off is done."""
_STEP = 300
"""Pixels that a turn of the wheel scrolls."""

_WATCH = """
window.tasks = [];
new PerformanceObserver((list) => tasks.push(...list.getEntries().map((task) => task.duration)))
  .observe({ type: "longtask", buffered: true });
"""
_DRAWN = """() => {
  const charts = [...document.querySelectorAll("figure .canvas:not([hidden])")].filter((chart) => {
    const { top, bottom } = chart.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  });
  return document.querySelector("main[data-shown]") && charts.every((chart) => chart.querySelector("canvas"))
    && performance.now();
}"""


def bench_pages(rounds: int, devices: int, runs: int, on_run: Callable[[int, str], None]) -> dict[str, Any]:
    """Open the page as many times, each with an empty cache; the first time the server reads the run, too.

    Returns:
        The machine, the browser, the sizes; ``"openings"``: of each ``{"open_s", "longest_task_ms": {phase: ms}}``, 0
        where no task took 50 ms; and their medians.

    Raises :class:`MissingDependency` without a browser or what drives it.
    """
    openings = []
    with _browser() as browser, tempfile.TemporaryDirectory() as scratch:
        write_run(Path(scratch) / "run", rounds, devices)
        with serving(Path(scratch)) as (_, address):
            for number in range(1, runs + 1):
                context = browser.new_context(viewport=_SCREEN)
                openings.append(_opened(context.new_page(), f"{address}/run/run"))
                context.close()
                on_run(number, "")
        version = browser.version
    longest = {phase: median(one["longest_task_ms"][phase] for one in openings) for phase in PHASES}
    return {
        "machine": machine("nicegui"),
        "browser": f"chromium {version}",
        "rounds": rounds,
        "devices": devices,
        "openings": openings,
        "open_s": median(one["open_s"] for one in openings),
        "longest_task_ms": longest,
    }


def results_table(results: dict[str, Any]) -> Table:
    """The answer for people."""
    title = f"Page of a run of {results['rounds']:,} rounds over {results['devices']:,} devices, {results['browser']}"
    table = Table("", "all charts on the screen", *(f"longest task, {phase}" for phase in PHASES), title=title)
    rows = [(f"opening {number}", one) for number, one in enumerate(results["openings"], 1)]
    for label, one in (*rows, ("median", results)):
        table.add_row(label, f"{one['open_s']:.2f} s", *(f"{one['longest_task_ms'][phase]:.0f} ms" for phase in PHASES))
    return table


def _opened(page: Any, address: str) -> dict[str, Any]:
    """What one page takes."""
    longest = {}

    def phase_ends(name: str) -> None:
        page.wait_for_timeout(_SETTLED)
        longest[name] = round(page.evaluate("Math.max(0, ...tasks.splice(0))"))

    page.add_init_script(_WATCH)
    page.goto(address)
    opened = page.wait_for_function(_DRAWN, timeout=_PATIENCE).json_value()
    phase_ends("open")
    while page.evaluate("scrollY + innerHeight < document.documentElement.scrollHeight - 1"):
        page.mouse.wheel(0, _STEP)
        page.wait_for_timeout(100)
    phase_ends("scroll")
    for chart in page.locator("figure .canvas:visible").all():
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        for share in (0.2, 0.4, 0.6, 0.8):
            page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
            page.wait_for_timeout(50)
    phase_ends("point")
    return {"open_s": round(opened / 1000, 3), "longest_task_ms": longest}


@contextmanager
def _browser() -> Iterator[Any]:
    """Chromium, which speaks to nobody but our pages."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        raise MissingDependency("Expected chromium to be installed, or its path in CHROMIUM.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise MissingDependency("Expected playwright to drive a browser (pip install 'fedtopk[dev]').") from None
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", *quiet])
        try:
            yield browser
        finally:
            browser.close()
