"""Models with the signature of their publisher, which devices pin: no device trains, keeps or serves another one.

What is signed is the model's bytes with the run, the number of completed rounds and the items that its rows belong to:
no signed model passes for that of another run, of another round, or for other items.
Tests: ``tests/unit/test_signed_model.py``.
"""

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ProtocolError
from common.secagg.identity import signed, verified
from common.secagg.wire import numbers

VERSION = 1
"""Of the model's format: its parameters' names and shapes, and what they mean."""


@dataclass(frozen=True)
class Edition:
    """Which model it is.

    Attributes:
        run: 32 bytes, of which run (:func:`common.messages.run_digest`).
        round: completed rounds.
        rows: 32 bytes, of the items that its rows belong to: :attr:`common.catalogue.Catalogue.digest`, or that of a
            slice of them (:func:`common.item_slice.rows_digest`).
    """

    run: bytes
    round: int
    rows: bytes

    def sign(self, key: Ed25519PrivateKey, content: bytes) -> bytes:
        """64 bytes, the publisher's signature of a model's bytes."""
        return signed(key, "model", *self._parts(content))

    def check(self, publisher: bytes, content: bytes, signature: bytes) -> None:
        """Whether `publisher` (32 bytes) signed these bytes as this edition. Raises :class:`ProtocolError`."""
        if not verified(publisher, "model", *self._parts(content), signature):
            raise ProtocolError(
                f"Expected the model of {self.round} rounds to be signed, for this run and these items, by the "
                "publisher that this device has pinned."
            )

    def _parts(self, content: bytes) -> tuple[bytes, ...]:
        return numbers("IQ", VERSION, self.round), self.run, self.rows, hashlib.sha256(content).digest()
