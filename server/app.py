"""The ServerApp: the round loop over the devices of a Flower Grid."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import FedtopkError, SettingsError
from common.messages import run_digest
from common.model import Parameters
from common.settings import OUT, Settings, parse_flat
from server.events import Events
from server.nodes import Nodes
from server.report import build_report
from server.run import open_training
from server.run_folder import RunFolder
from server.secure_sum import SecureSum
from server.training import Progress

logger = logging.getLogger("flwr")

_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Deployment:
    """What the server is told about its devices.

    Attributes:
        items: A, the size of the public catalogue.
        devices: N, for how many devices to wait; None takes those that are there.
        most: how many devices there can be: a larger number is nobody's.
        authority: 32 bytes, the public key of the devices' enrolment authority.
        evaluate: the report's evaluation of a model; empty where nobody can evaluate.
    """

    items: int
    devices: int | None
    most: int
    authority: bytes
    evaluate: Callable[[Parameters], dict[str, Any]]


def make_app(deploy: Callable[[Settings], Deployment]) -> ServerApp:
    """The ServerApp for the devices that `deploy` describes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            _serve(grid, context, deploy)
        except FedtopkError as error:
            logger.error("%s", error)
            raise SystemExit(1) from None

    return app


def _serve(grid: Grid, context: Context, deploy: Callable[[Settings], Deployment]) -> None:
    settings = parse_flat(context.run_config)
    name = context.run_config.get(OUT) or f"fedtopk-run-{context.run_id}"
    folder = RunFolder(Path(str(name)).absolute())
    if settings.aggregation.kind != "secure":
        raise SettingsError(
            f"Expected aggregation.kind={settings.aggregation.kind} to be secure in a Flower run: "
            "plain and central are for `fedtopk simulate`."
        )
    deployment = deploy(settings)
    with folder.open(settings, resume=False) as store:
        events, run = Events(store, time.time), run_digest(settings, context.run_id)
        cohort = SecureSum(Nodes(grid, _TIMEOUT_SECONDS), settings, run, deployment.authority, events.record)
        cohort.find(deployment.devices, deployment.most)
        training = open_training(settings, folder, store, cohort, deployment.items)
        outcome = training.run(lambda: False, _log)
        folder.save_model(outcome.parameters)
        report = build_report(training, outcome, deployment.evaluate(outcome.parameters))
        folder.save_report(report)
    logger.info("%s after %d rounds; run folder: %s", outcome.status, outcome.rounds, folder.path)


def _log(progress: Progress) -> None:
    logger.info("round %d: %d members, %.1f s", progress.round, progress.members, progress.seconds)
