"""`fedtopk audit`: the command."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from common.console import Format, answer, stderr, stopping


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that ended.")],
    budget: Annotated[
        int, typer.Option("--budget", min=8, help="Shadow runs of the membership attack, a second or so each.")
    ] = 48,
    canaries: Annotated[int, typer.Option("--canaries", min=64, help="Made-up devices.")] = 32_768,
    users: Annotated[int, typer.Option("--users", min=2, help="Devices of a repetition, at most.")] = 100,
    items: Annotated[int, typer.Option("--items", min=2, help="Items of a repetition, at most.")] = 200,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Rounds of a repetition, at most.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of canaries and coins; the noise is the system's.")] = 0,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=1 - 1e-12, help="With which a correct system passes.")
    ] = 0.999,
    study_seeds: Annotated[
        int, typer.Option("--study", metavar="SEEDS", min=0, help="Instead, audit broken systems over so many seeds.")
    ] = 0,
    format: Annotated[Format, typer.Option("--format", help="What standard output holds.")] = "text",
) -> None:
    """Attack a run's own system, repeated at a smaller size, and compare what shows with the claimed ε (minutes).

    Exit code 1 if an audit fails.
    """
    from server.run_folder import RunFolder
    from simulations.audit import QUICK_STEPS, claim_of
    from simulations.audit import audit as run_audit
    from simulations.audits.study import SYSTEMS, study
    from simulations.audits.system import Size, repetition
    from simulations.progress import RoundsBar

    folder = RunFolder(run)
    size = Size(users=users, items=items, rounds=rounds, canaries=canaries, shadow_runs=budget)
    steps = len(SYSTEMS) * study_seeds if study_seeds else QUICK_STEPS + budget
    done = 0
    with (
        stopping("Stopping after this training; press Ctrl-C again to break it off.") as should_stop,
        RoundsBar(steps, "audit", "trainings") as bar,
    ):

        def step(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(done, name)

        if study_seeds:
            claim = claim_of(folder)
            system = repetition(folder.settings(), claim.get("noise_multiplier", 0.0), size)
            found = study(system, size, range(seed, seed + study_seeds), confidence, step, should_stop)
        else:
            found = run_audit(folder, size, seed, confidence, step, should_stop)
        stopped = should_stop()
    answer(format, found, lambda: study_table(found) if study_seeds else findings_text(found))
    if stopped:
        stderr.print("Stopped: this is what was done until then.")
        raise typer.Exit(130)
    if not study_seeds and not found["passed"]:
        raise typer.Exit(1)


def findings_text(report: dict[str, Any]) -> Any:
    """The findings for people: figures first, then what they can and cannot show."""
    from rich.console import Group

    repeated = report["repetition"]
    table = Table("audit", "statistic", "value", "at least", "limit", "verdict")
    notes = []
    for found in report["audits"]:
        figures = (f"{found[name]:.3g}" for name in ("value", "lower_bound", "limit"))
        table.add_row(found["name"], found["statistic"], *figures, found["verdict"])
        notes.append(f"{found['name']}: detects {found['detects']}. Cannot detect {found['cannot_detect']}.")
    heading = (
        f"Repeated with {repeated['users']} users, {repeated['items']} items, {repeated['rounds']} rounds at the run's "
        f"z={repeated['noise_multiplier']:.3g} and q={repeated['cohort_rate']:g}; δ={repeated['delta']:g}, "
        f"unit: {repeated['unit']}. All bounds hold together with {report['confidence']:.12g}."
    )
    verdict = "No audit failed." if report["passed"] else "An audit failed: the claimed ε does not hold."
    return Group(heading, table, *notes, verdict)


def study_table(results: dict[str, Any]) -> Table:
    """How often each system was caught, and by which audit."""
    names = list(next(iter(results.values()))["by"]) if results else []
    table = Table("system", "caught", *names, title="Failed audits, and the range of the lower bounds")
    for system, found in results.items():
        cells = []
        for name in names:
            low, high = found["lower_bounds"][name]
            cells.append(f"{found['by'][name]}  [{low:.3g}, {high:.3g}]")
        table.add_row(system, f"{found['caught']} of {found['seeds']}", *cells)
    return table
