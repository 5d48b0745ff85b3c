"""Stage 3: the signatures that fix one set of survivors."""

import hashlib

from common.secagg.identity import SIGNATURE_BYTES
from common.secagg.wire import Reader, flags


def subject(survivors: bytes) -> bytes:
    """What is signed of a set of survivors, beside the context."""
    return hashlib.sha256(survivors).digest()


def signatures_bytes(signatures: list[bytes | None]) -> bytes:
    """What the server hands a device of its neighbours' signatures; None where a neighbour sent none."""
    given = [signature for signature in signatures if signature is not None]
    return flags([signature is not None for signature in signatures]) + b"".join(given)


def read_signatures(content: bytes, count: int) -> list[bytes | None]:
    """Raises :class:`ProtocolError`."""
    reader = Reader(content, "the neighbours' signatures")
    found = [reader.take(SIGNATURE_BYTES) if present else None for present in reader.flags(count)]
    reader.end()
    return found
