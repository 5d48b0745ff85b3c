"""The `fedtopk` command."""

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.table import Table

from client.cli import device_app
from client.recommend import recommend
from common.console import Format, answer, stderr, stopping
from common.errors import FedtopkError, SettingsError
from common.settings import load_settings
from server.cli import authority_app, server_app
from simulations.audits.command import audit
from simulations.bench.commands import bench_app

if TYPE_CHECKING:
    from simulations.simulate import Watch

_CORES = len(os.sched_getaffinity(0))

app = typer.Typer(
    help="Federated, differentially private training of the top-K off-policy-corrected REINFORCE recommender.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(authority_app, name="authority")
app.add_typer(server_app, name="server")
app.add_typer(device_app, name="device")

FormatOption = Annotated[Format, typer.Option("--format", help="What standard output holds.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a setting; repeatable.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; what it lacks is default.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Processes; they change the speed and nothing else.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Accepted before or after the subcommand; :func:`main` reads it."""


@app.command()
def simulate(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    workers: WorkersOption = _CORES,
    cluster: Annotated[
        str, typer.Option("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: its address, auto, or local.")
    ] = "",
    format: FormatOption = "text",
) -> None:
    """Train federatedly over a simulated population, evaluate, and write the run folder."""
    from server.run_folder import RunFolder
    from simulations.simulate import simulate as run

    if resume and (config is not None or overrides):
        raise SettingsError("Expected --resume without --config and --set: a run goes on with its own settings.")
    folder = RunFolder(out)
    settings = None if resume else load_settings(config, overrides or ())
    rounds = (settings or folder.settings()).training.rounds
    with ExitStack() as bars:
        report = run(folder, _watch(bars, "training", rounds), settings=settings, workers=workers, cluster=cluster)
    answer(format, report, lambda: _report_text(report, out))
    if report["status"] == "stopped":
        stderr.print(f"Stopped after round {report['rounds']}. Go on with: fedtopk simulate --resume --out {out}")
        raise typer.Exit(130)


@app.command()
def fleet(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run, and of all devices.")],
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes, one a device.")] = 8,
    config: ConfigOption = None,
    overrides: SetOption = None,
    format: FormatOption = "text",
) -> None:
    """Train over real device processes on this machine: TLS, enrolled keys, secure aggregation (minutes)."""
    from server.run_folder import RunFolder
    from simulations.fleet import demo_settings, run_fleet
    from simulations.progress import RoundsBar

    def say(line: str) -> None:
        stderr.print(line, highlight=False, soft_wrap=True)

    settings = demo_settings(devices, config, overrides or ())
    with (
        stopping("Stopping after this round; press Ctrl-C again to break it off.") as should_stop,
        RoundsBar(settings.training.rounds, "training") as bar,
    ):
        report = run_fleet(
            RunFolder(out),
            settings,
            should_stop=should_stop,
            on_round=lambda progress: bar.update(progress.round, f"{progress.cohort_sum.survivors} updates"),
            say=say,
        )
    answer(format, report, lambda: _report_text(report, out))
    if report["status"] == "stopped":
        raise typer.Exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the demo's runs.")] = Path(
        "runs/demo"
    ),
    workers: WorkersOption = _CORES,
    format: FormatOption = "text",
) -> None:
    """Train on MovieLens small without privacy and under two budgets, and print the results table (minutes)."""
    from rich.console import Group

    from simulations.demo import demo as run
    from simulations.demo import results_table, verdict

    with ExitStack() as bars:
        reports = run(out, workers, lambda name, rounds: _watch(bars, name, rounds))
    if any(report["status"] == "stopped" for report in reports.values()):
        raise typer.Exit(130)
    answer(format, reports, lambda: Group(results_table(reports), verdict(reports), f"Run folders: {out}/run-*"))


@app.command()
def compare(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder for the three runs and what they show.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    workers: WorkersOption = _CORES,
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
    from simulations.tensorboard import write_tensorboard

    settings = settings_of(config, overrides or ())
    with ExitStack() as bars:
        comparison = run(out, settings, workers, lambda name, rounds: _watch(bars, name, rounds))
    if comparison is None:
        stderr.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130)
    for estimator in settings:
        write_tensorboard(RunFolder(out / estimator), out / "tensorboard" / estimator)
    written = write_report(comparison, out)
    paths = "\n".join([*written.values(), f"tensorboard --logdir {out / 'tensorboard'}"])
    answer(format, comparison, lambda: Group(results_table(comparison), *comparison["findings"], paths))


@app.command()
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


@app.command("closed-loop")
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
    workers: WorkersOption = _CORES,
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


@app.command()
def accuracy(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; an earlier one goes on.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each case, each way.")] = 5,
    overrides: SetOption = None,
    workers: WorkersOption = _CORES,
    format: FormatOption = "text",
) -> None:
    """Train every estimator federatedly and centrally, not privately, and rank held-out items (an hour)."""
    from simulations.accuracy import CASES, WAYS, accuracy_table, run_accuracy
    from simulations.progress import RoundsBar

    with RoundsBar(len(CASES) * len(WAYS) * seeds, "accuracy", "results") as bar:
        summary = run_accuracy(out, list(CASES), seeds, overrides or [], workers=workers, on_done=bar.update)
    answer(format, summary, lambda: accuracy_table(summary))


@app.command()
def evaluate(run: RunArgument, format: FormatOption = "text") -> None:
    """Evaluate a run's model by full ranking, beside popularity and first-order Markov."""
    from server.run_folder import RunFolder
    from simulations.evaluate_run import evaluate_run

    figures = evaluate_run(RunFolder(run))
    answer(format, figures, lambda: _evaluation_table(figures))


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder to write into; made where missing.")],
    format: FormatOption = "text",
) -> None:
    """Write a run's shared model for other programs: safetensors, the catalogue as csv, the settings."""
    from server.run_folder import RunFolder
    from simulations.export import export_run

    written = export_run(RunFolder(run), to)
    answer(format, written, lambda: "\n".join(f"{name}: {path}" for name, path in written.items()))


app.command()(recommend)
app.command()(audit)


@data_app.command("list")
def data_list(format: FormatOption = "text") -> None:
    """Name the sources of data."""
    from simulations.datasets import available

    sources = available()
    answer(format, sources, lambda: _rows_table("data.source", "what it is", sources))


@data_app.command("prepare")
def data_prepare(
    config: ConfigOption = None,
    overrides: SetOption = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Write the catalogue and each user's history there.")
    ] = None,
    format: FormatOption = "text",
) -> None:
    """Fetch, check and convert the data of the settings, and print their counts."""
    from simulations import datasets
    from simulations.datasets.histories import write_histories

    settings = load_settings(config, overrides or ())
    interactions = datasets.load(settings.data, seed=settings.training.seed)
    counts = datasets.summary(interactions)
    if to is not None:
        write_histories(interactions, to)
    answer(format, counts, lambda: _rows_table("figure", "value", counts))


@app.command()
def doctor(format: FormatOption = "text") -> None:
    """Say what this machine has, and what is missing for which command."""
    from simulations.doctor import examine

    findings = examine()
    answer(format, findings, lambda: _findings_table(findings))
    if not all(finding["ok"] or finding["optional"] for finding in findings):
        raise typer.Exit(1)


def _watch(bars: ExitStack, title: str, rounds: int) -> "Watch":
    """A run's progress bar, which ends with the stack, and its notes on standard error."""
    from simulations.progress import RoundsBar
    from simulations.simulate import Watch

    bars.close()  # the bar of the run before
    bar = bars.enter_context(RoundsBar(rounds, title))
    return Watch(
        note=lambda sentence: stderr.print(sentence, highlight=False),
        on_round=lambda progress, remark: bar.update(progress.round, remark),
        patient=lambda: stopping("Stopping after this round; press Ctrl-C again to break it off."),
    )


def _rows_table(key: str, value: str, rows: dict[str, Any]) -> Table:
    table = Table(key, value)
    for name, content in rows.items():
        table.add_row(name, str(content))
    return table


def _evaluation_table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"{figures['protocol']}, full ranking, {figures['users']} users")
    for heading in ("", "HR@10 [95 %]", "NDCG@10 [95 %]", "coverage@10"):
        table.add_column(heading)
    for name, row in (("this model", figures), ("popularity", figures["popularity"]), ("Markov", figures["markov"])):
        cells = [f"{row[m]:.3f} [{row[m + '_ci95'][0]:.3f}, {row[m + '_ci95'][1]:.3f}]" for m in ("hr@10", "ndcg@10")]
        table.add_row(name, *cells, f"{row['coverage@10']:.3f}")
    return table


def _findings_table(findings: list[dict[str, Any]]) -> Table:
    table = Table("", "what", "found", "needed for")
    for finding in findings:
        mark = "ok" if finding["ok"] else "missing" if not finding["optional"] else "-"
        table.add_row(mark, finding["what"], finding["found"], finding["needed_for"])
    return table


def _report_text(report: dict[str, Any], out: Path) -> Any:
    from rich.console import Group

    privacy = report["privacy"]
    lines = [
        f"{report['status']}: {report['rounds']} rounds, {report['devices']} devices, "
        f"{report['client_updates']} updates in {report['seconds']:.1f} s"
    ]
    if "epsilon_model" in privacy:
        lines.append(
            f"ε_model {privacy['epsilon_model']:.2f} (who sees the models), ε_server {privacy['epsilon_server']:.1f} "
            f"(the server, under secure aggregation), δ {privacy['delta']:.2g}, unit: user, noise: {privacy['noise']}"
        )
    else:
        lines.append("No privacy: no noise was added.")
    parts: list[Any] = ["\n".join(lines)]
    if "evaluation" in report:
        parts.append(_evaluation_table(report["evaluation"]))
    return Group(*parts, f"Run folder: {out}")


def _leave(number: int, frame: Any) -> None:
    """End at once: a KeyboardInterrupt in the middle of a C extension's import comes out as some other error.

    All that matters is on disk by then, and worker processes end with this one.
    """
    stderr.print("Interrupted. A run goes on with --resume; an experiment with the same command.")
    os._exit(130)


def main() -> None:
    """Entry point: errors become one line on standard error and an exit code, never a traceback without --debug."""
    signal.signal(signal.SIGINT, _leave)
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments, prog_name="fedtopk", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except FedtopkError as error:
        if debug:
            raise
        stderr.print(f"Error: {error}", highlight=False, markup=False, soft_wrap=True)
        code = 1
    sys.exit(code)
