"""A run behind a Flower Grid: the round loop over devices, whichever process the Grid is in."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from common.errors import FedtopkError, SettingsError
from common.messages import run_digest
from common.model import Parameters
from common.settings import OUT, Settings, parse_flat
from server.controls import Controls
from server.events import Events
from server.nodes import Nodes
from server.population_ledger import PopulationLedger
from server.report import build_report
from server.run import open_training, settle
from server.run_folder import RunFolder
from server.secure_sum import SecureSum, Trust
from server.training import Progress

logger = logging.getLogger("flwr")

_TIMEOUT_SECONDS = 600.0
_POPULATION = "population"
_NO_NODE = 0


@dataclass(frozen=True)
class Deployment:
    """What the server is told about its devices.

    Attributes:
        items: A, the size of the public catalogue.
        trust: whom the server believes, and whom the devices believe.
        gather: waits for the devices that the run is to begin with.
        evaluate: the report's evaluation of a model; empty where nobody can evaluate.
        node_of: Flower's node of each device, as far as it is known.
        timeout: seconds that a device has for an answer.
        deliver: whether devices get the last model, to recommend with.
        population: the ledger of all runs over these devices; the budget is then what all of them may spend.
        features: of the items, for a model that is made of them.
    """

    items: int
    trust: Trust
    gather: Callable[[Nodes, SecureSum], None]
    evaluate: Callable[[Parameters], dict[str, Any]] = lambda parameters: {}
    node_of: Mapping[int, int] = field(default_factory=dict)
    timeout: float = _TIMEOUT_SECONDS
    deliver: bool = False
    population: PopulationLedger | None = None
    features: Tensor | None = None


def make_app(deploy: Callable[[Settings], Deployment]) -> ServerApp:
    """The ServerApp for the devices that `deploy` describes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            settings = parse_flat(context.run_config)
            name = context.run_config.get(OUT) or f"fedtopk-run-{context.run_id}"
            folder = RunFolder(Path(str(name)).absolute())
            expect_secure(settings)
            report = serve(grid, context.run_id, settings, folder, deploy(settings), on_round=_log)
            logger.info("%s after %d rounds; run folder: %s", report["status"], report["rounds"], folder.path)
        except FedtopkError as error:
            logger.error("%s", error)
            raise SystemExit(1) from None

    return app


def expect_secure(settings: Settings) -> None:
    """Raise :class:`SettingsError` for a run that would show the server its devices' updates."""
    if settings.aggregation.kind != "secure":
        raise SettingsError(
            f"Expected aggregation.kind={settings.aggregation.kind} to be secure in a Flower run: "
            "plain and central are for `fedtopk simulate`."
        )
    if settings.privacy.mechanism == "tree" and not settings.guard.trust_server:
        raise SettingsError(
            "Expected guard.trust_server=false to be true with privacy.mechanism=tree: the server adds the noise and "
            "could see the sum without it, and devices refuse that unless their policy allows it."
        )


def serve(
    grid: Grid,
    run_id: int,
    settings: Settings,
    folder: RunFolder,
    deployment: Deployment,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_round: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train over the Grid's devices, and write the run folder. Returns the report."""
    with folder.open(settings, resume) as store:
        events, run = Events(store, time.time), run_digest(settings, run_id)
        nodes = Nodes(grid, deployment.timeout, _population(events, deployment.node_of))
        controls = Controls(store, events)

        def record(kind: str, round_: int, **fields: Any) -> None:
            events.record(kind, round_, **fields)
            if kind == "stage":  # a round over real devices may take minutes
                controls.expect_no_abort()

        cohort = SecureSum(nodes, settings, run, deployment.trust, record)
        deployment.gather(nodes, cohort)
        training = open_training(
            settings, folder, store, cohort, deployment.items, deployment.population, deployment.features
        )
        if resume:
            training.resume()
        outcome = training.run(should_stop, on_round)
        folder.save_model(outcome.parameters)
        wanted = outcome.status != "aborted"
        if wanted and deployment.deliver:
            cohort.deliver(outcome.parameters, outcome.rounds)
        spent = settle(training, deployment.population)
        report = build_report(training, outcome, deployment.evaluate(outcome.parameters) if wanted else {}, spent)
        folder.save_report(report)
    return report


def _population(events: Events, node_of: Mapping[int, int]) -> Mapping[int, int]:
    """The devices of the run, which stay the same when it is gone on with: q, N and the budget are for these."""
    if not node_of:  # nobody is known yet, and who comes says who it is
        return node_of
    recorded = events.read(kinds=[_POPULATION])
    if not recorded:
        events.record(_POPULATION, devices=sorted(node_of))
        return node_of
    return {device: node_of.get(device, _NO_NODE) for device in recorded[0].fields["devices"]}


def _log(progress: Progress) -> None:
    logger.info("round %d: %d members, %.1f s", progress.round, progress.members, progress.seconds)
