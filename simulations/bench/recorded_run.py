"""Run folders as of long runs, written without running them, to measure and to test what reads them."""

import math
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from common.settings import load_settings
from server.events import append
from server.run_folder import RunFolder
from server.store import ledger_table

ACCOUNT = {"multiplier": 1.5, "honest": 0.8, "rate": 0.01, "delta": 1e-6, "spendable": 9.9e-7}
BOUNDS = {
    "weights": [-3.25 + 0.25 * n for n in range(27)],
    "multipliers": [0.5 * n for n in range(21)],
    "norms": [-2.25 + 0.25 * n for n in range(19)],
}


def write_run(
    out: Path, rounds: int, devices: int = 1_000_000, kind: str = "central", title: str = "", quantile: float = 0.0
) -> Path:
    """A finished simulation's folder; with `kind` secure, a deployment's with five stages a round; with a `quantile`,
    of a clip that adapts."""
    folder = RunFolder(out)
    overrides = [f"training.rounds={rounds}", "training.cohort_rate=0.01", f"aggregation.kind={kind}"]
    overrides.append(f"privacy.clip_quantile={quantile}")
    settings = load_settings(None, overrides + ([f'data.path="{title}"'] if title else []))
    rows: list[tuple[str, int | None, dict[str, Any]]] = []

    def record(event: str, round_: int | None, **fields: Any) -> None:
        rows.append((event, round_, fields))

    record(
        "opened",
        None,
        devices=devices,
        items=5000,
        parameters=1000,
        allowed_releases=rounds,
        noise_multiplier=1.5,
        account=ACCOUNT,
    )
    record("population", None, devices=list(range(min(devices, 1000))))
    if kind != "secure":
        record("simulated", None, bounds=BOUNDS)
    drawn = devices // 100
    for number in range(1, rounds + 1):
        slow = math.exp(-number / rounds)
        for stage in ("share", "upload", "agree", "unmask") if kind == "secure" else ():
            record(
                "stage",
                number,
                attempt=1,
                stage=stage,
                asked=drawn,
                answers=drawn - 3,
                seconds=slow,
                bytes_up=10**8,
                bytes_down=10**7,
            )
        clip = {"clip": slow, "share_within": 1 - slow} if quantile else {}
        record("round", number, attempt=1, members=drawn, survivors=drawn - 3, dropouts=3, seconds=2 + slow, **clip)
        if kind != "secure":
            histograms = {name: [slow] * (len(bounds) - 1) for name, bounds in BOUNDS.items()}
            record(
                "simulation",
                number,
                policy_loss=slow,
                behaviour_loss=8 * slow,
                critic_loss=slow,
                clipped=slow,
                norm=1,
                **histograms,
            )
    record("finished", rounds, reason="")
    with folder.open(settings, resume=False) as store, store.transaction() as connection:
        for second, (event, round_, fields) in enumerate(rows):
            append(connection, 1e9 + second, event, round_, **fields)
        entry = {"attempt": 1, "noise_multiplier": 1.5, "rate": 0.01, "reserved_at": 0.0, "uploaded_at": 0.0}
        connection.execute(
            insert(ledger_table), [entry | {"round": n, "released_at": 0.0} for n in range(1, rounds + 1)]
        )
    return out
