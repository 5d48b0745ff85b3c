"""Which runs there are below a folder. Pages name runs by what is found here and never by a path."""

import os
from collections.abc import Mapping
from pathlib import Path

from server.store import DATABASE

_SETTINGS = "settings.toml"
_DEPTH = 4


def find_runs(root: Path) -> Mapping[str, Path]:
    """Run folders by name, the path below `root`; `root` itself by its own name where it is one. Symlinks are ignored.

    A folder counts as soon as it holds a run's database or settings, in whatever condition they are; what is inside of
    it belongs to that run.
    """
    found = {}
    for here, folders, files in os.walk(root):
        folder = Path(here)
        depth = len(folder.relative_to(root).parts)
        if DATABASE in files or _SETTINGS in files:
            found[_printable(str(folder.relative_to(root)) if depth else folder.resolve().name)] = folder
            folders.clear()
        folders[:] = sorted(name for name in folders if depth < _DEPTH and name[0] != ".")
    return found


def _printable(name: str) -> str:
    """Names of files may hold bytes that are no text."""
    return name.encode("utf-8", "replace").decode("utf-8")
