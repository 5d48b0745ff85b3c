"""Opens a run's training in its folder: model, budget, ledger and events put together."""

import time

import torch

from common.item_slice import cut, slice_of
from common.model import initialise
from common.privacy.budget import make_budget
from common.settings import Settings
from server.cohort import Cohort
from server.events import Events
from server.ledger import Ledger
from server.run_folder import RunFolder
from server.store import Store
from server.training import Training


def open_training(settings: Settings, folder: RunFolder, store: Store, cohort: Cohort, items: int) -> Training:
    """A training at its first round, with the model drawn from `training.seed`.

    Args:
        items: A, the size of the catalogue.
    """
    generator = torch.Generator().manual_seed(settings.training.seed)
    parameters = initialise(settings, items, generator)
    dimension = sum(value.numel() for value in cut(parameters, slice_of(settings, items, 1)).values())
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
    return Training(settings, parameters, cohort, budget, ledger, Events(store, time.time), folder.checkpoints)
