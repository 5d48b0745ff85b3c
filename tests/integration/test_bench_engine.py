"""`fedtopk bench engine`: the documented answer, and that all engines do the same work."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from running import fedtopk

from common import kernels
from common.errors import AggregationError, SettingsError
from common.model import flatten
from simulations.batched_cohort import BatchedCohort
from simulations.bench import engine
from simulations.bench.engine import FLOWER_NODES, Engine, Job, bench_engine, compared, grown, results_table
from simulations.bench.engine_loops import batched_sum, clipped_gradient, expect_equal
from simulations.bench.engine_profile import profile_engine
from simulations.bench.engine_workloads import Name, Softmax, Workload

TINY = Workload("reference", "sampled", devices=30, cohort=12, items=60, steps=9)
ROW = {
    "engine",
    "softmax",
    "workers",
    "devices",
    "cohort",
    "items",
    "steps",
    "slice",
    "parameters",
    "updates_per_second",
    "spread",
    "peak_rss_mib",
    "startup_s",
    "runs",
}


def rows_of(*words: str) -> list[dict[str, Any]]:
    """The command fails unless the engines' sums are equal."""
    done = fedtopk("bench", "engine", "--quick", *words, "--format", "json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer.keys() == {"machine", "workload", "rows", "absent", "ratios", "growth"}
    assert answer["growth"] == [] and answer["absent"] == {}
    for row in answer["rows"]:
        assert row.keys() == ROW
        assert len(row["runs"]) == 1 and row["updates_per_second"] == row["runs"][0] > 0
        assert row["startup_s"] > 0 and row["peak_rss_mib"] > 50
    ours = {row["softmax"] for row in answer["rows"] if row["engine"] == "fedtopk"}
    others = {row["engine"] for row in answer["rows"]} - {"fedtopk"}
    assert answer["ratios"].keys() == ours and all(ratios.keys() == others for ratios in answer["ratios"].values())
    rows: list[dict[str, Any]] = answer["rows"]
    return rows


def test_a_profile_counts_the_arithmetic_and_all_of_the_time() -> None:
    done = fedtopk("bench", "engine", "--quick", "--profile", "--softmax", "full", "--format", "json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["profile"]
    steps, items, state, width = 10, 200, 64, 65
    grams = steps * (steps + 1) // 2 * (items + width)  # a half of each, where the loops are compiled
    heads = 3 * steps * items * width + grams  # logits, slope, sum
    cell = 10 * 3 * state * (32 + 1 + state)  # the forward pass alone
    assert 2 * (heads + cell) / 1e6 < row["megaflops"] < 2 * (heads + grams + 5 * cell) / 1e6
    assert row["ratio"] == pytest.approx(row["microseconds"] / row["floor_microseconds"], rel=0.05)
    assert sum(row["parts"].values()) == pytest.approx(1, abs=0.05)


@pytest.mark.skipif(not kernels.available, reason="no C compiler was there when fedtopk was installed")
@pytest.mark.parametrize("name", ["reference", "full"])
def test_a_profile_counts_the_same_arithmetic_of_compiled_loops(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(name, "sampled", devices=60, cohort=40, items=200, steps=10)
    compiled = profile_engine(workload)["megaflops"]
    monkeypatch.setattr(kernels, "_library", None)
    assert compiled == pytest.approx(profile_engine(workload)["megaflops"], rel=0.03)  # halves of few Gram matrices


def test_ours_and_the_plain_loop() -> None:
    rows = rows_of("--engines", "fedtopk,plain", "--softmax", "full", "--workers", "2")
    assert [(row["engine"], row["softmax"], row["workers"]) for row in rows] == [
        ("fedtopk", "full", 2),
        ("plain", "full", 1),
        ("plain", "full", 2),
    ]
    sizes = {(row["devices"], row["cohort"], row["items"], row["steps"]) for row in rows}
    assert sizes == {(60, 40, 200, 10)}


@pytest.mark.parametrize("peer", ["pfl", "fedjax"])
def test_a_peer_has_our_sum(peer: Engine) -> None:
    """With both softmaxes; of two processes pfl adds up the parts, and each of FedJAX's has the sum."""
    if not engine.installed(peer):  # asked without an import: JAX starts threads, and other tests fork
        pytest.skip("not installed")
    for softmax, workers in (("full", "2"), ("sampled", "1")):
        (row,) = rows_of("--engines", peer, "--softmax", softmax, "--workers", workers)
        assert (row["engine"], row["softmax"], row["workers"]) == (peer, softmax, int(workers))


def test_a_peer_without_a_row_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Job) -> dict[str, Any]:
        raise AttributeError(f"module '{job.engine}' has no attribute 'simulate'")

    def found(workload: Workload) -> dict[str, str]:
        results = bench_engine(compared([workload], ["pfl", "fedjax"], 1, 1), [], lambda done, name: None)
        assert results["rows"] == [] and results["ratios"] == {}
        console = Console(width=200)
        with console.capture() as printed:
            console.print(results_table(results))
        absent: dict[str, str] = results["absent"]
        lines = [line for line in printed.get().splitlines() if "│" in line]
        assert all(any(peer in line and why in line for line in lines) for peer, why in absent.items())
        return absent

    monkeypatch.setattr(Job, "row", refuse)
    monkeypatch.setattr(engine, "installed", lambda package: False)
    assert found(TINY) == {"pfl": "not installed", "fedjax": "not installed"}
    monkeypatch.setattr(engine, "installed", lambda package: package == "pfl")
    monkeypatch.setattr(engine, "machine", lambda *packages: {})  # which would look for pfl's version
    assert found(replace(TINY, name="full"))["pfl"] == "does the workload reference only"
    failing = {"pfl": "AttributeError: module 'pfl' has no attribute 'simulate'", "fedjax": "not installed"}
    assert found(TINY) == failing
    with pytest.raises(AttributeError):  # of an engine that is no peer
        bench_engine(compared([TINY], ["fedtopk"], 1, 1), [], lambda done, name: None)


def test_flower_with_the_whole_objective() -> None:
    """Its nodes keep their user embeddings between rounds."""
    (row,) = rows_of("--workload", "full", "--engines", "flower", "--cohort", "6", "--workers", "1")
    assert (row["engine"], row["softmax"], row["devices"], row["cohort"]) == ("flower", "sampled", 6, 6)


@pytest.mark.parametrize("name", ["reference", "full"])
@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_autograd_adds_up_to_the_batched_sum(name: Name, softmax: Softmax) -> None:
    workload = replace(TINY, name=name, softmax=softmax).limited(8)
    parameters, population = workload.parameters(), workload.population()
    model = {key: torch.nn.Parameter(value) for key, value in parameters.items()}
    total = {key: torch.zeros_like(value) for key, value in parameters.items()}
    offer = workload.offer(1, parameters)
    for device in range(8):
        window, user = population.windows(1, np.array([device])), population.users[[device]]
        gradient, _ = clipped_gradient(offer, model, window, user)
        assert float(flatten(gradient).norm()) <= 1 + 1e-5
        total = {key: value + gradient[key] for key, value in total.items()}
    found = flatten(total).numpy()
    expect_equal("loop", found, batched_sum(workload))
    with pytest.raises(AggregationError, match=r"the loop's sum to be the batched engine's to 0\.0001"):
        expect_equal("loop", 1.001 * found, batched_sum(workload))


def test_only_the_full_workload_is_noised() -> None:
    for workload in (TINY, replace(TINY, name="full")):
        offer, silent = (workload.offer(1, workload.parameters(), silent=silent) for silent in (False, True))
        with BatchedCohort(workload.population()) as cohort:
            one, other = (cohort.sum_updates(each, workload.members(1)).total for each in (offer, silent))
        assert (float(np.linalg.norm(one - other)) > 1) == (workload.name == "full")


def test_a_smaller_population_is_the_beginning_of_a_larger_one() -> None:
    few, many = TINY.limited(5).population(), TINY.population()
    one, other = (population.windows(1, np.arange(5)) for population in (few, many))
    assert torch.equal(one.items, other.items) and torch.equal(one.rewards, other.rewards)


def test_which_rows_there_are() -> None:
    workload = Workload("reference", "sampled", 10_000, 2000, 5000, 50)
    jobs = compared([workload], ["fedtopk", "plain", "flower"], workers=2, runs=3)
    assert [(job.engine, job.effort.workers, job.workload.devices) for job in jobs] == [
        ("fedtopk", 2, 10_000),
        ("plain", 1, 10_000),
        ("plain", 2, 10_000),
        ("flower", 2, FLOWER_NODES),
    ]
    sizes = [
        (job.workload.devices, job.workload.cohort, job.workload.items, job.workload.steps, job.effort.workers)
        for job in grown(workload, workers=2, runs=3)
    ]
    assert sizes == [
        (10_000, 2000, 5000, 50, 2),
        (1000, 1000, 5000, 50, 2),
        (100_000, 2000, 5000, 50, 2),
        (10_000, 50, 5000, 50, 2),
        (10_000, 500, 5000, 50, 2),
        (10_000, 10_000, 5000, 50, 2),
        (10_000, 2000, 50_000, 50, 2),
        (10_000, 2000, 5000, 200, 2),
        (10_000, 2000, 100_000, 50, 2),
        (10_000, 2000, 5000, 50, 1),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engines", "ours"), "Expected --engines=ours to be some of fedtopk, plain, flower, pfl, fedjax"),
        (("--softmax", "full,half"), "Expected --softmax=full,half to be some of full, sampled"),
    ],
)
def test_refuses(words: tuple[str, ...], message: str) -> None:
    done = fedtopk("bench", "engine", "--quick", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


def test_a_cohort_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="Expected --cohort=31 to be at most --devices=30"):
        replace(TINY, cohort=31)
