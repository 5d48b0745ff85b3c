"""What one audit found."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True)
class Finding:
    """One audit's statistic with its bound, and what that says.

    Attributes:
        name: of the audit.
        statistic: what was measured, in words.
        value: the measurement.
        lower_bound: what it is at least, at the error that was asked for.
        limit: what the lower bound must not exceed.
        verdict: failed: it does; inconclusive: it does not, but could not either at this size, whatever the system.
        detects, cannot_detect: in words.
        details: further figures.
    """

    name: str
    statistic: str
    value: float
    lower_bound: float
    limit: float
    verdict: Verdict
    detects: str
    cannot_detect: str
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def verdict_of(lower_bound: float, limit: float, *, works: bool = True) -> Verdict:
    """Whether a bound is within its limit; `works`: whether the audit could have failed."""
    if lower_bound > limit:
        return "failed"
    return "passed" if works else "inconclusive"
