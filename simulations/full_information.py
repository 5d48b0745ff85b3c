"""The same architecture trained on the true probabilities: how far learning from logs could get at best.

A reward model as of the estimator `direct`, but its targets are the true probability of every item, not what the user
did with the logged one; and trained centrally, since no device knows them.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common.features import features_of
from common.item_tables import formed
from common.model import HEADS, condition, initialise, queries, trained
from common.recurrence import Recurrence
from common.settings import Settings
from common.threads import one_thread
from server.training import learning_rate, make_optimizer
from simulations.datasets.interactions import Interactions
from simulations.environment import World
from simulations.federated import Trained
from simulations.population import Population

_STEPS_OF_A_USER = 2
_ORDER = 0x66756C6C


@one_thread()
def train_on_truth(settings: Settings, histories: Interactions, world: World) -> Trained:
    """Train for `training.rounds` steps on minibatches of the expected cohort's size.

    Each step compares all items at a few random steps of each user, at its time in the world 0, with the probability
    that the user likes them.
    """
    training, population = settings.training, Population(settings, histories)
    items = len(histories.catalogue)
    features = features_of(settings.model, histories.catalogue)
    drawn = initialise(settings, items, torch.Generator().manual_seed(training.seed), features)
    model = {name: torch.nn.Parameter(value) for name, value in drawn.items()}
    optimizer = make_optimizer(training, list(trained(settings, model).values()))
    generator = np.random.default_rng([_ORDER, training.seed])
    batch = max(1, round(training.cohort_rate * len(population)))
    for step in range(training.rounds):
        devices = generator.choice(len(population), batch, replace=False)
        windows = population.windows(step + 1, devices)
        tables = formed(dict(model))
        states = Recurrence(settings.model).run(tables, windows.items, windows.rewards)
        at = generator.integers(0, windows.lengths.numpy()[:, None] + 1, (batch, _STEPS_OF_A_USER))
        chosen = states.gather(1, torch.from_numpy(at).unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        conditioned = condition(tables, chosen, population.users[devices], None)
        logits = queries(conditioned, settings.model.temperature) @ tables[HEADS["critic"]].T
        truth = torch.from_numpy(world.likes(devices)).unsqueeze(1).expand_as(logits)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, truth).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Trained(settings, {name: value.detach() for name, value in model.items()}, population)
