"""Opens a run's training in its folder: model, budget, ledger and events put together."""

import time
from dataclasses import asdict

import torch

from common.model import initialise
from common.privacy.budget import make_budget
from common.settings import Settings
from server.cohort import Cohort
from server.controls import Controls
from server.events import OPENED, Events
from server.ledger import Ledger
from server.run_folder import RunFolder
from server.store import Store
from server.training import Training


def open_training(settings: Settings, folder: RunFolder, store: Store, cohort: Cohort, items: int) -> Training:
    """A training at its first round, with the model drawn from `training.seed`; the log says what it is of.

    Args:
        items: A, the size of the catalogue.
    """
    generator = torch.Generator().manual_seed(settings.training.seed)
    parameters = initialise(settings, items, generator)
    dimension = sum(value.numel() for value in parameters.values())
    budget = make_budget(settings, cohort.devices, dimension)
    ledger = Ledger(
        store,
        noise_multiplier=budget.noise_multiplier,
        rate=settings.training.cohort_rate,
        allowed_releases=budget.allowed_releases,
        budget=budget.words,
        repeatable=settings.reproducible,
        clock=time.time,
    )
    events = Events(store, time.time)
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
    return Training(settings, parameters, cohort, budget, ledger, events, controls, folder.checkpoints)
