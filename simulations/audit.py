"""`fedtopk audit RUN`: attacks on a run's own system, with bounds that hold together at 99.9 %, or what is asked for.

A run folder says what is claimed: its settings and, in its report, the noise multiplier. The audits train again with
the same code and mechanism, at a size that fits (:class:`simulations.audits.system.Size`), and compare what they find
with the ε_model that the budget gives for that repetition. What each can and cannot show: ``docs/audits.md``.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from common.errors import RunError
from server.run_folder import RunFolder
from simulations.audits.bounds import error_of_each
from simulations.audits.canaries import audit_canaries
from simulations.audits.finding import Finding
from simulations.audits.flaws import without_noise
from simulations.audits.interactions import audit_interactions, excess_by_round
from simulations.audits.membership import audit_membership
from simulations.audits.payload import audit_payload
from simulations.audits.system import DELTA, Size, System, repetition

QUICK_STEPS = 3
"""Steps of progress besides the shadow runs."""


def audit(
    folder: RunFolder,
    size: Size,
    seed: int,
    confidence: float,
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """All audits of a run that ended; after a stop, those that were done.

    Args:
        seed: of canaries, coins of presence and initial models; the system's own noise and coins are its own.
        confidence: with which all bounds hold together, and a correct system passes.
        on_step: called with what comes next, :data:`QUICK_STEPS` times and once for each shadow run.

    Raises :class:`RunError` without a report, :class:`~common.errors.PrivacyError` for a run without noise.
    """
    start = time.monotonic()
    claim = claim_of(folder)
    system = repetition(folder.settings(), claim.get("noise_multiplier", 0.0), size)
    findings = list(audits(system, size, seed, error_of_each(confidence), on_step, should_stop))
    return {
        "run": claim,
        "repetition": {
            "users": system.histories.users,
            "items": system.items,
            "parameters": system.dimension,
            "rounds": system.settings.training.rounds,
            "cohort_rate": system.settings.training.cohort_rate,
            "noise_multiplier": system.settings.privacy.noise_multiplier,
            "delta": DELTA,
            "unit": "user, added or removed; observer: sees every released model",
            "size": asdict(size),
        },
        "confidence": confidence,
        "complete": not should_stop(),
        "passed": not any(finding.verdict == "failed" for finding in findings),
        "audits": [finding.to_dict() for finding in findings],
        "seconds": round(time.monotonic() - start, 1),
    }


def audits(
    system: System,
    size: Size,
    seed: int,
    error: float,
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> list[Finding]:
    """The findings of all audits of one system, or of those before a stop."""
    findings: list[Finding] = []
    quick: dict[str, Callable[[], list[Finding]]] = {
        "canaries": lambda: audit_canaries(system, size.canaries, seed, error),
        "payload": lambda: [audit_payload(system, seed, error)],
        "interactions": lambda: [
            audit_interactions(
                excess_by_round(system, seed), excess_by_round(replace(system, flaw=without_noise), seed), error
            )
        ],
    }
    for name, run in quick.items():
        if should_stop():
            return findings
        on_step(name)
        findings += run()
    membership = audit_membership(system, size.shadow_runs, seed, error, lambda: on_step("membership"), should_stop)
    return findings if membership is None else [*findings, membership]


def claim_of(folder: RunFolder) -> dict[str, Any]:
    """The `privacy` object of the run's report. Raises :class:`RunError` where there is none."""
    try:
        privacy = json.loads(folder.report_file.read_text(encoding="utf-8"))["privacy"]
    except OSError as error:
        raise RunError(f"Expected {folder.report_file} to be readable: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"Expected {folder.report_file} to be the report of a run, with its privacy.") from None
    if not isinstance(privacy, dict):
        raise RunError(f"Expected the privacy of {folder.report_file} to be an object.")
    return privacy
