"""`fedtopk bench`: measured figures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import typer

from common.console import FormatOption, answer
from common.errors import SettingsError
from simulations.options import CORES

bench_app = typer.Typer(help="Measured figures.", no_args_is_help=True)


@bench_app.command()
def secagg(
    devices: Annotated[
        str,
        typer.Option("--devices", metavar="N,N…", help="Sizes of a cohort. [default: 100,1000, and 10000 of d=4096]"),
    ] = "",
    dimension: Annotated[int, typer.Option("--dimension", min=1, help="d, numbers of an update.")] = 1 << 20,
    dropout: Annotated[float, typer.Option("--dropout", min=0, help="Share of the devices that drop out.")] = 0.05,
    bits: Annotated[int, typer.Option("--bits", help="Width of a number: 16, 20, 32, or 0 for what fits.")] = 16,
    corrupt: Annotated[float, typer.Option("--corrupt", min=0, help="γ, share of devices that may collude.")] = 0.1,
    allowed: Annotated[float, typer.Option("--allowed-dropout", min=0, help="δ, share that may drop out.")] = 0.1,
    quick: Annotated[bool, typer.Option("--quick", help="Without the cohorts of 1000 and 10000.")] = False,
    format: FormatOption = "text",
) -> None:
    """Measure what secure aggregation costs a device and the server, beside Flower's legacy masks (half an hour)."""
    from simulations.bench.secagg import Case, bench_secagg, results_table
    from simulations.progress import RoundsBar

    sizes = [(n, dimension) for n in _numbers(devices or ("100" if quick else "100,1000"))]
    if not devices and not quick:
        sizes.append((10_000, min(dimension, 4096)))
    cases = [Case(n, d, dropout, bits, corrupt, allowed) for n, d in sizes]
    with RoundsBar(sum(case.steps for case in cases), "secagg", "messages") as bar:
        results = bench_secagg(cases, bar.advance)
    answer(format, results, lambda: results_table(results))


@bench_app.command()
def fuzz(
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="Inputs in all.")] = 1_000_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the keys and of the inputs.")] = 0,
    format: FormatOption = "text",
) -> None:
    """Feed every reader of secure aggregation's messages with changed ones; nothing may crash (minutes)."""
    from simulations.bench.fuzz import fuzz as run
    from simulations.bench.fuzz import results_table
    from simulations.progress import RoundsBar

    with RoundsBar(inputs, "fuzz", "inputs") as bar:
        results = run(inputs, seed, bar.update)
    answer(format, results, lambda: results_table(results))
    if results["crashes"]:
        raise typer.Exit(1)


@bench_app.command()
def device(
    items: Annotated[int, typer.Option("--items", min=1, help="A, size of the catalogue.")] = 5000,
    events: Annotated[int, typer.Option("--events", min=1, help="Interactions of the device's history.")] = 200,
    devices: Annotated[int, typer.Option("--devices", min=2, help="n, size of the cohort.")] = 100,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds that are measured.")] = 9,
    format: FormatOption = "text",
) -> None:
    """Measure what a round, a recommendation and a new interaction cost one device (a minute)."""
    from simulations.bench.device import bench_device, results_table
    from simulations.bench.device_rounds import Workload
    from simulations.progress import RoundsBar

    workload = Workload(items, events, devices, repeats)
    with RoundsBar(workload.steps, "device", "measurements") as bar:
        results = bench_device(workload, bar.advance)
    answer(format, results, lambda: results_table(results))


@bench_app.command()
def engine(
    workload: Annotated[
        Literal["reference", "full"],
        typer.Option("--workload", help="Cross-entropy by a GRU, or the default objective with its noise."),
    ] = "reference",
    softmax: Annotated[
        str,
        typer.Option("--softmax", help="full, sampled, or both, which is the default; of the full workload: sampled."),
    ] = "",
    engines: Annotated[
        str, typer.Option("--engines", help="Which; the last two where they are installed.")
    ] = "fedtopk,plain,flower,pfl,fedjax",
    devices: Annotated[int, typer.Option("--devices", min=1, help="N, devices that there are.")] = 10_000,
    cohort: Annotated[int, typer.Option("--cohort", min=1, help="Devices of a round; of Flower's at most 200.")] = 2000,
    items: Annotated[int, typer.Option("--items", min=2, help="A, size of the catalogue.")] = 5000,
    steps: Annotated[int, typer.Option("--steps", min=2, help="T, interactions of a device.")] = 50,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = CORES,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Measurements of each; the median counts.")] = 3,
    growth: Annotated[bool, typer.Option("--growth", help="Also our engine at other sizes.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead: where our engine's time goes, beside its arithmetic's.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="At most 40 of 60 devices, 200 items, 10 steps.")] = False,
    format: FormatOption = "text",
) -> None:
    """Measure device updates per second, beside other simulations and a plain loop (minutes, on an idle machine)."""
    from simulations.bench.engine import Engine, bench_engine, compared, grown, results_table
    from simulations.bench.engine_profile import profile_table, profiled
    from simulations.bench.engine_workloads import Softmax, Workload
    from simulations.progress import RoundsBar

    if quick:
        devices, cohort, items, steps, runs = min(devices, 60), min(cohort, 40), min(items, 200), min(steps, 10), 1
    kinds = softmax or ("full,sampled" if workload == "reference" else "sampled")
    chosen = _words("softmax", kinds, get_args(Softmax))
    workloads = [Workload(workload, kind, devices, cohort, items, steps) for kind in chosen]
    if profile:
        measured = profiled(workloads)
        answer(format, measured, lambda: profile_table(measured))
        return
    comparison = compared(workloads, _words("engines", engines, get_args(Engine)), workers, runs, quick=quick)
    more = grown(replace(workloads[0], softmax="sampled"), workers, runs, quick=quick) if growth else []
    with RoundsBar(len(comparison) + len(more), "engine", "rows") as bar:
        results = bench_engine(comparison, more, bar.update)
    answer(format, results, lambda: results_table(results))


@bench_app.command()
def dashboard(
    devices: Annotated[
        int, typer.Option("--devices", min=100, help="N; a tenth of them takes part in a round.")
    ] = 10_000,
    blocks: Annotated[
        int, typer.Option("--blocks", min=6, help="Of six stretches: open, closed, null, null, closed, open.")
    ] = 12,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of a stretch.")] = 6,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = CORES,
    format: FormatOption = "text",
) -> None:
    """Measure what an open dashboard costs the run that it shows (four minutes, on an idle machine)."""
    from simulations.bench.dashboard import BLOCK, bench_dashboard, results_table, settings_of
    from simulations.progress import RoundsBar

    with RoundsBar(blocks * len(BLOCK), "dashboard", "stretches") as bar:
        results = bench_dashboard(settings_of(devices, blocks, rounds), blocks, workers, bar.update)
    answer(format, results, lambda: results_table(results))


@bench_app.command()
def pages(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of the run whose page it is.")] = 2000,
    devices: Annotated[
        int, typer.Option("--devices", min=100, help="N; a hundredth takes part in a round.")
    ] = 1_000_000,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Times that it is opened; the median counts.")] = 5,
    format: FormatOption = "text",
) -> None:
    """Measure how soon the page of a long run is there and how promptly it answers (a minute; needs chromium)."""
    from simulations.bench.pages import bench_pages, results_table
    from simulations.progress import RoundsBar

    with RoundsBar(runs, "pages", "openings") as bar:
        results = bench_pages(rounds, devices, runs, bar.update)
    answer(format, results, lambda: results_table(results))


def _words(option: str, text: str, known: Sequence[Any]) -> list[Any]:
    """Known words with commas between them, in the order in which they are known."""
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= set(known):
        raise SettingsError(f"Expected --{option}={text} to be some of {', '.join(known)}, with commas between them.")
    return [word for word in known if word in words]


def _numbers(text: str) -> list[int]:
    """Positive whole numbers with commas between them."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise SettingsError(f"Expected --devices={text} to be whole numbers from 1, with commas between them.")
    return [int(word) for word in words]
