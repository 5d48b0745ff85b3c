"""The dashboard's routes. Nothing here writes to a run but :func:`server.controls.request`.

Pages stand still; what changes on them comes over one stream of server-sent events (:mod:`server.dashboard.feed`),
whose first message holds it all. A browser that lost the stream connects again by itself and is sent everything anew,
so that there are no gaps.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote
from weakref import WeakValueDictionary

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import Conflict, FedtopkError, RunError
from server.controls import ACTIONS
from server.controls import request as request_command
from server.dashboard.access import Access, is_loopback
from server.dashboard.compare import compare_parts
from server.dashboard.course import Course, explained
from server.dashboard.feed import Feed, Parts
from server.dashboard.log import search
from server.dashboard.openmetrics import CONTENT_TYPE, exposition
from server.dashboard.runs import Runs
from server.dashboard.spending import Apart, Spending
from server.dashboard.view import SECTIONS, log_lines, run_parts, static_file, templates
from server.run_folder import RunFolder
from server.run_lock import is_running

Preview = Callable[[Path, str], Mapping[str, Any]]
"""``preview(run, user)``: what a simulated user has seen and would be shown, for "" the first; raises FedtopkError.

To be pickled, it is a module's.
"""

_FOUND = 200
"""Lines of a log that a search shows."""
_BODY = 4096
"""Longest body of a request."""
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}


class Dashboard:
    """The web application over the runs below a folder.

    Args:
        echarts: folder of the chart library's modules.
        host: that it is served on. On loopback it answers under no foreign name, lest one be pointed at this machine.
        apart: where ε and previews are computed.
    """

    def __init__(
        self, root: Path, access: Access, echarts: Path, host: str, preview: Preview | None, apart: Apart
    ) -> None:
        self._runs = Runs(root, apart, self._hurry)
        self._access = access
        self._preview = preview
        self._apart = apart
        self._feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()
        self.closing = asyncio.Event()
        # The middleware cuts at the first colon: "[" is what it sees of an IPv6 address, which is never a foreign name.
        hosts = ["localhost", "127.0.0.1", "[", host] if is_loopback(host) else ["*"]
        own = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
        self.app = Starlette(
            routes=[
                Route("/", self._index),
                Route("/login", self._login, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/compare", self._compare),
                Route("/run/{name:path}", self._run),
                Route("/preview/{name:path}", self._previewed),
                Route("/command/{name:path}", self._command, methods=["POST"]),
                Route("/log/{name:path}", self._log),
                Route("/stream", self._stream_index),
                Route("/stream/compare", self._stream_compare),
                Route("/stream/run/{name:path}", self._stream_run),
                *(Route(f"/static/{name}", _own(name, kind)) for name, kind in own.items()),
                Mount("/static/echarts", StaticFiles(directory=echarts)),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_Guarded, access=access)],
            exception_handlers={FedtopkError: self._explain, 404: self._missing},
        )

    # Pages

    def _page(self, request: Request, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
        operator = self._access.is_operator(request)
        csrf = self._access.derived("csrf") if operator else ""
        common = {"operator": operator, "csrf": csrf, "path": request.url.path}
        return HTMLResponse(templates.get_template(template).render(common | facts), status)

    async def _index(self, request: Request) -> Response:
        return self._page(request, "index.html", stream="/stream")

    async def _run(self, request: Request) -> Response:
        name = request.path_params["name"]
        if self._runs.path(name) is None:
            return self._page(request, "problem.html", 404, title="No such run", words=f"There is no run {name}.")
        return self._page(request, "run.html", name=name, stream=f"/stream/run/{quote(name)}", sections=SECTIONS)

    async def _compare(self, request: Request) -> Response:
        names = await anyio.to_thread.run_sync(lambda: list(self._runs.names()))
        chosen = [name for name in request.query_params.getlist("run") if name in names]
        query = "&".join(f"run={quote(name)}" for name in chosen)
        return self._page(request, "compare.html", names=names, chosen=chosen, stream=f"/stream/compare?{query}")

    async def _previewed(self, request: Request) -> Response:
        name, user, preview = request.path_params["name"], request.query_params.get("user", ""), self._preview
        folder = self._runs.path(name)
        if folder is None or preview is None:
            return self._page(request, "problem.html", 404, title="No preview", words=f"There is none of {name}.")

        def shown() -> Mapping[str, Any]:
            if not self._runs.show(name, lambda course, spending: course.simulated):
                raise RunError(f"Expected {name} to be a simulation: devices of other runs keep their histories.")
            return self._apart(preview, folder, user)[0]  # type: ignore[no-any-return]

        return self._page(request, "preview.html", name=name, **await anyio.to_thread.run_sync(shown))

    async def _log(self, request: Request) -> Response:
        """Lines of a run's log, as HTML."""
        name = request.path_params["name"]
        folder = self._runs.path(name)
        if folder is None:
            return await self._missing(request, RunError(""))
        text = request.query_params.get("with", "")

        def lines() -> str:
            self._runs.show(name, lambda course, spending: None)  # says what is wrong with the folder, if anything is
            with explained(folder):
                found = log_lines(search(RunFolder(folder), text, _FOUND))
                return templates.get_template("parts/log.html").render(log=found)

        return HTMLResponse(await anyio.to_thread.run_sync(lines))

    async def _explain(self, request: Request, error: Exception) -> Response:
        return self._page(request, "problem.html", 422, title="This cannot be shown", words=str(error))

    async def _missing(self, request: Request, error: Exception) -> Response:
        return self._page(request, "problem.html", 404, title="No such page", words="There is nothing here.")

    # What changes

    async def _stream_index(self, request: Request) -> Response:
        return self._stream("", self._runs.index, "runs")

    async def _stream_compare(self, request: Request) -> Response:
        names = request.query_params.getlist("run")
        return self._stream(json.dumps(names), lambda: self._runs.show_all(names, compare_parts), "compared")

    async def _stream_run(self, request: Request) -> Response:
        name, previewed = request.path_params["name"], self._preview is not None
        seen: object = None

        def news() -> Parts:
            nonlocal seen
            before, seen = seen, None  # after an error everything is news

            def drawn(course: Course, spending: Spending) -> tuple[object, Parts]:
                version = course.version, spending.version
                return version, {} if version == before else run_parts(name, course, spending, previewed)

            seen, parts = self._runs.show(name, drawn)
            return parts

        return self._stream(name, news, "status")

    def _stream(self, key: str, draw: Callable[[], Parts], told: str) -> Response:
        """The feed that others follow already, or a new one; `told` is the fragment that holds what is wrong."""

        def parts() -> Parts:
            try:
                return draw()
            except FedtopkError as error:
                return {"html": {told: templates.get_template("parts/problem.html").render(words=str(error))}}

        feed = self._feeds.setdefault(f"{told} {key}", Feed(parts))
        no_store = {"cache-control": "no-store"}
        return StreamingResponse(feed.follow(self.closing), media_type="text/event-stream", headers=no_store)

    def _hurry(self, name: str) -> None:
        """Something is there that those who look at a run wait to see."""
        if feed := self._feeds.get(f"status {name}"):
            feed.hurry()

    async def _metrics(self, request: Request) -> Response:
        text = await anyio.to_thread.run_sync(lambda: self._runs.show_all(self._runs.names(), exposition))
        return Response(text, media_type=CONTENT_TYPE)

    # What an operator does

    async def _login(self, request: Request) -> Response:
        fields = parse_qs((await _body(request)).decode("utf-8", "replace"))
        back = fields.get("back", ["/"])[0]
        if not self._access.is_token(fields.get("token", [""])[0]):
            return self._page(request, "problem.html", 403, title="Wrong token", words="That is not the token.")
        target = quote(back, safe="/?=&%") if back.startswith("/") and not back.startswith(("//", "/\\")) else "/"
        response = RedirectResponse(target, 303)
        self._access.remember(request, response)
        return response

    async def _command(self, request: Request) -> Response:
        """Body: ``{"action", "expected"}``, the id of the newest command that the operator has seen."""
        if not self._access.may_command(request):
            return JSONResponse({"error": "Commands need the operator's token."}, 403)
        folder = self._runs.path(request.path_params["name"])
        if folder is None:
            return JSONResponse({"error": "There is no such run."}, 404)
        try:
            asked = json.loads(await _body(request))
            action, expected = asked["action"], asked["expected"]
        except (ValueError, KeyError, TypeError):
            action = expected = None
        if action not in ACTIONS or type(expected) is not int:
            return JSONResponse({"error": f"Expected an action of {', '.join(ACTIONS)}, and expected: a number."}, 400)
        origin = f"dashboard, from {request.client.host if request.client else 'somewhere'}"
        name = request.path_params["name"]
        try:
            given = await anyio.to_thread.run_sync(lambda: self._ask(name, folder, action, expected, origin))
        except Conflict as error:
            return JSONResponse({"error": str(error)}, 409)
        except FedtopkError as error:
            return JSONResponse({"error": str(error)}, 422)
        self._hurry(name)
        return JSONResponse({"command": given}, 202)

    def _ask(self, name: str, folder: Path, action: Any, expected: int, origin: str) -> int:
        state, ended = self._runs.show(name, lambda course, spending: (course.state, course.end is not None))
        if ended or not is_running(folder):
            raise Conflict(f"Expected {name} to be running; it is {state}, and nobody would answer.")
        return request_command(folder, action, expected, origin)


class _Guarded:
    """Adds the headers that every answer has, and asks for the token where looking needs it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = dict(message["headers"])
                cached = {} if b"cache-control" in kept else {b"cache-control": b"no-cache"}
                message["headers"] = [*message["headers"], *_HEADERS.items(), *cached.items()]
            await send(message)

        request = Request(scope)
        free = request.url.path == "/login" or request.url.path.startswith("/static/")
        if free or self._access.may_look(request):
            return await self._app(scope, receive, with_headers)
        words = {"title": "Token needed", "words": "This page is for those with the token."}
        common = {"operator": False, "csrf": "", "path": request.url.path}
        page = templates.get_template("problem.html").render(common | words)
        return await HTMLResponse(page, 401)(scope, receive, with_headers)


def _own(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = static_file(name)

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


async def _body(request: Request) -> bytes:
    """A small body; what is longer counts as empty."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _BODY:
            return b""
    return body
