"""What a device insists on, whatever a server offers: its own pinned policy."""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from pydantic import TypeAdapter, ValidationError

from client.ledger import Charge, epsilon_server, last_attempt
from common.errors import Refusal, SettingsError
from common.privacy.adaptive_clip import joint
from common.privacy.encoding import WIDTHS
from common.secagg.terms import Terms
from common.settings import Settings

_DELTA = 1e-6


@dataclass(frozen=True)
class Policy:
    """The terms under which a device takes part.

    Attributes:
        minimum_cohort, maximum_cohort: least and largest n; a device's share of the noise falls with n.
        corrupt, dropout: γ and δ, from which thresholds and shares of the noise follow; neither more nor less.
        bits: widths of a residue that are allowed.
        maximum_clip: most that a device adds: the largest C, √1.01 times that where C adapts.
        minimum_noise_multiplier: least z.
        maximum_contributions: κ, uploads in all; 0 for any number.
        hybrid: whether shares must travel under ML-KEM too.
        maximum_epsilon_server, delta: most that all uploads may tell the servers that get them, as ε at δ; 0 for any.
        own_coins: whether it takes part only in rounds for which its own coin fell so, whoever else the server asks.
        reproducible: whether noise may be seeded, or absent, which protects nobody: for trying things out.
        trust_server: whether the server may be the one that adds the noise (:mod:`common.privacy.tree`), and could see
            the sum without it.
        separation: s, least number of rounds from one upload to the next in a run; 0 for any.
    """

    minimum_cohort: int
    maximum_cohort: int
    corrupt: float
    dropout: float
    bits: tuple[int, ...]
    maximum_clip: float
    minimum_noise_multiplier: float
    maximum_contributions: int
    hybrid: bool
    maximum_epsilon_server: float = 0.0
    delta: float = _DELTA
    own_coins: bool = False
    reproducible: bool = False
    trust_server: bool = False
    separation: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """The policy that a run's own settings describe.

        κ is what they say, or how many turns a device has in the run, where devices take turns.
        """
        guard, aggregation = settings.guard, settings.aggregation
        return cls(
            guard.minimum_cohort,
            guard.maximum_cohort,
            aggregation.corrupt_fraction,
            aggregation.dropout_fraction,
            (aggregation.bits,) if aggregation.bits else WIDTHS,
            joint(settings.largest_clip) if settings.privacy.clip_quantile else settings.largest_clip,
            guard.minimum_noise_multiplier,
            guard.maximum_contributions or settings.turns,
            aggregation.hybrid,
            guard.maximum_epsilon_server,
            settings.privacy.delta or _DELTA,
            own_coins=settings.training.coins == "device",
            reproducible=settings.reproducible,
            trust_server=guard.trust_server,
            separation=settings.separation,
        )

    @classmethod
    def proposed(cls, settings: Settings) -> "Policy":
        """The policy that a server's settings propose to a device: all but to trust that server, which only the
        device's owner can say (``test_guard.py::test_trust_in_a_server_is_not_its_own_to_propose``)."""
        return replace(cls.of(settings), trust_server=False)

    def in_words(self) -> list[str]:
        """What the device insists on, for its owner."""
        contributions, epsilon = self.maximum_contributions, self.maximum_epsilon_server
        return [
            f"between {self.minimum_cohort} and {self.maximum_cohort} devices in a sum, of which up to "
            f"{self.corrupt:.0%} may be the server's friends and {self.dropout:.0%} may fall silent",
            f"noise of at least {self.minimum_noise_multiplier:g} times the most that this device adds "
            f"({self.maximum_clip:g})" + (", which may be reproducible: for trying things out" * self.reproducible),
            f"at most {contributions} uploads" if contributions else "any number of uploads",
            f"ε_server of at most {epsilon:g} at δ={self.delta:g} for all of them (one user, its updates against "
            "zeros, for the servers that get them)"
            if epsilon
            else "any ε_server",
            *(["rounds for which its own coin falls so"] if self.own_coins else []),
            *([f"{self.separation} rounds from one upload to the next"] if self.separation else []),
            *(["noise, which the server may add: it is trusted with the sum"] if self.trust_server else []),
        ]

    def check_run(self, settings: Settings) -> None:
        """Whether this device takes part in such a run at all. Raises :class:`Refusal`."""
        _demand(
            (self.reproducible or not settings.reproducible, "noise that nobody can reproduce"),
            (
                self.trust_server or settings.privacy.mechanism != "tree",
                "noise from the devices; with privacy.mechanism=tree the server adds it and could see the sum without, "
                "which the policy's trust_server allows",
            ),
        )

    def check(self, terms: Terms, charges: Sequence[Charge], run: bytes) -> None:
        """Whether this device takes part in an attempt of a run, after the uploads that its ledger holds.

        Every upload counts, also one of an attempt that released nothing: a device cannot know that. So where devices
        take turns, a round that is tried again is without those that uploaded before
        (``test_guard.py::test_turns_are_kept_apart``).

        Raises:
            Refusal: it does not, for the reasons named.
        """
        encoding, honest, contributions = terms.encoding, 1 - self.corrupt - self.dropout, len(charges)
        last, _ = last_attempt(charges, run)
        _demand(
            (terms.n >= self.minimum_cohort, f"cohort={terms.n} ≥ {self.minimum_cohort}"),
            (terms.n <= self.maximum_cohort, f"cohort={terms.n} ≤ {self.maximum_cohort}"),
            (terms.corrupt == self.corrupt, f"corrupt_fraction={terms.corrupt} to be {self.corrupt}"),
            (terms.dropout == self.dropout, f"dropout_fraction={terms.dropout} to be {self.dropout}"),
            (encoding.bits in self.bits, f"bits={encoding.bits} to be in {self.bits}"),
            (encoding.clip <= self.maximum_clip, f"clip_norm={encoding.clip} ≤ {self.maximum_clip}"),
            (
                encoding.noise_multiplier >= self.minimum_noise_multiplier
                or (self.trust_server and encoding.variance == 0),
                f"noise_multiplier={encoding.noise_multiplier:g} ≥ {self.minimum_noise_multiplier}",
            ),
            (abs(encoding.honest - honest) < 1e-9, f"honest={encoding.honest} to be {honest:g}"),
            (not encoding.central, "noise from the devices"),
            (terms.hybrid == self.hybrid, f"hybrid={terms.hybrid} to be {self.hybrid}"),
            (
                not self.maximum_contributions or contributions < self.maximum_contributions,
                f"contributions={contributions} < {self.maximum_contributions}",
            ),
            (
                not last or terms.round - last >= self.separation,
                f"round {terms.round} to be {self.separation} after round {last}, in which it took part",
            ),
        )
        if self.maximum_epsilon_server:  # last: it loads an accountant
            spent = epsilon_server([*charges, Charge.of(run, terms)], self.delta)
            _demand((spent <= self.maximum_epsilon_server, f"ε_server={spent:.4g} ≤ {self.maximum_epsilon_server:g}"))


def _demand(*demands: tuple[bool, str]) -> None:
    broken = [demand for met, demand in demands if not met]
    if broken:
        raise Refusal(f"This device does not take part: expected {', '.join(broken)}.")


def with_changes(policy: Policy, text: str) -> Policy:
    """The policy with the values of a TOML text, by the names of its fields. Raises :class:`SettingsError`."""
    try:
        changes = tomllib.loads(text)
        unknown = changes.keys() - {field.name for field in fields(policy)}
        if unknown:
            raise SettingsError(f"Expected a policy to have the fields of {Policy.__name__}, not {sorted(unknown)}.")
        return TypeAdapter(Policy).validate_python(asdict(policy) | changes)
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise SettingsError(f"Expected a policy as TOML: {error}.") from None
