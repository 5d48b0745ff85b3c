"""Flower's own simulation on the same work: its engine moves the model to every device and every update back.

A round: the server sends each node the model and the round's number, the node computes its one device's part by the
plain loop and sends the clipped gradient back, the server adds. What Flower recommends: a ServerApp and a ClientApp
over its Message API, `flwr run`, and its backend of Ray actors, one core each. Every node takes part in every round,
which suits Flower best: it gets slower with every node that rests.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.errors import AggregationError
from common.offer import Offer
from common.processes import program, running
from simulations.bench.engine_loops import batched_sum, clipped_gradient, expect_equal
from simulations.bench.engine_workloads import Workload
from simulations.bench.meter import Effort, Measured, peak_rss_mib
from simulations.population import Population

_HOME = "FLWR_HOME"
_MODEL, _UPDATE, _ROUND, _USER = "model", "update", "round", "user"
_PATIENCE_SECONDS = 900.0
_RESULT, _SUM, _LOG = "result.json", "sum.npy", "flower.log"

_APP = """\
from simulations.bench.engine_flower import make_client_app, make_server_app
from simulations.bench.engine_workloads import Workload

workload = {workload!r}
client_app = make_client_app(workload)
server_app = make_server_app(workload, {rounds}, {folder!r})
"""

_PROJECT = """\
[project]
name = "benchmark"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtopk"
fab-include = ["benchmark.py"]

[tool.flwr.app.components]
serverapp = "benchmark:server_app"
clientapp = "benchmark:client_app"

[tool.flwr.app.config]
"""


def measure_flower(workload: Workload, effort: Effort) -> Measured:
    """Whole rounds over all devices, a run for each.

    Args:
        workload: all of whose devices are in the cohort.

    Raises:
        AggregationError: Flower came to no end, or to another sum than the batched engine.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedtopk-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _run(folder, workload, effort)
        result = json.loads((folder / _RESULT).read_text())
        expect_equal("Flower run", np.load(folder / _SUM), batched_sum(workload))
    seconds = result["seconds"]
    startup = result["ready"] - begin - median(seconds)
    return Measured([workload.cohort / each for each in seconds], startup, result["peak_rss_mib"])


def make_client_app(workload: Workload) -> ClientApp:
    """Devices by their partition."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        population, arrays = _population(workload), message.content.array_records[_MODEL]
        model = {name: torch.nn.Parameter(value) for name, value in arrays.to_torch_state_dict().items()}
        device = np.array([context.node_config["partition-id"]])
        number = message.content.config_records[_ROUND]["number"]
        assert isinstance(number, int)  # the server below sends it
        offer = _offer(workload, number)
        user = population.users[device]
        if _USER in context.state.array_records:
            user = torch.from_numpy(context.state.array_records[_USER]["user"].numpy().copy())
        gradient, user = clipped_gradient(offer, model, population.windows(offer.round, device), user)
        if workload.settings.training.user_steps:
            context.state[_USER] = ArrayRecord({"user": Array(user.numpy())})
        update = ArrayRecord({name: Array(value.numpy()) for name, value in gradient.items()})
        return Message(RecordDict({_UPDATE: update}), reply_to=message)

    return app


def make_server_app(workload: Workload, rounds: int, folder: str) -> ServerApp:
    """So many rounds, of which the first one, with all that Flower does once, counts as start-up."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        parameters = {name: value.numpy() for name, value in workload.parameters().items()}
        while len(nodes := list(grid.get_node_ids())) < workload.devices:
            time.sleep(0.1)
        seconds, ready = [], 0.0
        for round_ in range(1, 1 + rounds):
            begin = time.monotonic()
            model = ArrayRecord({name: Array(value) for name, value in parameters.items()})
            number = ConfigRecord({"number": round_})
            messages = [
                Message(RecordDict({_MODEL: model, _ROUND: number}), dst_node_id=node, message_type="train")
                for node in nodes
            ]
            total = {name: np.zeros_like(value) for name, value in parameters.items()}
            for reply in grid.send_and_receive(messages):
                if reply.has_error():
                    raise AggregationError(f"Expected an update from every node: {reply.error.reason}")
                for name, array in reply.content.array_records[_UPDATE].items():
                    total[name] += array.numpy()
            seconds.append(time.monotonic() - begin)
            if round_ == 1:
                ready = time.monotonic()
                np.save(Path(folder) / _SUM, np.concatenate([value.ravel() for value in total.values()]))
        result = {"seconds": seconds[1:], "ready": ready, "peak_rss_mib": peak_rss_mib(_processes(os.environ[_HOME]))}
        (Path(folder) / _RESULT).write_text(json.dumps(result))

    return app


@lru_cache(maxsize=1)
def _population(workload: Workload) -> Population:
    torch.set_num_threads(1)
    return workload.population()


@lru_cache(maxsize=1)
def _offer(workload: Workload, round_: int) -> Offer:
    """What is public of a round; the parameters that count come in the message."""
    return workload.offer(round_, workload.parameters())


def _run(folder: Path, workload: Workload, effort: Effort) -> None:
    """`flwr run` until its ServerApp has left its result in the folder."""
    app, home = folder / "app", folder / "home"
    app.mkdir()
    (app / "pyproject.toml").write_text(_PROJECT)
    (app / "benchmark.py").write_text(
        _APP.format(workload=workload, rounds=1 + effort.runs, folder=str(folder)), encoding="utf-8"
    )
    environment = {
        _HOME: str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    nodes = f"num-supernodes={workload.devices}"
    resources = f"client-resources-num-cpus=1 init-args-num-cpus={effort.workers}"
    words = [program("flwr"), "run", str(app), "--stream", "--federation-config", f"{nodes} {resources}"]
    with (folder / _LOG).open("wb") as log, _ended(home), running(words, environment, log) as flower:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while flower.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    if not (folder / _RESULT).exists():
        said = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip()
        raise AggregationError(f"Expected a result of Flower's run; it said: {said[-2000:]}")


@contextmanager
def _ended(home: Path) -> Iterator[None]:
    """Ends what was started with this Flower home: the SuperLink, Ray and their children outlive `flwr run`."""
    try:
        yield
    finally:
        for pid in _processes(str(home)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _processes(home: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{_HOME}={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found
