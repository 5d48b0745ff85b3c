"""`fedtopk bench device`: the documented answer, from a small measurement through every message of real rounds."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simulations.bench.commands import bench_app
from simulations.bench.device import results_table

MESSAGES = ["advertise", "share", "upload", "agree", "unmask"]


def test_device() -> None:
    """The command fails unless the server takes every message of the device as an honest one."""
    words = ["device", "--items", "60", "--events", "20", "--devices", "5", "--repeats", "1", "--format", "json"]
    done = CliRunner().invoke(bench_app, words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert {"machine", "update_ms", "recommend_ms", "add_event_ms", "peak_rss_mib"} < answer.keys()
    update = answer["update_ms"]
    assert list(update) == ["adapt", "gradient", "encode", "noise", "protocol", "total"]
    assert all(update[name] > 0 for name in update.keys() - {"adapt"}) and update["adapt"] >= 0
    assert update["protocol"] == pytest.approx(sum(answer["protocol_ms"].values()), abs=0.01)
    assert list(answer["messages_ms"]) == MESSAGES
    assert update["total"] == pytest.approx(sum(answer["messages_ms"].values()), abs=0.05)  # of a single round
    assert answer["workload"] == {
        "items": 60,
        "events": 20,
        "devices": [6, 6],
        "parameters": 60 * (32 + 65 + 65) + 128 * 130 + 64 * 65 + 64 * 16,
        "bits": 16,
    }
    assert 50 < answer["peak_rss_mib"] < answer["update_peak_rss_mib"] * 2
    assert min(answer[name] for name in ("recommend_ms", "add_event_ms", "add_event_ms_long")) > 0
    console = Console(width=100)
    with console.capture() as printed:
        console.print(results_table(answer))
    assert str(update["total"]) in printed.get() and f"{answer['peak_rss_mib']} MiB" in printed.get()
