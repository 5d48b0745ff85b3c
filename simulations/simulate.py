"""`fedtopk simulate`: federated training over a simulated population, from settings to a finished run folder."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from common.errors import SettingsError
from common.features import features_of
from common.model import Parameters
from common.settings import Settings
from server.cohort import Cohort
from server.population_ledger import PopulationLedger
from server.report import build_report
from server.run import open_training, settle
from server.run_folder import RunFolder
from server.training import Progress, Training
from simulations import datasets
from simulations.batched_cohort import BatchedCohort
from simulations.evaluation import compare
from simulations.plain_cohort import PlainCohort
from simulations.population import Population
from simulations.recommender import PolicyScorer
from simulations.recorded import HISTOGRAMS, bounds_of
from simulations.splits import Split, split
from simulations.validation import Validation


@dataclass(frozen=True)
class Watch:
    """How a run tells of itself and is told to stop.

    Attributes:
        note: called with a sentence for the user.
        on_round: called after each round, with a short remark on it.
        patient: entered while the run trains; what it yields is asked between two rounds whether to stop.
    """

    note: Callable[[str], None]
    on_round: Callable[[Progress, str], None]
    patient: Callable[[], AbstractContextManager[Callable[[], bool]]]


def simulate(
    folder: RunFolder,
    watch: Watch,
    *,
    settings: Settings | None,
    workers: int,
    cluster: str = "",
    population_ledger: PopulationLedger | None = None,
) -> dict[str, Any]:
    """Train, evaluate and report. Returns the report, which is also in the folder.

    Args:
        settings: of a new run; None resumes the one in the folder with its own.
        workers: processes of the batched engine; they change the speed and nothing else.
        population_ledger: of all runs over these users; the budget is then what all of them may spend.
        cluster: address of a Ray cluster that takes their place (:class:`simulations.ray_shards.RayShards`).

    Raises:
        FedtopkError: whatever the user can mend. A run that was interrupted can be resumed.
    """
    resume = settings is None
    if not resume:
        folder.expect_new()
    settings = folder.settings() if settings is None else settings
    if settings.aggregation.kind == "secure":
        raise SettingsError("Expected aggregation.kind=secure only in Flower runs: choose central or plain here.")
    if cluster and settings.aggregation.kind == "plain":
        raise SettingsError(
            f"Expected --ray={cluster} only with aggregation.kind=central: plain computes in one process."
        )
    data = load_split(settings)
    for sentence in (*data.notes, *_cautions(settings, data.train.users)):
        watch.note(sentence)
    population, catalogue = Population(settings, data.train, folder.user_embeddings), data.train.catalogue
    with folder.open(settings, resume) as store, _cohort(settings, population, workers, cluster) as cohort:
        features = features_of(settings.model, catalogue)
        training = open_training(settings, folder, store, cohort, len(catalogue), population_ledger, features)
        bounds = {name: bounds_of(name, settings.objective.slate_size).tolist() for name in HISTOGRAMS}
        training.events.record("simulated", bounds=bounds)
        if resume:
            training.resume()
        validation = Validation(settings, data, population)
        with watch.patient() as should_stop:
            outcome = training.run(should_stop, lambda progress: _tell(progress, training, validation, watch))
        folder.save_model(outcome.parameters)
        spent = settle(training, population_ledger)
        folder.save_report(build_report(training, outcome, {}, spent))
        if outcome.reason:
            watch.note(outcome.reason)
        evaluation = {}
        if outcome.status not in ("stopped", "aborted"):
            watch.note("Evaluating by full ranking, beside popularity and first-order Markov.")
            evaluation = evaluate_model(settings, outcome.parameters, population, data)
        report = build_report(training, outcome, evaluation, spent)
        folder.save_report(report)
    return report


def load_split(settings: Settings) -> Split:
    """The run's interactions, cut for evaluation. Raises :class:`DataError` and :class:`SettingsError`."""
    interactions = datasets.load(settings.data, seed=settings.training.seed)
    items = len(interactions.catalogue)
    if settings.objective.slate_size > items:
        raise SettingsError(
            f"Expected objective.slate_size={settings.objective.slate_size} to be at most the {items} items "
            "of the catalogue."
        )
    cut = split(interactions, settings.evaluation.protocol)
    return cut.limited(settings.evaluation.users, settings.training.seed)


def _cautions(settings: Settings, devices: int) -> Iterator[str]:
    """What the settings will do that nobody can have meant."""
    objective, expected = settings.objective, settings.training.cohort_rate * devices
    if objective.corrected and objective.warmup_rounds >= settings.training.rounds:
        yield (
            f"The correction never applies: objective.warmup_rounds={objective.warmup_rounds} are not fewer than "
            f"training.rounds={settings.training.rounds}."
        )
    if expected < settings.guard.minimum_cohort:
        yield (
            f"Most rounds release noise alone: {expected:g} members are expected, and "
            f"guard.minimum_cohort={settings.guard.minimum_cohort}."
        )


def evaluate_model(settings: Settings, parameters: Parameters, population: Population, data: Split) -> dict[str, Any]:
    """The `evaluation` object of the report: the test targets, by full ranking, beside both baselines."""
    scorer = PolicyScorer(settings, parameters, population.users)
    return compare(scorer, data, "test", seed=settings.training.seed)


@contextmanager
def _cohort(settings: Settings, population: Population, workers: int, cluster: str) -> Iterator[Cohort]:
    if settings.aggregation.kind == "plain":
        yield PlainCohort(population)
        return
    with ExitStack() as stack:
        pool = None
        if cluster:
            from simulations.ray_shards import RayShards

            pool = stack.enter_context(RayShards(cluster))
        yield stack.enter_context(BatchedCohort(population, workers, pool))


def _tell(progress: Progress, training: Training, validation: Validation, watch: Watch) -> None:
    """Record what only a simulation can see of a round, and show it."""
    settings, metrics, remark = training.settings, progress.cohort_sum.simulation_metrics, ""
    if metrics:
        training.events.record("simulation", progress.round, **metrics)
    if settings.evaluation.every and progress.round % settings.evaluation.every == 0:
        figures = validation.of(progress.parameters)
        training.events.record("validation", progress.round, **figures)
        remark = f"validation HR@10 {figures['hr@10']:.3f}"
    watch.on_round(progress, remark)
