"""Ed25519 keys in PEM files: the enrolment authority's, and that of a server's models."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.errors import RunError


def read_signing_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """The key of a file. Raises :class:`RunError`, also where the passphrase is not the right one."""
    try:
        key = load_pem_private_key(path.read_bytes(), passphrase.encode() if passphrase else None)
    except OSError as error:
        raise RunError(f"Expected {path} to be a readable key: {error.strerror}.") from None
    except (ValueError, TypeError) as error:
        raise RunError(f"Expected {path} to open with this passphrase: {error}.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise RunError(f"Expected {path} to be an Ed25519 key.")
    return key
