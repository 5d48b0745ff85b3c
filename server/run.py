"""Opens a run's training in its folder: model, budget, ledger and events put together."""

import json
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError
from common.item_slice import cut, slice_of
from common.model import dimension_of, initialise
from common.popularity import histogram_length
from common.privacy.budget import make_budget
from common.privacy.tree import CorrelatedNoise, Tree
from common.settings import Settings
from server.cohort import Cohort
from server.controls import Controls
from server.events import OPENED, Events
from server.ledger import Ledger
from server.noise_key import KeyFile, SeededKey
from server.population_ledger import PopulationLedger
from server.run_folder import RunFolder
from server.store import Store
from server.training import ATTEMPTS, Training

MECHANISM = "mechanism"
"""The event that holds what a run's figures follow from, beside the steps of its ledger."""


def open_training(
    settings: Settings,
    folder: RunFolder,
    store: Store,
    cohort: Cohort,
    items: int,
    population: PopulationLedger | None = None,
    features: Tensor | None = None,
) -> Training:
    """A training at its first round, with the model drawn from `training.seed`; the log says what it is of.

    Args:
        items: A, the size of the catalogue.
        population: the ledger of the population's whole life, in which all that the run may spend is reserved here.
        features: of the items (:func:`common.features.features_of`), for a model that is made of them.

    Raises:
        BudgetExceeded: other runs over the population have spent the target.
        RunError: the run was begun with another population's ledger.
    """
    events = Events(store, time.time)
    begun = next(iter(events.read(kinds=[MECHANISM])), None)
    generator = torch.Generator().manual_seed(settings.training.seed)
    parameters = initialise(settings, items, generator, features)
    dimension = dimension_of(settings, cut(parameters, slice_of(settings, items, 1)))
    others = population.others(events.origin) if population else None
    begun_with = begun.fields["noise_multiplier"] if begun else None
    length = histogram_length(settings, items)
    budget = make_budget(settings, cohort.devices, dimension, others, begun_with, length)
    if begun is None:
        events.record(MECHANISM, **budget.mechanism(), population=population.origin if population else "")
    elif budget.tree is not None and begun.fields["tree"] != json.loads(json.dumps(budget.mechanism()["tree"])):
        raise RunError(
            "Expected the band and the noise that the run was begun with: another version of fedtopk did it."
        )
    elif begun.fields["population"] != (population.origin if population else ""):
        raise RunError("Expected the ledger of the population that the run was begun with: --ledger.")
    ledger = Ledger(
        store,
        noise_multiplier=budget.noise_multiplier,
        rate=settings.rate,
        allowed_releases=budget.allowed_releases,
        budget=budget.words,
        repeatable=settings.reproducible,
        once=budget.tree is not None,
        clock=time.time,
    )
    if population:
        allowed = settings.training.rounds if budget.allowed_releases is None else budget.allowed_releases
        most = max(allowed, ledger.model_releases)
        attempts = ledger.attempts + ATTEMPTS * settings.training.rounds
        population.charge(events.origin, budget.spending(most, attempts), budget.delta, settled=False)
    events.record(
        OPENED,
        devices=cohort.devices,
        items=items,
        parameters=dimension,
        allowed_releases=budget.allowed_releases,
        noise_multiplier=budget.noise_multiplier,
        account=asdict(budget.account) if budget.account else None,
    )
    controls = Controls(store, events)
    noise = None if budget.tree is None else _correlated_noise(budget.tree, settings, folder, fresh=not ledger.attempts)
    return Training(settings, parameters, cohort, budget, ledger, events, controls, folder.checkpoints, noise)


def _correlated_noise(tree: Tree, settings: Settings, folder: RunFolder, *, fresh: bool) -> CorrelatedNoise:
    """The noise of a run; of a `fresh` one, in which no round was begun, under a new key."""
    if settings.reproducible:
        return CorrelatedNoise(tree, SeededKey(settings.training.seed))
    key = KeyFile(folder.noise_key)
    if fresh:
        key.make()
    return CorrelatedNoise(tree, key)


def settle(training: Training, population: PopulationLedger | None) -> dict[str, Any] | None:
    """Charge the run with what it has spent in place of its most. What its population has spent, if it has a ledger."""
    if population is None:
        return None
    spending = training.budget.spending(training.ledger.model_releases, training.ledger.attempts)
    return population.charge(training.events.origin, spending, training.budget.delta, settled=True)
