"""One device's side of one attempt: a state for each stage, and what leads from each to the next.

::

    advertise() ─► Advertised ─ share() ─► Shared ─ receive(), upload() ─► Uploaded ─ agree() ─► Agreed ─ unmask() ─► ∅

States are values of plain numbers and bytes, to be stored *before* the message that a step returns is sent, in place
of the one before: then no stage is ever answered twice, whatever crashes. There is no way back; what fails is tried
again from :func:`advertise`, with fresh keys.

Guarantees, against a server that may send anything and up to ⌊γn⌋ devices that work with it:

===========================================================================  ====================================
a device gives one share of a neighbour's secrets and never the other one    ``unmask`` reads one survivor set,
                                                                             and its state is gone afterwards
no device is unmasked under two survivor sets                                2t > k + corrupt neighbours
                                                                             (:mod:`common.secagg.graph`), and
                                                                             ``unmask`` asks for t signatures
the sum is over at least ⌈(1−δ)n⌉ updates                                    ``agree`` counts
devices that were told different things do not open each other's shares      the context in every key
===========================================================================  ====================================

Tests: ``tests/unit/test_secagg_attacks.py``, one for each attack; ``tests/unit/test_secagg_round.py`` for exactness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from common.errors import ProtocolError
from common.secagg.advertisement import Advertisement, commitment_to
from common.secagg.identity import Certificate, signed, verified
from common.secagg.keys import (
    KEM_CIPHERTEXT_BYTES,
    SEED_BYTES,
    channel_key,
    decapsulate,
    encapsulate,
    kem_public_key,
    mask_key,
    own_key,
    private_key,
    public_key,
    upload_key,
)
from common.secagg.masks import add_masks, in_lanes
from common.secagg.packing import pack
from common.secagg.roster import View, devices_bytes
from common.secagg.shamir import split
from common.secagg.shares import read_inbox, seal, split_pair, unseal
from common.secagg.signatures import read_signatures, subject
from common.secagg.terms import Terms
from common.secagg.wire import Reader

TAG_BYTES = 16
"""At the end of an upload, of Poly1305: that it is of the device whose keys are in the roster."""

_KEM_SEED_BYTES = 64

Random = Callable[[int], bytes]
"""Secret random bytes, so many: ``os.urandom`` on a real device."""


@dataclass(frozen=True)
class Identity:
    """Who this device is, and whom it believes.

    Attributes:
        key: its Ed25519 key.
        certificate: of that key.
        authority: 32 bytes, the public key of the enrolment authority, pinned.
    """

    key: Ed25519PrivateKey
    certificate: Certificate
    authority: bytes


@dataclass(frozen=True)
class Secrets:
    """What one attempt rests on: seeds of the key agreement for masks, of that for channels (X25519, and ML-KEM or
    nothing), and of the device's own mask, b."""

    mask_seed: bytes
    channel_seed: bytes
    kem_seed: bytes
    own_seed: bytes


@dataclass(frozen=True)
class Advertised(Secrets):
    """Keys are made and told. `message` is the advertisement, `run` what it is for."""

    run: bytes
    message: bytes


@dataclass(frozen=True)
class Shared(Secrets):
    """The roster is known and the secrets are shared among the neighbours.

    Attributes:
        terms: of the attempt, as they were offered.
        server_key: of the attempt's server.
        neighbours, devices, identities, mask_keys, channel_keys: positions and what they advertised, in one order.
    """

    context: bytes
    terms: bytes
    server_key: bytes
    position: int
    neighbours: list[int]
    devices: list[int]
    identities: list[bytes]
    mask_keys: list[bytes]
    channel_keys: list[bytes]


@dataclass(frozen=True)
class Uploaded:
    """The masked update is on its way, or about to be.

    Attributes:
        upload_key: 32 bytes, with which the server knows whose upload it is.
        shares: 64 bytes of each neighbour's two secrets, or nothing where it sent none.
    """

    context: bytes
    terms: bytes
    position: int
    own_seed: bytes
    upload_key: bytes
    neighbours: list[int]
    identities: list[bytes]
    shares: list[bytes]


@dataclass(frozen=True)
class Agreed(Uploaded):
    """One set of survivors is signed, as bits by position, and no other will be."""

    survivors: bytes


def advertise(identity: Identity, run: bytes, random: Random, *, hybrid: bool = False) -> Advertised:
    """Fresh keys for one attempt of a run, told in a signed message."""
    mask_seed, channel_seed, own_seed = random(SEED_BYTES), random(SEED_BYTES), random(SEED_BYTES)
    kem_seed = random(_KEM_SEED_BYTES) if hybrid else b""
    unsigned = Advertisement(
        identity.certificate,
        public_key(mask_seed),
        public_key(channel_seed),
        commitment_to(own_seed),
        kem_public_key(kem_seed) if hybrid else b"",
        b"",
    ).unsigned
    message = unsigned + signed(identity.key, "advertisement", run, unsigned)
    return Advertised(mask_seed, channel_seed, kem_seed, own_seed, run, message)


def share(state: Advertised, identity: Identity, view: View, now: float, random: Random) -> tuple[Shared, bytes]:
    """Check the neighbours' keys and share the own secrets among them: t of k each.

    Raises:
        ProtocolError: the view does not hold this device's advertisement, or holds one that is not of a device that
            the authority certified, or keys that are no keys.
    """
    if view.own.to_bytes() != state.message:
        raise ProtocolError("Expected the roster to hold what this device advertised last.")
    for advertisement in view.advertisements:
        advertisement.check(state.run, identity.authority, now)
    terms, degree = view.terms, view.terms.degree
    context = terms.context(state.run, view.root, devices_bytes(view.devices))
    count, threshold = len(view.neighbours), degree.threshold
    secret, channel = state.own_seed + state.mask_seed, private_key(state.channel_seed)
    pairs = split(secret, count, threshold, random((threshold - 1) * len(secret)))
    parcels = []
    for holder, pair, theirs in zip(view.neighbours, pairs, view.advertisements, strict=True):
        kem_secret, encapsulated = encapsulate(theirs.kem_key) if terms.hybrid else (b"", b"")
        key = channel_key(channel, theirs.channel_key, context, view.position, holder, kem_secret)
        both = split_pair(pair.tobytes())
        parcels.append(seal(key, context, view.position, holder, both["own"], both["mask"], encapsulated=encapsulated))
    shared = Shared(
        **_carried(state, Secrets),
        context=context,
        terms=terms.to_bytes(),
        server_key=view.server_key,
        position=view.position,
        neighbours=view.neighbours,
        devices=[theirs.device for theirs in view.advertisements],
        identities=[theirs.certificate.key for theirs in view.advertisements],
        mask_keys=[theirs.mask_key for theirs in view.advertisements],
        channel_keys=[theirs.channel_key for theirs in view.advertisements],
    )
    return shared, b"".join(parcels)


def receive(state: Shared, inbox: bytes) -> tuple[Uploaded, list[tuple[bytes, int]]]:
    """Open the neighbours' shares.

    Returns:
        The next state, and the masks of this device's update as keys and signs (:func:`upload`): its own one and one
        for each neighbour that shared.

    Raises:
        ProtocolError: a parcel that does not open, which names its sender; or too few of them.
    """
    terms, own, context = Terms.parse(state.terms), state.position, state.context
    parcels = read_inbox(inbox, len(state.neighbours), terms.hybrid)
    channel, mask = private_key(state.channel_seed), private_key(state.mask_seed)
    masks, shares = [(own_key(state.own_seed, context), 1)], []
    for index, (parcel, dealer) in enumerate(zip(parcels, state.neighbours, strict=True)):
        if parcel is None:
            shares.append(b"")
            continue
        kem_secret = decapsulate(state.kem_seed, parcel[:KEM_CIPHERTEXT_BYTES]) if terms.hybrid else b""
        key = channel_key(channel, state.channel_keys[index], context, dealer, own, kem_secret)
        shares.append(unseal(parcel, key, context, dealer, own, state.devices[index]))
        common = mask_key(mask, state.mask_keys[index], context, own, dealer)
        masks.append((common, sign_of(own, dealer)))
    if len(masks) - 1 < terms.degree.quorum:
        raise ProtocolError(
            f"Expected the shares of {len(masks) - 1} neighbours to be of at least {terms.degree.quorum}."
        )
    mac_key = upload_key(channel, state.server_key, context, own)
    return Uploaded(**_carried(state, Uploaded), upload_key=mac_key, shares=shares), masks


def upload(state: Uploaded, masks: Sequence[tuple[bytes, int]], residues: NDArray[np.uint32]) -> bytes:
    """The masked update, packed and authenticated. `residues` (2^m,) are encoded and noised, in [0, 2^bits)."""
    bits = Terms.parse(state.terms).encoding.bits
    total = in_lanes(residues, bits)
    add_masks(total, masks)
    np.bitwise_and(total, (1 << bits) - 1, out=total)
    content = pack(total, bits)
    return content + Poly1305.generate_tag(state.upload_key, content)


def agree(state: Uploaded, identity: Identity, survivors: bytes) -> tuple[Agreed, bytes]:
    """Sign the one set of survivors that this device will help to unmask.

    Raises:
        ProtocolError: a set that misses this device, is too small, or holds neighbours that did not share.
    """
    terms, reader = Terms.parse(state.terms), Reader(survivors, "the survivors")
    flags = reader.flags(terms.n)
    reader.end()
    if not flags[state.position]:
        raise ProtocolError("Expected this device to be among the survivors.")
    if sum(flags) < terms.least_survivors:
        raise ProtocolError(f"Expected {sum(flags)} survivors to be at least {terms.least_survivors} of {terms.n}.")
    for neighbour, held in zip(state.neighbours, state.shares, strict=True):
        if flags[neighbour] and not held:
            raise ProtocolError(f"Expected position {neighbour}, which did not share, not to be among the survivors.")
    signature = signed(identity.key, "survivors", state.context, subject(survivors))
    return Agreed(**_carried(state, Uploaded), survivors=survivors), signature


def unmask(state: Agreed, signatures: bytes) -> bytes:
    """What unmasks the sum: the seed of the own mask, and of each neighbour that shared one share, of its own mask if
    it is among the survivors, of its key agreement otherwise. The state is to be erased before this is sent.

    Raises:
        ProtocolError: fewer neighbours than the quorum signed the survivors that this device signed.
    """
    found = read_signatures(signatures, len(state.neighbours))
    valid = sum(
        signature is not None and verified(key, "survivors", state.context, subject(state.survivors), signature)
        for key, signature in zip(state.identities, found, strict=True)
    )
    terms = Terms.parse(state.terms)
    if valid < terms.degree.quorum:
        raise ProtocolError(
            f"Expected {valid} neighbours that signed the same survivors to be at least {terms.degree.quorum}."
        )
    alive = Reader(state.survivors, "the survivors").flags(terms.n)
    given = [state.own_seed]
    for neighbour, pair in zip(state.neighbours, state.shares, strict=True):
        if pair:
            given.append(split_pair(pair)["own" if alive[neighbour] else "mask"])
    return b"".join(given)


def sign_of(one: int, other: int) -> int:
    """The sign with which position `one` adds the mask that it has in common with `other`."""
    return 1 if one < other else -1


def _carried(state: object, into: type) -> dict[str, Any]:
    """What a state hands on to the next one."""
    return {field.name: getattr(state, field.name) for field in fields(into) if hasattr(state, field.name)}
