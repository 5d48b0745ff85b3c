"""Plays a whole attempt of the secure aggregation in memory: every message as bytes, devices that fall out at will."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.encoding import Encoding
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.identity import issue
from common.secagg.member import Advertised, Agreed, Identity, Shared, Uploaded
from common.secagg.roster import View
from common.secagg.terms import Terms

RUN = bytes(range(32))
NOW = 1_000.0
SERVER_SEED = bytes(range(32, 64))
STAGES = ("advertise", "share", "upload", "agree", "unmask")


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "little"))


AUTHORITY = key_of(2**200)


def identity_of(device: int, authority: Ed25519PrivateKey = AUTHORITY, expires: int = 2_000) -> Identity:
    key = key_of(device)
    certificate = issue(authority, device, key.public_key().public_bytes_raw(), expires)
    return Identity(key, certificate, AUTHORITY.public_key().public_bytes_raw())


def terms_of(n: int, dimension: int = 5, bits: int = 16, **changes: object) -> Terms:
    encoding = Encoding(dimension, 1.0, 8.0, bits, 4.0, 0.8)
    values = {"round": 3, "attempt": 1, "n": n, "corrupt": 0.1, "dropout": 0.1, "hybrid": False}
    return Terms(**values | {"encoding": encoding, "model": bytes(32)} | changes)  # type: ignore[arg-type]


def anything(terms: Terms) -> None:
    """A policy that accepts all terms."""


@dataclass
class Play:
    """An attempt under way, with all states of all devices, by device number 0 … n−1 (of those that advertised)."""

    terms: Terms
    aggregate: Aggregate
    identities: dict[int, Identity]
    advertised: dict[int, Advertised]
    device_at: list[int]
    shared: dict[int, Shared] = field(default_factory=dict)
    uploaded: dict[int, Uploaded] = field(default_factory=dict)
    agreed: dict[int, Agreed] = field(default_factory=dict)
    uploads: dict[int, bytes] = field(default_factory=dict)
    random: Callable[[int], bytes] = os.urandom
    clocks: dict[int, float] = field(default_factory=dict)  # of devices for which it is not NOW, by position

    def positions(self, absent: Collection[int]) -> list[int]:
        return [position for position, device in enumerate(self.device_at) if device not in absent]

    def view(self, position: int) -> View:
        return View.parse(self.aggregate.view(position), anything)

    def share(self, absent: Collection[int] = ()) -> None:
        for position in self.positions(absent):
            identity, state = self.identities[self.device_at[position]], self.advertised[self.device_at[position]]
            view, now = self.view(position), self.clocks.get(position, NOW)
            self.shared[position], message = member.share(state, identity, view, now, self.random)
            self.aggregate.take_shares(position, message)

    def upload(self, residues: np.ndarray, absent: Collection[int] = ()) -> None:
        """`residues` (n, 2^m) by position."""
        for position in self.positions(absent):
            if position in self.shared:
                state, masks = member.receive(self.shared[position], self.aggregate.inbox(position))
                self.uploads[position] = member.upload(state, masks, residues[position])
                self.aggregate.take_upload(position, self.uploads[position])
                self.uploaded[position] = state

    def agree(self, absent: Collection[int] = ()) -> None:
        survivors = self.aggregate.fix_survivors()
        for position in self.positions(absent):
            if position in self.uploaded:
                identity = self.identities[self.device_at[position]]
                self.agreed[position], signature = member.agree(self.uploaded[position], identity, survivors)
                self.aggregate.take_agreement(position, signature)

    def unmask(self, absent: Collection[int] = ()) -> None:
        for position in self.positions(absent):
            if position in self.agreed:
                message = member.unmask(self.agreed[position], self.aggregate.signatures(position))
                self.aggregate.take_unmasking(position, message)


def begin(n: int, absent: Collection[int] = (), **changes: object) -> Play:
    """Devices 0 … n−1 but the absent ones have advertised."""
    devices = [device for device in range(n) if device not in absent]
    terms = terms_of(len(devices), **changes)  # type: ignore[arg-type]
    identities = {device: identity_of(device) for device in devices}
    advertised = {
        device: member.advertise(identity, RUN, os.urandom, hybrid=terms.hybrid)
        for device, identity in identities.items()
    }
    roster = [Advertisement.parse(advertised[device].message, terms.hybrid) for device in devices]
    for advertisement in roster:
        advertisement.check(RUN, AUTHORITY.public_key().public_bytes_raw(), NOW)
    return Play(terms, Aggregate(RUN, terms, roster, SERVER_SEED), identities, advertised, devices)


def residues_of(play: Play, seed: int) -> np.ndarray:
    """(n, 2^m) uint32, any numbers in the encoding's range."""
    encoding = play.terms.encoding
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**encoding.bits, (play.terms.n, encoding.padded), dtype=np.uint32)


def plain_sum(play: Play, residues: np.ndarray) -> np.ndarray:
    """The truth: the survivors' residues, summed without masks."""
    total = residues[play.aggregate.survivors].astype(object).sum(axis=0) % 2**play.terms.encoding.bits
    return np.array(total, np.uint32)
