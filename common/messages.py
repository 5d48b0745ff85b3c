"""The contents of the Messages between server and devices: bytes of the secure aggregation, and the model's arrays.

A Message from the other side is input: whatever does not fit raises :class:`ProtocolError`. Nothing here imports torch:
a device's answers that train nothing start in a fraction of the time without it.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.errors import ProtocolError
from common.secagg.identity import digest
from common.settings import Settings

Action = Literal["query.advertise", "query.share", "train.upload", "query.agree", "query.unmask"]
"""The exchanges of a round, in their order, as Flower's message types."""


def run_digest(settings: Settings, run_id: int) -> bytes:
    """32 bytes that tell this run from every other one, on either side."""
    return digest("run", settings.to_toml().encode(), run_id.to_bytes(8, "little"))


def content_of(body: bytes, arrays: Mapping[str, np.ndarray] | None = None, advertisement: bytes = b"") -> RecordDict:
    """What a Message carries: a body of the secure aggregation; with the model's arrays on the way to an upload, and
    with the advertisement for a next attempt on the way from an unmasking."""
    content = RecordDict({"secure": ConfigRecord({"body": body, "advertisement": advertisement})})
    if arrays is not None:
        content["parameters"] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    return content


def body_of(message: Message) -> bytes:
    """The body. Raises :class:`ProtocolError`."""
    return _bytes(message, "body")


def advertisement_of(message: Message) -> bytes:
    """The advertisement that came along, or nothing. Raises :class:`ProtocolError`."""
    return _bytes(message, "advertisement")


def arrays_of(message: Message) -> dict[str, np.ndarray]:
    """The model's arrays, which may be anything yet. Raises :class:`ProtocolError`."""
    record = message.content.get("parameters")
    if not isinstance(record, ArrayRecord):
        raise ProtocolError("Expected a Message with the record 'parameters'.")
    try:
        return {name: array.numpy() for name, array in record.items()}
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ProtocolError(f"Expected the parameters to be arrays: {error}.") from None


def size_of(content: RecordDict) -> int:
    """Bytes of all bodies and arrays in a content."""
    bodies = sum(
        len(value)
        for record in content.config_records.values()
        for value in record.values()
        if isinstance(value, bytes)
    )
    return bodies + sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _bytes(message: Message, name: str) -> bytes:
    record = message.content.get("secure")
    value = record.get(name) if isinstance(record, ConfigRecord) else None
    if not isinstance(value, bytes):
        raise ProtocolError(f"Expected a Message with {name!r} in the record 'secure'.")
    return value
