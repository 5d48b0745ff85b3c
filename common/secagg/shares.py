"""Stage 1, upwards: the shares of a device's two secrets, one parcel for each neighbour.

A parcel is sealed for its receiver and carries, for everyone to see, a commitment to either share in it. The receiver
checks them, so a share that does not fit its commitment later is its holder's doing, and shares that all fit but do
not give the secret are their dealer's. It consists of

- 1,088 bytes for the receiver's KEM key, in a hybrid run;
- 80 bytes, both shares encrypted and authenticated;
- 16 bytes each, the commitments to the share of the own mask's seed and to that of the key agreement's.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import ProtocolError
from common.secagg.keys import KEM_CIPHERTEXT_BYTES, SEED_BYTES
from common.secagg.wire import Reader, flags, numbers

SHARE_BYTES = SEED_BYTES
PAIR_BYTES = 2 * SHARE_BYTES
COMMITMENT_BYTES = 16

_TAG_BYTES = 16
_NONCE = bytes(12)  # a key seals one message: it is of one sender, one receiver and one attempt

Kind = Literal["own", "mask"]
"""Which secret a share is of: the seed of the device's own mask, or that of its key agreement."""

_KINDS: tuple[Kind, Kind] = ("own", "mask")


def commitment(context: bytes, dealer: int, holder: int, kind: Kind, share: bytes) -> bytes:
    """16 bytes that tell a holder's share from any other; shares are random, so that it says nothing of one."""
    # The server makes k·n of these: one hash of fields of fixed lengths, instead of `identity.digest`.
    fields = context + numbers("IIB", dealer, holder, _KINDS.index(kind)) + share
    return hashlib.sha256(b"fedtopk secure aggregation 1: share" + fields).digest()[:COMMITMENT_BYTES]


def promised(parcel: bytes, kind: Kind) -> bytes:
    """The commitment in a parcel."""
    return parcel[-COMMITMENT_BYTES:] if kind == "mask" else parcel[-2 * COMMITMENT_BYTES : -COMMITMENT_BYTES]


def seal(
    key: bytes, context: bytes, dealer: int, holder: int, own: bytes, mask: bytes, *, encapsulated: bytes
) -> bytes:
    """The parcel from position `dealer` to position `holder`."""
    sealed = ChaCha20Poly1305(key).encrypt(_NONCE, own + mask, _associated(context, dealer, holder))
    commitments = [commitment(context, dealer, holder, kind, share) for kind, share in split_pair(own + mask).items()]
    return b"".join((encapsulated, sealed, *commitments))


def unseal(parcel: bytes, key: bytes, context: bytes, dealer: int, holder: int, device: int) -> bytes:
    """64 bytes, both shares of the dealer's secrets, which fit their commitments.

    Args:
        device: the dealer's number, which is named in errors.

    Raises:
        ProtocolError: the parcel was changed, is of another attempt, or comes from somebody else.
    """
    end = len(parcel) - 2 * COMMITMENT_BYTES
    sealed = parcel[end - PAIR_BYTES - _TAG_BYTES : end]
    try:
        pair = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, _associated(context, dealer, holder))
    except InvalidTag:
        raise ProtocolError(f"Expected the shares of device {device} to be sealed for this attempt.", device) from None
    for kind, share in split_pair(pair).items():
        if promised(parcel, kind) != commitment(context, dealer, holder, kind, share):
            raise ProtocolError(f"Expected the shares of device {device} to fit its commitments.", device)
    return pair


def split_pair(pair: bytes) -> dict[Kind, bytes]:
    """The two shares of an unsealed parcel."""
    return {"own": pair[:SHARE_BYTES], "mask": pair[SHARE_BYTES:]}


def read_parcels(content: bytes, count: int, hybrid: bool) -> list[bytes]:
    """One parcel for each of `count` neighbours. Raises :class:`ProtocolError`."""
    reader, length = Reader(content, "the shares"), _parcel_bytes(hybrid)
    parcels = [reader.take(length) for _ in range(count)]
    reader.end()
    return parcels


def inbox_bytes(parcels: Sequence[bytes | None]) -> bytes:
    """What the server hands a device of its neighbours' parcels; None where a neighbour sent none."""
    return flags([parcel is not None for parcel in parcels]) + b"".join(filter(None, parcels))


def read_inbox(content: bytes, count: int, hybrid: bool) -> list[bytes | None]:
    """Raises :class:`ProtocolError`."""
    reader, length = Reader(content, "the neighbours' shares"), _parcel_bytes(hybrid)
    parcels = [reader.take(length) if present else None for present in reader.flags(count)]
    reader.end()
    return parcels


def _associated(context: bytes, dealer: int, holder: int) -> bytes:
    return context + numbers("II", dealer, holder)


def _parcel_bytes(hybrid: bool) -> int:
    return (KEM_CIPHERTEXT_BYTES if hybrid else 0) + PAIR_BYTES + _TAG_BYTES + 2 * COMMITMENT_BYTES
