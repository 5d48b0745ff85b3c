"""What the commands print: answers on standard output, everything else on standard error."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

Format = Literal["text", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="What standard output holds.")]

stderr = Console(stderr=True)
stdout = Console()


def answer(format: Format, value: Any, text: Callable[[], Any]) -> None:
    """Print a command's answer: `value` as JSON for programs, or what `text` renders for people."""
    if format == "json":
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        stdout.print(text())


@contextmanager
def stopping(words: str) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C (or SIGTERM) only ask for an end, with a word on it; the second one does what it did before.

    Yields whether it was asked for.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        interrupt = previous[signal.SIGINT]
        if asked and callable(interrupt):
            interrupt(number, frame)
        asked = True
        stderr.print(words)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
