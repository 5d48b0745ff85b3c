"""What a simulation looks at while it trains: held-out items, ranked beside both baselines, and the policy's value.

Only a simulation can: it holds all histories. Nothing of it moves the model.
"""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch

from common.model import Parameters
from common.ope import LoggedEvents, snips
from common.settings import Head, Settings
from common.trajectory import rewards_of
from simulations.baselines import Markov, Popularity
from simulations.evaluation import evaluate
from simulations.population import Population
from simulations.recommender import PolicyScorer
from simulations.splits import Split

_BLOCK = 256  # users at once
_SMALLEST = 1e-12  # of β: below it a logged item counts as if β had been that


class Validation:
    """The validation targets of a run."""

    def __init__(self, settings: Settings, data: Split, population: Population) -> None:
        self._settings = settings
        self._data = data
        self._population = population

    def of(self, parameters: Parameters) -> dict[str, Any]:
        """A model's figures on the validation targets.

        Returns:
            :func:`simulations.evaluation.evaluate`'s, with ``popularity`` and ``markov`` (the same of the baselines),
            and ``policy_value`` where there is a β: the estimate of :func:`common.ope.snips` for the mean reward of π.
        """
        scorer = PolicyScorer(self._settings, parameters, self._population.users)
        figures = evaluate(scorer, self._data, "validation", seed=self._settings.training.seed) | self._baselines
        value = {}
        if {"policy", "behaviour"} <= set(self._settings.heads):
            value = {"policy_value": asdict(self._value(parameters))}
        return figures | value

    @cached_property
    def _baselines(self) -> dict[str, Any]:
        train, seed = self._data.train, self._settings.training.seed
        return {
            "popularity": evaluate(Popularity(train), self._data, "validation", seed=seed),
            "markov": evaluate(Markov(train), self._data, "validation", seed=seed),
        }

    def _value(self, parameters: Parameters) -> Any:
        """Self-normalised, capped importance sampling of the held-out interaction of every user, one each."""
        targets, train, whole = self._data.validation, self._data.train, self._data.interactions
        at = whole.offsets[targets.users] + train.lengths()[targets.users]
        rewards = rewards_of(whole.ratings[at], self._settings.data.rating_range)

        def probabilities(head: Head) -> np.ndarray:
            scorer = PolicyScorer(self._settings, parameters, self._population.users, head)
            parts = []
            for start in range(0, len(targets.users), _BLOCK):
                users, items = targets.users[start : start + _BLOCK], targets.items[start : start + _BLOCK]
                logits = scorer.scores(train, users).double().log_softmax(-1)
                parts.append(logits[torch.arange(len(users)), torch.from_numpy(items)].exp().numpy())
            return np.concatenate(parts)

        behaviour = probabilities("behaviour").clip(_SMALLEST, 1)
        logged = LoggedEvents(rewards.astype(np.float64), behaviour)
        target = probabilities("policy").clip(_SMALLEST, 1)
        return snips(logged, target, cap=self._settings.objective.weight_cap)
