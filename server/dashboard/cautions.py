"""What an operator should know of a run, in sentences that say what to do."""

from collections.abc import Iterator

from common.privacy.adaptive_clip import share_noise
from server.dashboard.course import Course
from server.dashboard.panels import ess_shares

_FEW = 0.05
"""Share of effective logs below which few of them dominate."""
_RECENT = 20
"""Rounds over which shares are taken."""


def cautions(course: Course) -> Iterator[str]:
    """What is wrong or may be, the most urgent first."""
    if course.state == "interrupted":
        yield "The run's process is gone without a word: killed, or the machine restarted. --resume goes on."
    if course.state == "failed" and course.end is not None:
        yield f"The run ended by an error: {course.end.fields['reason']}"
    yield from _of_privacy(course)
    yield from _of_cohorts(course)
    yield from _of_learning(course)


def _of_privacy(course: Course) -> Iterator[str]:
    privacy, training = course.settings.privacy, course.settings.training
    if not course.settings.private:
        yield "No noise is added: whoever sees the models may learn what single users did."
        return
    if privacy.randomness == "seeded":
        yield "Noise is seeded, not private: whoever knows the seed can subtract it."
    allowed = course.opened.get("allowed_releases")
    if allowed is not None and allowed < training.rounds:
        ends = course.round + max(allowed - course.releases, 0)
        yield (
            f"The budget ends in round {ends:,} of {training.rounds:,}: raise privacy.target_epsilon or "
            "privacy.noise_multiplier, or train fewer rounds."
        )
    if privacy.mechanism == "tree":
        yield (
            "privacy.mechanism=tree: the server adds the noise, and no ε_server is offered. RUN/noise.key must stay "
            "with the server's process: who reads it can take the noise away."
        )
    elif course.settings.aggregation.kind != "secure":
        yield (
            f"aggregation.kind={course.settings.aggregation.kind}: ε_server holds under secure aggregation only; this "
            "process sees every update."
        )


def _of_cohorts(course: Course) -> Iterator[str]:
    guard, recent = course.settings.guard, list(course.rounds.values())[-_RECENT:]
    if course.failed_attempts:
        last = course.failures[0]
        yield (
            f"{course.failed_attempts:,} attempts at rounds failed and released nothing; the last, in round "
            f"{last.round}: {last.fields['reason']}"
        )
    small = sum(row["survivors"] < guard.minimum_cohort for row in recent)
    if small:
        yield (
            f"{small} of the last {len(recent)} rounds had fewer members than guard.minimum_cohort="
            f"{guard.minimum_cohort} and released noise alone: raise training.cohort_rate."
        )
    lost, drawn = sum(row.get("dropouts", 0) for row in recent), sum(row["members"] for row in recent)
    if drawn and lost / drawn > course.settings.aggregation.dropout_fraction / 2:
        yield (
            f"{lost:,} of the last {drawn:,} members dropped out; beyond aggregation.dropout_fraction="
            f"{course.settings.aggregation.dropout_fraction:g} of a cohort a round fails."
        )


def _of_learning(course: Course) -> Iterator[str]:
    objective, training = course.settings.objective, course.settings.training
    if objective.corrected and objective.warmup_rounds >= training.rounds:
        yield (
            f"The correction never applies: objective.warmup_rounds={objective.warmup_rounds:,} are not fewer than "
            f"training.rounds={training.rounds:,}."
        )
    shares = ess_shares(course)
    if shares:
        newest = max(shares)
        logs = sum(course.simulation[newest]["weights"]) * course.rounds.get(newest, {}).get("members", 0)
        if shares[newest] < _FEW:
            yield (
                f"ESS {shares[newest] * logs:,.0f} of {logs:,.0f}: the correction is dominated by few logs; lower "
                f"objective.weight_cap={objective.weight_cap:g}."
            )
    recent = list(course.simulation.values())[-_RECENT:]
    yield from _of_clip(course)
    fixed = not course.settings.privacy.clip_quantile
    clipped = [float(row["clipped"]) for row in recent if "clipped" in row and fixed]
    if clipped and sum(clipped) / len(clipped) > 0.99:
        yield (
            f"Nearly every update is clipped to privacy.clip_norm={course.settings.privacy.clip_norm:g}: all count "
            "alike, whatever their size. A larger clip brings more noise."
        )
    elif clipped and sum(clipped) / len(clipped) < 0.01 and course.settings.private:
        yield (
            f"No update reaches privacy.clip_norm={course.settings.privacy.clip_norm:g}: a lower clip brings less "
            "noise at the same ε."
        )


def _of_clip(course: Course) -> Iterator[str]:
    settings, clip = course.settings, course.latest(course.rounds).get("clip")
    if clip is None:
        return
    off = share_noise(course.opened["noise_multiplier"], settings.training.cohort_rate * course.opened["devices"])
    if off > 1:
        yield (
            f"The clip follows noise: its count of updates is off by {off:.1f} cohorts a round; raise "
            "training.cohort_rate, or lower privacy.clip_learning_rate."
        )
    if clip >= settings.largest_clip:
        yield f"The clip has reached {clip:g}, the largest that devices accept: raise guard.maximum_clip."
