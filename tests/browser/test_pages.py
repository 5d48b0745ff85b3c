"""The pages in a real browser, over real runs."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKEN, process, serving, training, wait_until
from running import TINY, arguments

from server.controls import read_commands
from server.store import open_store_read_only
from simulations.bench.recorded_run import write_run

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

PATIENCE = 240_000
"""Milliseconds: of a machine that has much else to do."""

PANELS = (
    *("cohort", "speed", "policy_loss", "behaviour_loss", "critic_loss", "value", "ess", "weights"),
    *("multipliers", "norms", "clipped", "hr-10", "ndcg-10", "coverage", "popularity", "epsilon"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that may load nothing but what the dashboard serves, and whose scripts must not fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
    elsewhere: list[str] = []
    page.on("request", lambda request: None if "127.0.0.1" in request.url else elsewhere.append(request.url))
    page.on("dialog", lambda dialog: dialog.accept())
    try:
        yield page
        assert not complaints and not [url for url in elsewhere if not url.startswith("data:")]
    finally:
        context.close()


RECORD_DRAWING = """
window.frame = 0;
window.drawnIn = {};  // chart → frame in which it was drawn first
const count = () => { frame += 1; requestAnimationFrame(count); };
requestAnimationFrame(count);
new MutationObserver((records) => {
  for (const { target } of records) {
    const chart = target.closest?.("figure .canvas");
    if (chart?.querySelector("canvas")) drawnIn[chart.parentElement.id] ??= frame;
  }
}).observe(document, { childList: true, subtree: true });
"""
CHARTS = """(near) => [...document.querySelectorAll("figure .canvas:not([hidden])")].filter((chart) => {
  const { top, bottom } = chart.getBoundingClientRect();
  return (bottom > -150 && top < innerHeight + 150) === near;
}).map((chart) => chart.parentElement.id)"""
"""Ids of those that are on the screen or close to it, or of the others."""


def open_run(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}/run/{name}")
    page.locator("main[data-shown]").wait_for(timeout=PATIENCE)


def sign_in(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}/run/{name}")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Operate").click()
    expect(page.locator(".role")).to_have_text("operator")
    page.locator("main[data-shown]").wait_for(timeout=PATIENCE)


def drawn(page: Any, panel: str) -> Any:
    """A panel, once it shows its chart: it does so where somebody looks."""
    figure = page.locator(f"#panel-{panel}")
    figure.scroll_into_view_if_needed(timeout=PATIENCE)
    figure.locator("canvas").first.wait_for(timeout=PATIENCE)
    return figure


def state(page: Any) -> Any:
    return page.locator('[data-part="status"] .state')


def round_shown(page: Any) -> int:
    return int(page.locator("progress").get_attribute("value"))


def test_a_live_run_from_its_first_round_to_its_end(page: Any, browser: Any, address: str, root: Path) -> None:
    """Every panel fills, ε never falls, pause and resume and stop change the run, and two operators do not collide."""
    with training(root / "live") as run:
        wait_until(lambda: (root / "live" / "events.sqlite").exists())
        time.sleep(1)
        sign_in(page, address, "live")
        expect(state(page)).to_have_text("running", timeout=PATIENCE)
        for panel in PANELS:
            figure = drawn(page, panel)
            assert len(figure.locator(".canvas").get_attribute("aria-label")) > 20
        expect(page.locator("#panel-stages")).to_contain_text("no messages")

        figures = []
        for _ in range(3):
            page.reload()
            shown = page.locator('[data-part="privacy"] .big').first
            expect(shown).to_contain_text(re.compile(r"\d"), timeout=PATIENCE)
            expect(shown).not_to_contain_text("…", timeout=PATIENCE)
            figures.append(float(shown.inner_text().split()[0]))
            time.sleep(1)
        assert figures == sorted(figures) and figures[0] > 0

        context = browser.new_context()
        second = context.new_page()
        try:
            sign_in(second, address, "live")
            page.get_by_role("button", name="pause").click()
            for viewer in (page, second):
                expect(state(viewer)).to_have_text("paused", timeout=PATIENCE)
            held = round_shown(page)
            time.sleep(2.5)
            assert round_shown(page) == round_shown(second) == held
            second.get_by_role("button", name="resume").focus()
            second.keyboard.press("Enter")
            expect(state(page)).to_have_text("running", timeout=PATIENCE)
            wait_until(lambda: round_shown(page) > held)
        finally:
            context.close()
        page.get_by_role("button", name="stop after this round").click()
        assert run.wait(150) == 130
        expect(state(page)).to_have_text("stopped", timeout=PATIENCE)
    with open_store_read_only(root / "live") as store:
        assert [(c.action, c.answer) for c in read_commands(store)] == [
            ("pause", "confirmed"),
            ("resume", "confirmed"),
            ("stop", "confirmed"),
        ]
    words = ("simulate", "--resume", "--out", root / "live")
    with process(*words):
        expect(state(page)).to_have_text("running", timeout=PATIENCE)


def test_abort_is_final_and_the_server_may_die(page: Any, root: Path) -> None:
    """The page says that its server is gone, and catches up when it is back; an abort ends the run for good."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with training(root / "doomed") as run:
        wait_until(lambda: (root / "doomed" / "events.sqlite").exists())
        with serving(root, port) as address:
            sign_in(page, address, "doomed")
            expect(state(page)).to_have_text("running", timeout=PATIENCE)
            before = round_shown(page)
        expect(page.locator("#lost")).to_be_visible(timeout=PATIENCE)
        with serving(root, port):
            expect(page.locator("#lost")).to_be_hidden(timeout=PATIENCE)
            wait_until(lambda: round_shown(page) > before)
            drawn(page, "cohort")
            page.get_by_role("button", name="abort").click()
            assert run.wait(150) == 130
            expect(state(page)).to_have_text("aborted", timeout=PATIENCE)
            expect(page.get_by_role("button", name="resume")).to_be_disabled()
    with process("simulate", "--resume", "--out", root / "doomed", quiet=False) as again:
        assert again.wait(150) == 1
        assert "this one was aborted" in again.stderr.read()


def test_a_long_run_opens_quickly(page: Any, address: str, root: Path) -> None:
    """2,000 rounds of a million devices, and deployments whose devices' figures are not released."""
    write_run(root / "large", 2000)
    write_run(root / "deployed", 2000, kind="secure")
    for name in ("large", "deployed"):
        page.goto(address)
        page.locator("main[data-shown]").wait_for(timeout=PATIENCE)
        start = time.perf_counter()
        page.goto(f"{address}/run/{name}")
        page.locator("main[data-shown]").wait_for(timeout=PATIENCE)
        page.locator("#panel-cohort .canvas").wait_for(timeout=PATIENCE)
        opened = time.perf_counter() - start
        print(f"{name} opened in {opened:.2f} s")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.locator("#panel-policy_loss")).to_contain_text("Not released")
    expect(page.locator("#panel-hr-10")).to_contain_text("Not released")
    lines = page.locator('[data-part="log"] p')
    page.locator("#filter").fill("round 7 ")  # long gone from the page
    expect(lines.first).to_contain_text("round 7", timeout=PATIENCE)
    expect(lines).to_have_count(5)
    page.locator("#filter").fill("")
    expect(lines.first).to_contain_text("finished", timeout=PATIENCE)


def test_charts_are_drawn_where_somebody_looks_and_one_at_a_time(page: Any, address: str, root: Path) -> None:
    """So that no page is kept from answering for longer than one chart takes: `fedtopk bench pages` measures that."""
    write_run(root / "long", 2000)
    page.add_init_script(RECORD_DRAWING)
    open_run(page, address, "long")
    for panel in PANELS:
        page.locator(f"#panel-{panel}").wait_for(timeout=PATIENCE)
    page.wait_for_function(f"({CHARTS})(true).every((id) => id in drawnIn)", timeout=PATIENCE)
    far = page.evaluate(CHARTS, False)
    assert len(far) > 5 and not set(far) & set(page.evaluate("drawnIn"))
    for panel in ("cohort", "policy_loss", "weights", "norms", "clipped"):
        figure = drawn(page, panel)
        figure.locator(".canvas").hover()
    frames = page.evaluate("drawnIn")
    assert {"panel-weights", "panel-multipliers", "panel-norms"} <= set(frames)
    assert len(set(frames.values())) == len(frames)


def test_compare_preview_and_narrow(page: Any, address: str, root: Path) -> None:
    for estimator in ("reinforce", "top-k"):
        small = TINY | {"training.rounds": 8, "objective.estimator": estimator, "objective.watch": "true"}
        with process("simulate", "--out", root / estimator, "--workers", "1", *arguments(small)) as run:
            assert run.wait(150) == 0
    page.goto(f"{address}/compare")
    page.get_by_label("reinforce", exact=True).check()
    page.get_by_label("top-k", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    drawn(page, "policy_loss")
    expect(page.locator('[data-part="compared"]')).to_contain_text("objective.estimator")
    expect(page.locator('[data-part="compared"]')).to_contain_text("ε_server")
    page.goto(f"{address}/preview/top-k?user=3", timeout=PATIENCE)  # the first one imports torch
    expect(page.locator("main")).to_contain_text("simulation")
    assert page.locator(".lists section").count() == 5  # history, π, β, critic, popularity
    page.set_viewport_size({"width": 360, "height": 740})
    for path in ("/", "/run/top-k", "/compare?run=top-k&run=reinforce", "/preview/top-k"):
        page.goto(address + path)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_markup_in_names_does_nothing(page: Any, address: str, root: Path) -> None:
    name = "<img src=x onerror=document.title='owned'>"
    write_run(root / name, 3, devices=1000, title="<script>document.title='owned'</script>")
    (root / "broken").mkdir()
    (root / "broken" / "events.sqlite").write_text("no database")
    page.goto(address)
    page.locator("main[data-shown]").wait_for(timeout=PATIENCE)
    expect(page.locator("main")).to_contain_text(name, timeout=PATIENCE)
    page.get_by_role("link", name=name).click()
    drawn(page, "cohort")
    assert "owned" not in page.title().replace(name, "")
    response = page.goto(f"{address}/run/broken")
    assert response.status == 200
    expect(page.locator("main")).to_contain_text("cannot be shown", timeout=PATIENCE)
