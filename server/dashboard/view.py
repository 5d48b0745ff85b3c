"""The parts of the pages: HTML from templates, which escape whatever they are given, and charts as JSON."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.settings import Settings
from server.controls import ACTIONS
from server.dashboard.cautions import cautions
from server.dashboard.charts import Chart, Heat, option
from server.dashboard.course import STAGES, Course
from server.dashboard.panels import Missing, Panel, panels
from server.dashboard.spending import Spending
from server.events import Event

SECTIONS = {
    "privacy": "Privacy",
    "cohort": "Cohorts",
    "secagg": "Secure aggregation",
    "learning": "Learning",
    "weights": "Weights and norms",
    "accuracy": "What is recommended",
}
_FRAGMENTS = ("status", "controls", "cautions", "privacy", "cohort", "secagg", "accuracy", "log")
STATES = {
    "starting": "is starting: no round is completed yet",
    "running": "is training",
    "paused": "is paused by an operator, and waits",
    "ending": "has trained and is evaluating",
    "finished": "completed all its rounds",
    "stopped": "was stopped; --resume goes on with it",
    "aborted": "was aborted by an operator, for good; nothing of the round under way was released",
    "budget spent": "ended with its privacy budget",
    "failed": "ended by an error",
    "interrupted": "was interrupted: its process is gone; --resume goes on with it",
}
_LIVE = ("starting", "running", "paused")
_RECENT = 20


def quantity(value: float | str | None, digits: int = 4) -> str:
    """A number for people: thousands in groups, and so many significant digits; a word in its place as it is."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB"


def moment(seconds: float) -> str:
    """A time of the log, UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except OSError as error:  # of years that no clock knows
        raise ValueError(f"time {seconds}: {error.strerror}") from None


templates = Environment(
    loader=PackageLoader("server.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters |= {"quantity": quantity, "duration": duration, "size": size, "moment": moment}


def run_parts(name: str, course: Course, spending: Spending, preview: bool) -> dict[str, Any]:
    """What the page of a run is sent: ``{"html": {fragment: HTML}, "panels": {id: panel}}``."""
    facts = run_facts(name, course, spending) | {"preview": preview, "log": log_lines(reversed(course.log))}
    html = {part: templates.get_template(f"parts/{part}.html").render(facts) for part in _FRAGMENTS}
    html["settings"] = settings_part(course.settings)
    drawn = {panel.id: drawing(panel, section) for section, row in panels(course, spending).items() for panel in row}
    return {"html": html, "panels": drawn}


def drawing(panel: Panel, section: str) -> dict[str, Any]:
    """One panel for the browser."""
    shown: dict[str, Any] = {"section": section, "title": panel.title}
    if isinstance(panel, Missing):
        return shown | {"reason": panel.reason}
    unit = panel.unit if isinstance(panel, Chart) else f"{panel.unit} over the rounds"
    return shown | {"unit": unit, "note": panel.note, "summary": summary(panel), "option": option(panel)}


def summary(panel: Chart | Heat) -> str:
    """A chart in words, for those who do not see it."""
    if isinstance(panel, Heat):
        if not len(panel.x):
            return panel.title
        top = int(panel.shares[-1].argmax())
        low, high = panel.bounds[top], panel.bounds[top + 1]
        return f"{panel.title}: in round {panel.x[-1]}, most are between {low:.3g} and {high:.3g}."
    ends = [f"{line.name} {quantity(line.y[-1])}" for line in panel.lines if len(line.y) and line.y[-1] is not None]
    return f"{panel.title}, {panel.unit}. Newest: {'; '.join(ends)}."


def run_facts(name: str, course: Course, spending: Spending) -> dict[str, Any]:
    """What the templates of a run show."""
    recent = [course.rounds[round_] for round_ in sorted(course.rounds)[-_RECENT:]]
    seconds = sum(row.get("seconds", 0) for row in recent)
    left = course.settings.training.rounds - course.round
    per_round = seconds / len(recent) if recent else None
    live = course.state in _LIVE
    return {
        "name": name,
        "state": course.state,
        "words": STATES[course.state],
        "reason": course.end.fields.get("reason", "") if course.end is not None else "",
        "live": live,
        "course": course,
        "settings": course.settings,
        "round": course.round,
        "rounds": course.settings.training.rounds,
        "updates": sum(row["survivors"] for row in course.rounds.values()),
        "updates_per_second": sum(row["survivors"] for row in recent) / seconds if seconds else None,
        "seconds_left": per_round * left if live and per_round is not None else None,
        "cautions": list(cautions(course)),
        "privacy": _privacy(course, spending),
        "dropped": course.dropouts.most_common(10),
        "failures": list(course.failures)[:20],
        "stages": _last_stages(course),
        "evaluation": course.report.get("evaluation"),
        "final_privacy": course.report.get("privacy", {}),
        "actions": {action: _allowed(action, course) for action in ACTIONS},
        "waiting": [command for command in course.commands if command.answered_at is None],
        "answered": [command for command in course.commands if command.answered_at is not None][-5:],
        "newest_command": course.commands[-1].id if course.commands else 0,
    }


def _privacy(course: Course, spending: Spending) -> dict[str, Any] | None:
    account = course.opened.get("account")
    if not account:
        return None
    allowed = course.opened.get("allowed_releases")
    rounds = course.settings.training.rounds
    return {
        "spent": spending.spent,
        "problem": spending.problem,
        "budget": course.settings.privacy.target_epsilon,
        "delta": account["delta"],
        "releases": course.releases,
        "allowed": allowed,
        "ends": None if allowed is None else min(course.round + max(allowed - course.releases, 0), rounds),
        "all_rounds": allowed is None or allowed - course.releases >= rounds - course.round,
        "noise_multiplier": course.opened.get("noise_multiplier"),
        "seeded": course.settings.privacy.randomness == "seeded",
    }


def _last_stages(course: Course) -> list[dict[str, Any]]:
    """The stages of the newest attempt, as they happen: those to come have no figures."""
    if not course.stages:
        return []
    newest = course.stages[-1]
    key = (newest.round, newest.fields["attempt"])
    found = {
        event.fields["stage"]: event.fields for event in course.stages if (event.round, event.fields["attempt"]) == key
    }
    return [{"stage": stage, "round": key[0], "attempt": key[1], "done": found.get(stage)} for stage in STAGES]


@lru_cache(maxsize=64)
def settings_part(settings: Settings) -> str:
    """All settings, and those that are not default beside what the default is. They stay as they are."""
    own, default = settings.flat(), Settings().flat()
    differences = {key: (value, default[key]) for key, value in own.items() if value != default[key]}
    return templates.get_template("parts/settings.html").render(differences=differences, all_settings=own)


def log_lines(events: Iterable[Event]) -> list[tuple[Event, str]]:
    """Events with their fields in words, for the log."""
    return [(event, _in_words(event)) for event in events]


def _allowed(action: str, course: Course) -> bool:
    """Whether it makes sense to ask for it now; the run itself has the last word."""
    state = course.state
    if any(command.answered_at is None for command in course.commands):
        return action == "abort" and state in _LIVE
    return {"pause": state in ("running", "starting"), "resume": state == "paused"}.get(action, state in _LIVE)


def _in_words(event: Event) -> str:
    """An event's fields in one line; of lists only their length."""
    return ", ".join(f"{name} {_brief(value)}" for name, value in event.fields.items() if value != "")


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_brief(part) for part in value) + "]" if len(value) <= 3 else f"[{len(value)} numbers]"
    if isinstance(value, Mapping):
        return "{…}" if len(value) > 3 else ", ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    return str(value)


def static_file(name: str) -> bytes:
    """A file of our own that pages refer to."""
    return (Path(__file__).parent / "static" / name).read_bytes()
