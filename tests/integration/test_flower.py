"""`flwr run .` through Flower's own processes: secure aggregation, and the very model of a plain one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import TINY

from client.device import participate
from common.offer import Offer
from common.privacy.encoding import add_residues
from common.settings import OUT, Settings, load_settings, parse_flat
from server.cohort import CohortSum, release
from server.events import EventReader
from server.run import open_training
from server.run_folder import RunFolder
from server.store import open_store_read_only
from simulations.plain_cohort import PlainCohort
from simulations.population import Population
from simulations.simulate import load_split

REPOSITORY = Path(__file__).parents[2]
FLWR = str(Path(sys.executable).with_name("flwr"))
SHARED = TINY | {
    "data.users": 10,
    "training.rounds": 3,
    "training.cohort_rate": 1.0,
    "aggregation.kind": "secure",
    "aggregation.dropout_fraction": 0.2,
    "privacy.clip_quantile": 0.5,
    "training.start": "popularity",
}
"""Settings of both runs; a device's state carries over from round to round."""


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


LOST = {2, 7}
"""Devices whose uploads of the second and third round never arrive: 20 %."""

FAULTY = f"""
from flwr.clientapp import ClientApp
from simulations.client_app import client_app as honest

class Faulty(ClientApp):
    def __call__(self, message, context):
        kind, late = message.metadata.message_type, message.metadata.group_id in ("2", "3")
        if kind == "train.upload" and late and context.node_config["partition-id"] in {LOST}:
            raise RuntimeError("lost on the way")
        return honest(message, context)

client_app = Faulty()
"""
"""A ClientApp that loses them."""


class Unreliable(PlainCohort):
    """The truth: what the devices that answer encode, summed in the clear."""

    def __init__(self, population: Population) -> None:
        super().__init__(population)
        self.people = population

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        lost = LOST if offer.round in (2, 3) else set()
        survivors = [device for device in members.tolist() if device not in lost]
        residues = np.zeros(offer.encoding.padded, np.uint32)
        for device in survivors:
            window = self.people.windows(offer.round, np.array([device]))
            part = participate(offer, len(members), device, window, self.people.users[device])
            add_residues(residues, part.residues, offer.encoding.bits)
            self.people.users[device] = part.local_user
        return CohortSum(release(residues, len(survivors), len(members), offer), len(members), len(survivors))


def test_a_real_run_with_lost_uploads_ends_in_the_bit_identical_model(tmp_path: Path, flower: dict[str, str]) -> None:
    (tmp_path / "app").mkdir()
    app = app_folder(tmp_path / "app")
    (app / "simulations/faulty.py").write_text(FAULTY)
    project = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(
        project.replace("simulations.client_app:client_app", "simulations.faulty:client_app")
    )
    run = tmp_path / "flower-run"
    said = flwr_run(app, flower, 10, SHARED | {OUT: str(run)})
    assert (run / "report.json").exists(), said

    settings = load_settings(None, [f"{key}={value}" for key, value in SHARED.items()])
    data = load_split(settings)
    folder = RunFolder(tmp_path / "plain-run")
    with folder.open(settings, resume=False) as store:
        cohort = Unreliable(Population(settings, data.train))
        training = open_training(settings, folder, store, cohort, len(data.train.catalogue))
        folder.save_model(training.run(lambda: False, lambda progress: None).parameters)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "plain-run/model.safetensors").read_bytes()

    report = json.loads((run / "report.json").read_text())
    clips = [clip for _, clip in report["clip"]["by_round"]]
    assert len(clips) == len(set(clips)) == 2 and clips[0] == 1.0  # the first round counts
    assert (report["status"], report["rounds"], report["devices"]) == ("finished", 3, 10)
    assert report["client_updates"] == 26
    assert report["aggregation"]["dropouts"] == 4
    assert report["aggregation"]["kind"] == "secure"
    assert report["aggregation"]["bytes_up_per_device"] < report["aggregation"]["bytes_down_per_device"]
    with open_store_read_only(run) as store:
        events = EventReader(store).read(kinds=["stage", "dropouts"])
    stages = [
        (event.fields["stage"], event.fields["answers"])
        for event in events
        if event.round == 2 and event.kind == "stage"
    ]
    assert stages == [("share", 10), ("upload", 8), ("agree", 8), ("unmask", 8)]
    assert any("lost on the way" in str(event.fields) for event in events if event.kind == "dropouts")


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
