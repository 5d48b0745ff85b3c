"""What changes on a page: drawn once for all who look at it, at a pace that bounds what they cost the run."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio.to_thread

Parts = Mapping[str, Mapping[str, Any]]
"""``{"html": {fragment: HTML}, "panels": {id: panel}}``, or of these what may have changed."""

_TICK_SECONDS = 1.0
_SHARE = 0.005
"""Of a core, that the viewers of a page may cost together: the longer a run, the rarer its news."""


class Feed:
    """The parts of one page as they are now.

    Guarantee: whoever follows it is sent every part, and again whenever it has changed, however many follow
    (tests/unit/test_dashboard.py::test_a_feed_draws_once_for_all).

    Args:
        draw: the parts; called in a thread, one call at a time.
        clock: seconds.
    """

    def __init__(self, draw: Callable[[], Parts], clock: Callable[[], float] = time.monotonic) -> None:
        self._draw = draw
        self._clock = clock
        self._lock = asyncio.Lock()
        self._due = 0.0
        self._hurried = False
        self._revision = 0
        self._parts: dict[tuple[str, str], tuple[int, str]] = {}

    def hurry(self) -> None:
        """Draw as soon as anybody asks, or anew if it is being drawn: something is there that viewers wait to see."""
        self._hurried = True

    async def follow(self, closing: asyncio.Event) -> AsyncIterator[str]:
        """Server-sent events, of which the first one holds it all, until `closing` is set."""
        seen = 0
        while not closing.is_set():
            async with self._lock:
                if self._hurried or self._clock() >= self._due:
                    await self._refresh()
            news = self._newer(seen)
            seen = self._revision
            yield f"data: {news}\n\n" if news else ": alive\n\n"
            try:
                await asyncio.wait_for(closing.wait(), min(max(self._due - self._clock(), 0.0), _TICK_SECONDS))
            except TimeoutError:
                continue

    async def _refresh(self) -> None:
        self._hurried = False
        found, seconds = await anyio.to_thread.run_sync(self._timed)
        self._due = self._clock() + max(_TICK_SECONDS, seconds / _SHARE)
        for kind, name, text in found:
            if self._parts.get((kind, name), (0, ""))[1] != text:
                self._revision += 1
                self._parts[kind, name] = self._revision, text

    def _timed(self) -> tuple[list[tuple[str, str, str]], float]:
        """All parts as JSON, and the CPU seconds that they took."""
        start = time.thread_time()
        found = [
            (kind, name, json.dumps(value, ensure_ascii=False, allow_nan=False))
            for kind, values in self._draw().items()
            for name, value in values.items()
        ]
        return found, time.thread_time() - start

    def _newer(self, than: int) -> str:
        """The parts of later revisions as one JSON object; empty if there are none."""
        news: dict[str, list[str]] = {}
        for (kind, name), (revision, text) in self._parts.items():
            if revision > than:
                news.setdefault(kind, []).append(f"{json.dumps(name)}:{text}")
        return "{" + ",".join(f'"{kind}":{{{",".join(parts)}}}' for kind, parts in news.items()) + "}" if news else ""
