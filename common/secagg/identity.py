"""Who is a device: an Ed25519 key, certified by an enrolment authority that is not the aggregator.

Devices pin the authority's public key. Without certificates a server could fill a roster with devices of its own
making and would be left with one real update in the sum.
"""

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import ProtocolError
from common.secagg.wire import Reader, numbers

KEY_BYTES = 32
SIGNATURE_BYTES = 64
CERTIFICATE_BYTES = 12 + KEY_BYTES + SIGNATURE_BYTES


@dataclass(frozen=True)
class Certificate:
    """What the authority says of a device.

    Attributes:
        device: the device's number, below 2^32.
        key: 32 bytes, its Ed25519 public key.
        expires: seconds since the epoch.
        signature: 64 bytes, the authority's.
    """

    device: int
    key: bytes
    expires: int
    signature: bytes

    def to_bytes(self) -> bytes:
        return _certified(self.device, self.key, self.expires) + self.signature

    @classmethod
    def read(cls, reader: Reader) -> "Certificate":
        """Raises :class:`ProtocolError`."""
        device, expires = reader.numbers("IQ")
        return cls(device, reader.take(KEY_BYTES), expires, reader.take(SIGNATURE_BYTES))

    def check(self, authority: bytes, now: float) -> None:
        """Whether `authority` (32 bytes) signed this and it is valid at `now`. Raises :class:`ProtocolError`."""
        content = _certified(self.device, self.key, self.expires)
        if not verified(authority, "certificate", content, self.signature):
            raise ProtocolError(
                f"Expected the certificate of device {self.device} to be of the authority.", self.device
            )
        if now > self.expires:
            raise ProtocolError(f"Expected the certificate of device {self.device} to be valid still.", self.device)


def issue(authority: Ed25519PrivateKey, device: int, key: bytes, expires: int) -> Certificate:
    """The authority's certificate of a device's public key."""
    return Certificate(device, key, expires, signed(authority, "certificate", _certified(device, key, expires)))


def signed(key: Ed25519PrivateKey, label: str, *parts: bytes) -> bytes:
    """A signature over the parts, bound to what it is for by its label."""
    return key.sign(_labelled(label, parts))


def verified(key: bytes, label: str, *parts_and_signature: bytes) -> bool:
    """Whether the last of the parts is the signature of the others by the holder of `key` (32 bytes)."""
    *parts, signature = parts_and_signature
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _labelled(label, tuple(parts)))
    except (InvalidSignature, ValueError):
        return False
    return True


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 of the parts with their lengths, so that no two lists of parts and labels share one."""
    return hashlib.sha256(_labelled(label, parts)).digest()


def _labelled(label: str, parts: tuple[bytes, ...]) -> bytes:
    pieces = [b"fedtopk secure aggregation 1", label.encode(), *parts]
    return b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces)


def _certified(device: int, key: bytes, expires: int) -> bytes:
    return numbers("IQ", device, expires) + key
