"""The `fedtopk` command."""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.table import Table

from client.cli import device_app
from client.recommend import recommend
from common.console import FormatOption, answer, stderr, stopping
from common.errors import FedtopkError, SettingsError
from common.settings import load_settings
from server.cli import authority_app, server_app
from simulations.audits.command import audit
from simulations.bench.commands import bench_app
from simulations.experiment_commands import accuracy, closed_loop, compare, demo, paper
from simulations.options import CORES, ConfigOption, SetOption, WorkersOption
from simulations.privacy_commands import figures_text, privacy_app

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
app.add_typer(privacy_app, name="privacy")

DashboardOption = Annotated[bool, typer.Option("--dashboard", help="Show it on a web page while it goes on.")]
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
    workers: WorkersOption = CORES,
    cluster: Annotated[
        str, typer.Option("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: its address, auto, or local.")
    ] = "",
    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger", metavar="DIR", help="Ledger of the population's life: the budget is for all its runs."
        ),
    ] = None,
    dashboard: DashboardOption = False,
    format: FormatOption = "text",
) -> None:
    """Train federatedly over a simulated population, evaluate, and write the run folder."""
    from server.run_folder import RunFolder

    if resume and (config is not None or overrides):
        raise SettingsError("Expected --resume without --config and --set: a run goes on with its own settings.")
    folder = RunFolder(out)
    settings = None if resume else load_settings(config, overrides or ())

    from server.dashboard.serve import beside  # after the settings: mistakes in them are told at once
    from server.population_ledger import open_population
    from simulations.progress import watch
    from simulations.simulate import simulate as run

    rounds = (settings or folder.settings()).training.rounds
    with beside(out, dashboard), ExitStack() as stack, ExitStack() as bars:
        report = run(
            folder,
            watch(bars, "training", rounds),
            settings=settings,
            workers=workers,
            cluster=cluster,
            population_ledger=None if ledger is None else stack.enter_context(open_population(ledger)),
        )
    answer(format, report, lambda: _report_text(report, out))
    if report["status"] == "stopped":
        stderr.print(f"Stopped after round {report['rounds']}. Go on with: fedtopk simulate --resume --out {out}")
    if report["status"] in ("stopped", "aborted"):
        raise typer.Exit(130)


@app.command()
def fleet(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run, and of all devices.")],
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes, one a device.")] = 8,
    config: ConfigOption = None,
    overrides: SetOption = None,
    dashboard: DashboardOption = False,
    format: FormatOption = "text",
) -> None:
    """Train over real device processes on this machine: TLS, enrolled keys, secure aggregation (minutes)."""
    from server.dashboard.serve import beside
    from server.run_folder import RunFolder
    from simulations.fleet import demo_settings, run_fleet
    from simulations.progress import RoundsBar

    def say(line: str) -> None:
        stderr.print(line, highlight=False, soft_wrap=True)

    settings = demo_settings(devices, config, overrides or ())
    with (
        beside(out, dashboard),
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
    if report["status"] in ("stopped", "aborted"):
        raise typer.Exit(130)


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="Folder of a run, or of several.")],
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8420,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; another than loopback needs --token.")] = (
        "127.0.0.1"
    ),
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="FEDTOPK_TOKEN", help="For the controls; by default one is made up."),
    ] = None,
) -> None:
    """Show runs on a web page, live while they train, and let an operator pause, resume, stop and abort them."""
    from server.dashboard.serve import serve_dashboard

    serve_dashboard(runs, host, port, token, _preview, lambda line: stderr.print(line, highlight=False, soft_wrap=True))


def _preview(run: Path, user: str) -> Mapping[str, Any]:
    from simulations.preview import preview  # brings torch

    return preview(run, user)


@app.command()
def report(
    run: RunArgument,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="By default RUN/report.")] = None,
    format: FormatOption = "text",
) -> None:
    """Write a run's page as one HTML file, its charts as PNG, and its course as TensorBoard files."""
    from server.dashboard.report import write_report
    from server.run_folder import RunFolder
    from simulations.tensorboard import write_tensorboard

    written = write_report(run, to or run / "report")
    write_tensorboard(RunFolder(run), run / "tensorboard")
    written["tensorboard"] = str(run / "tensorboard")
    answer(format, written, lambda: "\n".join(f"{name}: {path}" for name, path in written.items()))


app.command()(demo)
app.command()(compare)
app.command()(paper)
app.command("closed-loop")(closed_loop)
app.command()(accuracy)


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
    lines.append(figures_text(privacy) + (f"\nnoise: {privacy['noise']}" if "noise" in privacy else ""))
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
