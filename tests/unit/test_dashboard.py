"""The dashboard without a browser: what it reads, what it refuses, and what it never tells."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from common.errors import FedtopkError, RunError, SettingsError
from server.controls import read_commands
from server.dashboard.access import Access
from server.dashboard.app import Dashboard
from server.dashboard.charts import COLUMNS, POINTS, Heat, Line, option, thinned, thinned_heat
from server.dashboard.course import Course, read_course, update
from server.dashboard.feed import Feed, Parts
from server.dashboard.folders import find_runs
from server.dashboard.panels import Missing, panels
from server.dashboard.report import write_report
from server.dashboard.runs import Runs
from server.dashboard.serve import echarts_folder, serve_dashboard
from server.dashboard.spending import Spending, figures, here
from server.dashboard.view import run_parts
from server.events import Events
from server.run_folder import RunFolder
from server.run_lock import is_running
from server.store import DATABASE, open_store, open_store_read_only
from simulations.bench.dashboard import has_curve, serving
from simulations.bench.recorded_run import write_run

TOKEN = "a token of some length"
ORIGIN = "http://127.0.0.1"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short simulation and a short deployment."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "simulation", 8, devices=1000)
    write_run(root / "deployment", 8, devices=1000, kind="secure")
    return root


class Client:
    """A browser without scripts: requests to the application itself, and a jar of cookies."""

    def __init__(self, dashboard: Dashboard) -> None:
        dashboard.closing.set()  # streams end at once
        self._app = dashboard.app
        self.cookies: dict[str, str] = {}

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=ORIGIN, cookies=self.cookies) as client:
                response = await client.request(method, path, **options)
                self.cookies |= {cookie.name: cookie.value or "" for cookie in client.cookies.jar}
                return response

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.send("POST", path, **options)


def client_of(root: Path, token: str = TOKEN, host: str = "127.0.0.1", preview: Any = None) -> Client:
    return Client(Dashboard(root, Access.of(host, token), echarts_folder(), host, preview, nowhere))


def nowhere(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Where no ε is computed: it takes a second, and few tests need it."""
    if function is figures:
        raise RunError("No test waits for it.")
    return here(function, *arguments)


def parts_of(folder: Path) -> dict[str, Any]:
    return run_parts("run", read_course(RunFolder(folder)), Spending(), True)


def test_follows_as_a_run_grows(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3, devices=1000)
    course = read_course(RunFolder(tmp_path / "run"))
    assert (course.round, course.state, course.releases) == (3, "finished", 3)
    with open_store(tmp_path / "run") as store:
        events = Events(store, lambda: 0.0)
        events.record("opened", devices=1000, account=None)
        events.record("round", 4, members=5, survivors=4, dropouts=1, seconds=1.0)
        update(course)
        assert (course.round, course.state) == (4, "running") and course.rounds[4]["survivors"] == 4
        assert sorted(course.rounds) == [1, 2, 3, 4]
    update(course)
    assert course.state == "interrupted"


def test_running_is_seen_and_does_not_disturb(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with open_store(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    with open_store(tmp_path):
        pass


def test_figures_of_devices_are_not_released(recorded: Path) -> None:
    course = read_course(RunFolder(recorded / "deployment"))
    found = {panel.id: panel for row in panels(course, Spending()).values() for panel in row}
    for id_ in (
        "policy_loss",
        "value",
        "ess",
        "weights",
        "norms",
        "clipped",
        "hr-10",
        "ndcg-10",
        "coverage",
        "popularity",
    ):
        panel = found[id_]
        assert isinstance(panel, Missing) and panel.reason.startswith("Not released")
    assert not isinstance(found["stages"], Missing) and not isinstance(found["bytes"], Missing)


def test_what_an_adaptive_clip_releases_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 8, devices=1000, kind="secure", quantile=0.5)
    drawn = parts_of(folder)
    assert drawn["panels"]["clip"]["option"]["series"][0]["data"][0] == [1, 0.8825]
    for id_ in ("clip", "clipped"):
        assert "A noisy count, released with every sum" in drawn["panels"][id_]["note"].replace(
            "; a noisy", ". A noisy"
        )
    assert "at first, then the 0.5 quantile of the norms" in drawn["html"]["privacy"]


def test_figures_of_a_simulation_are_marked(recorded: Path) -> None:
    drawn = parts_of(recorded / "simulation")["panels"]
    for id_ in ("policy_loss", "behaviour_loss", "critic_loss", "ess", "weights", "multipliers", "norms", "clipped"):
        assert "Simulation: no real run releases it." in drawn[id_]["note"]
    json.dumps(drawn, allow_nan=False)


def test_both_figures_of_privacy_with_all_that_they_mean(recorded: Path) -> None:
    html = parts_of(recorded / "simulation")["html"]["privacy"]
    for words in ("ε_model", "ε_server", "one user", "added or removed", "replaced by zero", "δ 1e-06"):
        assert words in html


def test_sentences_about_the_budget_of_a_live_run_stand_apart(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    course, spending = read_course(RunFolder(tmp_path / "run")), Spending()
    course.end, course.running = None, True
    assert "Being computed… The budget lasts" in run_parts("run", course, spending, True)["html"]["privacy"]
    spending.spent = {"releases": 8, "epsilon_model": 1.0, "epsilon_server": 2.0}
    assert "After 8 releases. The budget lasts" in run_parts("run", course, spending, True)["html"]["privacy"]


def test_epsilon_never_falls(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    course, spending = read_course(RunFolder(tmp_path / "run")), Spending()
    course.releases = 5
    spending.finish(course)
    assert spending.spent is not None and spending.spent["releases"] == 5
    model, server = spending.spent["epsilon_model"], spending.spent["epsilon_server"]
    assert 0 < model < server
    figures = [figures for _, figures in sorted(spending.curve.items())]
    assert figures == sorted(figures)
    course.report = {"privacy": {"releases": 5, "epsilon_model": model / 2, "epsilon_server": 2 * server}}
    spending.update(course)
    assert spending.spent == {"releases": 5, "epsilon_model": model, "epsilon_server": 2 * server}


def test_ess_of_equal_and_of_one_weight(recorded: Path) -> None:
    from server.dashboard.panels import ess_shares

    course = Course(RunFolder(recorded))
    course.bounds = {"weights": [-1.0, 0.0, 1.0]}
    course.simulation = {1: {"weights": [4.0, 0.0]}, 2: {"weights": [1.0, 1.0]}, 3: {"weights": [0.0, 0.0]}}
    low, high = 10**-0.5, 10**0.5
    assert ess_shares(course) == pytest.approx({1: 1.0, 2: (low + high) ** 2 / (2 * (low**2 + high**2))})


def test_thinned_lines_keep_means_and_ends() -> None:
    x = list(range(1, 2001))
    line = thinned(Line("a", x, [None if n % 7 == 0 else float(n) for n in x]))
    assert len(line.x) == len(line.y) == POINTS and line.x[-1] == 2000
    assert np.mean([y for y in line.y if y is not None]) == pytest.approx(1000.5, rel=0.01)
    heat = thinned_heat(Heat("h", "", "", x, [0, 1, 2], np.tile([30.0, 70.0], (2000, 1))))
    assert heat.shares == pytest.approx(np.tile([30.0, 70.0], (len(heat.x), 1)))
    assert thinned(Line("b", [1.0], [2.0])).y == [2.0]


def test_a_long_run_is_sent_in_little(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2000)
    parts = parts_of(tmp_path / "run")
    assert len(json.dumps(parts)) < 400_000
    for panel in parts["panels"].values():
        for series in panel.get("option", {}).get("series", ()):
            assert len(series["data"]) <= (COLUMNS if series["type"] == "heatmap" else POINTS)


def test_no_torch_for_looking(recorded: Path) -> None:
    """Not in the dashboard's process, also of a private run: a child of it computes ε."""

    def has_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

    with (
        serving(recorded) as (pid, address),
        httpx.stream("GET", f"{address}/stream/run/simulation", timeout=120) as response,
    ):
        assert any(has_curve(line) for line in response.iter_lines())
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        assert not has_torch(pid) and any(has_torch(int(child)) for child in children)


def test_followers_are_told_of_new_figures(recorded: Path) -> None:
    """Of a long run they would wait a minute for the page to be drawn again; also where the list of runs, which needs
    no curve, was first to ask."""

    def becomes(count: int) -> bool:
        end = time.monotonic() + 60
        while told.count("simulation") < count and time.monotonic() < end:
            time.sleep(0.01)
        return told.count("simulation") == count

    told: list[str] = []
    runs = Runs(recorded, told=told.append)
    runs.index()
    assert becomes(1)
    runs.show("simulation", lambda course, spending: None)
    assert becomes(2) and runs.show("simulation", lambda course, spending: spending.curve)
    told.clear()
    Runs(recorded, nowhere, told.append).show("simulation", lambda course, spending: None)
    assert becomes(1)


# Folders that are no runs, or not any more


def damaged(root: Path, source: Path) -> dict[str, str]:
    """Folders by name, and a word of what is to be said of each."""
    for name in (
        "no-database",
        "no-settings",
        "half-written",
        "linked",
        "pipe",
        "foreign",
        "newer",
        "text",
        "bad-toml",
        "odd-events",
        "folder",
    ):
        shutil.copytree(source, root / name)
    (root / "no-database" / DATABASE).unlink()
    (root / "no-settings" / "settings.toml").unlink()
    content = (root / "half-written" / DATABASE).read_bytes()
    (root / "half-written" / DATABASE).write_bytes(content[: len(content) // 3])
    (root / "text" / DATABASE).write_text("This is no database." * 100)
    (root / "bad-toml" / "settings.toml").write_text("[training\nrounds = = 3")
    (root / "folder" / DATABASE).unlink()
    (root / "folder" / DATABASE).mkdir()
    (root / "linked" / "settings.toml").unlink()
    (root / "linked" / "settings.toml").symlink_to("/etc/hostname")
    (root / "pipe" / "run.lock").unlink(missing_ok=True)
    os.mkfifo(root / "pipe" / "run.lock")
    for name, statement in {
        "foreign": "PRAGMA application_id=1",
        "newer": "PRAGMA user_version=99",
        "odd-events": "UPDATE events SET fields='[1, 2]' WHERE kind='dropouts' OR kind='opened'",
    }.items():
        connection = sqlite3.connect(root / name / DATABASE)
        connection.execute(statement)
        connection.commit()
        connection.close()
    return {
        "no-database": "unable to open",
        "no-settings": "settings.toml is missing",
        "half-written": "malformed",
        "foreign": "another program made it",
        "newer": "schema version",
        "text": "not a database",
        "bad-toml": "valid TOML",
        "odd-events": "what this version records",
        "folder": "no folder, link or pipe",
        "linked": "no folder, link or pipe",
        "pipe": "no folder, link or pipe",
    }


def test_damaged_folders_are_explained(recorded: Path, tmp_path: Path) -> None:
    expected = damaged(tmp_path, recorded / "simulation")
    client = client_of(tmp_path)
    index = client_page(client, tmp_path)
    for name, words in expected.items():
        with pytest.raises((RunError, SettingsError), match=words):
            read_course(RunFolder(tmp_path / name))
        assert name in index
        response = client.get(f"/run/{name}")
        assert response.status_code == 200 and name in response.text
    assert client.get("/metrics").status_code == 200


def client_page(client: Client, root: Path) -> str:
    assert client.get("/").status_code == 200
    html: str = Runs(root, nowhere).index()["html"]["runs"]
    return html


HUGE = {"members": 10**400, "survivors": 10**400, "dropouts": -(10**400), "seconds": 1e308}
HOSTILE: dict[str, list[tuple[str, Any, Any]]] = {
    "huge numbers": [("round", 1, HUGE), ("round", 10**15, HUGE)],
    "no numbers": [("round", 1, {"members": 1, "survivors": 1, "seconds": "NaN"})],
    "negative": [("round", -5, {"members": -1, "survivors": -2, "dropouts": -3, "seconds": -4.0})],
    "infinite": [("simulation", 1, {"policy_loss": math.inf, "clipped": "NaN", "weights": [math.nan] * 26})],
    "other types": [("simulation", 1, {"policy_loss": {"a": 1}, "clipped": [1], "weights": "many"})],
    "odd histograms": [("simulated", None, {"bounds": {"weights": [1e9, -1e9, None]}})],
    "unknown kind": [("teleported", 1, {"where": "<script>"})],
    "odd account": [("opened", None, {"devices": "many", "account": {"delta": "small"}})],
    "other account": [("opened", None, {"devices": 9, "account": {"delta": 1e-6, "multiplier": -1}})],
    "deep": [("begun", None, "[" * 100_000)],
    "odd validation": [("validation", 1, {"hr@10": "?", "hr@10_ci95": 3})],
}


def test_hostile_records_are_explained_or_shown(recorded: Path, tmp_path: Path) -> None:
    """Whatever stands in a database, each page answers, others stay whole, and a report is written or refused."""
    shutil.copytree(recorded / "simulation", tmp_path / "whole")
    for name, events in HOSTILE.items():
        shutil.copytree(recorded / "simulation", tmp_path / name)
        connection = sqlite3.connect(tmp_path / name / DATABASE)
        for kind, round_, fields in events:
            text = fields if isinstance(fields, str) else json.dumps(fields)
            connection.execute(
                "INSERT INTO events (time, kind, round, fields, digest) VALUES (1e300, ?, ?, ?, '')",
                (kind, round_, text),
            )
        connection.commit()
        connection.close()
    client = client_of(tmp_path)
    runs = Runs(tmp_path, nowhere)
    index = client_page(client, tmp_path)
    for name in HOSTILE:
        assert name in index
        for path in (f"/run/{name}", f"/stream/run/{name}", f"/log/{name}?with=round", f"/compare?run={name}"):
            assert client.get(path).status_code in (200, 422)
        with contextlib.suppress(FedtopkError):
            runs.show(
                name, lambda course, spending: json.dumps(run_parts("x", course, spending, True), allow_nan=False)
            )
    with pytest.raises(RunError, match="what this version records"):
        write_report(tmp_path / "huge numbers", tmp_path / "report")
    assert 'fedtopk_rounds_total{run="whole"} 8.0' in client.get("/metrics").text
    assert set(runs.show_all(["whole", *HOSTILE], dict)) >= {"whole", "unknown kind"}


def test_text_that_is_not_unicode_is_explained(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    connection = sqlite3.connect(tmp_path / "run" / DATABASE)
    connection.execute("UPDATE events SET fields=CAST(x'7b22ff223a317d' AS TEXT) WHERE kind='round'")
    connection.commit()
    connection.close()
    with pytest.raises(RunError, match="UTF-8"):
        read_course(RunFolder(tmp_path / "run"))


def test_a_run_in_the_place_of_another_is_read_anew(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    runs = Runs(tmp_path, nowhere)
    assert runs.show("run", lambda course, spending: course.round) == 8
    shutil.rmtree(tmp_path / "run")
    write_run(tmp_path / "run", 3, devices=500)
    with pytest.raises(RunError, match="another one took its place"):
        runs.show("run", lambda course, spending: course.round)
    assert runs.show("run", lambda course, spending: course.round) == 3


def test_the_whole_log_is_searched(recorded: Path, tmp_path: Path) -> None:
    """Also what no page holds any more; letters in either case, and none is a pattern."""
    write_run(tmp_path / "run", 100, devices=1000)
    client = client_of(tmp_path)
    first = client.get("/log/run", params={"with": "ROUND 1 "}).text
    assert "<i>round 1</i>" in first and first.count("<p>") == 2  # and its figures of the simulation
    assert client.get("/log/run", params={"with": "seconds 2.99"}).text.count("<p>") == 1
    assert client.get("/log/run", params={"with": "opened"}).text.count("<p>") == 1
    assert "No line" in client.get("/log/run", params={"with": "100%_"}).text
    assert client.get("/log/nothing").status_code == 404
    assert "<i>round 1</i>" not in parts_of(tmp_path / "run")["html"]["log"]


def test_a_feed_draws_once_for_all() -> None:
    now, drawn, state = [0.0], [0], {"a": 1, "b": 1}

    def draw() -> Parts:
        drawn[0] += 1
        return {"html": dict(state)}

    def content(message: str) -> Any:
        return json.loads(message.removeprefix("data:")) if message.startswith("data:") else None

    async def follow() -> None:
        feed, closing = Feed(draw, lambda: now[0]), asyncio.Event()
        first, second = feed.follow(closing), feed.follow(closing)
        assert content(await anext(first)) == content(await anext(second)) == {"html": {"a": 1, "b": 1}}
        assert drawn == [1]
        state["b"] = 2
        now[0] = 100.0
        assert content(await anext(first)) == content(await anext(second)) == {"html": {"b": 2}}
        assert drawn == [2]
        assert content(await anext(feed.follow(closing))) == {"html": {"a": 1, "b": 2}}
        assert content(await anext(first)) is None
        assert drawn == [2]
        feed.hurry()
        state["a"] = 3
        assert content(await anext(first)) == {"html": {"a": 3}}

    asyncio.run(follow())


def test_a_feed_that_is_hurried_while_it_draws_draws_again() -> None:
    async def follow() -> None:
        drawn = [0]

        def draw() -> Parts:
            drawn[0] += 1
            if drawn[0] == 1:
                feed.hurry()  # what it tells of is not in this drawing
            return {"html": {"a": drawn[0]}}

        feed = Feed(draw, lambda: 0.0)
        following = feed.follow(asyncio.Event())
        await anext(following)
        assert '"a":2' in await anext(following)
        await anext(following)
        assert drawn == [2]

    asyncio.run(follow())


def test_what_is_unchanged_is_not_read_again(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    course = read_course(RunFolder(tmp_path / "run"))  # which may make SQLite write its own files
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (1e9, 1e9))
    update(course)
    monkeypatch.setattr("server.dashboard.course.open_store_read_only", None)
    update(course)
    assert course.round == 8


def test_a_locked_database_is_explained(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    holder = sqlite3.connect(tmp_path / "run" / DATABASE, isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(RunError, match="locked"):
            read_course(RunFolder(tmp_path / "run"))
    finally:
        holder.close()
    assert read_course(RunFolder(tmp_path / "run")).round == 8


def test_names_are_looked_up_and_symlinks_not_followed(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "secret" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret" / "run")
    assert find_runs(tmp_path / "runs") == {}
    client = client_of(tmp_path / "runs")
    for path in (
        "/run/../secret/run",
        "/run/%2e%2e/secret/run",
        "/run/..%2fsecret%2frun",
        f"/run/{tmp_path}/secret/run",
        "/run/link",
    ):
        assert client.get(path).status_code == 404
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/echarts/../../../__init__.py",
        "/static/echarts/%2e%2e/echart.py",
    ):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a\"b'c&d", "ε π λ", "a b%2Fc", "x" * 200])
def test_names_with_markup_are_text(recorded: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / name)
    with open_store(tmp_path / name) as store:
        Events(store, lambda: 0.0).record("attempt failed", 9, attempt=1, reason="<script>alert(2)</script>")
    (found,) = find_runs(tmp_path)
    page = client_of(tmp_path).get(f"/compare?run={found}").text + client_page(client_of(tmp_path), tmp_path)
    assert "<img" not in page and "<script>alert" not in page
    html = parts_of(tmp_path / name)["html"]
    assert "<script>" not in html["cohort"] and "&lt;script&gt;" in html["cohort"] and "<script>" not in html["log"]


# Who may do what


def test_another_host_needs_a_token() -> None:
    with pytest.raises(SettingsError, match="--token"):
        Access.of("0.0.0.0", None)
    with pytest.raises(SettingsError, match="16 characters"):
        Access.of("0.0.0.0", "short")
    assert not Access.of("0.0.0.0", TOKEN).open
    assert Access.of("localhost", None).open and Access.of("::1", None).token != Access.of("::1", None).token


def test_what_cannot_be_served_is_said_at_the_start(tmp_path: Path) -> None:
    def serve(root: Path, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        serve_dashboard(root, host, port, token, None, lambda line: None)

    with pytest.raises(RunError, match="folder of runs"):
        serve(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="--token"):
        serve(tmp_path, "0.0.0.0")
    with pytest.raises(SettingsError, match="--port"):
        serve(tmp_path, port=70_000)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(RunError, match="free to listen on"),
    ):
        serve(tmp_path, port=taken.getsockname()[1])


def test_another_host_shows_nothing_without_the_token(recorded: Path) -> None:
    client = client_of(recorded, host="0.0.0.0")
    for path in ("/", "/run/simulation", "/stream", "/metrics", "/compare", "/preview/simulation", "/nothing"):
        response = client.get(path)
        assert response.status_code == 401 and "simulation" not in response.text.replace(path, "")
    assert client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.post("/login", content=f"token={TOKEN.replace(' ', '+')}", follow_redirects=True).status_code == 200
    assert client.get("/run/simulation").status_code == 200


def test_every_answer_has_the_headers(recorded: Path) -> None:
    client = client_of(recorded)
    for path in ("/", "/run/simulation", "/nothing", "/static/app.js", "/static/echarts/index.js", "/metrics"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_foreign_names_for_this_machine_are_refused(recorded: Path) -> None:
    for host in ("rebound.example", "rebound.example:8420", "127.0.0.1.rebound.example", "localhost.example", ""):
        assert client_of(recorded).get("/", headers={"host": host}).status_code == 400
    for host in ("localhost", "127.0.0.1:8420", "[::1]:8420", "localhost:x"):
        assert client_of(recorded).get("/", headers={"host": host}).status_code == 200
    assert client_of(recorded, host="127.0.0.2").get("/", headers={"host": "127.0.0.2:1"}).status_code == 200


def test_behind_a_proxy_with_tls(recorded: Path) -> None:
    """It passes Host on; the browser's Origin is https, and so the cookie is for that alone."""
    client = client_of(recorded, host="0.0.0.0")
    there = {"host": "runs.example:8443", "origin": "https://runs.example:8443"}
    response = client.post("/login", data={"token": TOKEN}, headers=there)
    cookie = response.headers["set-cookie"]
    assert response.status_code == 303 and "Secure" in cookie and cookie.startswith("fedtopk-8443=")
    access = Access.of("0.0.0.0", TOKEN)
    client.cookies = {"fedtopk-8443": access.derived("cookie")}
    word = {"x-csrf": access.derived("csrf")}
    asked = {"action": "abort", "expected": 0}
    assert client.post("/command/simulation", json=asked, headers=there | word).status_code == 409  # it has ended
    elsewhere = there | word | {"origin": "https://runs.example"}
    assert client.post("/command/simulation", json=asked, headers=elsewhere).status_code == 403


def test_login_redirects_to_this_site_only(recorded: Path) -> None:
    client = client_of(recorded)
    for back in ("https://elsewhere.example/", "//elsewhere.example", "/\\elsewhere.example", "javascript:alert(1)"):
        response = client.post("/login", data={"token": TOKEN, "back": back}, follow_redirects=False)
        assert response.status_code == 303 and response.headers["location"] == "/"
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert client.post("/login", data={"token": "wrong"}).status_code == 403
    assert client.post("/login", content=b"token=" + b"x" * 10**6).status_code == 403


def test_commands_need_token_and_csrf_word_and_origin(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    access, client = Access.of("127.0.0.1", TOKEN), client_of(tmp_path)
    asked = {"action": "abort", "expected": 0}
    cookie = {"fedtopk": access.derived("cookie")}
    word = {"x-csrf": access.derived("csrf"), "origin": ORIGIN}
    with open_store(tmp_path / "run") as store:
        Events(store, lambda: 0.0).record("opened", devices=1, account=None)

        def ask(headers: dict[str, str], cookies: dict[str, str] | None = None, **changes: Any) -> int:
            client.cookies = dict(cookies or {})
            return client.post("/command/run", json=asked | changes, headers=headers).status_code

        assert ask({}) == 403
        assert ask(word) == 403
        assert ask({}, cookie) == 403
        assert ask(word | {"origin": "http://elsewhere.example"}, cookie) == 403
        assert ask({"x-csrf": "guess", "origin": ORIGIN}, cookie) == 403
        assert ask(word, {"fedtopk": "guess"}) == 403
        assert ask({"authorization": "Bearer guess"}) == 403
        assert read_commands(store) == []
        assert ask(word, cookie, action="explode") == 400
        assert ask(word, cookie, expected="0") == 400
        assert ask(word, cookie, expected=4) == 409
        assert ask(word, cookie) == 202
        assert ask({"authorization": f"Bearer {TOKEN}"}) == 409
        (command,) = read_commands(store)
        assert command.action == "abort" and command.origin.startswith("dashboard, from ")
    assert ask(word, cookie, expected=1) == 409  # nobody runs it


def test_an_aborted_run_does_not_go_on(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2, devices=1000)
    folder = RunFolder(tmp_path / "run")
    with open_store(folder.path) as store:
        Events(store, lambda: 0.0).record("aborted", 1, reason="")
    with pytest.raises(RunError, match="aborted"):
        folder.open(folder.settings(), resume=True)


def test_preview_escapes_titles(recorded: Path) -> None:
    titles = {"π": [{"title": "<i>Film</i>", "value": "3 %"}]}
    shown = {"user": "<b>7", "next": "8&x=<", "users": 3, "round": 2, "lists": titles}
    client = client_of(recorded, preview=lambda run, user: shown)
    text = client.get("/preview/simulation?user=999999999999").text
    assert "&lt;i&gt;Film&lt;/i&gt;" in text and "<b>7" not in text
    assert client_of(recorded).get("/preview/simulation").status_code == 404


def test_openmetrics(recorded: Path) -> None:
    text = client_of(recorded).get("/metrics").text
    assert 'fedtopk_rounds_total{run="simulation"} 8.0' in text
    assert 'fedtopk_simulation{figure="policy_loss",run="simulation"}' in text
    assert 'fedtopk_simulation{figure="policy_loss",run="deployment"}' not in text
    assert text.endswith("# EOF\n")


def test_report_is_self_contained(recorded: Path, tmp_path: Path) -> None:
    written = write_report(recorded / "simulation", tmp_path / "report")
    page = Path(written["html"]).read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and page.count("data:image/png") >= 8
    assert Path(written["weights"]).read_bytes()[:4] == b"\x89PNG"


def test_a_store_without_commands_can_be_read(recorded: Path, tmp_path: Path) -> None:
    """As versions before the dashboard left it."""
    shutil.copytree(recorded / "simulation", tmp_path / "run")
    connection = sqlite3.connect(tmp_path / "run" / DATABASE)
    connection.execute("DROP TABLE commands")
    connection.close()
    with open_store_read_only(tmp_path / "run") as store:
        assert read_commands(store) == []
    assert read_course(RunFolder(tmp_path / "run")).round == 8


def test_options_are_json() -> None:
    line = Line("a", [1], [float("nan")], [None], [None])
    from server.dashboard.charts import Chart

    json.dumps(option(Chart("c", "t", "u", (line,))), allow_nan=False)
