"""What the commands print: answers on standard output, everything else on standard error."""

import json
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console

Format = Literal["text", "json"]

stderr = Console(stderr=True)
stdout = Console()


def answer(format: Format, value: Any, text: Callable[[], Any]) -> None:
    """Print a command's answer: `value` as JSON for programs, or what `text` renders for people."""
    if format == "json":
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        stdout.print(text())
