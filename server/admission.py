"""Which requests of devices the gateway lets through, and how many."""

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import SettingsError

FLEET_ROUTES = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""All that is forwarded, as it is spelt on the wire. A route that a new Flower adds is closed until it is put here."""

REFUSALS: Mapping[str, int] = {
    "path": 404,
    "rate": 503,
    "busy": 503,
    "body": 413,
    "slow": 408,
    "unreachable": 502,
    "unanswered": 504,
    "connections": 0,  # ended without an answer
}
"""Status of each refusal. Flower's SuperNode tries again after 502, 503 and 504 only: any other one it takes for final,
and asks for no more messages. So it is 503 for too many requests, where 429 would be the usual one."""


@dataclass(frozen=True)
class Limits:
    """What the gateway lets through.

    Attributes:
        body: bytes of a request's body.
        rate: requests per second of one address, in the long run.
        burst: requests of one address at once.
        addresses: how many addresses are remembered; the one that was quiet longest is forgotten first.
        concurrent: requests under way at once.
        connections: open connections at once.
        seconds: for a whole request with its answer, and for its headers to arrive.

    Raises:
        SettingsError: one is out of range.
    """

    body: int = 32 * 2**20
    rate: float = 100.0
    burst: float = 1000.0
    addresses: int = 10_000
    concurrent: int = 64
    connections: int = 4096
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value, least = getattr(self, name), 1e-3 if name in ("rate", "seconds") else 1
            if not least <= value < math.inf:
                raise SettingsError(f"Expected the gateway's {name}={value} to be ≥ {least} and finite.")


class TokenBuckets:
    """For each address a bucket that holds ``burst`` tokens and gains ``rate`` a second; a request takes one."""

    def __init__(self, rate: float, burst: float, addresses: int) -> None:
        self._rate, self._burst, self._addresses = rate, burst, addresses
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, address: str, now: float) -> float:
        """Seconds until there is a token for this address: 0 if it just took one."""
        tokens, since = self._buckets.pop(address, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        taken = tokens >= 1
        self._buckets[address] = (tokens - taken, now)  # last: the first one is the one that was quiet longest
        if len(self._buckets) > self._addresses:
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if taken else (1 - tokens) / self._rate

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._buckets)


def is_fleet_route(method: str, path: bytes, query: bytes) -> bool:
    """Whether a request is one that Flower's devices make; ``path`` is as it was sent, with nothing decoded."""
    return method == "POST" and path in FLEET_ROUTES and not query


def subscriber(address: str) -> str:
    """Whom an address stands for: one IPv6 subscriber has 2^64 of them."""
    found = ipaddress.ip_address(address)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64))) if found.version == 6 else address
