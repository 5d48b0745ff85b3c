"""Stage 1, upwards: the shares of a device's two secrets, one parcel for each neighbour.

A parcel is sealed for its receiver and carries, for everyone to see, a commitment to either share in it. The receiver
checks them, so a share that does not fit its commitment later is its holder's doing, and shares that all fit but do
not give the secret are their dealer's.
"""

from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import ProtocolError
from common.secagg.identity import digest
from common.secagg.keys import KEM_CIPHERTEXT_BYTES, SEED_BYTES
from common.secagg.wire import Reader, flags, numbers

SHARE_BYTES = SEED_BYTES
PAIR_BYTES = 2 * SHARE_BYTES
COMMITMENT_BYTES = 16

_TAG_BYTES = 16
_NONCE = bytes(12)  # a key seals one message: it is of one sender, one receiver and one attempt

Kind = Literal["own", "mask"]
"""Which secret a share is of: the seed of the device's own mask, or that of its key agreement."""


@dataclass(frozen=True)
class Parcel:
    """What one neighbour is sent.

    Attributes:
        encapsulated: 1,088 bytes for the receiver's KEM key, or nothing.
        sealed: 80 bytes, both shares encrypted and authenticated.
        commitments: to the share of the own mask's seed and to that of the key agreement's, 16 bytes each.
    """

    encapsulated: bytes
    sealed: bytes
    commitments: dict[Kind, bytes]

    def to_bytes(self) -> bytes:
        return self.encapsulated + self.sealed + self.commitments["own"] + self.commitments["mask"]

    @classmethod
    def read(cls, reader: Reader, hybrid: bool) -> "Parcel":
        """Raises :class:`ProtocolError`."""
        encapsulated = reader.take(KEM_CIPHERTEXT_BYTES if hybrid else 0)
        sealed = reader.take(PAIR_BYTES + _TAG_BYTES)
        return cls(encapsulated, sealed, {"own": reader.take(COMMITMENT_BYTES), "mask": reader.take(COMMITMENT_BYTES)})


def commitment(context: bytes, dealer: int, holder: int, kind: Kind, share: bytes) -> bytes:
    """16 bytes that tell a holder's share from any other; shares are random, so that it says nothing of one."""
    return digest("share", context, numbers("II", dealer, holder), kind.encode(), share)[:COMMITMENT_BYTES]


def seal(
    key: bytes, context: bytes, dealer: int, holder: int, own: bytes, mask: bytes, *, encapsulated: bytes
) -> Parcel:
    """The parcel from position `dealer` to position `holder`."""
    sealed = ChaCha20Poly1305(key).encrypt(_NONCE, own + mask, _associated(context, dealer, holder))
    shares: dict[Kind, bytes] = {"own": own, "mask": mask}
    commitments = {kind: commitment(context, dealer, holder, kind, share) for kind, share in shares.items()}
    return Parcel(encapsulated, sealed, commitments)


def unseal(parcel: Parcel, key: bytes, context: bytes, dealer: int, holder: int, device: int) -> bytes:
    """64 bytes, both shares of the dealer's secrets, which fit their commitments.

    Args:
        device: the dealer's number, which is named in errors.

    Raises:
        ProtocolError: the parcel was changed, is of another attempt, or comes from somebody else.
    """
    try:
        pair = ChaCha20Poly1305(key).decrypt(_NONCE, parcel.sealed, _associated(context, dealer, holder))
    except InvalidTag:
        raise ProtocolError(f"Expected the shares of device {device} to be sealed for this attempt.", device) from None
    for kind, share in split_pair(pair).items():
        if parcel.commitments[kind] != commitment(context, dealer, holder, kind, share):
            raise ProtocolError(f"Expected the shares of device {device} to fit its commitments.", device)
    return pair


def split_pair(pair: bytes) -> dict[Kind, bytes]:
    """The two shares of an unsealed parcel."""
    return {"own": pair[:SHARE_BYTES], "mask": pair[SHARE_BYTES:]}


def read_parcels(content: bytes, count: int, hybrid: bool) -> list[Parcel]:
    """One parcel for each of `count` neighbours. Raises :class:`ProtocolError`."""
    reader = Reader(content, "the shares")
    parcels = [Parcel.read(reader, hybrid) for _ in range(count)]
    reader.end()
    return parcels


def inbox_bytes(parcels: list[Parcel | None]) -> bytes:
    """What the server hands a device of its neighbours' parcels; None where a neighbour sent none."""
    present = [parcel.to_bytes() for parcel in parcels if parcel is not None]
    return flags([parcel is not None for parcel in parcels]) + b"".join(present)


def read_inbox(content: bytes, count: int, hybrid: bool) -> list[Parcel | None]:
    """Raises :class:`ProtocolError`."""
    reader = Reader(content, "the neighbours' shares")
    parcels = [Parcel.read(reader, hybrid) if present else None for present in reader.flags(count)]
    reader.end()
    return parcels


def _associated(context: bytes, dealer: int, holder: int) -> bytes:
    return context + numbers("II", dealer, holder)
