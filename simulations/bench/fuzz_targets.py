"""What `fedtopk bench fuzz` feeds with bytes: every reader of messages from the other side, with a valid message each.

A target may raise :class:`FedtopkError` and nothing else. Each starts from the same state: those that belong to a stage
of an attempt take it from a complete one of a few devices, which is played here in memory. Where a signature would
stop every changed byte, a target ending in `-signed` signs the bytes first, as a malicious device can.

Messages of a malicious device that pass go on to those who would rely on them: shares to their receivers, the last
unmasking to the sum, an advertisement to a whole attempt.
"""

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import AggregationError, ProtocolError
from common.privacy.encoding import Encoding
from common.privacy.randomness import seeded_stream
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.identity import Certificate, signed
from common.secagg.masks import in_lanes
from common.secagg.packing import pack, unpack
from common.secagg.roster import View
from common.secagg.shares import read_inbox, read_parcels
from common.secagg.signatures import read_signatures
from common.secagg.terms import Terms
from common.secagg.wire import Reader
from simulations.identities import simulated_authority, simulated_identity

_RUN = bytes(32)
_NOW = 0.0
_N = 5  # devices
_MOST = 1000  # devices of a roster that a device accepts
_BAD, _GOOD = 1, 2  # positions of the malicious device and of an honest one


@dataclass(frozen=True)
class Target:
    """A reader of bytes.

    Attributes:
        name: of the target.
        read: takes any bytes.
        seeds: messages that it accepts.
        weight: its part of the inputs, relative to the other targets; less where one input takes long.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: list[bytes]
    weight: float = 1.0


def targets(seed: int) -> list[Target]:
    """All of them; `seed` makes the keys."""
    plain, hybrid = _Attempt(seed, hybrid=False), _Attempt(seed, hybrid=True)
    return [
        Target("Certificate.read", _read_certificate, [plain.certificate]),
        Target("Terms.parse", Terms.parse, [plain.terms.to_bytes(), hybrid.terms.to_bytes()]),
        Target("read_signatures", lambda content: read_signatures(content, _N - 1), [plain.signatures]),
        *(_unpacking(bits) for bits in (16, 20, 32)),
        *(target for attempt in (plain, hybrid) for target in attempt.targets()),
    ]


class _Attempt:
    """A whole attempt, with the states and messages of position :data:`_GOOD` and the server before every stage."""

    def __init__(self, seed: int, *, hybrid: bool, advertisement: Callable[[bytes], bytes] = lambda own: own) -> None:
        encoding = Encoding(5, 1.0, 8.0, 16, 4.0, 0.8)
        self.hybrid = hybrid
        self.terms = Terms(1, 1, _N, 0.1, 0.2, hybrid, encoding, bytes(32))
        stream = seeded_stream(seed, "fuzz")
        ...
