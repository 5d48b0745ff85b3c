"""Key agreement: the key of the mask that two devices have in common, those of the channels between them, and the one
that authenticates a device's upload to the server."""

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import ProtocolError
from common.secagg.wire import numbers

SEED_BYTES = 32
KEM_KEY_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088


def private_key(seed: bytes) -> X25519PrivateKey:
    """The X25519 key of 32 secret bytes (RFC 7748). Making it costs more than agreeing on a secret with it."""
    return X25519PrivateKey.from_private_bytes(seed)


def public_key(seed: bytes) -> bytes:
    """Its public key."""
    return private_key(seed).public_key().public_bytes_raw()


_ANY = private_key(bytes([1] * SEED_BYTES))


def is_key(public: bytes) -> bool:
    """Whether 32 bytes are an X25519 key with which secrets can be agreed on: a point that is not of low order."""
    try:
        _ANY.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def mask_key(own: X25519PrivateKey, other: bytes, context: bytes, one: int, two: int) -> bytes:
    """32 bytes: the key of the mask that positions `one` and `two` have in common, the same from either side.

    Args:
        own: one side's key.
        other: the other side's public key.

    Raises:
        ProtocolError: a public key of low order, with which the result would not be secret.
    """
    low, high = sorted((one, two))
    return _derive(_exchange(own, other), context, b"mask" + numbers("II", low, high))


def channel_key(
    own: X25519PrivateKey, other: bytes, context: bytes, sender: int, receiver: int, kem_secret: bytes
) -> bytes:
    """32 bytes: the key of the one message from `sender` to `receiver`; `kem_secret` is empty or of ML-KEM.

    Raises :class:`ProtocolError` for a public key of low order.
    """
    secret = _exchange(own, other) + kem_secret
    return _derive(secret, context, b"channel" + numbers("II", sender, receiver))


def upload_key(own: X25519PrivateKey, other: bytes, context: bytes, position: int) -> bytes:
    """32 bytes: the key of the one upload of the device at `position`, the same for it and for the server.

    Raises :class:`ProtocolError` for a public key of low order.
    """
    return _derive(_exchange(own, other), context, b"upload" + numbers("I", position))


def own_key(seed: bytes, context: bytes) -> bytes:
    """32 bytes: the key of a device's own mask, from b."""
    return _derive(seed, context, b"own mask")


def kem_public_key(seed: bytes) -> bytes:
    """The ML-KEM-768 public key of 64 secret bytes (FIPS 203)."""
    return MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()


def encapsulate(other: bytes) -> tuple[bytes, bytes]:
    """A secret for the holder of a KEM key, and the ciphertext that brings it. Raises :class:`ProtocolError`."""
    try:
        return MLKEM768PublicKey.from_public_bytes(other).encapsulate()
    except ValueError:
        raise ProtocolError("Expected a neighbour's ML-KEM key to be one.") from None


def decapsulate(seed: bytes, ciphertext: bytes) -> bytes:
    """The secret; another one where the ciphertext was not made for this key."""
    return MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ciphertext)


def _exchange(own: X25519PrivateKey, other: bytes) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise ProtocolError("Expected another party's X25519 key to be a point of full order.") from None


def _derive(secret: bytes, context: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=context, info=info).derive(secret)
