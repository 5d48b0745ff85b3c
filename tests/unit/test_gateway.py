"""The gateway by real connections on loopback: what the SuperLink sees, what is refused, and that everything ends."""

import asyncio
import gc
import hashlib
import http.client
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common.errors import RunError, SettingsError
from server.admission import FLEET_ROUTES, REFUSALS, Limits, TokenBuckets, is_fleet_route, subscriber
from server.gateway import Gateway
from server.tls import CA, CERTIFICATE, KEY, make_tls

LARGE = os.urandom(5 * 2**20)
PULL = "/v1/fleet/pull-object"


@dataclass
class SuperLink:
    """A server that notes what it is sent, and answers as the body says."""

    port: int = 0
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    broken: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            self.broken += 1
            return
        self.seen.append((request.method, scope["raw_path"].decode(), dict(request.headers), body))
        await (await self._response(body))(scope, receive, send)

    async def _response(self, body: bytes) -> Response:
        kind, _, rest = body.partition(b" ")
        if kind == b"large":
            return Response(LARGE, media_type="application/protobuf")
        if kind == b"hang":
            await asyncio.sleep(float(rest))
        if kind == b"refuse":
            return Response(b'{"code": 1}', 403, {"flwr-version-incompatibility-message": "old", "set-cookie": "a=b"})
        if kind == b"stall":
            return StreamingResponse(stall(), headers={"content-length": "100"})
        if kind == b"heartbeat":
            return Response(SendNodeHeartbeatResponse(success=True).SerializeToString())
        return Response(hashlib.sha256(body).hexdigest())


async def stall() -> Any:
    yield b"begun"
    await asyncio.sleep(1.5)


@contextmanager
def serving(tls: Path) -> Iterator[SuperLink]:
    link = SuperLink()
    server = uvicorn.Server(
        uvicorn.Config(
            link,
            port=0,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            timeout_graceful_shutdown=1,
            ssl_certfile=tls / CERTIFICATE,
            ssl_keyfile=tls / KEY,
        )
    )
    thread = threading.Thread(target=server.run, name="superlink")
    thread.start()
    try:
        wait_until(lambda: server.started)
        link.port = server.servers[0].sockets[0].getsockname()[1]
        yield link
    finally:
        server.should_exit = True
        thread.join()


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_tls(folder, [], now=datetime.now(UTC))
    return folder


@pytest.fixture(scope="module")
def served(tls: Path) -> Iterator[SuperLink]:
    with serving(tls) as link:
        yield link


@pytest.fixture
def link(served: SuperLink) -> SuperLink:
    served.seen.clear()
    served.broken = 0
    return served


@pytest.fixture(scope="module")
def gate(tls: Path, served: SuperLink) -> Iterator[Gateway]:
    """One with the limits that it has by itself."""
    with gateway(tls, served) as gate:
        yield gate


def gateway(tls: Path, link: SuperLink, **limits: Any) -> Gateway:
    return Gateway(tls, link.port, lambda: {"round": 7}, host="127.0.0.1", limits=Limits(**limits))


def connected(tls: Path, port: int, source: str = "127.0.0.1") -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=tls / CA)
    connection = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
    return context.wrap_socket(connection, server_hostname="localhost")


def answer(connection: socket.socket, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPResponse(connection, method=method)) as response:
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def exchange(
    tls: Path, port: int, target: str, body: bytes = b"", method: str = "POST", headers: str = "", **options: Any
) -> tuple[int, dict[str, str], bytes]:
    """One request, spelt exactly so, on a connection of its own."""
    with connected(tls, port, **options) as connection:
        head = f"{method} {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(head.encode() + body)
        return answer(connection, method)


def ended(connection: socket.socket, drip: bytes = b"") -> bool:
    """Whether the other side ends the connection within 2 s although it is sent something now and then."""
    end = time.monotonic() + 2
    connection.settimeout(0.05)
    while time.monotonic() < end:
        try:
            if not connection.recv(1000):
                return True
            connection.sendall(drip)
        except TimeoutError:
            if drip:
                try:
                    connection.sendall(drip)
                except OSError:
                    return True
        except OSError:
            return True
    return False


def test_large_bodies_go_both_ways(tls: Path, link: SuperLink, gate: Gateway) -> None:
    trusted = ssl.create_default_context(cafile=tls / CA)
    with httpx.Client(verify=trusted, trust_env=False) as client:
        url = f"https://localhost:{gate.port}{PULL}"
        assert client.post(url, content=b"large").content == LARGE
        assert client.post(url, content=LARGE).text == hashlib.sha256(LARGE).hexdigest()
        assert client.post(url, content=iter([LARGE[:9], LARGE[9:]])).text == hashlib.sha256(LARGE).hexdigest()
    assert [body for *_, body in link.seen] == [b"large", LARGE, LARGE]


def test_status_and_headers(tls: Path, link: SuperLink, gate: Gateway) -> None:
    sent = "x-forwarded-for: 6.6.6.6\r\nauthorization: b\r\ncookie: c\r\nFlwr-Signature: s\r\nContent-Type: t\r\n"
    status, headers, body = exchange(tls, gate.port, PULL, b"refuse", headers=sent)
    assert (status, body) == (403, b'{"code": 1}')
    assert set(headers) == {"date", "content-length", "flwr-version-incompatibility-message"}
    (_, _, seen, _) = link.seen[0]
    assert seen.pop("host") == f"127.0.0.1:{link.port}"
    assert seen == {"flwr-signature": "s", "content-type": "t", "content-length": "6"}


def test_flowers_own_client(tls: Path, link: SuperLink, gate: Gateway) -> None:
    """What a SuperNode sends arrives as it is, but for what belongs to a connection."""
    sent = []

    class Noting:
        def intercept(self, context: Any, call_next: Any) -> Any:
            sent.append(dict(context.request.headers))
            context.request.stream = httpx.ByteStream(b"heartbeat")
            context.request.headers["content-length"] = "9"
            return call_next(context)

    keys = generate_key_pairs()
    others = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys), Noting()]
    address, root = f"127.0.0.1:{gate.port}", (tls / CA).read_bytes()
    with FleetHttpClient.from_server_address(address, False, root, others) as client:
        assert client.SendNodeHeartbeat(SendNodeHeartbeatRequest()).success
    ((method, path, seen, _),) = link.seen
    assert (method, path) == ("POST", "/v1/fleet/send-node-heartbeat")
    of_the_connection = {"host", "user-agent", "accept-encoding", "connection", "content-length"}
    assert {k: v for k, v in seen.items() if k not in of_the_connection} == {
        k: v for k, v in sent[0].items() if k not in of_the_connection
    }


def test_flowers_own_routes() -> None:
    fleet = {path.encode() for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert fleet == FLEET_ROUTES
    assert all(is_fleet_route("POST", path, b"") for path in fleet)


CLOSED = [
    *(path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/")),
    *("/", "/docs", "/openapi.json", "/redoc", "/health/", "/v1/responses", "/v1", "/v1/fleet", "/v1/fleet/", "*"),
    *("/v1/fleet/other", "/V1/fleet/get-run", "/v1/fleet/Get-Run", "/v1/fleet/get-run/", "/v1/fleet/get-run/x"),
    *("//v1/fleet/get-run", "/v1//fleet/get-run", "/v1/fleet/./get-run", "/v1/fleet/../control/list-runs"),
    *("/v1/fleet/get-run/../../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet%2fget-run"),
    *("/v1/fleet/get%2drun", "/v1/fleet/get-run%00", "/v1/fleet/get-run%0d%0ax", "/v1/fleet/get-run%2f..%2f"),
    *("/v1/fleet/..%2fcontrol%2flist-runs", "/v1/fleet\\get-run", "/v1/fleet/get-run;x", "/v1/fleet/get-run?x=1"),
    *("/v1/control/list-runs?/v1/fleet/get-run", "/v1/control/list-runs#/v1/fleet/get-run", "v1/fleet/get-run"),
    *("https://127.0.0.1/v1/fleet/get-run", "@127.0.0.1/v1/fleet/get-run", "http://127.0.0.1/v1/control/list-runs"),
]


def test_closed_paths(tls: Path, link: SuperLink, gate: Gateway) -> None:
    before = gate.refused["path"]
    for target in CLOSED:
        assert exchange(tls, gate.port, target)[0] == 404, target
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "post"):
        assert exchange(tls, gate.port, PULL, method=method)[0] == 404, method
    assert exchange(tls, gate.port, "/health", method="POST")[0] == 404
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: a\r\nsec-websocket-version: 13\r\n"
    assert exchange(tls, gate.port, "/v1/control/stream-logs", method="GET", headers=upgrade)[0] == 404
    assert gate.refused["path"] == before + len(CLOSED) + 8
    override = "x-http-method-override: GET\r\nx-original-url: /v1/control/list-runs\r\nx-forwarded-prefix: /v1\r\n"
    assert exchange(tls, gate.port, PULL, headers=override)[0] == 200
    ((_, path, seen, _),) = link.seen
    assert path == PULL and not any(name.startswith("x-") for name in seen)


def test_a_second_request_cannot_hide_in_the_first(tls: Path, link: SuperLink, gate: Gateway) -> None:
    hidden = b"POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    with connected(tls, gate.port) as connection:
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\na".encode() + hidden)
        assert [answer(connection)[0], answer(connection)[0]] == [200, 404]
    exchange(tls, gate.port, PULL, b"0\r\n\r\n" + hidden, headers="transfer-encoding: chunked\r\n")
    assert {path for _, path, _, _ in link.seen} == {PULL}


def test_health(tls: Path, link: SuperLink, gate: Gateway) -> None:
    status, headers, body = exchange(tls, gate.port, "/health", method="GET")
    assert (status, headers["content-type"], json.loads(body)) == (200, "application/json", {"round": 7})
    assert not link.seen


def test_large_body(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, body=1000) as gate:
        assert exchange(tls, gate.port, PULL, bytes(1000))[0] == 200
        assert exchange(tls, gate.port, PULL, bytes(1001))[0] == 413
        assert exchange(tls, gate.port, PULL, bytes(3_000_000))[0] == 413  # although it is still being sent
        with connected(tls, gate.port) as connection:
            head = f"POST {PULL} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head.encode() + b"3e8\r\n" + bytes(1000) + b"\r\n1\r\na\r\n")
            assert answer(connection)[0] == 413
        wait_until(lambda: link.broken == 1)
        assert gate.refused["body"] == 3
    assert len(link.seen) == 1


def test_rate(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, burst=3, rate=0.02) as gate:
        assert [exchange(tls, gate.port, PULL)[0] for _ in range(3)] == [200, 200, 200]
        status, headers, _ = exchange(tls, gate.port, PULL, headers="x-forwarded-for: 9.9.9.9\r\n")
        assert status == 503 and 45 <= int(headers["retry-after"]) <= 50
        assert exchange(tls, gate.port, "/health", method="GET")[0] == 503
        assert exchange(tls, gate.port, PULL, source="127.0.0.2")[0] == 200
        assert gate.refused["rate"] == 2
    assert len(link.seen) == 4


def test_concurrent(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, concurrent=1) as gate, connected(tls, gate.port) as busy:
        busy.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nabcd".encode())
        wait_until(lambda: exchange(tls, gate.port, PULL)[0] == 503)
        busy.sendall(b"e")
        assert answer(busy)[0] == 200
        assert exchange(tls, gate.port, PULL)[0] == 200
        assert gate.refused["busy"] >= 1


def test_connections(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, connections=2) as gate:
        with connected(tls, gate.port), connected(tls, gate.port), connected(tls, gate.port) as third:
            assert ended(third)
        wait_until(lambda: gate.refused["connections"] == 1)
        assert exchange(tls, gate.port, PULL)[0] == 200


def test_slow_body(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, seconds=0.3) as gate, connected(tls, gate.port) as connection:
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n".encode())
        for _ in range(5):
            connection.sendall(b"a")
            time.sleep(0.05)
        status, headers, _ = answer(connection)
        assert (status, headers["connection"]) == (408, "close")
        assert ended(connection, b"a")
        assert gate.refused["slow"] == 1
    assert not link.seen


def test_slow_headers(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, seconds=0.3) as gate:
        with connected(tls, gate.port) as silent, connected(tls, gate.port) as slow:
            slow.sendall(b"POST /v1/fleet/")
            assert ended(slow, b"a") and ended(silent)
        with connected(tls, gate.port) as second:
            time.sleep(0.2)
            second.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n".encode())
            time.sleep(0.2)
            second.sendall(b"a")
            assert answer(second)[0] == 200
            second.sendall(b"POST /v1/fleet/")
            assert ended(second, b"a")
        with connected(tls, gate.port) as endless:
            endless.sendall(b"POST / HTTP/1.1\r\na: " + b"b" * 70_000)
            assert answer(endless)[0] == 400


def test_rest_of_a_refused_body(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, seconds=0.3, body=100) as gate, connected(tls, gate.port) as connection:
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n".encode())
        assert answer(connection)[0] == 413
        assert ended(connection, b"a")


def test_slow_answers(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link, seconds=0.3) as gate:
        assert exchange(tls, gate.port, PULL, b"hang 1")[0] == 504
        with pytest.raises(http.client.IncompleteRead, match="5 bytes read, 95 more"):
            exchange(tls, gate.port, PULL, b"stall")
        assert (gate.refused["unanswered"], gate.refused["slow"]) == (1, 1)


def test_upstream_down(tls: Path, link: SuperLink, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with Gateway(tls, port, lambda: {}, host="127.0.0.1") as gate:
        status, _, body = exchange(tls, gate.port, PULL)
        assert (status, body) == (502, b"refused: unreachable")
        assert exchange(tls, gate.port, "/health", method="GET")[0] == 200
    make_tls(tmp_path, [], now=datetime.now(UTC))
    with gateway(tmp_path, link) as gate:  # what is there now is not the SuperLink of this certificate
        assert exchange(tmp_path, gate.port, PULL)[0] == 502
    assert not link.seen


def test_cannot_start(tls: Path, link: SuperLink, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(RunError, match=f"Expected 127.0.0.1:{port} to be free"),
            Gateway(tls, link.port, dict, host="127.0.0.1", port=port),
        ):
            pass
    with pytest.raises(RunError, match="Expected port=70000"), Gateway(tls, link.port, dict, port=70_000):
        pass
    with pytest.raises(RunError, match="to be free"), Gateway(tls, link.port, dict, host="192.0.2.1"):
        pass
    with pytest.raises(RunError, match="to hold a server's certificate"), Gateway(tmp_path, link.port, dict):
        pass


def test_stop(tls: Path, link: SuperLink, caplog: pytest.LogCaptureFixture) -> None:
    """With an upload under way, an answer nobody reads, none yet, an idle connection and one that never shook hands."""
    before = set(threading.enumerate())
    with gateway(tls, link) as gate:
        sockets = [connected(tls, gate.port) for _ in range(4)]
        sockets.append(socket.create_connection(("127.0.0.1", gate.port)))
        sockets[0].sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\nabc".encode())
        sockets[1].sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nlarge".encode())
        sockets[2].sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 7\r\n\r\nhang 20".encode())
        sockets[3].sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        assert answer(sockets[3])[0] == 200
        start = time.monotonic()
    assert time.monotonic() - start < 6
    assert set(threading.enumerate()) == before
    assert "Cancel 1" not in caplog.text  # by uvicorn, which complains about it
    for connection in sockets:
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", gate.port))
    gc.collect()


def test_quick_stop(tls: Path, link: SuperLink) -> None:
    with gateway(tls, link) as gate:
        assert exchange(tls, gate.port, PULL)[0] == 200
        start = time.monotonic()
    assert time.monotonic() - start < 1


def test_nothing_is_logged(tls: Path, link: SuperLink, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), gateway(tls, link, body=100, seconds=0.3) as gate:
        for target in (PULL, "/v1/secret"):
            exchange(tls, gate.port, target, b"secret", headers="flwr-signature: secret\r\n")
        exchange(tls, gate.port, PULL, b"hang 1")
        exchange(tls, gate.port, PULL, b"secret" * 100)
        with connected(tls, gate.port) as connection:
            connection.sendall(b"secret\r\n\r\n")
            assert answer(connection)[0] == 400
        with connected(tls, gate.port) as connection:
            connection.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nsecret".encode())
    records = [record for record in caplog.records if record.threadName != "superlink"]
    text = "".join(record.getMessage() for record in records)
    assert "secret" not in text and "fleet" not in text
    assert {record.levelname for record in records} == {"INFO"}


def test_a_mistake_is_logged(tls: Path, link: SuperLink, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, Any]:
        raise LookupError("no status")

    with Gateway(tls, link.port, broken, host="127.0.0.1") as gate:
        assert exchange(tls, gate.port, "/health", method="GET")[0] == 500
    assert "no status" in caplog.text


def test_token_buckets() -> None:
    buckets = TokenBuckets(rate=2, burst=3, addresses=2)
    assert [buckets.take("a", 10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("a", 10.25) == 0.25
    assert buckets.take("a", 10.5) == 0
    assert buckets.take("a", 10.5) == 0.5
    assert [buckets.take("a", 1000.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", 1000.0) == 0
    assert buckets.take("a", 1000.0) == 0.5
    assert buckets.take("c", 1000.0) == 0 and len(buckets) == 2
    assert buckets.take("a", 1000.0) == 0.5  # b was quiet longest and is the one forgotten


def test_subscriber() -> None:
    assert subscriber("192.0.2.7") == "192.0.2.7"
    assert subscriber("2001:db8:1:2:3::4") == subscriber("2001:db8:1:2::") == "2001:db8:1:2::/64"
    assert subscriber("2001:db8:1:3::") != subscriber("2001:db8:1:2::")
    assert subscriber("fe80::1%eth0") == "fe80::/64"


def test_limits() -> None:
    assert set(REFUSALS) == set(Gateway(Path(), 1, dict).refused)
    for name in Limits.__dataclass_fields__:
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(SettingsError, match=f"Expected the gateway's {name}="):
                Limits(**{name: value})
