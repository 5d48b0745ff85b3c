"""Serves the dashboard until it is told to end, and starts one beside a run."""

import asyncio
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn

from common.errors import MissingDependency, RunError, SettingsError
from common.processes import program, running
from server.dashboard.access import Access
from server.dashboard.app import Dashboard, Preview
from server.dashboard.aside import Aside
from server.durable import make_folder

PORT = 8420
_GRACE_SECONDS = 2
_NICE = 10
"""The machine is the run's: the dashboard takes what is left, and a tenth of a core where nothing is."""


def serve_dashboard(
    root: Path, host: str, port: int, token: str | None, preview: Preview | None, say: Callable[[str], None]
) -> None:
    """Serve the runs below `root` until SIGINT or SIGTERM.

    Args:
        port: 0 takes a free one.
        token: as of :meth:`server.dashboard.access.Access.of`.
        preview: shows a simulated user's recommendations; None where nobody can.
        say: is told the address, and how to give commands.

    Raises:
        RunError: there is no such folder, or the port cannot be had.
        SettingsError: the token is missing or too short.
        MissingDependency: the chart library is not installed.
    """
    if not root.is_dir():
        raise RunError(f"Expected {root} to be a folder of runs.")
    if not 0 <= port < 2**16:
        raise SettingsError(f"Expected --port={port} in [0, 65535].")
    access = Access.of(host, token)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RunError(f"Expected {host}:{port} to be free to listen on: {error.strerror or error}.") from None
    _give_way()
    shown = f"[{host}]" if ":" in host else host
    say(f"Dashboard: http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
    if token is None:
        say(f"Token for its controls: {access.token}")
    if not access.open:
        say("Other machines can reach it, and it speaks no TLS: put a proxy with TLS before it.")
    with closing(Aside()) as apart:
        asyncio.run(_serve(Dashboard(root, access, echarts_folder(), host, preview, apart), listening))


def _give_way() -> None:
    os.nice(_NICE)
    # Linux may weigh sessions against each other, and priorities only within each.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICE), encoding="ascii")


async def _serve(dashboard: Dashboard, listening: socket.socket) -> None:
    config = uvicorn.Config(
        dashboard.app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of streams that it has to cut at the end
    await _Server(config, dashboard.closing).serve(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends by a signal as by a wish: streams end by themselves then, and need not be waited for."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing, self._loop = closing, asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._closing.set)


def echarts_folder() -> Path:
    """Where the chart library's modules are: ECharts as NiceGUI bundles it, of which nothing else is used."""
    found = importlib.util.find_spec("nicegui")
    folder = Path(found.origin).parent / "elements" / "echart" / "dist" if found and found.origin else None
    if folder is None or not (folder / "index.js").exists():
        raise MissingDependency("Expected the chart library of nicegui 3 (pip install 'fedtopk[dashboard]').")
    return folder


@contextmanager
def beside(run: Path, wanted: bool) -> Iterator[None]:
    """A dashboard of one run in a process of its own, until the end of the block; nothing unless it is `wanted`."""
    if not wanted:
        yield
        return
    echarts_folder()
    make_folder(run)
    words = [program("fedtopk"), "dashboard", str(run), "--port", "0"]
    with running(words, {}, sys.stderr.fileno()):
        yield
