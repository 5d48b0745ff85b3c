"""Audit 4, membership of a real user: a likelihood-ratio attack with shadow runs.

Carlini et al., "Membership inference attacks from first principles" (S&P 2022), at the level of a user. In each of
many trainings a fair coin decides for every user whether they are there. The attacker knows a user's whole history and
sees every released model; its score of a user is how far the sums point along the update that this user would send,
Σ_t ⟨g_u, x_t⟩, with g_u at every fifth model. The first runs, whose coins it knows, are its shadows: they give every
user's mean score when there and when not, and the spread. In the runs after those it scores users by the ratio of the
two Gaussian likelihoods.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from client.local_update import losses_of
from common.model import group_of, unflatten
from common.offer import Offer
from common.threads import one_thread
from simulations.audits.bounds import epsilon_bound, largest_bound, rate_interval, true_positives
from simulations.audits.finding import Finding, verdict_of
from simulations.audits.system import DELTA, Present, Seen, System, devices_of, train

FALSE_RATE = 0.01
FEWEST_RUNS = 8

_COINS = 0x6D656D62
_EVERY = 5  # rounds


def audit_membership(
    system: System, runs: int, seed: int, error: float, on_run: Callable[[], None], should_stop: Callable[[], bool]
) -> Finding | None:
    """`runs` trainings, three quarters of them shadows; None if it was stopped before there were eight."""
    generator = np.random.default_rng([_COINS, seed])
    scores, present, claim = [], [], 0.0
    for run in range(runs):
        if should_stop():
            break
        coins = generator.random(system.histories.users) < 0.5
        attacker = Alignment(system)
        again = system.seeded(seed * runs + run)
        claim = train(again, Present(devices_of(again), coins), system.examples, attacker.see)
        scores.append(attacker.scores())
        present.append(coins)
        on_run()
    if len(scores) < FEWEST_RUNS:
        return None
    shadows = 3 * len(scores) // 4
    ratios, there = likelihood_ratios(np.array(scores), np.array(present), shadows)
    bound = epsilon_bound([ratios], there, DELTA, error)
    largest = largest_bound(bound.coins, 1, DELTA, error)
    caught, positives = true_positives(ratios, there, FALSE_RATE)
    return Finding(
        name="membership",
        statistic="lower bound on ε from guesses which real users were there (LiRA)",
        value=bound.epsilon,
        lower_bound=bound.epsilon,
        limit=claim,
        verdict=verdict_of(bound.epsilon, claim, works=largest > claim),
        detects="that real histories show in the released models more than ε allows",
        cannot_detect="that a claim above largest_bound is false; leaks that only chosen updates bring "
        "about, for which there are the canaries: users of real data are far from the worst case",
        details={
            "shadow_runs": shadows,
            "attacked_runs": len(scores) - shadows,
            "users": system.histories.users,
            "guesses": bound.guesses,
            "right": bound.right,
            "largest_bound": largest,
            "tpr_at_1_percent_fpr": caught / positives,
            "tpr_interval": rate_interval(caught, positives, error),
        },
    )


def likelihood_ratios(scores: np.ndarray, present: np.ndarray, shadows: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood ratios of every user in every attacked run, and whether they were there, both flat.

    Args:
        scores, present: (R, N) of all runs, of which the first `shadows` are.
    """
    known, coins = scores[:shadows], present[:shadows]
    overall = known.mean(0)
    there = _means(known, coins, overall)
    absent = _means(known, ~coins, overall)
    spread = (known - np.where(coins, there, absent)).std(0) + np.finfo(float).tiny
    middle = (there + absent) / 2
    ratios = (there - absent) * (scores[shadows:] - middle) / spread**2
    return ratios.ravel(), present[shadows:].ravel()


def _means(scores: np.ndarray, chosen: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """(N,) each user's mean over the runs that are chosen for them; without any, the mean of all."""
    counts = chosen.sum(0)
    return np.where(counts > 0, (scores * chosen).sum(0) / np.maximum(counts, 1), otherwise)


class Alignment:
    """How far a run's sums point along each user's own update, computed anew at every fifth model."""

    def __init__(self, system: System) -> None:
        self._population = system.population()
        self._scores = np.zeros(len(self._population))
        self._offer: Offer | None = None
        self._sum: np.ndarray | float = 0.0

    def see(self, seen: Seen) -> None:
        if seen.offer.round % _EVERY == 1:
            self._add()
            parameters = {name: value.clone() for name, value in seen.offer.parameters.items()}
            self._offer, self._sum = replace(seen.offer, parameters=parameters), 0.0
        self._sum = self._sum + seen.total

    def scores(self) -> np.ndarray:
        """(N,) of all rounds seen."""
        self._add()
        self._offer = None
        return self._scores

    def _add(self) -> None:
        if self._offer is None:
            return
        offer, population = self._offer, self._population
        windows = population.windows(offer.round, np.arange(len(population)))
        shapes = {name: (value.shape[0], value.shape[1]) for name, value in offer.parameters.items()}
        scale = offer.settings.privacy.group_scale
        total = unflatten(torch.from_numpy(np.asarray(self._sum)).float(), shapes)
        direction = [getattr(scale, group_of(name)) * part for name, part in total.items()]
        with one_thread():
            parameters = {name: value.requires_grad_() for name, value in offer.parameters.items()}
            losses, _ = losses_of(offer.settings, parameters, windows, population.users, offer.candidates, offer.warm)
            self._scores += _directional(losses, list(parameters.values()), direction).double().numpy()


def _directional(losses: Tensor, parameters: list[Tensor], direction: list[Tensor]) -> Tensor:
    """(B,) each loss's derivative along `direction`, without any loss's gradient: Jᵀw is linear in w, and its product
    with the direction has the derivative J·direction by w."""
    weights = torch.zeros_like(losses, requires_grad=True)
    gradients = torch.autograd.grad(losses, parameters, weights, create_graph=True, materialize_grads=True)
    along = torch.stack([(gradient * part).sum() for gradient, part in zip(gradients, direction, strict=True)]).sum()
    (found,) = torch.autograd.grad(along, weights)
    return found
