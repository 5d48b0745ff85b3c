"""`fedtopk privacy`: what a budget allows, what was spent, and whether that is so."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from common.console import FormatOption, answer, stderr
from common.errors import RunError
from common.privacy import NOT_OFFERED
from server.cli import PassphraseOption, read_passphrase
from simulations.options import CORES, ConfigOption, SetOption, WorkersOption

privacy_app = typer.Typer(help="Plan a budget; state and verify what was spent.", no_args_is_help=True)


@privacy_app.command()
def plan(
    users: Annotated[int, typer.Option("--users", help="N, devices in all.")],
    cohort: Annotated[
        int | None, typer.Option("--cohort", help="Expected devices in a round; by default training.cohort_rate.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="T, releases of the model; by default training.rounds.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon",
            help="Target of ε_model, a user added or removed, who sees every model; by default privacy.target_epsilon.",
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option("--delta", help="δ of both figures; by default privacy.delta, or N^-1.1.")
    ] = 0.0,
    parameters: Annotated[int, typer.Option("--parameters", help="Shared numbers; by default the model's.")] = 0,
    config: ConfigOption = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="F.png", help="Draw the curve, too.")] = None,
    overrides: SetOption = None,
    format: FormatOption = "text",
) -> None:
    """Say what a target of ε_model costs before anything is trained: parameters, bytes, noise, both ε, signal, verdict
    and levers."""
    from common.privacy.planning import make_curve, make_plan
    from common.settings import load_settings

    if picture is not None:
        from server.durable import make_folder, replacing
        from simulations.privacy_picture import draw

        make_folder(picture.parent)
    settings = load_settings(config, overrides or [])
    cohort = max(1, round(settings.training.cohort_rate * users)) if cohort is None else cohort
    rounds = settings.training.rounds if rounds is None else rounds
    epsilon = settings.privacy.target_epsilon if epsilon is None else epsilon
    delta = delta or settings.privacy.delta
    with stderr.status("accounting"):
        found = make_plan(users, cohort, rounds, epsilon, delta, parameters, overrides or [], config)
        if picture is not None:
            with replacing(picture) as temporary:
                draw(make_curve(found), found, temporary)
    answer(format, found, lambda: _plan_text(found))


@privacy_app.command()
def verify(
    subject: Annotated[
        Path, typer.Argument(metavar="RUN|STATEMENT|LEDGER", help="Run folder, signed statement, population's ledger.")
    ],
    statement: Annotated[
        Path | None, typer.Option("--statement", metavar="F.json", help="Hold a run against what was stated of it.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="HEX", help="Public key that the statement must be signed with.")
    ] = None,
    format: FormatOption = "text",
) -> None:
    """Recompute ε from the events alone with a second accountant, and check that the log is whole; 1 if not."""
    from server.statement import read_statement
    from server.store import open_store_read_only
    from server.verification import Check, read_log, report_of, verify_folder

    if subject.is_dir():
        checks, figures = verify_folder(subject)
        if statement is not None:
            stated = read_statement(statement)
            checks += [replace(check, check=f"statement: {check.check}") for check in stated.verify(key)[0]]
            with open_store_read_only(subject) as store:
                try:
                    checks.append(stated.covers(read_log(store)))
                except RunError as error:
                    checks.append(Check("statement", False, str(error)))
    elif statement is not None:
        raise RunError(f"Expected {subject} to be the folder of a run, to hold a statement against.")
    else:
        checks, figures = read_statement(subject).verify(key)
    found = report_of(checks, figures)
    answer(format, found, lambda: _verification_text(found))
    if not found["ok"]:
        raise typer.Exit(1)


@privacy_app.command("statement")
def state(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that ended.")],
    key: Annotated[
        Path, typer.Option("--key", metavar="F", help="Ed25519 key to sign with: a server's publisher.key.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="F.json", help="File for the statement.")],
    passphrase: PassphraseOption = None,
    format: FormatOption = "text",
) -> None:
    """Write a signed statement of what a run released, when, and at which ε."""
    from server.durable import make_folder, replacing
    from server.run_folder import RunFolder
    from server.signing_key import read_signing_key
    from server.statement import Statement

    made = Statement.make(RunFolder(run), read_signing_key(key, read_passphrase(passphrase)), time.time())
    make_folder(out.parent)
    with replacing(out) as file:
        file.write_text(made.to_json(), encoding="utf-8")
    found = {"statement": str(out), "publisher": made.publisher}
    answer(format, found, lambda: f"Signed by {made.publisher}: {out}. Give it to those who are to hold you to it.")


@privacy_app.command()
def utility(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; an earlier one goes on.")],
    devices: Annotated[int, typer.Option("--devices", min=1, help="N, simulated devices.")] = 100_000,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="T, releases of the model.")] = 200,
    cohort: Annotated[int, typer.Option("--cohort", min=1, help="Expected devices in a round.")] = 5_000,
    items: Annotated[int, typer.Option("--items", min=1, help="Items of the catalogue.")] = 5_000,
    events: Annotated[int, typer.Option("--events", min=1, help="Logged events of a device.")] = 40,
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Target of ε_model; repeatable, for a curve. By default 8.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Worlds, logs and trainings.")] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="The first of them; tune on others.")] = 0,
    source: Annotated[
        str, typer.Option("--source", help="movielens-small or synthetic: what the world is fitted to.")
    ] = "movielens-small",
    picture: Annotated[Path | None, typer.Option("--picture", metavar="F.png", help="Draw value against ε.")] = None,
    overrides: SetOption = None,
    workers: WorkersOption = CORES,
    format: FormatOption = "text",
) -> None:
    """Train with and without privacy where the true preferences are known, and value both exactly (an hour).

    The same command goes on with what an earlier one left.
    """
    from simulations.closed_loop import Setup
    from simulations.progress import watch
    from simulations.utility import Study, run_study
    from simulations.utility_summary import privacy_words, values_table

    if picture is not None:
        from server.durable import make_folder, replacing
        from simulations.utility_picture import draw

        make_folder(picture.parent)
    setup = Setup(source=source, users=devices, items=items, events=events)
    study = Study(setup, rounds, cohort, tuple(epsilons or [8.0]), seeds, first_seed, tuple(overrides or ()))
    with ExitStack() as bars:
        summary = run_study(out, study, workers, lambda name, rounds: watch(bars, name, rounds))
    if summary is None:
        stderr.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130)
    if picture is not None:
        with replacing(picture) as file:
            draw(summary, file)
    answer(format, summary, lambda: Group(values_table(summary), *summary["findings"], *privacy_words(summary)))


def figures_text(figures: dict[str, Any]) -> str:
    """Both ε with all that they mean, a line each."""
    if "epsilon_model" not in figures:
        return "No noise was added: no ε can be given."
    server = figures["epsilon_server"]
    server = server if server == NOT_OFFERED else f"{server:.4g}"
    lines = [
        f"ε_model {figures['epsilon_model']:.4g} at δ={figures['delta']:.3g}, unit: one {figures['unit']}; "
        f"adjacency: {figures['adjacency']['epsilon_model']}; observer: {figures['observer']['epsilon_model']}",
        f"ε_server {server} at δ={figures['delta']:.3g}, unit: one {figures['unit']}; "
        f"adjacency: {figures['adjacency']['epsilon_server']}; observer: {figures['observer']['epsilon_server']}",
    ]
    return "\n".join(lines)


def _plan_text(found: dict[str, Any]) -> Group:
    table = Table("what would change it", "parameters", "signal-to-noise")
    for lever in found["levers"]:
        parameters = f"{lever['parameters']:,}" if "parameters" in lever else ""
        table.add_row(lever["change"], parameters, f"{lever['signal_to_noise']:.2g}")
    return Group(
        found["verdict"],
        *([_sizes_text(found)] if "groups" in found else []),
        f"{found['parameters']:,} parameters are uploaded, {found['bytes_up']:,} bytes of a device in a round"
        + (f"; the model that it is sent has {found['bytes_down']:,}" if "bytes_down" in found else ""),
        *(
            [f"the first release says {found['first_release']}, of the rounds that are charged, and trains nothing"]
            if "first_release" in found
            else []
        ),
        f"noise multiplier {found['noise_multiplier']:.4g}, signal-to-noise {found['signal_to_noise']:.2g}: an upper "
        "estimate, as if every round's update pointed the same way",
        figures_text(found),
        table,
    )


def _sizes_text(found: dict[str, Any]) -> Table:
    table = Table("group", "trained and uploaded", "fixed")
    for name, numbers in found["groups"].items():
        table.add_row(name, f"{numbers['trained']:,}", f"{numbers['fixed']:,}")
    return table


def _verification_text(found: dict[str, Any]) -> Group:
    table = Table("", "check", "found")
    for check in found["checks"]:
        table.add_row("ok" if check["ok"] else "FAILED", check["check"], check["found"])
    figures = [f"Recomputed: {figures_text(found['privacy'])}"] if "delta" in found["privacy"] else []
    return Group(table, *figures, "Verified." if found["ok"] else "NOT verified.")
