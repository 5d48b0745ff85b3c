"""The ServerApp: the round loop over the devices of a Flower Grid."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import FedtopkError, SettingsError
from common.model import Parameters
from common.settings import OUT, Settings, parse_flat
from server.flower_cohort import FlowerCohort
from server.report import build_report
from server.run import open_training
from server.run_folder import RunFolder
from server.training import Progress

logger = logging.getLogger("flwr")

_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Deployment:
    """What the server is told about its devices.

    Attributes:
        items: A, the size of the public catalogue.
        devices: N, for how many devices to wait; None takes those that are there.
        evaluate: the report's evaluation of a model; empty where nobody can evaluate.
    """

    items: int
    devices: int | None
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
    if settings.aggregation.kind != "plain":
        raise SettingsError(
            f"Expected aggregation.kind={settings.aggregation.kind} to be plain in a Flower run: "
            "secure aggregation is not part of this version, central is for `fedtopk simulate`."
        )
    logger.warning("NOT SECRET: this server sums the devices' updates in the clear and could look at each one.")
    deployment = deploy(settings)
    cohort = FlowerCohort(grid, deployment.devices, _TIMEOUT_SECONDS)
    with folder.open(settings, resume=False) as store:
        training = open_training(settings, folder, store, cohort, deployment.items)
        outcome = training.run(lambda: False, _log)
        folder.save_model(outcome.parameters)
        report = build_report(training, outcome, deployment.evaluate(outcome.parameters))
        folder.save_report(report)
    logger.info("%s after %d rounds; run folder: %s", outcome.status, outcome.rounds, folder.path)


def _log(progress: Progress) -> None:
    logger.info("round %d: %d members, %.1f s", progress.round, progress.members, progress.seconds)
