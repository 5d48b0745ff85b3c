"""Flower's SuperLink as a child process on loopback, and what this process asks of it: to know the devices, and to
begin a run whose ServerApp is here.

Devices reach it through :mod:`server.gateway` alone. The bundle that a run needs holds its settings and no code.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import tomli_w
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from common.errors import RunError
from common.flower_tasks import ENVIRONMENT, Runtime, free_port
from common.processes import program, running, secret_files
from common.settings import Settings

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files: the server's certificate and its key, and the one that it is verified with."""

    certificate: Path
    key: Path
    root: Path


class SuperLink:
    """A running SuperLink.

    Attributes:
        address: ``host:port`` on loopback.
    """

    def __init__(self, runtime: Runtime, control: ControlHttpClient) -> None:
        self.address = runtime.address
        self._runtime = runtime
        self._control = control

    def admit(self, transport_keys: Sequence[str]) -> list[int]:
        """Let the holders of these OpenSSH public keys connect, and nobody else; their nodes, in the same order."""
        known = {node.public_key: node.node_id for node in self._control.ListNodes(ListNodesRequest()).nodes_info}
        wanted = [public_key_to_bytes(load_ssh_public_key(key.encode())) for key in transport_keys]  # type: ignore[arg-type]
        for key in known.keys() - set(wanted):
            self._control.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))
        for key in wanted:
            if key not in known:
                known[key] = self._control.RegisterNode(RegisterNodeRequest(public_key=key)).node_id
        return [known[key] for key in wanted]

    @contextmanager
    def run(self, settings: Settings) -> Iterator[tuple[Grid, int]]:
        """Begin a run; the Grid of its ServerApp, and its number."""
        content = _bundle(settings)
        self._control.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", content, {}))))
        start = time.monotonic()
        with self._runtime.tasks(TaskType.SERVER_APP) as acquire:
            while not (token := acquire()):
                if time.monotonic() - start > _PATIENCE_SECONDS:
                    raise RunError(f"Expected the SuperLink to hand out the run within {_PATIENCE_SECONDS:g} s.")
                time.sleep(_POLL_SECONDS)
        with self._runtime.task(token) as client, ExitStack() as stack:
            given = client.PullTaskInput(PullTaskInputRequest())
            run = run_from_proto(given.run)
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run.run_id
            TaskIdentity.node_id = given.context.node_id
            grid = HttpGrid(self.address, False, self._runtime.certificates, token=token)
            stack.callback(grid.close)
            grid.set_run(run)
            yield grid, run.run_id


@contextmanager
def superlink(tls: Tls, folder: Path, log: IO[bytes]) -> Iterator[SuperLink]:
    """Start one, and end it with this block.

    Args:
        folder: for its database, which knows the devices' nodes from run to run.
        log: where its own words go.

    Raises:
        RunError: it does not start.
    """
    root = tls.root.read_bytes()
    runtime = Runtime(f"127.0.0.1:{free_port()}", secrets.token_bytes(32), root)
    with secret_files(runtime.secret) as [(descriptor, path)]:
        words = [
            program("flower-superlink"),
            *(
                "--ssl-certfile",
                str(tls.certificate),
                "--ssl-keyfile",
                str(tls.key),
                "--ssl-ca-certfile",
                str(tls.root),
            ),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process"),
            *("--superexec-auth-secret-file", path, "--database", str(folder / "superlink.sqlite")),
            *("--host", "127.0.0.1", "--port", runtime.address.split(":")[1]),
        ]
        environment = ENVIRONMENT | {"FLWR_HOME": str(folder / "flower")}
        with running(words, environment, log, [descriptor]) as process:
            retries = make_simple_http_retry_invoker()
            retries.max_tries = 1  # its pauses grow to 20 s, which is how late a start would be noticed
            control = ControlHttpClient.from_server_address(
                server_address=runtime.address,
                insecure=False,
                root_certificates=root,
                interceptors=[RuntimeVersionHttpInterceptor(component_name="fedtopk")],
                retry_invoker=retries,
            )
            try:
                _await_start(control, process.poll)
                yield SuperLink(runtime, control)
            finally:
                control.close()


def _await_start(control: ControlHttpClient, ended: Callable[[], int | None]) -> None:
    start = time.monotonic()
    while time.monotonic() - start < _PATIENCE_SECONDS and ended() is None:
        try:
            control.ListNodes(ListNodesRequest())
            return
        except httpx.TransportError:
            time.sleep(_POLL_SECONDS)
    raise RunError(
        f"Expected Flower's SuperLink to start within {_PATIENCE_SECONDS:g} s; its log says why it does not."
    )


def _bundle(settings: Settings) -> bytes:
    """A Flower app without code: every device and server runs the `fedtopk` that is installed there."""
    config: Mapping[str, object] = settings.flat()
    app = {
        "publisher": "fedtopk",
        "components": {"serverapp": "installed:server", "clientapp": "installed:client"},
        "config": config,
    }
    project = {"project": {"name": "fedtopk", "version": "1.0.0"}, "tool": {"flwr": {"app": app}}}
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})[0]
