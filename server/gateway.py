"""What devices can reach: a reverse proxy for the fleet routes of Flower's SuperLink, and for nothing else.

The SuperLink serves its fleet, its control and its runtime on one port, and whoever reaches the control can start and
stop runs. So the SuperLink listens on loopback only, and the gateway on the network.
"""

import asyncio
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import httpx
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from common.errors import RunError
from server.admission import REFUSALS, Limits, TokenBuckets, is_fleet_route, subscriber
from server.listener import Listener
from server.tls import CA, CERTIFICATE, KEY

_REQUEST_HEADERS = frozenset(
    {b"content-type", b"content-length", b"accept", b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"}
    | {b"flwr-package-name", b"flwr-package-version", b"flwr-component-name"}
)
"""Media type, node authentication, version check. Not X-Forwarded-For, which the SuperLink believes from loopback."""
_RESPONSE_HEADERS = frozenset({b"content-type", b"content-length", b"flwr-version-incompatibility-message"})
_TIMEOUT = {"connect": 5.0}
_UPSTREAM_IDLE = 2.0
"""Seconds until an idle connection to the SuperLink is closed: before it does (5 s), lest a request misses it."""


class Gateway:
    """A gateway that listens from the start to the end of a ``with`` block, in a thread of its own.

    Guarantees (tests/unit/test_gateway.py):
        - the SuperLink sees ``POST`` requests for :data:`server.admission.FLEET_ROUTES` only (::test_closed_paths);
        - of bodies, requests, connections and time no more than :class:`Limits` has (::test_large_body and after);
        - no path, header or body is logged (::test_nothing_is_logged).

    Args:
        tls: folder of :func:`server.tls.make_tls`; the SuperLink presents the same certificate.
        upstream: the SuperLink's port on 127.0.0.1.
        status: what ``GET /health`` answers, as JSON; called in the gateway's thread, which it must not hold up.
        port: 0 takes a free one.

    Raises:
        RunError: at the start: the certificate cannot be used, or the port not be had.
    """

    def __init__(
        self,
        tls: Path,
        upstream: int,
        status: Callable[[], Mapping[str, Any]],
        *,
        host: str = "0.0.0.0",
        port: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self._tls, self._upstream, self._status = tls, f"https://127.0.0.1:{upstream}", status
        self._host, self.port, self._limits = host, port, limits or Limits()
        self._buckets = TokenBuckets(self._limits.rate, self._limits.burst, self._limits.addresses)
        self._refused = dict.fromkeys(REFUSALS, 0)
        self._active = 0

    @property
    def refused(self) -> Mapping[str, int]:
        """How many requests were refused, by reason: the keys of :data:`server.admission.REFUSALS`."""
        return dict(self._refused)

    def __enter__(self) -> Self:
        try:
            served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            served.load_cert_chain(self._tls / CERTIFICATE, self._tls / KEY)
            trusted = ssl.create_default_context(cafile=self._tls / CA)
        except OSError as error:
            raise RunError(f"Expected {self._tls} to hold a server's certificate: {error}.") from None
        # Not a client, which would log every URL and carry the cookies of one device's answer to another one's call.
        self._transport = httpx.AsyncHTTPTransport(
            verify=trusted, trust_env=False, limits=httpx.Limits(keepalive_expiry=_UPSTREAM_IDLE)
        )
        self._listener = Listener(
            self._answer,
            served,
            self._transport,
            host=self._host,
            port=self.port,
            connections=self._limits.connections,
            seconds=self._limits.seconds,
            surplus=lambda: self._count("connections"),
        )
        self.port = self._listener.__enter__().port
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.__exit__(*error)

    def _count(self, reason: str) -> None:
        self._refused[reason] += 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        health = (scope["method"], scope["raw_path"]) == ("GET", b"/health")
        if not health and not is_fleet_route(scope["method"], scope["raw_path"], scope["query_string"]):
            return await self._refuse("path", scope, receive, send)
        if wait := self._buckets.take(subscriber(scope["client"][0]), time.monotonic()):
            return await self._refuse("rate", scope, receive, send, {"retry-after": str(math.ceil(wait))})
        if health:
            return await JSONResponse(self._status())(scope, receive, send)
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > self._limits.body:
            return await self._refuse("body", scope, receive, send)
        if self._active >= self._limits.concurrent:
            return await self._refuse("busy", scope, receive, send, {"retry-after": "1"})
        self._active += 1
        try:
            await self._forward(scope, receive, send)
        finally:
            self._active -= 1

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, begun = _Body(receive, self._limits.body), False
        headers = [(name, value) for name, value in scope["headers"] if name in _REQUEST_HEADERS]
        url = self._upstream + scope["raw_path"].decode()
        request = httpx.Request("POST", url, headers=headers, content=body, extensions={"timeout": _TIMEOUT})
        try:
            async with (
                asyncio.timeout(self._limits.seconds),
                aclosing(await self._transport.handle_async_request(request)) as answer,
            ):
                begun = True
                kept = [
                    (name.lower(), value) for name, value in answer.headers.raw if name.lower() in _RESPONSE_HEADERS
                ]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
                async for part in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            return
        except _Gone:
            return
        except _TooLarge:
            reason = "body"
        except TimeoutError:
            reason = "unanswered" if body.whole and not begun else "slow"
        except httpx.TransportError:
            reason = "unreachable"
        if begun:  # it cannot become another answer: uvicorn ends the connection
            self._count(reason)
        else:
            await self._refuse(reason, scope, receive, send, {"connection": "close"} if reason == "slow" else None)

    async def _refuse(
        self, reason: str, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
    ) -> None:
        self._count(reason)
        await PlainTextResponse(f"refused: {reason}", REFUSALS[reason], headers)(scope, receive, send)


class _Gone(Exception):
    """The device has closed the connection."""


class _TooLarge(Exception):
    """The body is larger than it may be."""


class _Body:
    """A request's body as it arrives, of at most so many bytes; ``whole`` once it has arrived."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self.whole = receive, most, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self.whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            self._left -= len(message["body"])
            if self._left < 0:
                raise _TooLarge
            self.whole = not message["more_body"]
            yield message["body"]
