"""The device's own ledger: what each upload has told the server, whatever the server's own books say.

Guarantee: an upload is charged before it is computed, so that a crash, or a server that forgets, never lets a device
count too few (tests/unit/test_secagg_attacks.py::test_nothing_leaves_before_it_is_stored).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.errors import DataError
from common.secagg.terms import Terms


@dataclass(frozen=True)
class Charge:
    """One upload.

    Attributes:
        run: hexadecimal, of which run.
        round, attempt: of the run, from 1.
        cohort: n, size of the roster.
        noise_multiplier: z of the released sum.
        honest: 1 − γ − δ, the part of that noise's variance which is not the server's or its friends'.
    """

    run: str
    round: int
    attempt: int
    cohort: int
    noise_multiplier: float
    honest: float

    @classmethod
    def of(cls, run: bytes, terms: Terms) -> "Charge":
        """What an upload under these terms costs."""
        encoding = terms.encoding
        return cls(run.hex(), terms.round, terms.attempt, terms.n, encoding.noise_multiplier, encoding.honest)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> "Charge":
        """Raises :class:`DataError`."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(f"Expected an entry of the device's ledger: {error}.") from None


def last_attempt(charges: Sequence[Charge], run: bytes) -> tuple[int, int]:
    """Round and attempt of this device's last upload to a run; (0, 0) before the first."""
    return max(((charge.round, charge.attempt) for charge in charges if charge.run == run.hex()), default=(0, 0))


def epsilon_server(charges: Sequence[Charge], delta: float) -> float:
    """ε at δ of all uploads for the servers that got them, taken as one that remembers.

    The Gaussian mechanisms of :func:`common.privacy.accounting.epsilon_server` with different z compose to one at
    (Σ 1/(z²·honest))^−½. Skellam noise counts for as much less as it may at most (``EXCESS_LIMIT``).
    """
    from common.privacy.accounting import EXCESS_LIMIT
    from common.privacy.accounting import epsilon_server as of_gaussian

    if not charges:
        return 0.0
    if any(charge.noise_multiplier == 0 for charge in charges):
        return math.inf
    spent = sum((1 + EXCESS_LIMIT) / (charge.noise_multiplier**2 * charge.honest) for charge in charges)
    return of_gaussian(1 / math.sqrt(spent), 1.0, 1, delta)
