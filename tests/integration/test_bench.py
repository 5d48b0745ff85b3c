"""`fedtopk bench`: the documented answers, from small measurements."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import fedtopk

from common.errors import MissingDependency
from simulations.bench import fuzz as fuzzing


def answer_of(*words: str) -> dict[str, Any]:
    done = fedtopk("bench", *words, "--format", "json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_secagg() -> None:
    """The command fails unless every masked sum is the plain one."""
    words = ("--quick", "--dimension", "256", "--devices", "8,70", "--dropout", "0.1")
    answer = answer_of("secagg", *words)
    assert answer.keys() == {"machine", "rows", "flower_legacy"}
    assert answer["flower_legacy"].keys() == {"mask_ms_per_million", "ours_mask_ms_per_million", "ratio"}
    assert [(row["n"], row["d"], row["bits"], row["dropout"]) for row in answer["rows"]] == [
        (8, 256, 16, 0.1),
        (70, 256, 16, 0.1),
    ]
    for row in answer["rows"]:
        assert row["device_ms"] == pytest.approx(sum(row["device_stages_ms"].values()), abs=0.01)
        assert row["server_s"] == pytest.approx(sum(row["server_stages_s"].values()), abs=0.001)
        assert row["encode_ms"] > 0
        assert row["upload_ratio"] == round((2 * 256 + 16) / (4 * 256), 5)
    complete, sparse = answer["rows"]
    assert complete["k"] == 7 and sparse["k"] < 69
    everybody = complete["k"]
    assert complete["overhead_up_bytes"] == 268 + everybody * 112 + 16 + 64 + 32 + everybody * 32
    assert sparse["overhead_up_bytes"] < 20_000 and sparse["overhead_down_bytes"] < 128_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--devices", "8,x"), "Expected --devices=8,x to be whole numbers from 1, with commas between them."),
        (("--dropout", "0.2"), "Expected dropout=0.2 to be at most allowed-dropout=0.1."),
        (("--allowed-dropout", "0.95"), "to sum to < 1."),
        (("--bits", "12"), "Expected bits=12 to be 0, 16, 20 or 32."),
    ],
)
def test_secagg_refuses(words: tuple[str, ...], message: str) -> None:
    done = fedtopk("bench", "secagg", "--quick", "--dimension", "16", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="there is no atheris for this machine")


@needs_atheris
def test_fuzz() -> None:
    answer = answer_of("fuzz", "--inputs", "2000")
    assert answer.keys() == {"targets", "inputs", "crashes"}
    assert answer["crashes"] == 0
    assert answer["inputs"] == sum(row["inputs"] for row in answer["targets"]) >= 2000
    assert all(row.keys() == {"name", "inputs", "seconds", "crashes"} for row in answer["targets"])
    assert all(row["inputs"] > 0 for row in answer["targets"])


BROKEN = """
import sys, time
from pathlib import Path
import atheris
with atheris.instrument_imports(include=["common"]):
    from simulations.bench import fuzz, fuzz_targets
    from common.secagg.terms import Terms

def bad(name, fault):
    def read(content):
        if content != b"valid":
            fault()
        Terms.parse(content)
    return fuzz_targets.Target(name, lambda content: content == b"valid" or read(content), [b"valid"])

def raises():
    raise KeyError("x")

fuzz_targets.targets = lambda seed: [
    bad("raises", raises),
    bad("hangs", lambda: time.sleep(3)),
    bad("grows", lambda: bytearray(2**27)),
    bad("refuses", lambda: None),
]
fuzz._fuzz_all(100, 0, Path(sys.argv[1]))
"""


@needs_atheris
def test_fuzz_finds_what_is_broken(tmp_path: Path) -> None:
    words = [sys.executable, "-c", BROKEN, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["raises"]["error"] == "KeyError: 'x'"
    assert rows["hangs"]["error"].startswith("libFuzzer: timeout")
    assert rows["grows"]["error"].startswith("MemoryError")
    assert [rows[name]["crashes"] for name in ("raises", "hangs", "grows", "refuses")] == [1, 1, 1, 0]
    assert rows["refuses"]["inputs"] == 25


def test_fuzz_without_atheris(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"fedtopk\[dev\]"):
        fuzzing.fuzz(1, 0, lambda done, name: None)


def test_dashboard() -> None:
    """The viewer stops and goes on as it should; how large the overhead is, is for an idle machine to say."""
    from simulations.bench.dashboard import BLOCK, bench_dashboard, settings_of

    told: list[tuple[int, str]] = []
    results = bench_dashboard(settings_of(100, 6, 1), 6, 1, lambda stretch, kind: told.append((stretch, kind)))
    assert told == list(enumerate(6 * BLOCK, 1))
    assert results["rounds"] == 37 and results["messages"] > 0 and results["stretch_s"] > 0
    for own in (results, results["cpu"]):
        assert min(own["update_ms"].values()) > 0
        for name in ("overhead", "null"):
            low, high = own[f"{name}_ci95"]
            assert low <= own[name] <= high


def test_dashboards_figures() -> None:
    """A viewer that costs 2 %, and a dashboard that takes 1 % of a core more, on a machine that slows down steadily and
    now and then has something else to do; of cohorts that differ."""
    from simulations.bench.dashboard import BLOCK, Stretch, compared

    def stretch(number: int) -> Stretch:
        kind, updates = BLOCK[number % len(BLOCK)], 100 + number % 7
        taken = updates * 1.01**number * (3 if number in (8, 27, 40) else 1)
        dashboard = 0.01 * taken if kind == "open" else 0.0
        return Stretch(kind, updates, taken * (1.02 if kind == "open" else 1.0), taken, dashboard)

    results = compared([stretch(number) for number in range(12 * len(BLOCK))])
    assert results["overhead"] == pytest.approx(0.02) and results["null"] == pytest.approx(0)
    assert results["cpu"]["overhead"] == pytest.approx(0.01) and results["cpu"]["null"] == pytest.approx(0)
    for own in (results, results["cpu"]):
        for name in ("overhead", "null"):
            assert own[f"{name}_ci95"][0] <= own[name] <= own[f"{name}_ci95"][1]
    assert results["dashboard_cpu"] == pytest.approx(0.01 / 1.02, rel=0.01)


def test_hodges_and_lehmanns_interval_holds_the_centre_as_often_as_it_says() -> None:
    from simulations.bench.dashboard import hodges_lehmann

    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        values = 5 + generator.standard_t(3, 12)
        centre, low, high = hodges_lehmann(values)
        assert low <= centre <= high
        held += low <= 5 <= high
    assert 930 <= held <= 970
    assert hodges_lehmann(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 1e9]))[0] < 5
