"""What a device keeps, as values and as bytes."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from common.catalogue import Catalogue
from common.errors import DataError

_BLOCK = 64
_EVENT = struct.Struct("<qdH")
_STATE = struct.Struct("<32sQI")


@dataclass(frozen=True)
class Event:
    """One interaction.

    Attributes:
        item: the item's id in the catalogue.
        rating: finite, in the declared range.
        timestamp: seconds.
    """

    item: str
    rating: float
    timestamp: int

    def pack(self) -> bytes:
        """Bytes whose length says nothing about an item whose id has at most 46 bytes, and little about a longer one.

        Raises :class:`DataError` for what is no event.
        """
        item = self.item.encode(errors="surrogatepass")
        if not 0 < len(item) < 2**16 or not math.isfinite(self.rating) or not -(2**63) <= self.timestamp < 2**63:
            raise DataError(f"Expected {self} to have an item, a finite rating and a timestamp of 64 bits.")
        content = _EVENT.pack(self.timestamp, self.rating, len(item)) + item
        return content.ljust(-(-len(content) // _BLOCK) * _BLOCK, b"\0")

    @classmethod
    def unpack(cls, content: bytes) -> Self:
        """The inverse of :meth:`pack`."""
        timestamp, rating, length = _EVENT.unpack_from(content)
        item = content[_EVENT.size : _EVENT.size + length].decode(errors="surrogatepass")
        return cls(item, rating, timestamp)


def known(events: Sequence[Event], catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """(T,) indices and ratings of the events whose items the catalogue has, in the same order."""
    found = [(catalogue.index[event.item], event.rating) for event in events if event.item in catalogue.index]
    return np.array([item for item, _ in found], np.int64), np.array([rating for _, rating in found], np.float64)


@dataclass(frozen=True)
class State:
    """The recurrent states at the end of a history.

    Attributes:
        model: 32 bytes, the digest of what they belong to.
        events: how many events of the history they have seen.
        values: (r, n) float32, oldest first, r ≥ 1.
    """

    model: bytes
    events: int
    values: np.ndarray

    def pack(self) -> bytes:
        """As bytes."""
        return _STATE.pack(self.model, self.events, len(self.values)) + self.values.astype("<f4").tobytes()

    @classmethod
    def unpack(cls, content: bytes) -> Self:
        """The inverse of :meth:`pack`."""
        model, events, rows = _STATE.unpack_from(content)
        values = np.frombuffer(content, "<f4", offset=_STATE.size).astype(np.float32)
        return cls(model, events, values.reshape(rows, -1))


@dataclass(frozen=True)
class ReceivedModel:
    """The last model that the device received.

    Attributes:
        content: safetensors.
        metadata: what came with it.
    """

    content: bytes = field(repr=False)
    metadata: Mapping[str, str]

    def pack(self) -> bytes:
        """As bytes."""
        metadata = json.dumps(dict(self.metadata)).encode()
        return len(metadata).to_bytes(4, "little") + metadata + self.content

    @classmethod
    def unpack(cls, content: bytes) -> Self:
        """The inverse of :meth:`pack`."""
        start = 4 + int.from_bytes(content[:4], "little")
        return cls(content[start:], json.loads(content[4:start]))
