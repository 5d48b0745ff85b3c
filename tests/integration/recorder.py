"""A proxy on loopback that writes down what passes: as it is on the wire, or, with the server's key, what TLS hides."""

import asyncio
import itertools
import ssl
import threading
from pathlib import Path
from typing import Self

from server.superlink import Tls

_CHUNK = 1 << 16


class Recorder:
    """Passes connections on to a port of loopback, from the start to the end of a ``with`` block.

    Args:
        upstream: that port.
        folder: for a file with the bytes of each connection and direction, such as ``0003-up``.
        tls: of the server there. The recorder then is this server to whoever connects, and a client of its own to the
            server, and writes down what they tell each other.
    """

    def __init__(self, upstream: int, folder: Path, tls: Tls | None = None) -> None:
        folder.mkdir(parents=True)
        self._upstream, self._folder = upstream, folder
        self._number = itertools.count()
        self._served = self._trusted = None
        if tls is not None:
            self._served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._served.load_cert_chain(tls.certificate, tls.key)
            self._trusted = ssl.create_default_context(cafile=str(tls.root))

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0, ssl=self._served)
        self.port = int(server.sockets[0].getsockname()[1])
        started.set()
        await self._over.wait()
        server.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._upstream, ssl=self._trusted)
        except OSError:
            writer.close()
            return
        name = f"{next(self._number):04}"
        await asyncio.gather(self._copy(reader, server, f"{name}-up"), self._copy(answers, writer, f"{name}-down"))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, name: str) -> None:
        with (self._folder / name).open("wb", buffering=0) as file:
            try:
                while content := await source.read(_CHUNK):
                    file.write(content)
                    target.write(content)
                    await target.drain()
            except OSError:
                pass  # one of them has gone
            finally:
                target.close()
