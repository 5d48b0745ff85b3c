"""Audit 1, canaries: made-up devices with a known update, of which a fair coin each decides whether they are there.

Each canary's update is one coordinate of the model, at ten times the clip norm and with a random sign; it claims ten
times the average number of examples. Canaries do not disturb each other, and all of them are tested in one run. The
observer knows them and sees every released sum; its score of a canary is the likelihood ratio of a canary that
takes part by Poisson sampling at q, under noise z, against one that is not there. It also tries to predict the noise:
it runs the public code for an empty cohort and subtracts what that releases.

Four findings come of it, each at the given error:

``canaries``     the lower bound on ε of the guesses (:func:`simulations.audits.bounds.epsilon_bound`), which holds for
                 whatever system;
``noise``        z over the spread of the sums along absent canaries: above 1, there is less noise than is claimed;
``prediction``   the same after the predicted noise is subtracted, which adds as much again where it is independent;
``contribution`` how much a canary that is there adds to all sums, over qT·C: above 1, it is clipped too little, drawn
                 too often or weighs too much.

Beside the first stands the Gaussian estimate of Andrew et al., "One-shot empirical privacy estimation for federated
learning" (ICLR 2024), over the sum of all releases: no bound, but it is not limited by the number of canaries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from scipy.stats import chi2, norm
from torch import Tensor

from common.offer import Offer
from server.cohort import CohortSum
from simulations.audits.bounds import epsilon_bound, largest_bound
from simulations.audits.finding import Finding, verdict_of
from simulations.audits.system import DELTA, Seen, System, devices_of, train
from simulations.batched_cohort import BatchedCohort, add_clipped, release

EXCESS = 10.0
"""How far a canary goes beyond what it should: its norm over C, and its examples over the average."""

_COINS = 0x63616E61


def audit_canaries(system: System, canaries: int, seed: int, error: float) -> list[Finding]:
    """One training with so many canaries, at most as many as there are parameters."""
    system = system.seeded(seed)
    scores = _Scores(system, _Canaries.draw(system.dimension, min(canaries, system.dimension), seed))
    devices = devices_of(system)
    cohort = _CanariedCohort(devices, scores.canaries)
    examples = np.concatenate([system.examples, np.full(len(scores.canaries), EXCESS)])
    claim = train(system, cohort, examples, scores.see)
    bound = epsilon_bound([scores.blind, scores.predicting], scores.canaries.present, DELTA, error)
    largest = largest_bound(bound.coins, 2, DELTA, error)
    epsilon = Finding(
        name="canaries",
        statistic="lower bound on ε from guesses which canaries were there, all releases seen",
        value=bound.epsilon,
        lower_bound=bound.epsilon,
        limit=claim,
        verdict=verdict_of(bound.epsilon, claim, works=largest > claim),
        detects="too little noise, a clip that does not hold, lost sampling, weights, noise that follows from the "
        "settings: whatever lets one device's chosen update show",
        cannot_detect="that a claim above largest_bound is false; noise that is predictable from anything but the "
        "settings; faults that need a certain history or a certain round; the masks",
        details={
            "canaries": bound.coins,
            "guesses": bound.guesses,
            "right": bound.right,
            "largest_bound": largest,
            **scores.estimate(error),
        },
    )
    return [epsilon, *scores.checks(error)]


@dataclass(frozen=True)
class _Canaries:
    """Updates, in the scale of `privacy.group_scale`: places (m,) of one coordinate each, distinct, and their signs."""

    places: np.ndarray
    signs: np.ndarray
    present: np.ndarray

    @classmethod
    def draw(cls, dimension: int, count: int, seed: int) -> "_Canaries":
        generator = np.random.default_rng([_COINS, seed])
        places = generator.permutation(dimension)[:count]
        return cls(places, generator.choice([-1.0, 1.0], count), generator.random(count) < 0.5)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class _CanaryGradients:
    """Gradients of some canaries, before the clip."""

    places: Tensor
    values: Tensor
    dimension: int

    def norms(self) -> Tensor:
        return self.values.abs()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.zeros(self.dimension).index_add_(0, self.places, weights * self.values)


class _CanariedCohort:
    """Devices, and after them the canaries; those that are not there contribute nothing when they are drawn."""

    def __init__(self, devices: BatchedCohort, canaries: _Canaries) -> None:
        self._devices, self._canaries = devices, canaries

    @property
    def devices(self) -> int:
        return self._devices.devices + len(self._canaries)

    def state(self) -> dict[str, Tensor]:
        return self._devices.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._devices.restore(state)

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        devices = self._devices.devices
        fixed, _ = self._devices.clipped_sum(offer, members[members < devices])
        drawn = members[members >= devices] - devices
        drawn = drawn[self._canaries.present[drawn]]
        reach = EXCESS * offer.encoding.clip
        values = torch.from_numpy(reach * self._canaries.signs[drawn]).float()
        add_clipped(offer, _CanaryGradients(torch.from_numpy(self._canaries.places[drawn]), values, len(fixed)), fixed)
        return CohortSum(release(offer, fixed), len(members), len(members))


class _Scores:
    """The observer's scores of the canaries, round by round."""

    def __init__(self, system: System, canaries: _Canaries) -> None:
        self.canaries = canaries
        self._multiplier = system.settings.privacy.noise_multiplier
        self._rate = system.settings.training.cohort_rate
        self.blind, self.predicting, self._sums = np.zeros((3, len(canaries)))
        self._noise, self._unpredicted, self._rounds = 0.0, 0.0, 0

    def see(self, seen: Seen) -> None:
        along = self._along(seen.total)
        unpredicted = along - self._along(seen.of_nobody())
        self._sums += along
        self.blind += self._log_ratio(along, self._multiplier**2)
        self.predicting += self._log_ratio(unpredicted, 2 * self._multiplier**2)
        absent = ~self.canaries.present
        self._noise += float((along[absent] ** 2).sum())
        self._unpredicted += float((unpredicted[absent] ** 2).sum())
        self._rounds += 1

    def checks(self, error: float) -> list[Finding]:
        shift, spread = self._shift()
        expected = self._rate * self._rounds
        low = (shift - float(norm.isf(error)) * spread) / expected
        return [
            self._noise_check(
                "noise",
                "claimed noise over the measured one",
                self._noise,
                1.0,
                error,
                "too little noise",
                "noise that somebody can predict; noise that is missing in some directions only; a deficit of 2 %, "
                "which rounding and real devices' updates may hide",
            ),
            self._noise_check(
                "prediction",
                "claimed noise over what is left of it when the public code's own is subtracted",
                self._unpredicted,
                2.0,
                error,
                "noise that follows from the settings",
                "noise that is predictable from anything else, such as the time",
            ),
            Finding(
                name="contribution",
                statistic="what a canary adds to all sums, over q·T·C",
                value=shift / expected,
                lower_bound=low,
                limit=1.0,
                verdict=verdict_of(low, 1.0),
                detects="a clip that does not hold, devices that are drawn too often or weigh by their examples",
                cannot_detect="faults that need another update than the canaries' one coordinate",
                details={"expected_rounds": expected},
            ),
        ]

    def _noise_check(
        self, name: str, statistic: str, squares: float, copies: float, error: float, detects: str, cannot_detect: str
    ) -> Finding:
        count = self._rounds * int(np.count_nonzero(~self.canaries.present))
        claimed = self._multiplier * copies**0.5
        low = claimed * (chi2.ppf(error, count) / max(squares, np.finfo(float).tiny)) ** 0.5
        value = claimed * (count / max(squares, np.finfo(float).tiny)) ** 0.5
        return Finding(
            name,
            statistic,
            float(value),
            float(low),
            1.0,
            verdict_of(float(low), 1.0),
            detects,
            cannot_detect,
            {"measurements": count},
        )

    def _along(self, total: np.ndarray) -> np.ndarray:
        return np.asarray(total[self.canaries.places] * self.canaries.signs)

    def _log_ratio(self, along: np.ndarray, variance: float) -> np.ndarray:
        """log of (1 − q) + q N(1, variance)/N(0, variance)."""
        with np.errstate(divide="ignore"):  # q = 1
            ratio = np.logaddexp(np.log1p(-self._rate), np.log(self._rate) + (along - 0.5) / variance)
        return np.asarray(ratio)

    def _shift(self) -> tuple[float, float]:
        """How much higher the sums along present canaries are than along absent ones, and its standard error."""
        there, absent = self._sums[self.canaries.present], self._sums[~self.canaries.present]
        error = np.hypot(there.std(ddof=1) / len(there) ** 0.5, absent.std(ddof=1) / len(absent) ** 0.5)
        return float(there.mean() - absent.mean()), float(error)

    def estimate(self, error: float) -> dict[str, Any]:
        """ε of a Gaussian mechanism that moves the canaries' sums as far, with an interval, each side at `error`."""
        spread = float(self._sums[~self.canaries.present].std(ddof=1))
        shift, deviation = self._shift()
        margin = float(norm.isf(error)) * deviation
        low, middle, high = (_gaussian(spread, shift + part) for part in (-margin, 0.0, margin))
        return {"gaussian_estimate": middle, "gaussian_estimate_interval": [low, high]}


def _gaussian(spread: float, shift: float) -> float:
    return float(get_epsilon_gaussian(spread / shift, DELTA)) if shift > 0 else 0.0
