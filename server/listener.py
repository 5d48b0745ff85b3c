"""uvicorn in a thread of its own, with an end to everything: connections, headers, and the server itself."""

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import RunError

_IDLE = 10
"""Seconds until an idle connection is closed: after Flower's client (5 s) has, lest it sends a request just then."""
_GRACE = 2
"""Seconds that requests under way have to finish when the server stops."""

_LOG = logging.getLogger(__name__)
# Of what uvicorn has to say about connections, only tracebacks of mistakes here: not what each peer did.
_LOG.addFilter(lambda record: record.exc_info is not None and isinstance(record.exc_info[1], Exception))


class Listener:
    """A server of an ASGI application over TLS, from the start to the end of a ``with`` block.

    Guarantees (tests/unit/test_gateway.py): it stops within a few seconds, whatever its peers do (::test_stop); no
    connection is open for long without a request under way (::test_slow_headers, ::test_rest_of_a_refused_body); no
    more connections than allowed (::test_connections).

    Args:
        context: the TLS that it speaks.
        resource: what the application uses; opened and closed in the server's event loop.
        port: 0 takes a free one; the attribute ``port`` tells which.
        connections: how many may be open at once; one more is ended without an answer.
        seconds: within which a connection's next request has to begin, and what is left of a refused body to end.
        surplus: called for every connection too many.

    Raises:
        RunError: at the start: the port cannot be had.
    """

    def __init__(
        self,
        app: ASGIApp,
        context: ssl.SSLContext,
        resource: AbstractAsyncContextManager[object],
        *,
        host: str,
        port: int,
        connections: int,
        seconds: float,
        surplus: Callable[[], None],
    ) -> None:
        self._resource, self._host, self.port = resource, host, port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_connection_class(connections, seconds, surplus),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                proxy_headers=False,  # whose address it is the connection says, not a header
                server_header=False,
                timeout_keep_alive=_IDLE,
                timeout_graceful_shutdown=_GRACE + 1,  # from Python 3.12 on it waits for handshakes, too
                ssl_context_factory=lambda config, default: context,
            )
        )

    def __enter__(self) -> Self:
        if not 0 <= self.port < 2**16:
            raise RunError(f"Expected port={self.port} in [0, 65535].")
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listening = socket.create_server((self._host, self.port), family=family, backlog=2048)
        except OSError as error:
            raise RunError(f"Expected {self._host}:{self.port} to be free to listen on: {error}.") from None
        # Connections inherit it; asyncio sets it on sockets of another making only, and 40 ms an answer are at stake.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = listening.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self, listening: socket.socket) -> None:
        async with self._resource:
            ending = asyncio.create_task(self._end())
            await self._server.serve(sockets=[listening])
            ending.cancel()

    async def _end(self) -> None:
        """End by force what is still under way some time after the stop; uvicorn would wait for it."""
        while not self._server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(_GRACE)
        for task in self._server.server_state.tasks:
            task.cancel()
        for connection in self._server.server_state.connections:
            connection.transport.abort()


def _connection_class(most: int, seconds: float, surplus: Callable[[], None]) -> type[H11Protocol]:
    """uvicorn's connections by the one of its two parsers that bounds the size of headers, and with an end."""

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.logger, self.access_log = _LOG, False
            self._deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._rest()
            if len(self.connections) > most:
                surplus()
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline:
                self._deadline.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._rest()
            super().on_response_complete()

        def _rest(self) -> None:
            """From now on the next request has so long to begin, and what is left of a refused body to end."""
            if self._deadline:
                self._deadline.cancel()
            self._deadline = self.loop.call_later(seconds, self._end)

        def _end(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Connection
