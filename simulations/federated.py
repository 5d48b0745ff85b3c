"""Federated training of given histories, for experiments that need the model and no run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from common.features import features_of
from common.model import Parameters
from common.settings import Settings
from server.run import open_training
from server.run_folder import RunFolder
from server.store import open_store
from server.training import Progress
from simulations.batched_cohort import BatchedCohort
from simulations.datasets.interactions import Interactions
from simulations.population import Population


@dataclass(frozen=True)
class Trained:
    """A trained model and the devices that it was trained on, with their user embeddings."""

    settings: Settings
    parameters: Parameters
    population: Population


def train(
    settings: Settings,
    histories: Interactions,
    *,
    workers: int = 1,
    on_round: Callable[[Progress, Population], None] = lambda progress, population: None,
) -> Trained:
    """Run all rounds of `settings` over the histories, one device per user, by the batched engine.

    The round loop is a run's own, with its ledger and checkpoints in a folder that is gone afterwards.
    """
    population = Population(settings, histories)
    with TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        with open_store(folder.path, durable=False) as store, BatchedCohort(population, workers) as cohort:
            features = features_of(settings.model, histories.catalogue)
            items = len(histories.catalogue)
            training = open_training(settings, folder, store, cohort, items, features=features)
            outcome = training.run(lambda: False, lambda progress: on_round(progress, population))
    return Trained(settings, outcome.parameters, population)
