"""The same objective and architecture trained centrally, as anybody would: what federated training is compared with.

All users are in one place. Shuffled minibatches, autograd on the mean loss, the server's own optimiser: no per-user
norms, no clip, no noise, no coins. User embeddings are adapted and kept as on devices, since they are a part of the
model; and a step draws its negatives, and ends the warm-up, as the round of the same number does.
"""

from collections.abc import Iterator

import numpy as np
import torch

from client.histogram import histograms_of
from client.local_update import losses_of
from common.features import features_of
from common.item_slice import cut, slice_of
from common.model import check_parameters, initialise, shapes, trained
from common.offer import candidates_of
from common.settings import Settings
from common.threads import one_thread
from server.popularity_start import starts
from server.training import learning_rate, make_optimizer
from simulations.datasets.interactions import Interactions
from simulations.federated import Trained
from simulations.population import Population

_SHUFFLE = 0x73687566


@one_thread()
def train_centrally(
    settings: Settings, histories: Interactions, *, steps: int | None = None, batch: int | None = None
) -> Trained:
    """Train on the pooled histories from the initial model of the federated run.

    `settings.privacy` and `settings.aggregation` play no part.

    Args:
        steps: of the optimiser; None: `training.rounds`.
        batch: users in a minibatch; None: the expected cohort, `training.cohort_rate` of them.

    Raises:
        ModelError: training diverged.
    """
    training, population, items = settings.training, Population(settings, histories), len(histories.catalogue)
    generator, features = torch.Generator().manual_seed(training.seed), features_of(settings.model, histories.catalogue)
    parameters = initialise(settings, items, generator, features)
    model = {name: torch.nn.Parameter(value) for name, value in parameters.items()}
    optimizer = make_optimizer(training, list(trained(settings, model).values()))
    batches = _shuffled(len(population), batch or round(training.cohort_rate * len(population)), training.seed)
    for step in range(1, 1 + (training.rounds if steps is None else steps)):
        devices = next(batches)
        item_slice, warm = slice_of(settings, items, step), step > settings.objective.warmup_rounds
        sliced = cut(model, item_slice)
        candidates = candidates_of(settings, sliced, step, item_slice)
        windows, users = population.windows(step, devices), population.users[devices]
        if settings.counting(step):
            counts = histograms_of(settings, windows, items, clip=1.0).weighted_sum(torch.ones(len(devices)))
            with torch.no_grad():
                for name, value in starts(settings, counts.numpy(), 0.0, len(devices)).items():
                    model[name].copy_(value)
            continue
        losses, users = losses_of(settings, sliced, windows, users, candidates, warm, item_slice)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step - 1)
        optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        population.states.keep(devices, users)
    last = {name: value.detach() for name, value in model.items()}
    check_parameters(last, shapes(settings, items))
    return Trained(settings, last, population)


def _shuffled(users: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless minibatches of `batch` users, 1 to all: an epoch shuffles anew and drops what does not fill the last."""
    generator, size = np.random.default_rng([_SHUFFLE, seed]), min(max(batch, 1), users)
    while True:
        yield from generator.permutation(users)[: users - users % size].reshape(-1, size)
