"""Which charts a run has, and what to say in place of those that it has not."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.privacy import NOT_OFFERED
from server.dashboard.charts import Chart, Heat, Line
from server.dashboard.course import STAGES, Course, Rows
from server.dashboard.spending import Spending

NOT_RELEASED = "not released"
"""Figures of devices are shown only where they were charged and released, or where a simulation plays the devices."""
SIMULATION = "simulation: no real run releases it"

_LOSSES = {
    "policy_loss": ("Policy loss", "−c·log π, mean per step"),
    "behaviour_loss": ("Behaviour (β) loss", "cross-entropy, nats"),
    "frequency_loss": ("Behaviour (β) loss, by frequency", "cross-entropy, nats"),
    "critic_loss": ("Critic loss", "cross-entropy, nats"),
}
_RELEASED = "a noisy count, released with every sum and charged with it"


@dataclass(frozen=True)
class Missing:
    """A chart that is not there, and why."""

    id: str
    title: str
    reason: str


Panel = Chart | Heat | Missing


def panels(course: Course, spending: Spending) -> dict[str, list[Panel]]:
    """All panels of a run by the section of the page they stand in."""
    return {
        "privacy": [_epsilon(course, spending)],
        "cohort": [_cohort(course), _speed(course)],
        "secagg": _secagg(course),
        "learning": [*_losses(course), _value(course), _ess(course)],
        "weights": [*_histograms(course), _clipped(course), *_clip(course)],
        "accuracy": [*_accuracy(course), _coverage(course), _popularity(course)],
    }


def _epsilon(course: Course, spending: Spending) -> Panel:
    title = "ε over the releases"
    if course.opened and not course.opened.get("account"):
        return Missing("epsilon", title, "No noise is added: there is no ε.")
    if spending.problem:
        return Missing("epsilon", title, spending.problem)
    if not spending.curve:
        return Missing("epsilon", title, "Being computed…")
    points = sorted(spending.curve.items())
    lines: list[Line] = []
    offered = not course.settings.separation
    for place, name in enumerate(("ε_model", "ε_server") if offered else ("ε_model",)):
        past = [(n, float(figures[place])) for n, figures in points if n <= course.releases]
        if spending.spent is not None:
            past.append((spending.spent["releases"], spending.spent[("epsilon_model", "epsilon_server")[place]]))
        past = sorted(set(past))
        ahead = (
            [past[-1], *((n, float(figures[place])) for n, figures in points if n > course.releases)] if past else []
        )
        lines.append(_line(name, past, place))
        if len(ahead) > 1:
            lines.append(_line(f"{name}, ahead", ahead, place, dashed=True))
    delta = course.opened["account"]["delta"]
    budget = (
        f"Budget: ε_model {course.settings.privacy.target_epsilon:g}. ε_model: a user added or removed, for who sees "
    )
    server = "a user's updates replaced by zero, for the server, under secure aggregation"
    if not offered:
        server = f"{NOT_OFFERED}, the server adds the noise"
    unit, note = f"ε of one user at δ {delta:.3g}", f"{budget}the models. ε_server: {server}."
    return Chart("epsilon", title, unit, tuple(lines), x="releases (one a round)", note=note)


def _line(name: str, points: Sequence[tuple[float, float]], colour: int, dashed: bool = False) -> Line:
    return Line(name, [x for x, _ in points], [y for _, y in points], dashed=dashed, colour=colour)


def _cohort(course: Course) -> Panel:
    rows = course.rounds
    if not rows:
        return Missing("cohort", "Cohort", "No round is completed yet.")
    lines = (
        Line("in the sum", *series(rows, "survivors")),
        Line("drawn", *series(rows, "members"), dashed=True),  # mostly the same line: both are to be seen
        Line("dropouts", *series(rows, "dropouts")),
    )
    return Chart("cohort", "Cohort", "devices", lines)


def _speed(course: Course) -> Panel:
    if not course.rounds:
        return Missing("speed", "Time of a round", "No round is completed yet.")
    return _chart("speed", "Time of a round", "seconds", course.rounds, {"round": "seconds"})


def _secagg(course: Course) -> list[Panel]:
    if course.settings.aggregation.kind != "secure":
        kind = course.settings.aggregation.kind
        return [Missing("stages", "Stages", f"aggregation.kind={kind} sends no messages: there are no stages.")]
    if not course.stages:
        return [Missing("stages", "Stages", "No stage is completed yet.")]
    names = {stage: stage for stage in STAGES if any(stage in row for row in course.stage_seconds.values())}
    sent = {round_: {way: count / 1024 for way, count in row.items()} for round_, row in course.sent.items()}
    ways = {"by devices": "bytes_up", "to devices": "bytes_down"}
    return [
        _chart("stages", "Time of each stage", "seconds", course.stage_seconds, names),
        _chart("bytes", "Sent in a round, by all", "KiB", sent, ways),
    ]


def _losses(course: Course) -> list[Panel]:
    found: list[Panel] = [
        _chart(name, title, unit, course.simulation, {title: name}, SIMULATION, zero=False)
        for name, (title, unit) in _LOSSES.items()
        if any(name in row for row in course.simulation.values())
    ]
    if found:
        return found
    return [Missing("policy_loss", "Losses of policy, β and critic", _absent(course, "no round is completed yet"))]


def _value(course: Course) -> Panel:
    title, rows = "Value of π by the log", {r: row for r, row in course.validation.items() if "policy_value" in row}
    if not rows:
        hint = "there is none yet; evaluation.every and an estimator with β make them"
        return Missing("value", title, _absent(course, hint))
    estimates = {round_: row["policy_value"] for round_, row in rows.items()}
    bounds = {round_: row["ci95"] for round_, row in estimates.items()}
    line = _interval("self-normalised estimate", {r: row["value"] for r, row in estimates.items()}, bounds)
    last = course.latest(estimates)
    note = (
        f"Mean reward, 95 % interval; the last rests on {last['effective_sample_size']:,.0f} effective of "
        f"{last['n']:,} logs. {SIMULATION.capitalize()}."
    )
    return Chart("value", title, "reward", (line,), note=note, zero=False)


def _ess(course: Course) -> Panel:
    title, shares = "Effective sample size", ess_shares(course)
    if not shares:
        return Missing("ess", title, _absent(course, "no weights π/β are recorded: the estimator divides by no β"))
    line = Line("capped weights π/β", sorted(shares), [100 * shares[round_] for round_ in sorted(shares)])
    return Chart("ess", title, "% of the logs", (line,), note=f"{SIMULATION.capitalize()}.")


def ess_shares(course: Course) -> dict[int, float]:
    """(Σw)²/(n Σw²) of each round's capped weights, by the middles of the histogram's bins."""
    bounds = np.array(course.bounds.get("weights", (0, 0)), float)
    middles = np.minimum(10 ** ((bounds[:-1] + bounds[1:]) / 2), course.settings.objective.weight_cap)
    rounds, counts = _histogram(course, "weights")
    if not rounds:
        return {}
    shares = (counts @ middles) ** 2 / (counts.sum(axis=1) * (counts @ middles**2))
    return dict(zip(rounds, shares.tolist(), strict=True))


def _histogram(course: Course, name: str) -> tuple[list[int], np.ndarray]:
    """Rounds in which any value was counted, and (rounds, bins) how many in each bin."""
    bins = len(course.bounds.get(name, ())) - 1
    rows = [(round_, row[name]) for round_, row in sorted(course.simulation.items()) if len(row.get(name, ())) == bins]
    counts = np.array([own for _, own in rows], float).reshape(len(rows), max(bins, 0))
    sums = counts.sum(axis=1)
    counted = np.isfinite(sums) & (sums > 0)
    return [round_ for (round_, _), known in zip(rows, counted, strict=True) if known], counts[counted]


_HISTOGRAMS: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "weights": ("Importance weights π/β before their cap", "π/β", lambda bound: 10**bound),
    "multipliers": ("Multipliers λ_K", "λ_K", lambda bound: bound),
    "norms": ("Norms of updates", "norm / clip", lambda bound: 10**bound),
}


def _histograms(course: Course) -> list[Panel]:
    found: list[Panel] = []
    for name, (title, unit, of_log) in _HISTOGRAMS.items():
        rounds, counts = _histogram(course, name)
        if not rounds:
            hint = "no round is completed yet" if name == "norms" else "none is recorded: the estimator divides by no β"
            found.append(Missing(name, title, _absent(course, hint)))
            continue
        bounds = [of_log(bound) for bound in course.bounds[name]]
        shares = 100 * counts / counts.sum(axis=1, keepdims=True)
        found.append(Heat(name, title, unit, rounds, bounds, shares, f"% of each round. {SIMULATION.capitalize()}."))
    return found


def _clipped(course: Course) -> Panel:
    if not course.simulation and course.rounds and course.settings.privacy.clip_quantile:
        rows = {
            round_: {"clipped": 100 * (1 - row["share_within"])}
            for round_, row in course.rounds.items()
            if "share_within" in row
        }
        return _chart("clipped", "Clipped updates", "% of the updates", rows, {"clipped": "clipped"}, _RELEASED)
    if not course.simulation:
        return Missing("clipped", "Clipped updates", _absent(course, "no round is completed yet"))
    rounds, shares = series(course.simulation, "clipped")
    line = Line("clipped", rounds, 100 * shares)
    return Chart("clipped", "Clipped updates", "% of the updates", (line,), note=f"{SIMULATION.capitalize()}.")


def _clip(course: Course) -> Iterable[Panel]:
    """The course of a clip that has one."""
    if course.settings.privacy.clip_quantile and course.rounds:
        note = f"follows the {course.settings.privacy.clip_quantile:g} quantile of the norms; {_RELEASED}"
        yield _chart("clip", "Clip norm C", "norm", course.rounds, {"C": "clip"}, note)


def _accuracy(course: Course) -> list[Panel]:
    found: list[Panel] = []
    for key, title in (("hr@10", "HR@10"), ("ndcg@10", "NDCG@10")):
        id_ = key.replace("@", "-")
        if course.validation:
            lines = [_interval("this model", *_figures(course.validation, key))]
            for name, label in (("popularity", "popularity"), ("markov", "Markov")):
                rows = {round_: row[name] for round_, row in course.validation.items() if name in row}
                lines.append(_interval(label, *_figures(rows, key)))
            note = f"Held-out validation items, full ranking, 95 % intervals. {SIMULATION.capitalize()}."
            found.append(Chart(id_, title, title, tuple(lines), note=note))
        else:
            found.append(Missing(id_, title, _absent(course, "evaluation.every=0 validates only at the end")))
    return found


def _figures(rows: Rows, key: str) -> tuple[dict[int, float], dict[int, Sequence[float]]]:
    return {r: row[key] for r, row in rows.items()}, {r: row[f"{key}_ci95"] for r, row in rows.items()}


def _interval(name: str, values: dict[int, float], bounds: dict[int, Sequence[float]]) -> Line:
    rounds = sorted(values)
    y = [values[round_] for round_ in rounds]
    low, high = ([bounds[round_][side] for round_ in rounds] for side in (0, 1))
    return Line(name, rounds, y, low, high)


def _coverage(course: Course) -> Panel:
    if not course.validation:
        return Missing(
            "coverage", "Catalogue coverage", _absent(course, "evaluation.every=0 validates only at the end")
        )
    rows = {
        round_: {name: 100 * of["coverage@10"] for name, of in _models(row)}
        for round_, row in course.validation.items()
    }
    names = {name: name for name in ("this model", "popularity", "Markov")}
    return _chart("coverage", "Catalogue coverage", "% of the catalogue in anybody's ten best", rows, names, SIMULATION)


def _popularity(course: Course) -> Panel:
    title = "Popularity of what is recommended"
    last = course.latest(course.validation)
    if "deciles@10" not in last:
        return Missing("popularity", title, _absent(course, "evaluation.every=0 validates only at the end"))
    tenths = tuple(f"{n}" for n in range(1, 11))
    lines = tuple(Line(name, range(10), [100 * share for share in of["deciles@10"]]) for name, of in _models(last))
    note = f"Of the newest validation; each tenth has a tenth of the log. {SIMULATION.capitalize()}."
    return Chart(
        "popularity",
        title,
        "% of the ten best",
        lines,
        "tenth of the log, popular items first",
        note,
        categories=tenths,
    )


def _models(row: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    yield "this model", row
    for name, label in (("popularity", "popularity"), ("markov", "Markov")):
        if name in row:
            yield label, row[name]


def _chart(
    id_: str, title: str, unit: str, rows: Rows, names: dict[str, str], note: str = "", zero: bool = True
) -> Chart:
    lines = tuple(Line(label, *series(rows, key)) for label, key in names.items())
    return Chart(id_, title, unit, lines, note=f"{note.capitalize()}." if note else "", zero=zero)


def number(value: Any) -> float | None:
    """A recorded number; None for what is missing or not finite, which events write as text."""
    if value is None:
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def series(rows: Rows, key: str) -> tuple[list[int], np.ndarray]:
    """A field's values over the rounds; NaN, which events write as text, where there is none."""
    rounds = sorted(rows)
    return rounds, np.array([rows[round_].get(key) for round_ in rounds], float)


def _absent(course: Course, hint: str) -> str:
    """Why figures of devices are missing."""
    if course.simulated:
        return f"{hint[0].upper()}{hint[1:]}."
    if course.opened and course.settings.aggregation.kind == "secure":
        return f"{NOT_RELEASED.capitalize()}: a device's figures never leave it, and none was charged and released."
    return f"{NOT_RELEASED.capitalize()}: aggregation.kind={course.settings.aggregation.kind} shows nothing of devices."
