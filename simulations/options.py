"""Options that several commands have."""

import os
from pathlib import Path
from typing import Annotated

import typer

CORES = len(os.sched_getaffinity(0))
"""Processors that this process may use."""

SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a setting; repeatable.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; what it lacks is default.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Processes; they change the speed and nothing else.")
]
