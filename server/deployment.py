"""A real server: gateway, SuperLink and training, from a server's folder to a run folder."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from common.errors import RunError
from common.features import features_of
from common.flower_tasks import quiet
from common.model import Parameters
from server.app import Deployment, expect_secure, serve
from server.gateway import Gateway
from server.nodes import Nodes
from server.population_ledger import open_population
from server.run_folder import RunFolder
from server.secure_sum import SecureSum, Trust
from server.site import ENROLMENTS, LEDGER, TLS, Site
from server.superlink import superlink
from server.training import Progress


@dataclass(frozen=True)
class Service:
    """How a server runs.

    Attributes:
        host, port: where devices connect to.
        wait: how many devices must be connected before the first round; 0: all that are enrolled.
        patience: seconds that they may take for it.
        timeout: seconds that a device has for an answer.
        log: where Flower's own words go.
        say: tells the operator, in one line, what happened.
        evaluate: the report's evaluation of a model; empty where nobody can evaluate.
    """

    host: str
    port: int
    wait: int
    patience: float
    timeout: float
    log: IO[bytes]
    say: Callable[[str], None]
    evaluate: Callable[[Parameters], dict[str, Any]] = lambda parameters: {}


@dataclass
class _Health:
    """What anybody may ask."""

    status: str = "starting"
    round: int = 0

    def answer(self) -> Mapping[str, Any]:
        return {"status": self.status, "round": self.round}


def run_server(
    site: Site,
    folder: RunFolder,
    service: Service,
    *,
    resume: bool,
    should_stop: Callable[[], bool],
    on_round: Callable[[Progress], None],
) -> dict[str, Any]:
    """Serve one run to its end. Returns the report, which is also in the folder.

    Raises:
        FedtopkError: whatever the operator can mend. A run that was interrupted can be resumed.
    """
    settings, health, enrolled = site.settings, _Health(), site.enrolled()
    quiet()
    expect_secure(settings)
    if not resume:
        folder.expect_new()
    if not enrolled:
        raise RunError(f"Expected enrolments in {site.path / ENROLMENTS}: fedtopk authority enrol writes them.")

    def told(progress: Progress) -> None:
        health.round = progress.round
        on_round(progress)

    with ExitStack() as stack:
        population = stack.enter_context(open_population(site.path / LEDGER))
        link = stack.enter_context(superlink(site.tls, site.path, service.log))
        node_of = dict(zip(enrolled, link.admit(list(enrolled.values())), strict=True))
        upstream = int(link.address.split(":")[1])
        gateway = Gateway(site.path / TLS, upstream, health.answer, host=service.host, port=service.port)
        stack.enter_context(gateway)
        service.say(f"Listening on {service.host}:{gateway.port}; {len(enrolled)} devices are enrolled.")
        grid, run_id = stack.enter_context(link.run(settings))
        wait = min(service.wait or len(enrolled), len(enrolled))
        health.status = "waiting for devices"

        def gather(nodes: Nodes, cohort: SecureSum) -> None:
            nodes.await_online(wait, service.patience, should_stop)
            if not should_stop():
                service.say(f"{wait} devices are there.")
            health.status = "training"

        deployment = Deployment(
            len(site.catalogue),
            Trust(site.authority, site.publisher, site.catalogue.digest, site.revoked),
            gather,
            service.evaluate,
            node_of,
            service.timeout,
            deliver=True,
            population=population,
            features=features_of(settings.model, site.catalogue),
        )
        report = serve(
            grid, run_id, settings, folder, deployment, resume=resume, should_stop=should_stop, on_round=told
        )
        if refused := {reason: count for reason, count in gateway.refused.items() if count}:
            service.say(f"Requests refused by the gateway: {refused}.")
    return report
