"""The device's own coin: whether it takes part in a round, decided by it alone and once.

With ``training.coins = device`` a server cannot choose whom to sample. Asking again gets the same answer, so asking
often does not help either. It sees who takes part, as ever: ε_server is not amplified.
Tests: ``tests/unit/test_coins.py``; that the sum is of those whose coin fell, ``tests/integration/test_secure_sum.py``.
"""

from collections.abc import MutableMapping

from flwr.app import ConfigRecord

from common.privacy.randomness import seeded_stream, system_stream
from common.privacy.sampling import poisson_sample
from common.settings import Settings

_COIN = "coin"


class Coins:
    """One device's coins in one run.

    Args:
        records: what the device keeps, by name.
        run: 32 bytes, which run this is.
    """

    def __init__(self, records: MutableMapping[str, ConfigRecord], run: bytes) -> None:
        self._records = records
        self._run = run

    def flip(self, round_: int, settings: Settings, device: int) -> bool:
        """Whether the device takes part, with probability q: the answer of before if the round was asked for before,
        and no for every round before that one."""
        last, heads = self._last()
        if round_ == last:
            return heads
        if round_ < last:
            return False
        seed = settings.training.seed
        stream = seeded_stream(seed, "coin", round_, device) if settings.reproducible else system_stream()
        heads = bool(len(poisson_sample(settings.training.cohort_rate, 1, stream)))
        self._records[_COIN] = ConfigRecord({"run": self._run, "round": round_, "heads": heads})
        return heads

    def fell_for(self, round_: int) -> bool:
        """Whether the coin of this round was flipped and says to take part."""
        return self._last() == (round_, True)

    def _last(self) -> tuple[int, bool]:
        record = self._records.get(_COIN)
        if record is None or record["run"] != self._run:
            return 0, False
        return int(record["round"]), bool(record["heads"])  # type: ignore[arg-type]
