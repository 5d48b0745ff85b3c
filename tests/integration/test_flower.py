"""`flwr run .` through Flower's own processes: the very model of `fedtopk simulate` with the plain kind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import TINY, simulate

from common.settings import OUT, Settings, parse_flat

REPOSITORY = Path(__file__).parents[2]
FLWR = str(Path(sys.executable).with_name("flwr"))
SHARED = TINY | {"data.users": 6, "training.rounds": 3, "training.cohort_rate": 0.7}
"""Settings of both runs; one round draws fewer devices than the others, and a device's state carries over."""


def processes_of(home: Path) -> list[int]:
    """Everything that was started with this Flower home: SuperLink, Ray and their children outlive `flwr run`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"FLWR_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment for `flwr`, whose processes end with the test."""
    home = tmp_path / "flower"
    yield os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for pid in processes_of(home):
        os.kill(pid, signal.SIGKILL)


def app_folder(folder: Path) -> Path:
    """A copy of what `flwr run .` reads, as in a clean clone."""
    for name in ("client", "common", "server", "simulations"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def run_config(values: dict[str, object]) -> str:
    return " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in values.items())


def flwr_run(app: Path, environment: dict[str, str], nodes: int, config: dict[str, object]) -> str:
    words = [FLWR, "run", ".", "--stream", "--federation-config", f"num-supernodes={nodes}", "-c", run_config(config)]
    done = subprocess.run(
        words,
        cwd=app,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    return done.stdout


def test_flower_and_plain_end_in_the_bit_identical_model(tmp_path: Path, flower: dict[str, str]) -> None:
    (tmp_path / "app").mkdir()
    said = flwr_run(app_folder(tmp_path / "app"), flower, 6, SHARED | {OUT: str(tmp_path / "flower-run")})
    assert (tmp_path / "flower-run/report.json").exists(), said
    assert "NOT SECRET" in said
    plain = simulate(
        tmp_path / "plain-run",
        **{key.replace(".", "__"): value for key, value in SHARED.items()},
        aggregation__kind="plain",
    )
    assert (tmp_path / "flower-run/model.safetensors").read_bytes() == (
        tmp_path / "plain-run/model.safetensors"
    ).read_bytes()
    report = json.loads((tmp_path / "flower-run/report.json").read_text())
    assert (report["status"], report["rounds"], report["devices"]) == ("finished", 3, 6)
    assert report["client_updates"] == plain["client_updates"] > 0
    assert report["privacy"] == plain["privacy"]
    assert report["aggregation"]["bytes_up_per_device"] > 0


def test_the_run_configuration_of_the_bundle_holds_every_setting() -> None:
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]

    def leaves(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        flat: dict[str, object] = {}
        for key, value in tree.items():
            flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    flat = leaves(config)
    assert set(flat) == set(Settings().flat()) | {OUT}
    given, default = parse_flat(flat).flat(), Settings().flat()
    assert {key for key in default if given[key] != default[key]} == {
        "aggregation.kind",
        "training.cohort_rate",
        "training.rounds",
    }
