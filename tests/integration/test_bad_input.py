"""A user's mistakes: one clear line, a non-zero exit code, no traceback, nothing lost."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from running import TINY, arguments, fedtopk, fedtopk_process, simulate

HEADER = "userId,movieId,rating,timestamp\n"


def refused(*words: str | Path) -> str:
    """The one line with which the command refuses."""
    done = fedtopk(*words)
    assert done.returncode not in (0, 130), done.stdout
    assert done.stdout == ""
    line = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(line) == 1, done.stderr
    return line[0].removeprefix("Error: ")


def simulate_refused(out: Path, *overrides: str) -> str:
    sets = [word for override in overrides for word in ("--set", override)]
    message = refused("simulate", "--out", out, *arguments(TINY), *sets)
    assert not (out / "report.json").exists()
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    simulate(out)
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A folder of a run that ended, to be spoilt."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def csv_of(folder: Path, text: str) -> tuple[str, str]:
    path = folder / "ratings.csv"
    path.write_text(text)
    return "data.source=csv", f"data.path={path}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.estimator=td3", "Expected objective.estimator='td3': input should be"),
        ("objective.slate_size=61", "Expected objective.slate_size=61 to be at most the 60 items of the catalogue."),
        ("training.cohort_rate=1.5", "Expected training.cohort_rate=1.5: input should be less than or equal to 1."),
        ("privacy.target_epsilon=0", "Expected privacy.target_epsilon=0: input should be greater than 0."),
        ("privacy.target_epsilon=-2", "Expected privacy.target_epsilon=-2: input should be greater than 0."),
        ("training.round=3", "Unknown setting training.round=3: did you mean training.rounds?"),
        ("aggregation.kind=secure", "Expected aggregation.kind=secure only in Flower runs"),
    ],
)
def test_settings(tmp_path: Path, override: str, message: str) -> None:
    assert simulate_refused(tmp_path / "run", override).startswith(message)


def test_a_cluster_that_would_compute_nothing(tmp_path: Path) -> None:
    words = ("--ray", "local", "--set", "aggregation.kind=plain")
    message = refused("simulate", "--out", tmp_path / "run", *arguments(TINY), *words)
    assert message.startswith("Expected --ray=local only with aggregation.kind=central")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("userId,movieId,timestamp\n1,2,3\n", "rating"),
        (HEADER + "1,2,nan,3\n", "rating"),
        (HEADER + "1,2,inf,3\n", "rating"),
        (HEADER + "1,2,4,-3\n", "timestamp"),
        (HEADER + "1,2,9,3\n", "data.rating_range"),
        ("", "ratings.csv"),
        (HEADER, "ratings.csv"),
        (HEADER + "1,2,4,3\n", "interactions"),
    ],
    ids=["column", "nan", "inf", "negative time", "out of range", "empty", "only a header", "one interaction"],
)
def test_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in simulate_refused(tmp_path / "run", *csv_of(tmp_path, text), "objective.slate_size=1")


def test_a_user_with_one_interaction_is_told_and_does_not_stop_the_run(tmp_path: Path) -> None:
    rows = [f"{user},{item},4,{item}" for user in range(5) for item in range(12)] + ["99,1,4,1"]
    sets = csv_of(tmp_path, HEADER + "\n".join(rows) + "\n")
    words = [word for override in (*sets, "data.users=0") for word in ("--set", override)]
    done = fedtopk("simulate", "--out", tmp_path / "run", *arguments(TINY), *words, "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["devices"], report["evaluation"]["users"]) == (6, 5)
    assert "1 of 6 users have fewer than 3 interactions" in done.stderr


def test_a_zip_without_ratings(tmp_path: Path) -> None:
    path = tmp_path / "books.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    message = simulate_refused(tmp_path / "run", "data.source=movielens", f"data.path={path}")
    assert str(path) in message
    assert "ratings" in message


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "Expected " in simulate_refused(tmp_path / "file" / "run")


def test_a_folder_that_holds_a_run(run: Path) -> None:
    before = (run / "report.json").read_bytes()
    message = refused("simulate", "--out", run, *arguments(TINY))
    assert "--resume" in message
    assert (run / "report.json").read_bytes() == before
    assert "--resume without" in refused("simulate", "--out", run, "--resume", "--set", "training.rounds=9")


def test_a_run_that_diverges_says_so_and_keeps_what_was_released(tmp_path: Path) -> None:
    sets = ("privacy.mechanism=none", "privacy.clip_norm=inf", "training.optimizer=sgd", "training.learning_rate=1e6")
    message = simulate_refused(tmp_path / "run", *sets, "training.rounds=60")
    assert "diverged" in message
    assert "training.learning_rate=1000000.0" in message


def test_settings_that_were_changed_after_the_start_are_refused(run: Path) -> None:
    """The ledger would describe another mechanism than the one that made its releases."""
    settings = run / "settings.toml"
    settings.write_text(settings.read_text().replace('randomness = "seeded"', 'randomness = "system"'))
    message = refused("simulate", "--out", run, "--resume")
    assert message == f"Expected {settings} to be as it was when the run was begun."


def test_what_is_left_of_a_run_is_not_built_upon(run: Path) -> None:
    (run / "settings.toml").unlink()
    assert "to hold no run yet" in refused("simulate", "--out", run, *arguments(TINY))


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--to", "x"], ["simulate", "--resume", "--out"]])
def test_a_folder_without_a_run(tmp_path: Path, command: list[str]) -> None:
    name, *options = command
    assert "to hold a run" in refused(name, *options, tmp_path / "nothing")


def test_the_installed_command_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    done = fedtopk_process("simulate", "--out", tmp_path / "run", "--set", "training.round=3")
    message = "Error: Unknown setting training.round=3: did you mean training.rounds?\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_unknown_options_exit_with_2() -> None:
    assert fedtopk("simulate", "--nonsense").returncode == 2


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    words = ("simulate", "--out", tmp_path / "run", "--set", "training.round=3", "--debug")
    assert "Traceback" in fedtopk_process(*words).stderr


@pytest.mark.parametrize("words", [("doctor",), ("data", "list"), ("data", "prepare", *arguments(TINY))])
def test_answers_for_programs(words: tuple[str, ...]) -> None:
    done = fedtopk(*words, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
