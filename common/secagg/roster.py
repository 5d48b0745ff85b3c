"""Stage 1, downwards: the terms, the commitment to the roster, and a device's own and its neighbours' places in it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import ProtocolError
from common.secagg.advertisement import Advertisement, advertisement_bytes
from common.secagg.graph import neighbours_of
from common.secagg.identity import KEY_BYTES
from common.secagg.merkle import verify
from common.secagg.terms import DIGEST_BYTES, Terms
from common.secagg.wire import Reader, numbers, varint


@dataclass(frozen=True)
class View:
    """What one device sees of a roster.

    Attributes:
        terms: of the attempt.
        devices: the numbers of all n devices, increasing.
        root: 32 bytes, of the Merkle tree over the roster's advertisements.
        server_key: 32 bytes, X25519: what uploads are authenticated with.
        position: the device's own, in [0, n).
        own: its advertisement, as it is in the roster.
        neighbours: positions, increasing.
        advertisements: of the neighbours, in the same order.
    """

    terms: Terms
    devices: list[int]
    root: bytes
    server_key: bytes
    position: int
    own: Advertisement
    neighbours: list[int]
    advertisements: list[Advertisement]

    @classmethod
    def parse(cls, content: bytes, check: Callable[[Terms], None]) -> "View":
        """Read a view and check that it is of one roster: every place in it is proven against the root and is of the
        device that is listed there, no device is listed twice, and the neighbours are those of the graph that the root
        determines. The list is part of the context, so all devices refuse a roster in which somebody has two places.

        Args:
            check: raises where the terms are not acceptable, before anything of the size of n is allocated.

        Raises:
            ProtocolError: otherwise.
            AggregationError: no (k, t) exists for the terms.
        """
        reader = Reader(content, "the view of a roster")
        terms = Terms.read(reader)
        check(terms)
        listed = [
            gap + place for place, gap in enumerate(itertools.accumulate(reader.varint() for _ in range(terms.n)))
        ]
        root, server_key, (position,) = reader.take(DIGEST_BYTES), reader.take(KEY_BYTES), reader.numbers("I")
        if position >= terms.n:
            raise ProtocolError(f"Expected position={position} < n={terms.n}.")
        neighbours = neighbours_of(root, terms.n, terms.degree.neighbours, position).tolist()
        found = []
        for place in [position, *neighbours]:
            leaf = reader.take(advertisement_bytes(terms.hybrid))
            (length,) = reader.numbers("B")
            if not verify(root, leaf, place, terms.n, reader.take(length * DIGEST_BYTES)):
                raise ProtocolError(f"Expected position {place} to be proven part of the roster.")
            found.append(Advertisement.parse(leaf, terms.hybrid))
            if found[-1].device != listed[place]:
                raise ProtocolError(f"Expected position {place} to be of device {listed[place]}.", found[-1].device)
        reader.end()
        return cls(terms, listed, root, server_key, position, found[0], neighbours, found[1:])


def devices_bytes(devices: Sequence[int]) -> bytes:
    """The roster's device numbers, increasing: the first one, then how many are left out before each next one. No
    device can be written twice."""
    return b"".join(varint(device - before - 1) for before, device in itertools.pairwise([-1, *devices]))


def place_bytes(leaf: bytes, proof: bytes) -> bytes:
    """A device's advertisement and the proof that it is in the roster, as they stand in a view."""
    return leaf + numbers("B", len(proof) // DIGEST_BYTES) + proof


def view_bytes(
    terms: Terms, devices: bytes, root: bytes, server_key: bytes, position: int, places: Sequence[bytes]
) -> bytes:
    """What :meth:`View.parse` reads; `places` are the device's own and those of its neighbours."""
    return b"".join([terms.to_bytes(), devices, root, server_key, numbers("I", position), *places])
