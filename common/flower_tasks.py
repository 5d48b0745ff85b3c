"""Flower's tasks, taken from a SuperLink's or SuperNode's Runtime API and done in this very process.

Flower's own executor installs the app that came over the network and starts a process for every message. Here the
app is the installed `fedtopk`: nobody who controls the other side can run code on this one, what the process holds in
memory stays loaded, and a message costs milliseconds instead of the seconds that importing torch takes.

Beside this module, :mod:`client.agent`, :mod:`server.superlink` and :mod:`simulations.bench` use what Flower does not
promise to keep; they are written for 1.42, to which `pyproject.toml` pins it. Source:
flwr/supercore/superexec/run_superexec.py, flwr/supernode/runtime/run_clientapp.py.
"""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime.tracing import RuntimeTracingInterceptor

ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
"""For Flower's processes: they ask nobody else on the network for anything."""

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True)
class Runtime:
    """Where tasks come from.

    Attributes:
        address: ``host:port``, on loopback.
        secret: with which only this process gets tasks (`--superexec-auth-secret-file`).
        certificates: PEM, of the Runtime API's TLS; None where it has none.
    """

    address: str
    secret: bytes
    certificates: bytes | None = None

    @contextmanager
    def tasks(self, kind: TaskType) -> Iterator[Callable[[], str]]:
        """What gives the token of the next task of a kind; an empty one where there is none, or nobody to ask."""
        with self._client(
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=_ACQUIRE)
        ) as client:

            def acquire() -> str:
                with suppress(httpx.HTTPError):
                    answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
                    return str(answer.token) if answer.HasField("task") else ""
                return ""

            yield acquire

    @contextmanager
    def task(self, token: str) -> Iterator[RuntimeHttpClient]:
        """What the holder of a task talks to; the task is marked as done at the end, or as failed."""
        with self._client(RuntimeTokenHttpInterceptor(token)) as client:
            heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            heartbeat.start()
            status = SubStatus.FAILED
            try:
                yield client
                status = SubStatus.COMPLETED
            finally:
                with suppress(httpx.HTTPError):
                    client.PushTaskOutput(PushTaskOutputRequest(sub_status=status))
                heartbeat.stop()

    @contextmanager
    def _client(
        self, authorised: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor
    ) -> Iterator[RuntimeHttpClient]:
        retries = make_simple_http_retry_invoker()
        retries.max_tries = 1
        client = RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificates is None,
            root_certificates=self.certificates,
            interceptors=[RuntimeTracingInterceptor(), RuntimeVersionHttpInterceptor("fedtopk"), authorised],
            retry_invoker=retries,
        )
        try:
            yield client
        finally:
            client.close()


def quiet() -> None:
    """Let Flower say in this process only what went wrong: the rest is for the logs of its own processes."""
    logging.getLogger("flwr").setLevel(logging.ERROR)


def free_port() -> int:
    """A port of loopback that nobody listens on, as of now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
