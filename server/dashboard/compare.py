"""Several runs beside each other: the same curves in one chart, final figures, and what differs in the settings."""

from collections.abc import Callable, Mapping
from typing import Any

from server.dashboard.charts import Chart, Line
from server.dashboard.course import Course
from server.dashboard.panels import NOT_RELEASED, SIMULATION, Panel, ess_shares, number, series
from server.dashboard.spending import Spending
from server.dashboard.view import drawing, templates

_CURVES: dict[str, tuple[str, str, str]] = {
    "policy_loss": ("Policy loss (scales differ: so do the weights)", "−c·log π, mean per step", "simulation"),
    "behaviour_loss": ("Behaviour (β) loss", "cross-entropy, nats", "simulation"),
    "critic_loss": ("Critic loss", "cross-entropy, nats", "simulation"),
    "log_pi": ("log π of the logged items", "nats", "simulation"),
    "clipped": ("Clipped updates", "share", "simulation"),
    "hr@10": ("HR@10", "HR@10, validation", "validation"),
    "ndcg@10": ("NDCG@10", "NDCG@10, validation", "validation"),
    "coverage@10": ("Catalogue coverage", "share of the catalogue", "validation"),
    "survivors": ("Updates in the sum", "devices", "rounds"),
    "seconds": ("Time of a round", "seconds", "rounds"),
}


def compare_parts(courses: Mapping[str, tuple[Course, Spending]]) -> dict[str, Any]:
    """What the page is sent."""
    drawn = {panel.id: drawing(panel, "curves") for panel in _overlays({n: c for n, (c, _) in courses.items()})}
    for panel in drawn.values():
        panel["option"]["legend"]["show"] = True  # also of one run: which it is
    facts = {
        "names": list(courses),
        "figures": _figures(courses),
        "differences": _differences({name: course for name, (course, _) in courses.items()}),
    }
    return {"html": {"compared": templates.get_template("parts/compared.html").render(facts)}, "panels": drawn}


def _overlays(courses: Mapping[str, Course]) -> list[Panel]:
    found: list[Panel] = []
    for key, (title, unit, rows) in _CURVES.items():
        lines = [
            Line(name, *series(getattr(course, rows), key), colour=place)
            for place, (name, course) in enumerate(courses.items())
            if any(key in row for row in getattr(course, rows).values())
        ]
        if lines:
            note = "" if rows == "rounds" else f"{SIMULATION.capitalize()}."
            found.append(Chart(key.replace("@", "-"), title, unit, tuple(lines), note=note, zero="loss" not in key))
    shares = {name: ess_shares(course) for name, course in courses.items()}
    lines = [
        Line(name, sorted(own), [100 * own[r] for r in sorted(own)], colour=place)
        for place, (name, own) in enumerate(shares.items())
        if own
    ]
    if lines:
        found.append(
            Chart("ess", "Effective sample size", "% of the logs", tuple(lines), note=f"{SIMULATION.capitalize()}.")
        )
    return found


_Of = Callable[[Course, Spending], Any]


def _evaluated(key: str) -> _Of:
    def figure(course: Course, spending: Spending) -> Any:
        evaluation = course.report.get("evaluation", {})
        if key not in evaluation:
            return None
        interval = evaluation.get(f"{key}_ci95")
        return f"{evaluation[key]:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

    return figure


def _spent(key: str) -> _Of:
    def figure(course: Course, spending: Spending) -> Any:
        final = course.report.get("privacy", {}).get(key)
        return final if final is not None else (spending.spent or {}).get(key)

    return figure


def _newest(key: str) -> _Of:
    def figure(course: Course, spending: Spending) -> Any:
        value = number(course.latest(course.simulation).get(key))
        return NOT_RELEASED if value is None and not course.simulated else value

    return figure


_ROWS: dict[str, _Of] = {
    "state": lambda course, spending: course.state,
    "rounds": lambda course, spending: course.round,
    "updates": lambda course, spending: sum(row["survivors"] for row in course.rounds.values()),
    "ε_model (user added or removed; who sees the models)": _spent("epsilon_model"),
    "ε_server (update replaced by 0; the server, under secure aggregation)": _spent("epsilon_server"),
    "δ": lambda course, spending: (course.opened.get("account") or {}).get("delta"),
    "HR@10, test [95 %]": _evaluated("hr@10"),
    "NDCG@10, test [95 %]": _evaluated("ndcg@10"),
    "coverage@10, test": _evaluated("coverage@10"),
    "policy loss, newest round (simulation)": _newest("policy_loss"),
    "β loss, newest round (simulation)": _newest("behaviour_loss"),
    "critic loss, newest round (simulation)": _newest("critic_loss"),
    "clipped, newest round (simulation)": _newest("clipped"),
}


def _figures(courses: Mapping[str, tuple[Course, Spending]]) -> list[tuple[str, list[Any]]]:
    return [(label, [of(*pair) for pair in courses.values()]) for label, of in _ROWS.items()]


def _differences(courses: Mapping[str, Course]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all of the runs."""
    flat = [course.settings.flat() for course in courses.values()]
    keys = flat[0] if flat else {}
    return [(key, [own[key] for own in flat]) for key in keys if len({str(own[key]) for own in flat}) > 1]
