"""`fedtopk compare`: three runs, one dictionary of figures, and what shows them."""

import importlib
import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import TINY, arguments, fedtopk
from tensorboardX.proto import event_pb2

from common.errors import MissingDependency, RunError, SettingsError
from common.objective import WEIGHT_EDGES
from server.events import EventReader, Events
from server.run_folder import RunFolder
from server.store import open_store, open_store_read_only
from simulations.compare import ESTIMATORS, compare, effective_share, settings_of
from simulations.compare_report import page
from simulations.recorded import Histogram, bounds_of, recorded
from simulations.simulate import Watch
from simulations.tensorboard import write_tensorboard

SETTINGS = TINY | {"objective.critic": "baseline", "evaluation.every": 3}
OVERRIDES = [f"{key}={value}" for key, value in SETTINGS.items()]
ROUNDS = list(range(1, TINY["training.rounds"] + 1))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compare") / "run"
    done = fedtopk("compare", "--out", out, *arguments(SETTINGS), "--workers", "1", "--format", "json")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def out(answered: tuple[Path, str]) -> Path:
    return answered[0]


@pytest.fixture
def comparison(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return loaded


def test_standard_output_is_the_file(answered: tuple[Path, str], comparison: dict[str, Any]) -> None:
    assert json.loads(answered[1]) == comparison


def test_the_runs_differ_in_the_estimator_alone(out: Path, comparison: dict[str, Any]) -> None:
    trees = [RunFolder(out / estimator).settings().flat() for estimator in ESTIMATORS]
    assert [tree.pop("objective.estimator") for tree in trees] == list(ESTIMATORS)
    assert trees[0] == trees[1] == trees[2]
    assert trees[0]["privacy.mechanism"] == "none"
    assert comparison["differences"]["objective.critic"] == {"here": "baseline", "default": "none"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_reports_what_it_has(comparison: dict[str, Any], estimator: str) -> None:
    row = comparison["estimators"][estimator]
    shared = {"policy_loss", "critic_loss", "log_pi", "clipped", "norm"}
    corrected = {"behaviour_loss", "behaviour_log_probability", "ess_share", "weight_p10", "weight_p50", "weight_p90"}
    assert shared <= row["curves"].keys()
    assert row["rounds_recorded"] == ROUNDS
    assert {len(curve) for curve in row["curves"].values()} == {len(ROUNDS)}
    assert row["evaluation"]["hr@10_ci95"][0] <= row["evaluation"]["hr@10"] <= row["evaluation"]["hr@10_ci95"][1]
    assert corrected <= row["curves"].keys()
    assert row["curves"]["behaviour_log_probability"] == [-loss for loss in row["curves"]["behaviour_loss"]]
    assert all(0 < share <= 1 for share in row["curves"]["ess_share"])
    low, middle, high = (row["final"][f"weight_{band}"] for band in ("p10", "p50", "p90"))
    assert 0 < low < middle < high
    assert 0.1 < row["final"]["weight_mean"] < 10
    assert np.isclose(WEIGHT_EDGES.numpy(), row["final"]["weight_cap_proposed"]).any()
    counted = {name: sum(histogram["counts"]) for name, histogram in row["histograms"].items()}
    assert counted["weights"] == pytest.approx(counted["multipliers"]) == pytest.approx(row["final"]["steps"])


def test_tensorboard_files_hold_what_was_recorded(out: Path) -> None:
    with open_store_read_only(out / "top-k") as store:
        events = EventReader(store).read(kinds=["simulation", "round", "validation"])
    losses = {event.round: event.fields["policy_loss"] for event in events if event.kind == "simulation"}
    members = {event.round: event.fields["members"] for event in events if event.kind == "round"}
    validated = {event.round: event.fields["hr@10"] for event in events if event.kind == "validation"}
    scalars, histograms = tensorboard_of(out / "tensorboard/top-k")
    assert scalars["simulation/policy_loss"] == pytest.approx(losses)
    assert scalars["round/members"] == members
    assert scalars["validation/hr_at_10"] == pytest.approx(validated)
    assert set(histograms) == {"simulation/log10_weights", "simulation/multipliers", "simulation/log10_norms"}
    for tag, by_round in histograms.items():
        assert list(by_round) == ROUNDS, tag
        for histogram in by_round.values():
            assert len(histogram.bucket) == len(histogram.bucket_limit)
            assert sum(histogram.bucket) == pytest.approx(histogram.num)
            assert histogram.min < histogram.bucket_limit[0] < histogram.bucket_limit[-1] == histogram.max


def test_tensorboard_files_are_replaced(out: Path, tmp_path: Path) -> None:
    for _ in range(2):
        write_tensorboard(RunFolder(out / "reinforce"), tmp_path)
    scalars, histograms = tensorboard_of(tmp_path)
    assert list(scalars["simulation/critic_loss"]) == ROUNDS
    assert all(list(steps) == ROUNDS for steps in histograms.values())


def tensorboard_of(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, Any]]]:
    """Scalars and histograms of the one event file in a folder, by tag and step."""
    (path,) = folder.iterdir()
    data, at = path.read_bytes(), 0
    scalars: dict[str, dict[int, float]] = {}
    histograms: dict[str, dict[int, Any]] = {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            if value.HasField("histo"):
                histograms.setdefault(value.tag, {})[event.step] = value.histo
            else:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        at += 12 + length + 4
    return scalars, histograms


def test_the_picture_opens(out: Path) -> None:
    with Image.open(out / "compare.png") as image:
        image.verify()
        assert image.width > 1000 < image.height


def test_the_page_is_self_contained_and_shows_the_figures(out: Path, comparison: dict[str, Any]) -> None:
    html = (out / "compare.html").read_text()
    assert "data:image/png;base64," in html
    assert not any(word in html for word in ("http:", "https:", "<script", "<link", "url("))
    for row in comparison["estimators"].values():
        low, high = row["evaluation"]["hr@10_ci95"]
        assert f"<td>{row['evaluation']['hr@10']:.3f} [{low:.3f}, {high:.3f}]</td>" in html
        for name in ("policy_loss", "critic_loss", "behaviour_loss", "ess_share", "weight_cap_proposed"):
            if name in row["final"]:
                assert f"<td>{row['final'][name]:.4g}</td>" in html
    for sentence in comparison["findings"]:
        assert sentence in html


def test_the_page_escapes_what_settings_say(comparison: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    comparison["settings"]["data.path"] = evil
    comparison["differences"]["data.path"] = {"here": evil, "default": ""}
    html = page(comparison, b"")
    assert evil not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_words_follow_from_the_figures(comparison: dict[str, Any]) -> None:
    text = "\n".join(comparison["findings"])
    low, high = comparison["popularity"]["hr@10_ci95"]
    for row in comparison["estimators"].values():
        lowest, highest = row["evaluation"]["hr@10_ci95"]
        relation = "above" if lowest > high else "below" if highest < low else "not told apart from"
        assert f"{row['name']} is {relation} it" in text.splitlines()[0]
        assert f"are worth {100 * row['final']['ess_share']:.0f} % of as many" in text
        assert f"propose_cap gives {row['final']['weight_cap_proposed']:.3g}" in text


def watch_until(rounds: float) -> Watch:
    """A silent watch that asks for a stop after so many rounds."""
    left = rounds

    @contextmanager
    def patient() -> Iterator[Any]:
        yield lambda: left <= 0

    def on_round(*_: Any) -> None:
        nonlocal left
        left -= 1

    return Watch(note=lambda sentence: None, on_round=on_round, patient=patient)


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path: Path, comparison: dict[str, Any]) -> None:
    settings = settings_of(None, OVERRIDES)

    def stopped(name: str, rounds: int) -> Watch:
        return watch_until(3 if name == "correction" else np.inf)

    assert compare(tmp_path, settings, 1, stopped) is None
    assert not (tmp_path / "top-k").exists()
    resumed = compare(tmp_path, settings, 1, lambda name, rounds: watch_until(np.inf))
    assert json.loads(json.dumps(resumed)) == comparison

    others = settings_of(None, [*OVERRIDES, "training.seed=1"])
    with pytest.raises(RunError, match="begun with the settings of this comparison"):
        compare(tmp_path, others, 1, lambda name, rounds: watch_until(np.inf))


def test_privacy_is_off_unless_somebody_asks_for_it(tmp_path: Path) -> None:
    config = tmp_path / "private.toml"
    config.write_text('[privacy]\nmechanism = "skellam"\n')
    assert not settings_of(None, [])["top-k"].private
    assert not settings_of(None, ["privacy.clip_norm=inf"])["top-k"].private
    assert settings_of(None, ["privacy.mechanism=skellam"])["top-k"].private
    assert settings_of(config, [])["top-k"].private
    with pytest.raises(SettingsError, match="trains reinforce, off-policy, top-k"):
        settings_of(None, ["objective.estimator = top-k"])


def test_runs_that_show_nothing_of_devices_are_compared_by_what_remains(tmp_path: Path) -> None:
    changes = ["training.rounds=1", "training.cohort_rate=0.1", "aggregation.kind=plain", "objective.critic=none"]
    plain = compare(tmp_path, settings_of(None, [*OVERRIDES, *changes]), 1, lambda name, rounds: watch_until(np.inf))
    assert plain is not None
    assert {len(row["curves"]) for row in plain["estimators"].values()} == {0}
    assert "correction: aggregation.kind=plain shows nothing of devices." in plain["findings"]
    assert page(plain, b"").count("<td>–</td>") > 0


def test_effective_share_and_quantiles() -> None:
    bounds = bounds_of("weights", 10)
    counts = np.zeros(len(bounds) - 1)
    counts[[10, 14]] = 3, 1  # four bins to a factor of ten
    weights = Histogram(counts, bounds)
    assert effective_share(weights, np.inf) == pytest.approx((3 + 10) ** 2 / (4 * (3 + 100)), rel=1e-5)
    assert effective_share(weights, 1e-4) == pytest.approx(1)
    assert effective_share(Histogram(0 * counts, bounds), 1.0) == 0
    assert weights.quantile(0.375) == pytest.approx((bounds[10] + bounds[11]) / 2)
    assert (bounds_of("multipliers", 4)[[0, -1]] == [0, 4]).all()


def test_a_round_that_was_run_again_counts_once(out: Path, tmp_path: Path) -> None:
    again = RunFolder(shutil.copytree(out / "off-policy", tmp_path / "run"))
    with open_store(again.path) as store:
        Events(store, time.time).record("simulation", 3, policy_loss=-1.5)
    losses = {line.round: line.figures["policy_loss"] for line in recorded(again) if line.kind == "simulation"}
    assert list(losses) == ROUNDS
    assert losses[3] == -1.5


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("tensorboardX", "simulations.tensorboard", "tensorboard"),
        ("matplotlib.axes", "simulations.compare_report", "pictures"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependency, match=rf"fedtopk\[{extra}\]"):
        importlib.import_module(module)
