"""Stage 0: what a device says of itself, once for each participation, before it knows the roster.

The keys are used in one attempt and erased, whatever became of it.
"""

from dataclasses import dataclass

from common.errors import ProtocolError
from common.secagg.identity import CERTIFICATE_BYTES, KEY_BYTES, SIGNATURE_BYTES, Certificate, digest, verified
from common.secagg.keys import KEM_KEY_BYTES, is_key
from common.secagg.wire import Reader

COMMITMENT_BYTES = 32

_LENGTH = CERTIFICATE_BYTES + 2 * KEY_BYTES + COMMITMENT_BYTES + SIGNATURE_BYTES


@dataclass(frozen=True)
class Advertisement:
    """A device's keys for one attempt.

    Attributes:
        certificate: of its identity.
        mask_key, channel_key: 32 bytes each, X25519: for the masks that it shares with its neighbours, and for the
            shares that it sends them.
        commitment: 32 bytes, H(b) of the seed b of its own mask.
        kem_key: 1,184 bytes, ML-KEM-768, or nothing where the run is not hybrid.
        signature: 64 bytes, with the identity key.
    """

    certificate: Certificate
    mask_key: bytes
    channel_key: bytes
    commitment: bytes
    kem_key: bytes
    signature: bytes

    @property
    def device(self) -> int:
        """The device's number."""
        return self.certificate.device

    @property
    def unsigned(self) -> bytes:
        """What the signature is over, apart from the run."""
        return self.certificate.to_bytes() + self.mask_key + self.channel_key + self.commitment + self.kem_key

    def to_bytes(self) -> bytes:
        return self.unsigned + self.signature

    @classmethod
    def parse(cls, content: bytes, hybrid: bool) -> "Advertisement":
        """Raises :class:`ProtocolError` for another length."""
        reader = Reader(content, "an advertisement")
        certificate = Certificate.read(reader)
        mask_key, channel_key = reader.take(KEY_BYTES), reader.take(KEY_BYTES)
        commitment = reader.take(COMMITMENT_BYTES)
        kem_key = reader.take(KEM_KEY_BYTES if hybrid else 0)
        found = cls(certificate, mask_key, channel_key, commitment, kem_key, reader.take(SIGNATURE_BYTES))
        reader.end()
        return found

    def check(self, run: bytes, authority: bytes, now: float) -> None:
        """Whether the device that the authority certified signed this for the run. Raises :class:`ProtocolError`."""
        self.certificate.check(authority, now)
        if not verified(self.certificate.key, "advertisement", run, self.unsigned, self.signature):
            raise ProtocolError(f"Expected the keys of device {self.device} to be signed by it.", self.device)
        if not (is_key(self.mask_key) and is_key(self.channel_key)):
            raise ProtocolError(f"Expected the keys of device {self.device} to be points of full order.", self.device)


def advertisement_bytes(hybrid: bool) -> int:
    """Length of an advertisement."""
    return _LENGTH + (KEM_KEY_BYTES if hybrid else 0)


def commitment_to(seed: bytes) -> bytes:
    """H(b)."""
    return digest("own mask", seed)
