"""``report.json``: what a run did, what it cost, and what came of it. Absent means not measured, never 0."""

from dataclasses import asdict
from typing import Any

from common.model import dimension_of
from server.events import clips_of
from server.training import Outcome, Training


def build_report(
    training: Training, outcome: Outcome, evaluation: dict[str, Any], population: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Assemble the report of DESIGN §8.

    Args:
        evaluation: the evaluation's own object; empty if there was none.
        population: what all runs over the population have spent together, if it has a ledger.
    """
    report: dict[str, Any] = {
        "status": outcome.status,
        "rounds": outcome.rounds,
        "devices": training.cohort.devices,
        "client_updates": outcome.client_updates,
        "seconds": round(outcome.seconds, 3),
    }
    if outcome.reason:
        report["reason"] = outcome.reason
    if outcome.client_updates:
        report["client_updates_per_second"] = round(outcome.client_updates / outcome.seconds, 1)
    report["parameters"] = dimension_of(training.settings, outcome.parameters)
    report["privacy"] = training.budget.statement(training.ledger.model_releases, training.ledger.attempts)
    if population:
        report["privacy"]["population"] = population
    if quantile := training.settings.privacy.clip_quantile:
        report["clip"] = {"quantile": quantile, "by_round": clips_of(training.events.read(kinds=["round"]))}
    if evaluation:
        report["evaluation"] = evaluation
    report["log"] = asdict(training.events.head)
    aggregation = {"kind": training.settings.aggregation.kind, "dropouts": outcome.dropouts}
    sent = {"bytes_up_per_device": outcome.bytes_up, "bytes_down_per_device": outcome.bytes_down}
    report["aggregation"] = aggregation | {name: value for name, value in sent.items() if value is not None}
    return report
