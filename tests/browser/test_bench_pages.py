"""`fedtopk bench pages` on a small run: what its answer holds. In a file of its own, for it starts its own browser."""

import json

from running import fedtopk

from simulations.bench.pages import PHASES


def test_a_page_is_opened_and_measured(chromium: str) -> None:
    done = fedtopk("bench", "pages", "--rounds", "5", "--devices", "1000", "--runs", "1", "--format", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == {"machine", "browser", "rounds", "devices", "openings", "open_s", "longest_task_ms"}
    assert (answer["rounds"], answer["devices"]) == (5, 1000)
    assert answer["browser"].startswith("chromium ") and answer["machine"]["cores"] >= 1
    (opening,) = answer["openings"]
    assert opening == {"open_s": answer["open_s"], "longest_task_ms": answer["longest_task_ms"]}
    assert 0 < opening["open_s"] < 120  # for which the bench waits
    tasks = opening["longest_task_ms"]
    assert tuple(tasks) == PHASES
    assert all(task == 0 or 50 <= task < 120_000 for task in tasks.values())  # shorter ones are not told of
