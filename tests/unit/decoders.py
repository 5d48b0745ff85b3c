"""One device as it really is, behind SecureUpload, among played ones; and everything that reads bytes of another party.

``DECODERS`` holds a name and a function of bytes for each reader: it returns a value or raises a FedtopkError.
``VALID`` holds messages that each of them accepts.
"""

import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from protocol import NOW, RUN, SERVER_SEED, Play, identity_of, terms_of

from client.guard import Policy
from client.secure_upload import SecureUpload
from common.errors import Refusal
from common.messages import advertisement_of, body_of, content_of, model_bytes, read_arrays, signed_model_of
from common.privacy.encoding import WIDTHS
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.member import Identity
from common.secagg.packing import pack, unpack
from common.secagg.roster import View
from common.secagg.shares import read_inbox, read_parcels
from common.secagg.signatures import read_signatures
from common.secagg.terms import Terms
from common.secagg.wire import Reader
from simulations.client_app import RecordedDevice

PHONE = 0
"""Number and position of the device behind SecureUpload."""

POLICY = Policy(
    minimum_cohort=3,
    maximum_cohort=1000,
    corrupt=0.1,
    dropout=0.1,
    bits=WIDTHS,
    maximum_clip=1.0,
    minimum_noise_multiplier=0.2,
    maximum_contributions=3,
    hybrid=False,
)
"""Bears the terms of :func:`protocol.terms_of`."""


class Disk(MutableMapping[str, ConfigRecord]):
    """A store that keeps bytes, as one does that outlives its process."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> ConfigRecord:
        return ConfigRecord.inflate(self.content[name])

    def __setitem__(self, name: str, record: ConfigRecord) -> None:
        self.content[name] = record.deflate()

    def __delitem__(self, name: str) -> None:
        del self.content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


class Pinned(RecordedDevice):
    """What a device has pinned, and what it keeps."""

    def __init__(self, identity: Identity, policy: Policy, store: MutableMapping[str, ConfigRecord]) -> None:
        super().__init__(store)
        self.identity = identity
        self.policy = policy


class Phone:
    """The device behind SecureUpload. Its process ends after every message; its disk stays."""

    def __init__(
        self, policy: Policy = POLICY, run: bytes = RUN, store: MutableMapping[str, ConfigRecord] | None = None
    ):
        self.store = Disk() if store is None else store
        self.run = run
        self._pinned = Pinned(identity_of(PHONE), policy, self.store)
        self._random = random.Random("phone").randbytes

    def process(self) -> SecureUpload:
        return SecureUpload(self._pinned, self.run, clock=lambda: NOW, random=self._random)

    def advertise(self) -> bytes:
        return self.process().advertise()

    def share(self, body: bytes) -> bytes:
        return self.process().share(body)

    def upload(self, body: bytes) -> bytes:
        return self.process().upload(body, lambda terms: np.zeros(terms.encoding.padded, np.uint32))

    def agree(self, body: bytes) -> bytes:
        return self.process().agree(body)

    def unmask(self, body: bytes) -> tuple[bytes, bytes]:
        return self.process().unmask(body)


def meet(n: int, seed: int = 0, given: Mapping[int, bytes] | None = None, run: bytes = RUN, **changes: object) -> Play:
    """Devices 0 … n−1 have advertised, with the same randomness each time; `given` are advertisements that come from
    elsewhere."""
    draw = random.Random(seed).randbytes
    terms, given = terms_of(n, **changes), given or {}  # type: ignore[arg-type]
    identities = {device: identity_of(device) for device in range(n)}
    advertised = {
        device: member.advertise(identity, run, draw, hybrid=terms.hybrid)
        for device, identity in identities.items()
        if device not in given
    }
    messages = {device: state.message for device, state in advertised.items()} | dict(given)
    roster = [Advertisement.parse(messages[device], terms.hybrid) for device in range(n)]
    return Play(terms, Aggregate(run, terms, roster, SERVER_SEED), identities, advertised, list(range(n)), random=draw)


def residues_for(play: Play) -> np.ndarray:
    """(n, 2^m) zeros."""
    return np.zeros((play.terms.n, play.terms.encoding.padded), np.uint32)


@dataclass
class Rehearsal:
    """An attempt of the phone and nine others, all of whose messages came in time.

    Attributes:
        requests, answers: of the phone, by stage.
        stores: the phone's, before each stage.
        ready: the server, before it took the phone's answer.
    """

    play: Play
    requests: dict[str, bytes]
    answers: dict[str, bytes]
    stores: dict[str, Disk]
    ready: dict[str, Aggregate]


def rehearse(phone: Phone, **changes: object) -> Rehearsal:
    """Play it."""
    play = meet(10, given={PHONE: phone.advertise()}, run=phone.run, **changes)
    found = Rehearsal(play, {}, {}, {}, {})
    server, others = play.aggregate, {PHONE}

    def ask(stage: str, request: bytes, answer: Callable[[bytes], bytes], take: str) -> None:
        found.requests[stage] = request
        found.stores[stage] = deepcopy(phone.store)
        found.ready[stage] = deepcopy(server)
        found.answers[stage] = answer(request)
        getattr(server, take)(PHONE, found.answers[stage])

    play.share(others)
    ask("share", server.view(PHONE), phone.share, "take_shares")
    play.upload(residues_for(play), others)
    ask("upload", server.inbox(PHONE), phone.upload, "take_upload")
    play.agree(others)
    ask("agree", server.fix_survivors(), phone.agree, "take_agreement")
    play.unmask(others)
    ask("unmask", server.signatures(PHONE), lambda body: phone.unmask(body)[0], "take_unmasking")
    return found


def modest(terms: Terms) -> None:
    """A policy that bounds what the terms make a device do, and nothing else."""
    if terms.n > 1000 or terms.encoding.bits not in WIDTHS:
        raise Refusal(f"Expected n={terms.n} ≤ 1000 and bits={terms.encoding.bits} of a packing.")


def message_with(content: RecordDict) -> Message:
    """A Message as it arrives."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower asks who is sending
    return Message(content, 2, "train.upload")


def flags_in(content: bytes) -> list[bool]:
    """Ten flags."""
    reader = Reader(content, "flags")
    found = reader.flags(10)
    reader.end()
    return found


def _model(content: bytes) -> dict[str, np.ndarray]:
    return read_arrays(signed_model_of(message_with(content_of(b"body", model=content)))[0])


_rehearsal = rehearse(Phone())
_play = _rehearsal.play
_COUNT, _OTHER = _play.terms.degree.neighbours, 1


def _take(stage: str, method: str, content: bytes) -> None:
    getattr(deepcopy(_rehearsal.ready[stage]), method)(PHONE, content)


def _answer(stage: str, content: bytes) -> object:
    return getattr(Phone(store=deepcopy(_rehearsal.stores[stage])), stage)(content)


Decoder = Callable[[bytes], object]

DECODERS: list[tuple[str, Decoder]] = [
    ("Advertisement.parse", partial(Advertisement.parse, hybrid=False)),
    ("Advertisement.parse, hybrid", partial(Advertisement.parse, hybrid=True)),
    ("Terms.parse", Terms.parse),
    ("View.parse", partial(View.parse, check=modest)),
    ("read_parcels", partial(read_parcels, count=_COUNT, hybrid=False)),
    ("read_inbox", partial(read_inbox, count=_COUNT, hybrid=False)),
    ("read_signatures", partial(read_signatures, count=_COUNT)),
    ("Reader.flags", flags_in),
    ("unpack, 16", partial(unpack, count=9, bits=16)),
    ("unpack, 20", partial(unpack, count=9, bits=20)),
    ("unpack, 32", partial(unpack, count=9, bits=32)),
    ("take_shares", partial(_take, "share", "take_shares")),
    ("take_upload", partial(_take, "upload", "take_upload")),
    ("take_agreement", partial(_take, "agree", "take_agreement")),
    ("take_unmasking", partial(_take, "unmask", "take_unmasking")),
    ("member.receive", lambda content: member.receive(_play.shared[_OTHER], content)),
    ("member.agree", lambda content: member.agree(_play.uploaded[_OTHER], _play.identities[_OTHER], content)),
    ("member.unmask", lambda content: member.unmask(_play.agreed[_OTHER], content)),
    ("body_of", lambda content: body_of(message_with(content_of(content)))),
    ("advertisement_of", lambda content: advertisement_of(message_with(content_of(b"", advertisement=content)))),
    ("read_arrays", _model),
    ("SecureUpload.share", partial(_answer, "share")),
    ("SecureUpload.upload", partial(_answer, "upload")),
    ("SecureUpload.agree", partial(_answer, "agree")),
    ("SecureUpload.unmask", partial(_answer, "unmask")),
]

_nine = np.arange(9)

VALID: dict[str, bytes] = {
    "Advertisement.parse": _play.advertised[_OTHER].message,
    "Advertisement.parse, hybrid": meet(3, hybrid=True).advertised[_OTHER].message,
    "Terms.parse": _play.terms.to_bytes(),
    "View.parse": _play.aggregate.view(_OTHER),
    "read_parcels": _rehearsal.answers["share"],
    "read_inbox": _play.aggregate.inbox(_OTHER),
    "read_signatures": _play.aggregate.signatures(_OTHER),
    "Reader.flags": b"\xff\x03",
    "unpack, 16": pack(_nine.astype(np.uint16), 16),
    "unpack, 20": pack(_nine.astype(np.uint32), 20),
    "unpack, 32": pack(_nine.astype(np.uint32), 32),
    "take_shares": _rehearsal.answers["share"],
    "take_upload": _rehearsal.answers["upload"],
    "take_agreement": _rehearsal.answers["agree"],
    "take_unmasking": _rehearsal.answers["unmask"],
    "member.receive": _play.aggregate.inbox(_OTHER),
    "member.agree": _rehearsal.requests["agree"],
    "member.unmask": _play.aggregate.signatures(_OTHER),
    "body_of": b"body",
    "advertisement_of": b"advertisement",
    "read_arrays": model_bytes({"a": np.arange(3, dtype=np.float32)}),
    **{f"SecureUpload.{stage}": request for stage, request in _rehearsal.requests.items()},
}
