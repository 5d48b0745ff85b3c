"""Identities of simulated devices: keys that follow from the seed, so that they keep no secret from anybody."""

from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.privacy.randomness import seeded_stream
from common.secagg.identity import issue
from common.secagg.member import Identity

_NEVER = 2**63 - 1  # seconds: the certificates do not expire


def simulated_identity(seed: int, device: int) -> Identity:
    """Who device number `device` is, certified by the run's simulated authority."""
    key = _key(seed, "identity", device)
    certificate = issue(_authority(seed), device, key.public_key().public_bytes_raw(), _NEVER)
    return Identity(key, certificate, simulated_authority(seed))


def simulated_authority(seed: int) -> bytes:
    """32 bytes, the public key of the run's simulated authority."""
    return _authority(seed).public_key().public_bytes_raw()


def simulated_publisher(seed: int) -> Ed25519PrivateKey:
    """The key that a simulated run's models are signed with."""
    return _key(seed, "publisher", 0)


@lru_cache(maxsize=1)
def _authority(seed: int) -> Ed25519PrivateKey:
    return _key(seed, "authority", 0)


def _key(seed: int, label: str, number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seeded_stream(seed, label, number).words(4).tobytes())
