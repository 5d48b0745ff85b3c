"""The budget of a run: which mechanism its settings stand for, how many releases that allows, and what they cost."""

import math
from dataclasses import dataclass
from typing import Any

from common.errors import PrivacyError
from common.privacy.accounting import (
    contributions,
    default_delta,
    effective_multiplier,
    epsilon_model,
    epsilon_server,
    noise_multiplier_for,
    releases_within,
    threshold_delta,
)
from common.privacy.encoding import Encoding
from common.settings import Settings

_LARGEST_DELTA_LOSS = 1e-3
"""Part of δ that is set aside for what encodings lose, and again for a minimum cohort; the same for every number of
releases, so that figures agree."""


@dataclass(frozen=True)
class Account:
    """All that a run's two figures of privacy follow from, beside the number of releases and attempts.

    Attributes:
        multiplier: effective z (:func:`~common.privacy.accounting.effective_multiplier`).
        honest: 1 − γ − δ of secure aggregation.
        rate: q.
        delta: δ of both figures; `spendable`: what of it the mechanism may use.
    """

    multiplier: float
    honest: float
    rate: float
    delta: float
    spendable: float

    def epsilon_model(self, releases: int) -> float:
        """ε_model after so many releases."""
        return epsilon_model(self.multiplier, self.rate, releases, self.spendable)

    def epsilon_server(self, attempts: int) -> float:
        """ε_server after so many attempts at rounds."""
        return epsilon_server(self.multiplier, self.honest, contributions(self.rate, attempts), self.spendable)


@dataclass(frozen=True)
class Budget:
    """A run's mechanism with its accounting.

    Attributes:
        noise_multiplier: z, the standard deviation of the released noise in units of the sensitivity; 0 for none.
        delta: δ of both figures.
        encoding: clip, rounding and noise as numbers.
        account: what both figures follow from; None without noise.
        allowed_releases: how many rounds the target permits, at most those of the settings; None without noise.
    """

    settings: Settings
    noise_multiplier: float
    delta: float
    encoding: Encoding
    account: Account | None
    allowed_releases: int | None

    @property
    def words(self) -> str:
        """The budget for whoever hits it."""
        return f"ε_model={self.settings.privacy.target_epsilon} at δ={self.delta:.3g}"

    def statement(self, releases: int, attempts: int) -> dict[str, Any]:
        """The `privacy` object of the report, for so many releases of a model and attempts at rounds.

        ε_model: unit one user, add/remove adjacency, against whoever sees every released model; amplified by Poisson
        sampling. ε_server: the user's update replaced by zero, against the aggregating server, which sees who takes
        part; no amplification, the honest devices' noise alone; it holds under secure aggregation.
        """
        privacy = self.settings.privacy
        clip = {} if math.isinf(privacy.clip_norm) else {"clip_norm": privacy.clip_norm}
        statement: dict[str, Any] = {"unit": "user", "mechanism": privacy.mechanism} | clip
        if self.account is None:
            return statement
        return statement | {
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "releases": releases,
            "epsilon_model": self.account.epsilon_model(releases),
            "epsilon_server": self.account.epsilon_server(attempts),
            "epsilon_server_holds_under": "secure aggregation",
            "target_epsilon": privacy.target_epsilon,
            "noise": "seeded, not private" if privacy.randomness == "seeded" else "cryptographic",
            "catalogue": "assumed public",
        }


def make_budget(settings: Settings, devices: int, dimension: int) -> Budget:
    """Resolve the mechanism of a run over N devices with d shared parameters.

    Raises :class:`~common.errors.PrivacyError` where the target cannot be met.
    """
    privacy, training, aggregation = settings.privacy, settings.training, settings.aggregation
    delta = privacy.delta or default_delta(devices)
    multiplier = 0.0
    if settings.private:
        multiplier = privacy.noise_multiplier or noise_multiplier_for(
            privacy.target_epsilon, training.cohort_rate, training.rounds, delta * (1 - 2 * _LARGEST_DELTA_LOSS)
        )
    encoding = Encoding.choose(
        dimension,
        privacy.clip_norm if math.isfinite(privacy.clip_norm) else 1.0,  # unclipped sums are never encoded
        multiplier,
        cohort=training.cohort_rate * devices,
        honest=1 - aggregation.corrupt_fraction - aggregation.dropout_fraction,
        bits=aggregation.bits,
        central=aggregation.kind == "central",
    )
    if not settings.private:
        return Budget(settings, multiplier, delta, encoding, None, None)
    # A multiplier that was asked for may leave room for rounds that a crash makes necessary again.
    at_most = 2 * training.rounds if privacy.noise_multiplier else training.rounds
    left = spendable_delta(delta, encoding, at_most)
    threshold = threshold_delta(
        settings.guard.minimum_cohort, training.cohort_rate, devices, at_most, privacy.target_epsilon
    )
    if threshold > _LARGEST_DELTA_LOSS * delta:
        raise PrivacyError(
            f"Expected guard.minimum_cohort={settings.guard.minimum_cohort} to be far from the "
            f"{training.cohort_rate * devices:g} expected members, or 1: one user would decide too often whether the "
            f"others are in the sum (δ {threshold:.2g} of {delta:.2g})."
        )
    account = Account(effective_multiplier(encoding), encoding.honest, training.cohort_rate, delta, left)
    allowed = releases_within(privacy.target_epsilon, account.multiplier, account.rate, left, at_most)
    return Budget(settings, multiplier, delta, encoding, account, allowed)


def spendable_delta(delta: float, encoding: Encoding, releases: int) -> float:
    """What is left of δ for the mechanism after what the encoding of so many releases, and a minimum cohort, lose.

    Raises :class:`PrivacyError` where that is more than a thousandth of δ.
    """
    loss = releases * encoding.delta_loss
    if loss > _LARGEST_DELTA_LOSS * delta:
        raise PrivacyError(
            f"Expected privacy.delta={delta:.3g} to be well above the {loss:.3g} that {releases} releases lose "
            "in their encoding: raise it, or train fewer rounds."
        )
    return delta * (1 - 2 * _LARGEST_DELTA_LOSS)
