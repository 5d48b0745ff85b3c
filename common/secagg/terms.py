"""The terms of one attempt at one round, which all its devices must share, and the context that binds all to them.

The context goes into every key derivation, signature and associated datum. Devices that were told anything different
(another model, roster, noise, threshold) derive other keys: they cannot open each other's shares, and refuse.
"""

from dataclasses import astuple, dataclass

from common.errors import PrivacyError, ProtocolError
from common.privacy.encoding import Encoding
from common.secagg.graph import Degree, degree
from common.secagg.identity import digest
from common.secagg.wire import Reader, numbers

DIGEST_BYTES = 32

_NUMBERS = "IIIddB"
_ENCODING = "IddBddB"


@dataclass(frozen=True)
class Terms:
    """What the server offers to each device of a roster.

    Attributes:
        round, attempt: from 1.
        n: size of the roster, from 1.
        corrupt, dropout: γ and δ, shares of the roster that may collude with the server, and that may drop out.
        hybrid: whether shares travel under ML-KEM-768 as well as X25519.
        encoding: how updates are clipped, rounded, noised and reduced.
        model: 32 bytes, digest of the parameters that the round starts from.
    """

    round: int
    attempt: int
    n: int
    corrupt: float
    dropout: float
    hybrid: bool
    encoding: Encoding
    model: bytes

    @property
    def degree(self) -> Degree:
        """(k, t), which both sides derive from n, γ and δ: no message holds them."""
        return degree(self.n, self.corrupt, self.dropout)

    @property
    def least_survivors(self) -> int:
        """⌈(1−δ)n⌉: with fewer updates nothing is released."""
        return self.n - int(self.dropout * self.n + 1e-9)

    def to_bytes(self) -> bytes:
        own = numbers(_NUMBERS, self.round, self.attempt, self.n, self.corrupt, self.dropout, self.hybrid)
        return own + numbers(_ENCODING, *astuple(self.encoding)) + self.model

    @classmethod
    def read(cls, reader: Reader) -> "Terms":
        """Raises :class:`ProtocolError` where they are no possible terms."""
        round_, attempt, n, corrupt, dropout, hybrid = reader.numbers(_NUMBERS)
        dimension, clip, scale, bits, variance, honest, central = reader.numbers(_ENCODING)
        try:
            encoding = Encoding(dimension, clip, scale, bits, variance, honest, bool(central))
        except PrivacyError as error:
            raise ProtocolError(str(error)) from None
        if not (n >= 1 and 0 <= corrupt < 1 and 0 <= dropout < 1 and {hybrid, central} <= {0, 1}):
            raise ProtocolError(f"Expected a roster of n={n} ≥ 1 with γ={corrupt}, δ={dropout} in [0, 1).")
        if encoding.squared_bound < 1:
            raise ProtocolError(f"Expected a scale={encoding.scale} at which an update is not 0.")
        return cls(round_, attempt, n, corrupt, dropout, bool(hybrid), encoding, reader.take(DIGEST_BYTES))

    @classmethod
    def parse(cls, content: bytes) -> "Terms":
        """Raises :class:`ProtocolError`."""
        reader = Reader(content, "the terms")
        terms = cls.read(reader)
        reader.end()
        return terms

    def context(self, run: bytes, root: bytes, devices: bytes) -> bytes:
        """32 bytes for this attempt: of the run, the terms, the root of the roster's Merkle tree and who is in it."""
        return digest("context", run, self.to_bytes(), root, devices)
