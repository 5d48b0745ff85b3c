"""The contents of the Messages between server and devices: records of arrays and numbers, and back.

A Message from the other side is input: whatever does not fit raises :class:`AggregationError` or :class:`ModelError`.
"""

from dataclasses import asdict, fields

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.errors import AggregationError
from common.model import check_parameters, shapes
from common.offer import Offer
from common.privacy.encoding import Encoding
from common.settings import Settings

IDENTIFY, UPDATE = "identify", "update"
"""Names of the actions; on the wire ``query.identify`` and ``train.update``."""


def identity_message(number: int, request: Message) -> Message:
    """A device's answer to `identify`."""
    return Message(RecordDict({"identity": ConfigRecord({"device": number})}), reply_to=request)


def read_identity(reply: Message) -> int:
    """The device number in an answer to `identify`."""
    record = reply.content.get("identity")
    number = record.get("device") if isinstance(record, ConfigRecord) else None
    if not isinstance(number, int) or number < 0:
        raise AggregationError(f"Expected device={number!r} to be a number of at least 0 in the answer to identify.")
    return number


def offer_content(offer: Offer, roster: int) -> RecordDict:
    """What the server sends to each member of a roster of `roster` devices."""
    encoding = {f"encoding.{name}": value for name, value in asdict(offer.encoding).items()}
    numbers = {"round": offer.round, "attempt": offer.attempt, "roster": roster}
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in offer.parameters.items()})
    return RecordDict({"parameters": arrays, "offer": ConfigRecord(numbers | encoding)})


def read_offer(message: Message, settings: Settings, items: int) -> tuple[Offer, int]:
    """The offer and the roster's size, as a device reads them."""
    arrays, numbers = message.content.get("parameters"), message.content.get("offer")
    if not isinstance(arrays, ArrayRecord) or not isinstance(numbers, ConfigRecord):
        raise AggregationError("Expected an offer with the records 'parameters' and 'offer'.")
    parameters = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    check_parameters(parameters, shapes(settings, items))
    try:
        encoding = Encoding(**{field.name: numbers[f"encoding.{field.name}"] for field in fields(Encoding)})  # type: ignore[arg-type]
        offer = Offer(int(numbers["round"]), int(numbers["attempt"]), parameters, encoding, settings)  # type: ignore[arg-type]
        return offer, int(numbers["roster"])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise AggregationError(f"Expected a complete offer: {error!r}.") from None


def update_message(residues: np.ndarray, request: Message) -> Message:
    """A device's answer to `update`."""
    return Message(RecordDict({"update": ArrayRecord({"residues": Array(residues)})}), reply_to=request)


def read_update(reply: Message, encoding: Encoding) -> np.ndarray:
    """(2^m,) uint32 the residues of one device. Raises :class:`AggregationError` where they are not of the encoding."""
    record = reply.content.get("update")
    residues = record["residues"].numpy() if isinstance(record, ArrayRecord) and "residues" in record else None
    if residues is None or residues.dtype != np.uint32 or residues.shape != (encoding.padded,):
        found = "nothing" if residues is None else f"{residues.dtype} of shape {residues.shape}"
        raise AggregationError(f"Expected an update of uint32 of shape ({encoding.padded},), found {found}.")
    if int(residues.max(initial=0)) >> encoding.bits:
        raise AggregationError(f"Expected residues below 2^{encoding.bits}, found {residues.max()}.")
    return residues
