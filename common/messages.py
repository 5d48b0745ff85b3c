"""The contents of the Messages between server and devices: bytes of the secure aggregation, and the model.

A Message from the other side is input: whatever does not fit raises :class:`ProtocolError`. Nothing here imports torch:
a device's answers that train nothing start in a fraction of the time without it.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import ProtocolError
from common.secagg.identity import digest
from common.settings import Settings

Action = Literal["query.advertise", "query.share", "train.upload", "query.agree", "query.unmask", "query.model"]
"""The exchanges of a round, in their order, and the delivery of a model, as Flower's message types."""


def run_digest(settings: Settings, run_id: int) -> bytes:
    """32 bytes that tell this run from every other one, on either side."""
    return digest("run", settings.to_toml().encode(), run_id.to_bytes(8, "little"))


def content_of(body: bytes, *, advertisement: bytes = b"", model: bytes = b"", signature: bytes = b"") -> RecordDict:
    """What a Message carries: a body of the secure aggregation; with the advertisement for a next attempt on the way
    from an unmasking, and with the model and its publisher's signature on the way to an upload. The model is a record
    of its own, of which Flower keeps one copy for all devices."""
    records = {"secure": ConfigRecord({"body": body, "advertisement": advertisement})}
    if model:
        records["model"] = ConfigRecord({"content": model, "signature": signature})
    return RecordDict(records)  # type: ignore[arg-type]


def body_of(message: Message) -> bytes:
    """The body. Raises :class:`ProtocolError`."""
    return _bytes(message, "secure", "body")


def advertisement_of(message: Message) -> bytes:
    """The advertisement that came along, or nothing. Raises :class:`ProtocolError`."""
    return _bytes(message, "secure", "advertisement")


def model_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A model's arrays as safetensors, whose reader allocates what it was sent and runs nothing."""
    return save(dict(arrays))


def signed_model_of(message: Message) -> tuple[bytes, bytes]:
    """The model's bytes and the signature under it, neither checked yet. Raises :class:`ProtocolError`."""
    return _bytes(message, "model", "content"), _bytes(message, "model", "signature")


def read_arrays(model: bytes) -> dict[str, np.ndarray]:
    """The model's arrays, of any names and shapes yet. Raises :class:`ProtocolError`."""
    try:
        return load(model)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"Expected the model to be safetensors: {error}.") from None


def size_of(content: RecordDict) -> int:
    """Bytes of all that a content holds."""
    values = (value for record in content.config_records.values() for value in record.values())
    return sum(len(value) for value in values if isinstance(value, bytes))


def _bytes(message: Message, kind: str, name: str) -> bytes:
    record = message.content.get(kind) if message.has_content() else None
    value = record.get(name) if isinstance(record, ConfigRecord) else None
    if not isinstance(value, bytes):
        raise ProtocolError(f"Expected a Message with {name!r} in the record {kind!r}.")
    return value
