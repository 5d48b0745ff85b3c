"""Do the audits catch what is broken, and only that? Every system, over many seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from simulations.audits.bounds import error_of_each
from simulations.audits.canaries import audit_canaries
from simulations.audits.finding import Finding
from simulations.audits.flaws import BROKEN, as_it_is, without_noise
from simulations.audits.interactions import audit_interactions, excess_by_round
from simulations.audits.payload import all_masks, audit_payload, no_masks
from simulations.audits.system import Size, System

CORRECT, NO_NOISE, NO_MASKS = "correct", "noise off", "masks off"
SYSTEMS = {CORRECT: as_it_is, **BROKEN, NO_NOISE: without_noise, NO_MASKS: as_it_is}


def study(
    system: System,
    size: Size,
    seeds: Sequence[int],
    confidence: float,
    on_step: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """How often each system was caught: ``{system: {"seeds", "caught", "by": {audit: how often it failed},
    "lower_bounds": {audit: [least, most]}, "limits": {audit: of the first seed}}}``.

    All audits but the membership attack, whose shadow runs would take hours.
    """
    runs: dict[str, list[list[Finding]]] = {name: [] for name in SYSTEMS}
    error = error_of_each(confidence)
    for seed in seeds:
        if should_stop():
            break
        masked, bare = (audit_payload(system, seed, error, mask) for mask in (all_masks, no_masks))  # before any sum
        unprotected = excess_by_round(replace(system, flaw=without_noise), seed)
        for name, flaw in SYSTEMS.items():
            if should_stop():
                break
            audited = replace(system, flaw=flaw)
            excess = unprotected if flaw is without_noise else excess_by_round(audited, seed)
            runs[name].append(
                [
                    *audit_canaries(audited, size.canaries, seed, error),
                    bare if name == NO_MASKS else masked,
                    audit_interactions(excess, unprotected, error),
                ]
            )
            on_step(name)
    return {name: _summary(found) for name, found in runs.items() if found}


def _summary(runs: list[list[Finding]]) -> dict[str, Any]:
    by_audit = {findings[0].name: findings for findings in zip(*runs, strict=True)}
    return {
        "seeds": len(runs),
        "caught": sum(any(finding.verdict == "failed" for finding in run) for run in runs),
        "by": {name: sum(finding.verdict == "failed" for finding in found) for name, found in by_audit.items()},
        "lower_bounds": {
            name: [min(finding.lower_bound for finding in found), max(finding.lower_bound for finding in found)]
            for name, found in by_audit.items()
        },
        "limits": {name: found[0].limit for name, found in by_audit.items()},
    }
