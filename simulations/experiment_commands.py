"""`fedtopk demo`, `compare`, `paper`, `closed-loop` and `accuracy`: many trainings, and what they show."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from common.console import FormatOption, answer, stderr
from simulations.options import CORES, ConfigOption, SetOption, WorkersOption


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the demo's runs.")] = Path(
        "runs/demo"
    ),
    workers: WorkersOption = CORES,
    format: FormatOption = "text",
) -> None:
    """Train on MovieLens small without privacy and under two budgets, and print the results table (minutes)."""
    from rich.console import Group

    from simulations.demo import demo as run
    from simulations.demo import results_table, verdict
    from simulations.progress import watch

    with ExitStack() as bars:
        reports = run(out, workers, lambda name, rounds: watch(bars, name, rounds))
    if any(report["status"] in ("stopped", "aborted") for report in reports.values()):
        raise typer.Exit(130)
    where = f"Run folders: {out}/run-*. On a web page: fedtopk dashboard {out}"
    answer(format, reports, lambda: Group(results_table(reports), verdict(reports), where))


def compare(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder for the three runs and what they show.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    workers: WorkersOption = CORES,
    format: FormatOption = "text",
) -> None:
    """Train with no correction, the correction and the top-K correction, otherwise alike, and show what differs.

    Without privacy unless the settings ask for it. The same command goes on with what an earlier one left.
    """
    from rich.console import Group

    from server.run_folder import RunFolder
    from simulations.compare import compare as run
    from simulations.compare import settings_of
    from simulations.compare_report import results_table, write_report
    from simulations.progress import watch
    from simulations.tensorboard import write_tensorboard

    settings = settings_of(config, overrides or ())
    with ExitStack() as bars:
        comparison = run(out, settings, workers, lambda name, rounds: watch(bars, name, rounds))
    if comparison is None:
        stderr.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130)
    for estimator in settings:
        write_tensorboard(RunFolder(out / estimator), out / "tensorboard" / estimator)
    written = write_report(comparison, out)
    paths = "\n".join([*written.values(), f"tensorboard --logdir {out / 'tensorboard'}"])
    answer(format, comparison, lambda: Group(results_table(comparison), *comparison["findings"], paths))


def paper(
    out: Annotated[Path, typer.Option("--out", metavar="F.json", help="File for the answer.")],
    picture: Annotated[Path | None, typer.Option("--picture", metavar="F.png", help="Draw the policies, too.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each case.")] = 5,
    format: FormatOption = "text",
) -> None:
    """Repeat the article's two simulations, federatedly and centrally, beside their exact results (minutes)."""
    from server.durable import make_folder, replacing
    from simulations.paper import ROUNDS, results_table, run_paper, trainings
    from simulations.progress import RoundsBar

    if picture is not None:
        from simulations.paper_picture import draw

        make_folder(picture.parent)
    make_folder(out.parent)
    with RoundsBar(trainings(seeds) * ROUNDS, "training") as bar:
        results = run_paper(seeds, bar.update)
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if picture is not None:
        with replacing(picture) as temporary:
            draw(results, temporary)
    answer(format, results, lambda: results_table(results))


def closed_loop(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; an earlier one goes on.")],
    learners: Annotated[list[str] | None, typer.Option("--learner", help="One of them only; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Worlds, logs and trainings.")] = 5,
    source: Annotated[
        str, typer.Option("--source", help="movielens-small or synthetic: what the world is fitted to.")
    ] = ("movielens-small"),
    users: Annotated[int, typer.Option("--users", min=1, help="Simulated devices.")] = 160_000,
    items: Annotated[int, typer.Option("--items", min=1, help="Items of the catalogue.")] = 2_000,
    events: Annotated[int, typer.Option("--events", min=1, help="Logged events of a device.")] = 40,
    generations: Annotated[int, typer.Option("--generations", min=1, help="Times to train, deploy and log.")] = 1,
    overrides: SetOption = None,
    workers: WorkersOption = CORES,
    format: FormatOption = "text",
) -> None:
    """Train every learner from logs of a world with known preferences, and value its policy exactly (half an hour)."""
    from rich.console import Group

    from simulations.closed_loop import Setup
    from simulations.closed_loop_table import (
        behaviour_table,
        comparisons_table,
        jobs_of,
        off_policy_table,
        run_closed_loop,
        values_table,
    )
    from simulations.progress import RoundsBar

    setup = Setup(source=source, users=users, items=items, events=events, generations=generations)
    chosen = learners or []
    with RoundsBar(jobs_of(chosen, seeds), "closed loop", "results") as bar:
        summary = run_closed_loop(
            out,
            setup,
            chosen,
            seeds,
            overrides or [],
            valued=min(users, 2_000),
            workers=workers,
            on_done=bar.update,
        )
    tables = (values_table, comparisons_table, off_policy_table, behaviour_table)
    answer(format, summary, lambda: Group(*(table(summary) for table in tables)))


def accuracy(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; an earlier one goes on.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each case, each way.")] = 5,
    overrides: SetOption = None,
    workers: WorkersOption = CORES,
    format: FormatOption = "text",
) -> None:
    """Train every estimator federatedly and centrally, not privately, and rank held-out items (an hour)."""
    from simulations.accuracy import CASES, WAYS, accuracy_table, run_accuracy
    from simulations.progress import RoundsBar

    with RoundsBar(len(CASES) * len(WAYS) * seeds, "accuracy", "results") as bar:
        summary = run_accuracy(out, list(CASES), seeds, overrides or [], workers=workers, on_done=bar.update)
    answer(format, summary, lambda: accuracy_table(summary))
