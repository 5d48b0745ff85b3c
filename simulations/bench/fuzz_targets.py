"""What `fedtopk bench fuzz` feeds with bytes: every reader of messages from the other side.

A target may raise :class:`FedtopkError` and nothing else, and starts from the same state each time. Those of a stage of
an attempt take it from one that is played here, by a few devices in memory. Where a signature or a tag would stop every
changed byte, a target that ends in `-signed` or `-tagged` adds it to the bytes first, as a malicious device can. What
passes goes on to whoever relies on it: a roster and shares to an honest device, the last unmasking to the sum.
"""

import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305

from common.errors import AggregationError, FedtopkError
from common.privacy.encoding import Encoding
from common.privacy.randomness import seeded_stream
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.identity import CERTIFICATE_BYTES, SIGNATURE_BYTES, Certificate, signed
from common.secagg.keys import SEED_BYTES, encapsulate, mask_key, private_key
from common.secagg.masks import lane
from common.secagg.member import TAG_BYTES, Advertised, Identity, Shared
from common.secagg.packing import pack, unpack
from common.secagg.roster import View
from common.secagg.shares import read_inbox, read_parcels
from common.secagg.signatures import read_signatures
from common.secagg.terms import Terms
from common.secagg.wire import Reader
from simulations.identities import simulated_identity

_RUN = bytes(32)
_NOW = 0.0
_N = 5  # devices of the attempt
_SPARSE = 100  # devices of a roster whose graph is not complete
_MOST = 1000  # devices of a roster that a device accepts
_COUNT = 9  # residues
_BAD, _GOOD, _MUTE, _DROPPED = range(1, 5)  # positions: malicious, honest, silent at the end, and without an upload


@dataclass(frozen=True)
class Target:
    """A reader of bytes.

    Attributes:
        name: of the target.
        read: takes any bytes.
        seeds: messages that it accepts, to begin with.
        weight: its part of the inputs beside the other targets', less where one takes long or there are few.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: list[bytes]
    weight: float = 1.0


def targets(seed: int) -> list[Target]:
    """All of them; `seed` makes the keys."""
    plain, hybrid = _Attempt(seed, hybrid=False), _Attempt(seed, hybrid=True)
    widths = (16, 20, 32)
    return [
        Target("Certificate.read", _read_certificate, [plain.advertised[_BAD].message[:CERTIFICATE_BYTES]]),
        Target("Terms.parse", Terms.parse, [plain.terms.to_bytes(), hybrid.terms.to_bytes()]),
        Target("read_signatures", lambda content: read_signatures(content, _N - 1), [plain.signatures]),
        *(Target(f"unpack-{bits}", _unpacking(bits), [pack(np.ones(_COUNT, lane(bits)), bits)]) for bits in widths),
        *plain.readers(),
        *plain.stages(),
        *(replace(target, name=f"{target.name}-hybrid") for target in hybrid.readers()),
        Target("encapsulate", encapsulate, [Advertisement.parse(hybrid.advertised[_BAD].message, True).kem_key], 0.5),
    ]


def _read_certificate(content: bytes) -> None:
    reader = Reader(content, "a certificate")
    Certificate.read(reader)
    reader.end()


def _unpacking(bits: int) -> Callable[[bytes], object]:
    return lambda content: unpack(content, _COUNT, bits)


def _limited(terms: Terms) -> None:
    if terms.n > _MOST:
        raise AggregationError(f"Expected n={terms.n} ≤ {_MOST}.")


class _Attempt:
    """An attempt that is played to its last share: states and messages at every stage.

    The device at :data:`_DROPPED` uploads nothing and that at :data:`_MUTE` does not help to unmask, so that secrets
    are put together, of shares that include the malicious device's.
    """

    def __init__(self, seed: int, *, hybrid: bool) -> None:
        self._seed, self._words = seed, seeded_stream(seed, "fuzz").words
        self._identities = [simulated_identity(seed, number) for number in range(_N)]
        self.terms = Terms(1, 1, _N, 0.0, 0.2, hybrid, Encoding(_COUNT, 1.0, 8.0, 16, 4.0, 0.8), bytes(32))
        self.advertised = [self._advertise(identity) for identity in self._identities]
        aggregate = self._begin(self.advertised)
        self._view = aggregate.view(_GOOD)
        self._before: dict[str, bytes] = {}  # the server's state when only the malicious device's message is missing
        self._valid: dict[str, bytes] = {}  # that message
        shared = [self._share(position, aggregate.view(position)) for position in range(_N)]
        self._shared = shared[_GOOD][0]
        self._stage(aggregate, "take_shares", [message for _, message in shared])
        self._inbox = aggregate.inbox(_GOOD)
        received = [member.receive(shared[position][0], aggregate.inbox(position)) for position in range(_DROPPED)]
        self._uploaded, residues = received[_GOOD][0], np.arange(self.terms.encoding.padded, dtype=np.uint32)
        self._upload_key = received[_BAD][0].upload_key
        uploads = [member.upload(state, masks, residues) for state, masks in received]
        self._stage(aggregate, "take_upload", uploads)
        self._survivors = aggregate.fix_survivors()
        agreed = [
            member.agree(state, self._identities[position], self._survivors)
            for position, (state, _) in enumerate(received)
        ]
        self._agreed = agreed[_GOOD][0]
        self._stage(aggregate, "take_agreement", [signature for _, signature in agreed])
        self.signatures = aggregate.signatures(_GOOD)
        unmaskings = [member.unmask(agreed[position][0], aggregate.signatures(position)) for position in range(_MUTE)]
        self._stage(aggregate, "take_unmasking", unmaskings)
        aggregate.total()

    def readers(self) -> list[Target]:
        """Whatever holds keys or shares, which a hybrid run has more of."""
        hybrid, message = self.terms.hybrid, self.advertised[_BAD].message
        views = [self._view] if hybrid else [self._view, self._sparse_view()]
        shares = self._valid["take_shares"]
        return [
            Target("Advertisement.parse", lambda content: Advertisement.parse(content, hybrid), [message]),
            Target("Advertisement.parse-signed", self._roster, [message[CERTIFICATE_BYTES:-SIGNATURE_BYTES]], 0.3),
            Target("View.parse", lambda content: self._share(_GOOD, content), views, 0.5),
            Target("read_parcels", lambda content: read_parcels(content, _N - 1, hybrid), [shares]),
            Target("read_inbox", lambda content: read_inbox(content, _N - 1, hybrid), [self._inbox]),
            Target("Aggregate.take_shares", self._take_shares, [shares], 0.5),
            Target("receive", lambda content: member.receive(self._shared, content), [self._inbox], 0.5),
        ]

    def stages(self) -> list[Target]:
        """The others."""
        upload = self._valid["take_upload"]
        own, key = (
            private_key(self.advertised[_GOOD].mask_seed),
            Advertisement.parse(self.advertised[_BAD].message, False).mask_key,
        )
        return [
            Target("mask_key", lambda content: mask_key(own, content, _RUN, _GOOD, _BAD), [key], 0.5),
            Target("Aggregate.take_upload", self._take("take_upload"), [upload]),
            Target("Aggregate.take_upload-tagged", self._take_tagged_upload, [upload[:-TAG_BYTES]]),
            Target("Aggregate.take_agreement", self._take("take_agreement"), [self._valid["take_agreement"]]),
            Target("Aggregate.take_unmasking", self._take_unmasking, [self._valid["take_unmasking"]]),
            Target(
                "agree",
                lambda content: member.agree(self._uploaded, self._identities[_GOOD], content),
                [self._survivors],
                0.2,
            ),
            Target("unmask", lambda content: member.unmask(self._agreed, content), [self.signatures]),
        ]

    def _random(self, length: int) -> bytes:
        return self._words(-(-length // 8)).tobytes()[:length]

    def _advertise(self, identity: Identity) -> Advertised:
        return member.advertise(identity, _RUN, self._random, hybrid=self.terms.hybrid)

    def _begin(self, advertised: list[Advertised]) -> Aggregate:
        roster = [Advertisement.parse(state.message, self.terms.hybrid) for state in advertised]
        for advertisement in roster:
            advertisement.check(_RUN, self._identities[0].authority, _NOW)
        return Aggregate(_RUN, replace(self.terms, n=len(roster)), roster, self._random(SEED_BYTES))

    def _share(self, position: int, content: bytes) -> tuple[Shared, bytes]:
        view = View.parse(content, _limited)
        return member.share(self.advertised[position], self._identities[position], view, _NOW, self._random)

    def _stage(self, aggregate: Aggregate, take: str, messages: list[bytes]) -> None:
        for position, message in enumerate(messages):
            if position != _BAD:
                getattr(aggregate, take)(position, message)
        self._before[take], self._valid[take] = pickle.dumps(aggregate), messages[_BAD]
        getattr(aggregate, take)(_BAD, messages[_BAD])

    def _sparse_view(self) -> bytes:
        others = [self._advertise(simulated_identity(self._seed, number)) for number in range(_N, _SPARSE)]
        return self._begin([*self.advertised, *others]).view(_GOOD)

    def _roster(self, content: bytes) -> None:
        certificate, key = self._identities[_BAD].certificate, self._identities[_BAD].key
        unsigned = certificate.to_bytes() + content
        advertised = list(self.advertised)
        message = unsigned + signed(key, "advertisement", _RUN, unsigned)
        advertised[_BAD] = replace(advertised[_BAD], message=message)
        self._share(_GOOD, self._begin(advertised).view(_GOOD))

    def _restored(self, take: str) -> Aggregate:
        aggregate: Aggregate = pickle.loads(self._before[take])
        return aggregate

    def _take(self, take: str) -> Callable[[bytes], object]:
        return lambda content: getattr(self._restored(take), take)(_BAD, content)

    def _take_shares(self, content: bytes) -> None:
        aggregate = self._restored("take_shares")
        aggregate.take_shares(_BAD, content)
        member.receive(self._shared, aggregate.inbox(_GOOD))

    def _take_tagged_upload(self, content: bytes) -> None:
        aggregate = self._restored("take_upload")
        aggregate.take_upload(_BAD, content + Poly1305.generate_tag(self._upload_key, content))
        aggregate.fix_survivors()

    def _take_unmasking(self, content: bytes) -> None:
        """What is wrong with one device's shares does not keep the server from going on."""
        aggregate = self._restored("take_unmasking")
        with suppress(FedtopkError):
            aggregate.take_unmasking(_BAD, content)
        aggregate.total()
