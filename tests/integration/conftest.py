"""One run of `fedtopk fleet` for all tests that look at what it left."""

import subprocess
import sys
from pathlib import Path

import pytest
from deployment import DEVICES, SETTINGS
from recorded_fleet import Fleet
from running import arguments, fedtopk


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Four devices and three rounds (a minute or two)."""
    home = tmp_path_factory.mktemp("fleet")
    words = ["fleet", "--devices", str(DEVICES), "--out", str(home / "run"), "--format", "json", *arguments(SETTINGS)]
    program = str(Path(__file__).with_name("recorded_fleet.py"))
    done = subprocess.run(
        [sys.executable, program, str(home / "traffic"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return Fleet(home / "run", home / "traffic", done.stdout)


@pytest.fixture(scope="session")
def plain(fleet: Fleet) -> Path:
    """The run folder of the same run without real devices, masks or network."""
    out = fleet.run.with_name("plain")
    config = ("--config", fleet.run / "settings.toml", "--set", "aggregation.kind=plain")
    done = fedtopk("simulate", "--out", out, *config)
    assert done.returncode == 0, done.stderr
    return out
