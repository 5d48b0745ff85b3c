"""The budget of a run: which mechanism its settings stand for, how many releases that allows, and what they cost."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from common.errors import PrivacyError
from common.popularity import CONCENTRATION
from common.privacy import NOT_OFFERED
from common.privacy.accounting import (
    History,
    contributions,
    default_delta,
    effective_multiplier,
    epsilon_model,
    epsilon_server,
    noise_multiplier_for,
    releases_within,
    threshold_delta,
)
from common.privacy.adaptive_clip import AdaptiveClip, sent
from common.privacy.encoding import Encoding
from common.privacy.epsilon_curve import epsilon_model_of_many
from common.privacy.tree import Tree, participations
from common.settings import Settings

_LARGEST_DELTA_LOSS = 1e-3
"""Part of δ that is set aside for what encodings lose, and again for a minimum cohort; the same for every number of
releases, so that figures agree."""

ADJACENCY = {"epsilon_model": "a user is added or removed", "epsilon_server": "a user's updates are replaced by zero"}
OBSERVER = {
    "epsilon_model": "who sees every released model",
    "epsilon_server": "the aggregating server, which sees who takes part",
}
"""What the two figures mean: they stand beside them wherever they do."""


@dataclass(frozen=True)
class Spending:
    """What a run spends of its population's privacy, or what several have spent.

    Attributes:
        history: of ε_model, one (effective z, q, releases) a run; of correlated noise, (effective z, 1, κ).
        server: Σ κ/(z²·honest) over the runs: as many contributions to the server at a noise of 1; inf where it has
            seen sums without noise.
        delta_loss: part of δ that goes to encodings and minimum cohorts.
    """

    history: History = ()
    server: float = 0.0
    delta_loss: float = 0.0

    def __add__(self, other: "Spending") -> "Spending":
        return Spending(self.history + other.history, self.server + other.server, self.delta_loss + other.delta_loss)

    def left(self, delta: float) -> float:
        """What the mechanisms have of δ. Raises :class:`PrivacyError` where encodings and minimum cohorts lost more."""
        return _left(delta, self.delta_loss / 2, f"{len(self.history)} runs")  # two parts are set aside, for either

    def statement(self, delta: float) -> dict[str, Any]:
        """Both figures of all the runs at δ, for the most exposed user: one who was there in each of them."""
        left = self.left(delta)
        model = epsilon_model(1.0, 1.0, 0, left, self.history)
        server: float | str = epsilon_server(self.server**-0.5, 1.0, 1, left) if self.server else 0.0
        return {
            "runs": len(self.history),
            "unit": "user",
            "delta": delta,
            "epsilon_model": model,
            "epsilon_server": NOT_OFFERED if server == math.inf > model else server,
            "adjacency": ADJACENCY,
            "observer": OBSERVER,
        }


@dataclass(frozen=True)
class Account:
    """All that a run's two figures of privacy follow from, beside the number of releases and attempts.

    Attributes:
        multiplier: effective z (:func:`~common.privacy.accounting.effective_multiplier`).
        honest: 1 − γ − δ of secure aggregation.
        rate: q.
        delta: δ of both figures; `spendable`: what of it the mechanism may use.
        separation: s of correlated noise (:mod:`common.privacy.tree`); 0 where coins decide who takes part.
    """

    multiplier: float
    honest: float
    rate: float
    delta: float
    spendable: float
    separation: int = 0

    def epsilon_model(self, releases: int, at_most: int = 0) -> float:
        """ε_model after so many releases: of rounds, one after another, where noise is correlated.

        Args:
            at_most: of many numbers of releases that it is wanted for, the largest
                (:func:`~common.privacy.epsilon_curve.epsilon_model_of_many`).
        """
        if self.separation:
            return epsilon_model(self.multiplier, 1.0, participations(releases, self.separation), self.spendable)
        if at_most:
            return epsilon_model_of_many(self.multiplier, self.rate, releases, self.spendable, at_most)
        return epsilon_model(self.multiplier, self.rate, releases, self.spendable)

    def epsilon_server(self, attempts: int) -> float | None:
        """ε_server after so many attempts at rounds; None where it is not offered."""
        if self.separation:
            return None
        return epsilon_server(self.multiplier, self.honest, contributions(self.rate, attempts), self.spendable)


@dataclass(frozen=True)
class Budget:
    """A run's mechanism with its accounting.

    Attributes:
        devices: N.
        noise_multiplier: z, the standard deviation of the released noise in units of the sensitivity; 0 for none.
        delta: δ of both figures.
        encoding: clip, rounding and noise as numbers, of the first round where the clip adapts.
        account: what both figures follow from; None without noise.
        allowed_releases: how many rounds the target permits, at most those of the settings; None without noise.
        others: what other runs over the same population have spent, which the target counts in.
        tree: the mechanism of correlated noise, where it is that; the encoding is then without noise.
        histogram: the encoding of the first round, where it counts (:mod:`common.popularity`).
    """

    settings: Settings
    devices: int
    noise_multiplier: float
    delta: float
    encoding: Encoding
    account: Account | None
    allowed_releases: int | None
    others: Spending = field(default_factory=Spending)
    tree: Tree | None = None
    histogram: Encoding | None = None

    @property
    def words(self) -> str:
        """The budget for whoever hits it."""
        others = f", of which {len(self.others.history)} other runs spent a part," if self.others.history else ""
        return (
            f"ε_model={self.settings.privacy.target_epsilon} at δ={self.delta:.3g} (one user added or removed, for "
            f"who sees every model){others}"
        )

    def statement(self, releases: int, attempts: int) -> dict[str, Any]:
        """The `privacy` object of the report, for so many releases of a model and attempts at rounds.

        ε_model: unit one user, add/remove adjacency, against whoever sees every released model; amplified by Poisson
        sampling. ε_server: the user's update replaced by zero, against the aggregating server, which sees who takes
        part; no amplification, the honest devices' noise alone; it holds under secure aggregation. With correlated
        noise ε_model is without amplification, and ε_server is not offered.
        """
        privacy = self.settings.privacy
        clip = {} if math.isinf(privacy.clip_norm) else {"clip_norm": privacy.clip_norm}
        if privacy.clip_quantile:
            clip |= {"clip_quantile": privacy.clip_quantile}
        statement: dict[str, Any] = {"unit": "user", "mechanism": privacy.mechanism} | clip
        if self.histogram:
            statement |= {"first_release": "how often each item was met"}
        if self.account is None:
            return statement
        if self.tree is None:
            server = {
                "epsilon_server": self.account.epsilon_server(attempts),
                "epsilon_server_holds_under": "secure aggregation",
            }
        else:
            server = {
                "epsilon_server": NOT_OFFERED,
                "noise_added_by": "the server",
                "separation": self.tree.separation,
                "contributions": participations(releases, self.tree.separation),
                "band": len(self.tree.coefficients),
            }
        return statement | {
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "releases": releases,
            "epsilon_model": self.account.epsilon_model(releases),
            **server,
            "adjacency": ADJACENCY,
            "observer": OBSERVER,
            "target_epsilon": privacy.target_epsilon,
            "noise": "seeded, not private" if privacy.randomness == "seeded" else "cryptographic",
            "catalogue": "assumed public",
        }

    def spending(self, releases: int, attempts: int) -> Spending:
        """What so many releases and attempts spend of the population's privacy: everything, without noise."""
        rate = self.settings.training.cohort_rate
        if self.account is None:
            return Spending(((0.0, rate, releases),) if releases else (), math.inf if attempts else 0.0)
        if self.tree is not None:
            times = participations(releases, self.tree.separation)
            return Spending(
                ((self.tree.effective_multiplier, 1.0, times),) if releases else (),
                math.inf if attempts else 0.0,
                releases * self.tree.delta_loss,
            )
        multiplier = self.account.multiplier
        return Spending(
            ((multiplier, rate, releases),) if releases else (),
            contributions(rate, attempts) / (multiplier**2 * self.encoding.honest),
            releases * self.encoding.delta_loss + threshold_loss(self.settings, self.devices, releases),
        )

    def mechanism(self) -> dict[str, Any]:
        """All that the figures follow from, beside the entries of the ledger: for the event log."""
        privacy = self.settings.privacy
        adaptive = AdaptiveClip.of(self.settings)
        tree = {name: value for name, value in asdict(self.tree).items() if name != "encoding"} if self.tree else None
        return ({"adaptive_clip": asdict(adaptive)} if adaptive else {}) | {
            "unit": "user",
            "mechanism": privacy.mechanism,
            "devices": self.devices,
            "rate": self.settings.rate,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "target_epsilon": privacy.target_epsilon,
            "minimum_cohort": self.settings.guard.minimum_cohort,
            "encoding": asdict(self.encoding),
            **({"tree": tree} if tree else {}),
            **({"histogram": asdict(self.histogram)} if self.histogram else {}),
        }


def make_budget(
    settings: Settings,
    devices: int,
    dimension: int,
    others: Spending | None = None,
    begun_with: float | None = None,
    histogram: int = 0,
) -> Budget:
    """Resolve the mechanism of a run over N devices with d shared parameters.

    Args:
        others: what other runs over the same population have spent, which the target counts in.
        begun_with: z of the run, where it was resolved before; what others spent since then changes it no more.
        histogram: how many numbers a member sends in a first round that counts; 0 where it does not.

    Raises :class:`~common.errors.PrivacyError` where the target cannot be met.
    """
    privacy, training, aggregation = settings.privacy, settings.training, settings.aggregation
    delta, others = privacy.delta or default_delta(devices), others or Spending()
    multiplier = 0.0
    turns = settings.turns  # with correlated noise a run is as many Gaussians, without any sampling
    if settings.private:
        multiplier = (
            begun_with
            or privacy.noise_multiplier
            or noise_multiplier_for(
                privacy.target_epsilon,
                1.0 if turns else training.cohort_rate,
                turns or training.rounds,
                delta * (1 - 2 * _LARGEST_DELTA_LOSS),
                others.history,
            )
        )

    def encoding_of(length: int, bound: float, concentration: int = 1) -> Encoding:
        return Encoding.choose(
            length,
            bound if math.isfinite(bound) else 1.0,  # unclipped sums are never encoded
            0.0 if turns else multiplier,
            cohort=concentration * settings.rate * devices,
            honest=1 - aggregation.corrupt_fraction - aggregation.dropout_fraction,
            bits=aggregation.bits,
            central=aggregation.kind == "central",
        )

    encoding = encoding_of(*sent(privacy, dimension))
    counting = encoding_of(histogram, privacy.clip_norm, CONCENTRATION) if histogram else None
    if not settings.private:
        return Budget(settings, devices, multiplier, delta, encoding, None, None, others, histogram=counting)
    if turns:
        return _correlated(settings, devices, multiplier, delta, encoding, others)
    # A multiplier that was asked for may leave room for rounds that a crash makes necessary again.
    at_most = 2 * training.rounds if privacy.noise_multiplier else training.rounds
    left = spendable_delta(delta, encoding, at_most, others.delta_loss)
    threshold = threshold_loss(settings, devices, at_most)
    if threshold > _LARGEST_DELTA_LOSS * delta:
        raise PrivacyError(
            f"Expected guard.minimum_cohort={settings.guard.minimum_cohort} to be far from the "
            f"{training.cohort_rate * devices:g} expected members, or 1: one user would decide too often whether the "
            f"others are in the sum (δ {threshold:.2g} of {delta:.2g})."
        )
    worst = min(effective_multiplier(used) for used in (encoding, counting) if used)
    account = Account(worst, encoding.honest, training.cohort_rate, delta, left)
    allowed = releases_within(privacy.target_epsilon, account.multiplier, account.rate, left, at_most, others.history)
    return Budget(settings, devices, multiplier, delta, encoding, account, allowed, others, histogram=counting)


def _correlated(
    settings: Settings, devices: int, multiplier: float, delta: float, unit: Encoding, others: Spending
) -> Budget:
    """The budget of a run with correlated noise of a `multiplier`, over updates like those of `unit`."""
    privacy, training, separation = settings.privacy, settings.training, settings.separation
    smallest, least = devices // separation, settings.guard.minimum_cohort
    if least > 1 and smallest <= least:
        raise PrivacyError(
            f"Expected guard.minimum_cohort={least} to be below the {smallest} devices of a turn, or 1: one user would "
            "decide whether the others are in the sum."
        )
    bits = settings.aggregation.bits
    tree = Tree.choose(unit, multiplier, settings.rate * devices, separation, training.rounds, bits)
    left = _left(delta, training.rounds * tree.delta_loss + others.delta_loss, f"{training.rounds} releases")
    account = Account(tree.effective_multiplier, unit.honest, settings.rate, delta, left, separation)
    turns = releases_within(privacy.target_epsilon, account.multiplier, 1.0, left, settings.turns, others.history)
    allowed = min(training.rounds, turns * separation)
    return Budget(settings, devices, multiplier, delta, tree.encoding, account, allowed, others, tree)


def threshold_loss(settings: Settings, devices: int, releases: int) -> float:
    """What the minimum cohort costs of δ in so many releases (:func:`common.privacy.accounting.threshold_delta`)."""
    rate, epsilon = settings.training.cohort_rate, settings.privacy.target_epsilon
    return threshold_delta(settings.guard.minimum_cohort, rate, devices, releases, epsilon)


def spendable_delta(delta: float, encoding: Encoding, releases: int, others: float = 0.0) -> float:
    """What is left of δ for the mechanism after what the encoding of so many releases, and a minimum cohort, lose.

    Args:
        others: part of δ that other runs over the same population have lost that way.

    Raises :class:`PrivacyError` where that is more than a thousandth of δ.
    """
    return _left(delta, releases * encoding.delta_loss + others, f"{releases} releases")


def _left(delta: float, loss: float, who: str) -> float:
    if loss > _LARGEST_DELTA_LOSS * delta:
        raise PrivacyError(
            f"Expected privacy.delta={delta:.3g} to be well above the {loss:.3g} that {who} lose in their encoding: "
            "raise it, or train fewer rounds."
        )
    return delta * (1 - 2 * _LARGEST_DELTA_LOSS)
