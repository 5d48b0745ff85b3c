"""Unit, image and compose files, and the commands in the documentation: well-formed, and of commands that there are."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from simulations.cli import app

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def expect_command(words: list[str], where: str) -> None:
    """That the command line's command and options exist; values are not looked at."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.commands.get(rest[0])
        assert inner is not None, f"{where}: no command {rest[0]} in {' '.join(words)}"
        command, rest = inner, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{where}: no option {word} in {' '.join(words)}"


def commands_in(text: str) -> list[list[str]]:
    """The `fedtopk` command lines of a page's shell blocks."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"[;&]| do ", line.partition(" #")[0]):
                words = shlex.split(part.replace("$(", "").replace(")", ""))
                if words[:1] == ["fedtopk"]:
                    found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path) -> None:
    for words in commands_in(page.read_text()):
        names = words[2].split("|") if len(words) > 2 else [""]
        for name in names:  # README lists subcommands as a|b|c
            expect_command([*words[:2], *([name] if name else []), *words[3:]], page.name)


def test_the_search_for_commands_finds_them() -> None:
    assert len(commands_in((ROOT / "docs/deploy.md").read_text())) >= 12
    with pytest.raises(AssertionError, match="no option --never"):
        expect_command(["fedtopk", "server", "start", "x", "--never"], "here")
    with pytest.raises(AssertionError, match="no command fly"):
        expect_command(["fedtopk", "server", "fly"], "here")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_well_formed(unit: Path) -> None:
    content = configparser.RawConfigParser(strict=False)
    content.optionxform = str  # type: ignore[assignment,method-assign]
    content.read(unit)
    assert content.sections() == ["Unit", "Service", "Install"]
    words = shlex.split(content["Service"]["ExecStart"])
    expect_command([Path(words[0]).name, *words[1:]], unit.name)
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        told = [line for line in done.stderr.splitlines() if "is not executable" not in line]  # not installed here
        assert not told, told


def test_the_compose_file_is_well_formed() -> None:
    content = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    for name, service in content["services"].items():
        expect_command(["fedtopk", *service["command"]], name)
        for volume in service["volumes"]:
            assert volume.split(":")[0] in content["volumes"]
    build = content["services"]["server"]["build"]
    assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).samefile(ROOT / "deploy/Dockerfile")
    compile(content["services"]["server"]["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_the_image_copies_what_there_is() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert {words[0] for words in instructions} <= {
        "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    for words in instructions:
        if words[0] == "COPY" and not words[1].startswith("--"):
            assert all((ROOT / source).exists() for source in words[1:-1]), words
