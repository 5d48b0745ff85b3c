"""When a device takes part: never on a metered network or a low battery, say. Whoever runs the device decides how."""

import shlex
import subprocess
from collections.abc import Callable

_SECONDS = 10.0


def command(words: str) -> Callable[[], str]:
    """The condition that a command succeeds: empty if it does, its last line, or that it failed, if it does not."""
    if not words:
        return str

    def condition() -> str:
        try:
            done = subprocess.run(shlex.split(words), capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return f"its condition could not be checked: {error}."
        lines = (done.stdout + done.stderr).split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return "" if done.returncode == 0 else said[-1] if said else f"its condition ended with {done.returncode}."

    return condition
