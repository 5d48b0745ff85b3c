"""Which runs there are below a folder. Pages name runs by what is found here and never by a path."""

import os
from collections.abc import Mapping
from pathlib import Path

from server.store import DATABASE

_SETTINGS = "settings.toml"
_DEPTH = 4
_INSIDE = {"checkpoints", "tensorboard", "fleet", "report"}
"""Folders of a run that hold no runs."""


def find_runs(root: Path) -> Mapping[str, Path]:
    """Run folders by name, the path below `root`; `root` itself by its own name where it is one. Symlinks are ignored.

    A folder counts as soon as it holds a run's database or settings, in whatever condition they are.
    """
    if _is_run(os.listdir(root) if root.is_dir() else []):
        return {_printable(root.resolve().name): root} | _below(root)
    return _below(root)


def _below(root: Path) -> dict[str, Path]:
    found = {}
    for here, folders, files in os.walk(root):
        folder = Path(here)
        depth = len(folder.relative_to(root).parts)
        folders[:] = sorted(name for name in folders if depth < _DEPTH and name not in _INSIDE and name[0] != ".")
        if depth and _is_run(files):
            found[_printable(str(folder.relative_to(root)))] = folder
    return found


def _is_run(files: list[str]) -> bool:
    return DATABASE in files or _SETTINGS in files


def _printable(name: str) -> str:
    """Names of files may hold bytes that are no text."""
    return name.encode("utf-8", "replace").decode("utf-8")
