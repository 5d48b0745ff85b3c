"""``/metrics``: the figures of all runs in the OpenMetrics format, for a Prometheus server."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, StateSetMetricFamily
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

from common.privacy import NOT_OFFERED
from server.dashboard.course import Course
from server.dashboard.panels import number
from server.dashboard.spending import Spending
from server.dashboard.view import STATES

__all__ = ["CONTENT_TYPE", "exposition"]

_SIMULATED = ("policy_loss", "behaviour_loss", "critic_loss", "clipped")


def exposition(courses: Mapping[str, tuple[Course, Spending]]) -> bytes:
    """The text. What was not measured has no sample."""
    registry = CollectorRegistry()
    registry.register(_Runs(courses))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


class _Runs(Collector):
    def __init__(self, courses: Mapping[str, tuple[Course, Spending]]) -> None:
        self._courses = courses

    def collect(self) -> Iterator[Metric]:
        """One family after another, with a sample for each run."""
        state = StateSetMetricFamily("fedtopk_state", "What the run does, or how it ended.", labels=["run"])
        rounds = CounterMetricFamily("fedtopk_rounds", "Completed rounds.", labels=["run"])
        updates = CounterMetricFamily("fedtopk_updates", "Updates in released sums.", labels=["run"])
        dropouts = CounterMetricFamily("fedtopk_dropouts", "Members that dropped out.", labels=["run"])
        failed = CounterMetricFamily("fedtopk_failed_attempts", "Attempts that released nothing.", labels=["run"])
        seconds = CounterMetricFamily("fedtopk_rounds_seconds", "Time spent in rounds.", labels=["run"])
        labels = ["run", "observer", "delta", "unit", "adjacency"]
        epsilon = GaugeMetricFamily("fedtopk_epsilon", "ε spent, who learns at most that.", labels=labels)
        simulated = GaugeMetricFamily(
            "fedtopk_simulation", "A cohort's mean in the newest round; in a simulation only.", labels=["run", "figure"]
        )
        for name, (course, spending) in self._courses.items():
            rows = list(course.rounds.values())
            state.add_metric([name], {known: known == course.state for known in STATES})
            rounds.add_metric([name], course.round)
            updates.add_metric([name], sum(row["survivors"] for row in rows))
            dropouts.add_metric([name], sum(row.get("dropouts", 0) for row in rows))
            failed.add_metric([name], course.failed_attempts)
            seconds.add_metric([name], sum(row.get("seconds", 0) for row in rows))
            if spending.spent is not None:
                delta = f"{course.opened['account']['delta']:.6g}"
                epsilon.add_metric([name, "model", delta, "user", "add/remove"], spending.spent["epsilon_model"])
                if spending.spent["epsilon_server"] != NOT_OFFERED:
                    epsilon.add_metric(
                        [name, "server", delta, "user", "update replaced by 0"], spending.spent["epsilon_server"]
                    )
            newest = course.latest(course.simulation)
            for figure in _SIMULATED:
                if (value := number(newest.get(figure))) is not None:
                    simulated.add_metric([name, figure], value)
        yield from (state, rounds, updates, dropouts, failed, seconds, epsilon, simulated)
