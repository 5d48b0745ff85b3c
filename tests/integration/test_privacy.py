"""`fedtopk privacy verify`: agrees with the ledger, and finds a log that was tampered with, cut off or reordered."""

import json
import math
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from running import TINY, arguments, fedtopk, simulate

from common.errors import RunError
from server.events import START, following
from server.run_folder import RunFolder
from server.statement import Statement, read_statement
from server.store import DATABASE
from server.verification import TOLERANCE, verify_folder


def failed(folder: Path) -> list[str]:
    return [check.check for check in verify_folder(folder)[0] if not check.ok]


def rewrite(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / DATABASE)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def seal(folder: Path) -> None:
    """Number the events and compute all digests anew, as an attacker can who may write the file."""
    connection = sqlite3.connect(folder / DATABASE)
    with connection:
        rows = connection.execute("SELECT time, kind, round, fields FROM events ORDER BY id").fetchall()
        connection.execute("DELETE FROM events")
        head = START
        for row in rows:
            head = following(head, *row)
            connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (head.events, *row, head.digest))
    connection.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "run"
    simulate(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize("seed", range(20))
def test_the_second_accountant_agrees_with_the_ledger(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    report = simulate(
        tmp_path / "run",
        privacy__noise_multiplier=draw.uniform(0.5, 4.0),
        privacy__target_epsilon=200.0,
        privacy__delta=10 ** draw.uniform(-7, -2),
        training__cohort_rate=draw.choice([1.0, *(draw.uniform(0.05, 1.0) for _ in range(5))]),
        training__rounds=draw.randrange(1, 9),
        privacy__clip_quantile=draw.choice([0.0, 0.3, 0.5]),
        training__start=draw.choice(["random", "popularity"]),
    )
    checks, figures = verify_folder(tmp_path / "run")
    assert all(check.ok for check in checks), checks
    for name in ("epsilon_model", "epsilon_server"):
        assert abs(report["privacy"][name] - figures[name]) <= TOLERANCE
    assert figures["releases"] == report["rounds"]


TAMPERED: dict[str, tuple[str, ...]] = {
    "a field changed": (
        "UPDATE events SET fields = replace(fields, '\"attempt\": 1', '\"attempt\": 2') WHERE id = 5",
        "",
    ),
    "the noise changed": ("UPDATE events SET fields = replace(fields, '\"rate\": 0.4', '\"rate\": 0.1')",),
    "a time changed": ("UPDATE events SET time = time - 1 WHERE kind = 'released' AND round = 2",),
    "an event removed": ("DELETE FROM events WHERE kind = 'released' AND round = 3",),
    "the first one removed": ("DELETE FROM events WHERE id = 1",),
    "one inserted": ("INSERT INTO events VALUES (1000, 0.0, 'released', 1, '{\"attempt\": 1}', '00')",),
    "two exchanged": (
        "UPDATE events SET id = -1 WHERE id = 6",
        "UPDATE events SET id = 6 WHERE id = 7",
        "UPDATE events SET id = 7 WHERE id = -1",
    ),
    "no log at all": ("DELETE FROM events",),
    "a number for a text": ("UPDATE events SET fields = 3 WHERE id = 4",),
    "a text for a number": ("UPDATE events SET round = 'x' WHERE id = 4",),
    "bytes for a text": ("UPDATE events SET kind = x'ff' WHERE id = 4",),
    "no digest": ("UPDATE events SET digest = '' WHERE id = 4",),
}


@pytest.mark.parametrize("name", list(TAMPERED))
def test_a_log_that_was_changed_is_found_by_itself(copy: Path, name: str) -> None:
    assert failed(copy) == []
    rewrite(copy, *TAMPERED[name])
    assert failed(copy) == ["event log"]


SEALED: dict[str, str] = {
    "cut off at the end": "DELETE FROM events WHERE id > (SELECT max(id) - 5 FROM events)",
    "an event removed": "DELETE FROM events WHERE kind = 'round' AND round = 2",
    "reordered": "UPDATE events SET id = -id WHERE kind = 'round'",
    "a time changed": "UPDATE events SET time = time - 1 WHERE kind = 'round' AND round = 2",
    "a step of the ledger more": (
        "INSERT INTO events SELECT max(id) + 1, max(time), 'reserved', 7, "
        '\'{"attempt": 1, "noise_multiplier": 1.0, "rate": 0.4}\', \'\' FROM events'
    ),
}


@pytest.mark.parametrize("name", list(SEALED))
def test_a_log_with_new_digests_is_found_against_the_report_and_a_statement(
    run: Path, copy: Path, tmp_path: Path, name: str
) -> None:
    statement = Statement.make(RunFolder(run), Ed25519PrivateKey.generate(), 1.0)
    rewrite(copy, SEALED[name])
    seal(copy)
    assert set(failed(copy)) & {"log's end", "event log"}
    report = json.loads((copy / "report.json").read_text())
    rows = sqlite3.connect(copy / DATABASE).execute("SELECT id, digest FROM events ORDER BY id").fetchall()
    report["log"] = dict(zip(("events", "digest"), rows[-1], strict=True))  # the attacker writes the report anew, too
    (copy / "report.json").write_text(json.dumps(report))
    (tmp_path / "statement.json").write_text(statement.to_json())
    result = fedtopk("privacy", "verify", copy, "--statement", tmp_path / "statement.json", "--format", "json")
    checks = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1 and not checks["statement"]["ok"] and checks["statement: signature"]["ok"]


def test_a_run_cut_off_at_its_end_is_found_against_the_report(copy: Path) -> None:
    rewrite(copy, "DELETE FROM events WHERE id > (SELECT max(id) - 5 FROM events)")
    assert "log's end" in failed(copy)


def test_a_ledger_that_is_not_what_the_events_say_is_found(copy: Path) -> None:
    rewrite(copy, "DELETE FROM ledger WHERE round = 6")
    assert failed(copy) == ["privacy ledger"]


@pytest.mark.parametrize(("field", "check"), [("clip", "clip"), ("share_within", "clip"), ("histogram", "histogram")])
def test_a_clip_that_did_not_follow_what_was_released_is_found(tmp_path: Path, field: str, check: str) -> None:
    """And a second histogram."""
    folder = tmp_path / "run"
    simulate(folder, privacy__clip_quantile=0.5, training__start="popularity")
    assert failed(folder) == []
    rewrite(folder, f"UPDATE events SET fields = json_set(fields, '$.{field}', 0.7) WHERE kind = 'round' AND round = 3")
    seal(folder)
    assert check in failed(folder)


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a smaller ε_model": (lambda report: report["privacy"].update(epsilon_model=1.0), "epsilon_model"),
    "a smaller ε_server": (lambda report: report["privacy"].update(epsilon_server=1.0), "epsilon_server"),
    "no ε_server": (lambda report: report["privacy"].pop("epsilon_server"), "epsilon_server"),
    "ε as a word": (lambda report: report["privacy"].update(epsilon_model="small"), "epsilon_model"),
    "ε that is none": (lambda report: report["privacy"].update(epsilon_model=math.nan), "epsilon_model"),
    "another δ": (lambda report: report["privacy"].update(delta=0.1), "delta"),
    "fewer releases": (lambda report: report["privacy"].update(releases=1), "releases"),
    "another unit": (lambda report: report["privacy"].update(unit="interaction"), "unit"),
    "no log": (lambda report: report.pop("log"), "report"),
}


@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_false_report_is_found(copy: Path, name: str) -> None:
    change, check = CLAIMS[name]
    report = json.loads((copy / "report.json").read_text())
    change(report)
    (copy / "report.json").write_text(json.dumps(report))
    assert failed(copy) == [check]


def test_changed_settings_and_missing_files_are_found(copy: Path) -> None:
    (copy / "settings.toml").write_text((copy / "settings.toml").read_text() + "\n")
    assert failed(copy) == ["settings"]
    (copy / "settings.toml").unlink()
    (copy / "report.json").unlink()
    assert failed(copy) == ["settings", "report"]
    (copy / DATABASE).unlink()
    with pytest.raises(RunError, match=r"events\.sqlite"):
        verify_folder(copy)


def test_a_statement_is_verified_on_its_own(run: Path, copy: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    written = tmp_path / "statement.json"
    made = fedtopk("privacy", "statement", run, "--key", tmp_path / "key.pem", "--out", written, "--format", "json")
    assert made.returncode == 0, made.stderr
    public = json.loads(made.stdout)["publisher"]
    assert public == key.public_key().public_bytes_raw().hex()
    good = fedtopk("privacy", "verify", written, "--key", public, "--format", "json")
    found = json.loads(good.stdout)
    assert good.returncode == 0 and found["ok"], found
    assert found["privacy"].keys() >= {"unit", "delta", "adjacency", "observer", "epsilon_model", "epsilon_server"}
    assert fedtopk("privacy", "verify", run, "--statement", written).returncode == 0
    text = written.read_text()
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    for statement, pinned in (
        (text, other),
        (text.replace(public, other), None),
        (text.replace('"round": 6', '"round": 5'), public),
        (text.replace('"unit": "user"', '"unit": "event"'), public),
    ):
        checks, _ = Statement.parse(statement).verify(pinned)
        assert not checks[0].ok, statement
    for broken in ("", "[]", "{}", text[:-20], text.replace('"version": 1', '"version": 2')):
        with pytest.raises(RunError, match="privacy statement"):
            Statement.parse(broken)
    with pytest.raises(RunError, match="readable statement"):
        read_statement(tmp_path / "none.json")
    (copy / "report.json").unlink()
    with pytest.raises(RunError, match="report of a run that ended"):
        Statement.make(RunFolder(copy), key, 1.0)


def test_runs_over_one_population_share_its_budget(tmp_path: Path) -> None:
    """A second run gets what the first has left; a third one nothing; a run without noise would spend everything."""
    ledger, words = tmp_path / "ledger", arguments(TINY | {"privacy.randomness": "system"})
    reports = []
    for name, target in (("one", 3.0), ("two", 5.0)):
        out = tmp_path / name
        result = fedtopk(
            "simulate", "--out", out, *words, "--set", f"privacy.target_epsilon={target}", "--ledger", ledger,
            "--format", "json",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout)["privacy"])
        assert failed(out) == failed(ledger) == []
    one, two = reports
    assert one["population"]["epsilon_model"] == pytest.approx(one["epsilon_model"], abs=1e-6)
    assert max(one["epsilon_model"], two["epsilon_model"]) < two["population"]["epsilon_model"] <= 5
    assert two["population"]["epsilon_model"] < one["epsilon_model"] + two["epsilon_model"]
    assert two["population"]["epsilon_server"] > max(one["epsilon_server"], two["epsilon_server"])
    third = fedtopk(
        "simulate", "--out", tmp_path / "three", *words, "--set", "privacy.target_epsilon=5", "--ledger", ledger
    )
    assert third.returncode == 1 and "other runs over this population" in third.stderr
    resumed = fedtopk("simulate", "--out", tmp_path / "two", "--resume")
    assert resumed.returncode == 1 and "Expected the ledger of the population" in resumed.stderr
    rewrite(ledger, "DELETE FROM events WHERE id = 3")
    assert failed(ledger) == ["event log"]


def test_a_plan_by_the_command(tmp_path: Path) -> None:
    words = ("privacy", "plan", "--users", "671", "--cohort", "67", "--rounds", "200", "--epsilon", "8")
    result = fedtopk(*words, "--picture", tmp_path / "curve.png", "--format", "json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan.keys() >= {"noise_multiplier", "delta", "epsilon_model", "epsilon_server", "signal_to_noise", "verdict"}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    wrong = fedtopk("privacy", "plan", "--users", "5", "--cohort", "9", "--rounds", "1", "--epsilon", "8")
    assert wrong.returncode == 1 and wrong.stderr.splitlines() == ["Error: Expected cohort=9 to be at most users=5."]
