"""What a device, the enrolment authority and the server tell each other about who is a device: small JSON documents.

A device has two keys: Ed25519 for secure aggregation and ECDSA P-384 for Flower's node authentication (the *transport*
key, in OpenSSH's format). The authority's enrolment binds both to one device number, so a node that is authenticated
with one key cannot take part as the holder of another one.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from common.errors import ProtocolError
from common.secagg.identity import CERTIFICATE_BYTES, KEY_BYTES, Certificate, issue, signed, verified
from common.secagg.wire import Reader, numbers

LARGEST_DEVICE = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """A device asks to be enrolled.

    Attributes:
        key: hexadecimal, its Ed25519 public key.
        transport: its ECDSA P-384 public key, as ``ssh-keygen`` writes it, without a comment.
        signature: hexadecimal, over both, with the Ed25519 key: whoever asks holds it.
    """

    key: str
    transport: str
    signature: str

    @classmethod
    def make(cls, key: Ed25519PrivateKey, transport: str) -> "Request":
        """The request of the holder of `key`."""
        public, transport = key.public_key().public_bytes_raw(), _transport(transport)
        return cls(public.hex(), transport, signed(key, "enrolment request", public, transport.encode()).hex())

    @classmethod
    def parse(cls, text: str | bytes) -> "Request":
        """Raises :class:`ProtocolError` where it is none, or not of the holder of its key."""
        request = cls(**_fields(text, cls, "an enrolment request"))
        key, signature = _bytes(request.key, "key"), _bytes(request.signature, "signature")
        if _transport(request.transport) != request.transport:
            raise ProtocolError("Expected a transport key without a comment.")
        if len(key) != KEY_BYTES or not verified(key, "enrolment request", key, request.transport.encode(), signature):
            raise ProtocolError("Expected the enrolment request to be signed with its own key.")
        return request

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Enrolment:
    """The authority's word for a device.

    Attributes:
        certificate: hexadecimal, of its Ed25519 key (:class:`common.secagg.identity.Certificate`).
        transport: its ECDSA P-384 public key.
        authority: hexadecimal, the authority's public key; whoever reads this compares it with the one it has pinned.
        signature: hexadecimal, the authority's, over certificate and transport key.
    """

    certificate: str
    transport: str
    authority: str
    signature: str

    @classmethod
    def make(cls, authority: Ed25519PrivateKey, device: int, request: Request, expires: int) -> "Enrolment":
        """What the authority answers a request that it has approved."""
        certificate = issue(authority, device, bytes.fromhex(request.key), expires).to_bytes()
        signature = signed(authority, "enrolment", certificate, request.transport.encode())
        public = authority.public_key().public_bytes_raw()
        return cls(certificate.hex(), request.transport, public.hex(), signature.hex())

    @classmethod
    def parse(cls, text: str | bytes) -> "Enrolment":
        """Raises :class:`ProtocolError` where it is none; whose it is, :meth:`checked` says."""
        enrolment = cls(**_fields(text, cls, "an enrolment"))
        if len(_bytes(enrolment.certificate, "certificate")) != CERTIFICATE_BYTES:
            raise ProtocolError(f"Expected a certificate of {CERTIFICATE_BYTES} bytes in the enrolment.")
        _bytes(enrolment.authority, "authority")
        _bytes(enrolment.signature, "signature")
        return enrolment

    def checked(self, authority: bytes, now: float) -> Certificate:
        """The certificate, if `authority` (32 bytes) signed all this and it is valid at `now`.

        Raises:
            ProtocolError: otherwise.
        """
        content = bytes.fromhex(self.certificate)
        certificate = Certificate.read(Reader(content, "a certificate"))
        if not verified(authority, "enrolment", content, self.transport.encode(), bytes.fromhex(self.signature)):
            raise ProtocolError(f"Expected the enrolment of device {certificate.device} to be of the authority.")
        certificate.check(authority, now)
        return certificate

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Revocations:
    """The authority's list of devices that are none any more.

    Attributes:
        number: of the list; a higher one replaces a lower one.
        devices: their numbers, increasing.
        signature: hexadecimal, the authority's.
    """

    number: int
    devices: list[int]
    signature: str

    @classmethod
    def make(cls, authority: Ed25519PrivateKey, number: int, devices: list[int]) -> "Revocations":
        """The list as the authority signs it."""
        revoked = sorted(set(devices))
        return cls(number, revoked, signed(authority, "revocations", _listed(number, revoked)).hex())

    @classmethod
    def parse(cls, text: str | bytes, authority: bytes) -> "Revocations":
        """Raises :class:`ProtocolError` where it is no list that `authority` (32 bytes) signed."""
        found = cls(**_fields(text, cls, "a revocation list"))
        signature = _bytes(found.signature, "signature")
        try:
            content = _listed(found.number, found.devices)
        except Exception as error:
            raise ProtocolError(f"Expected a revocation list of device numbers: {error}.") from None
        if not verified(authority, "revocations", content, signature):
            raise ProtocolError("Expected the revocation list to be of the authority.")
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def _fields(text: str | bytes, kind: type, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError(f"Expected {what} to be JSON.") from None
    names = {name: field.type for name, field in kind.__dataclass_fields__.items()}  # type: ignore[attr-defined]
    if not isinstance(found, dict) or set(found) != set(names):
        raise ProtocolError(f"Expected {what} to have the fields {', '.join(names)}.")
    for name, type_ in names.items():
        if type_ in (str, int) and type(found[name]) is not type_:
            raise ProtocolError(f"Expected {name}={found[name]!r} of {what} to be of type {type_.__name__}.")
    return found


def _bytes(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ProtocolError(f"Expected {name}={text[:80]!r} to be hexadecimal.") from None


def _transport(text: str) -> str:
    """An OpenSSH ECDSA P-384 public key, without its comment."""
    try:
        key = load_ssh_public_key(text.encode())
    except Exception:
        raise ProtocolError("Expected the transport key to be an OpenSSH public key.") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ProtocolError("Expected the transport key to be of ECDSA on P-384.")
    return " ".join(text.split()[:2])


def _listed(number: int, devices: list[int]) -> bytes:
    return numbers(f"Q{len(devices)}I", number, *devices)
