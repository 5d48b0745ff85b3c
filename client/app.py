"""The ClientApp: one device's answers to the server's Messages, the five exchanges of a round.

===========  ==============================================  ==========================================================
message      server → device                                 device → server
===========  ==============================================  ==========================================================
`advertise`  the round, where devices flip the coins         certificate and fresh keys, signed; nothing on tails
`share`      terms, roster root, own and neighbours' places  shares of two secrets, sealed for each neighbour
`upload`     the neighbours' shares, the signed model        the encoded update (:mod:`client.device`), masked
`agree`      who uploaded                                    a signature under it
`unmask`     the neighbours' signatures                      one share of each neighbour's secrets; the next `advertise`
`model`      the signed model, after the last round          nothing
===========  ==============================================  ==========================================================

Only `upload` imports torch. What a device refuses it answers with an error that says why.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.coins import Coins
from client.secure_upload import Secured, SecureUpload
from common.catalogue import Catalogue
from common.errors import AggregationError, ModelError, SettingsError
from common.messages import body_of, content_of, read_arrays, run_digest, signed_model_of
from common.secagg.terms import Terms
from common.secagg.wire import Reader
from common.settings import Settings, parse_flat
from common.signed_model import VERSION, Edition

if TYPE_CHECKING:
    from common.trajectory import Trajectories

_REFUSED = 2  # what Flower gives for an exception in a ClientApp, which would come with its traceback


class Device(Secured, Protocol):
    """What is this device's own and stays with it."""

    @property
    def number(self) -> int:
        """The device's number, which labels its reproducible randomness."""

    @property
    def catalogue(self) -> Catalogue:
        """The items that models are of."""

    @property
    def publisher(self) -> bytes:
        """32 bytes, the public key that models must be signed with, pinned."""

    def window(self, round_: int) -> "Trajectories":
        """The stretch of the history to train on in a round, a batch of one."""

    def load_user(self) -> np.ndarray | None:
        """(w,) float32, the user embedding; None before there is one."""

    def save_user(self, user: np.ndarray) -> None:
        """Keep the user embedding, durably."""

    def keep_model(self, content: bytes, metadata: Mapping[str, str]) -> None:
        """Keep a model that was checked, to recommend with."""

    def expect_willing(self) -> None:
        """Raise :class:`Refusal` where the device does not want to take part now: on a low battery, for one."""


OpenDevice = Callable[[Settings, Context], Device]
Handler = Callable[[Message, "Opened"], Message]


class Opened:
    """A device that got a Message, and what of the Message's run concerns it."""

    def __init__(self, open_device: OpenDevice, context: Context) -> None:
        self.settings = parse_flat(context.run_config)
        self.device = open_device(self.settings, context)
        self.device.policy.check_run(self.settings)
        self.run = run_digest(self.settings, context.run_id)
        self.run_id = context.run_id
        self.secure = SecureUpload(self.device, self.run)

    def checked_model(self, message: Message, round_: int) -> bytes:
        """The model of all items after so many rounds, which is kept. Raises :class:`ProtocolError` for another one."""
        content, signature = self._checked(message, round_, self.device.catalogue.digest)
        metadata = {
            "version": str(VERSION),
            "settings": self.settings.to_toml(),
            "run_id": str(self.run_id),
            "round": str(round_),
            "signature": signature.hex(),
        }
        self.device.keep_model(content, metadata)
        return content

    def offered_model(self, message: Message, round_: int) -> bytes:
        """The model to train on in a round. Raises :class:`ProtocolError` where it is not of the items of the round: of
        all, or of the slice that this device finds for it, of which there is nothing to keep."""
        from common.item_slice import rows_digest, slice_of

        item_slice = slice_of(self.settings, len(self.device.catalogue), round_)
        if item_slice is None:
            return self.checked_model(message, round_ - 1)
        return self._checked(message, round_ - 1, rows_digest(self.device.catalogue.digest, item_slice))[0]

    def _checked(self, message: Message, round_: int, rows: bytes) -> tuple[bytes, bytes]:
        content, signature = signed_model_of(message)
        Edition(self.run, round_, rows).check(self.device.publisher, content, signature)
        return content, signature


def make_app(open_device: OpenDevice) -> ClientApp:
    """The ClientApp of the device that `open_device` finds in its node's configuration."""
    app = ClientApp()
    for kind, action, handler in (
        (app.query, "advertise", _advertise),
        (app.query, "share", _share),
        (app.train, "upload", _upload),
        (app.query, "agree", _agree),
        (app.query, "unmask", _unmask),
        (app.query, "model", _model),
    ):
        kind(action)(partial(_answer, open_device, handler))
    return app


def _advertise(message: Message, opened: Opened) -> Message:
    settings, device = opened.settings, opened.device
    device.expect_willing()
    if settings.training.coins == "device":
        reader = Reader(body_of(message), "the round")
        (round_,) = reader.numbers("I")
        reader.end()
        if round_ and not Coins(device.records, opened.run).flip(round_, settings, device.number):
            return Message(content_of(b""), reply_to=message)
    return Message(content_of(opened.secure.advertise()), reply_to=message)


def _share(message: Message, opened: Opened) -> Message:
    opened.device.expect_willing()
    return Message(content_of(opened.secure.share(body_of(message))), reply_to=message)


def _upload(message: Message, opened: Opened) -> Message:
    model = opened.offered_model(message, opened.secure.terms.round)
    body = opened.secure.upload(body_of(message), lambda terms: _compute(opened, terms, model))
    return Message(content_of(body), reply_to=message)


def _agree(message: Message, opened: Opened) -> Message:
    return Message(content_of(opened.secure.agree(body_of(message))), reply_to=message)


def _unmask(message: Message, opened: Opened) -> Message:
    body, advertisement = opened.secure.unmask(body_of(message))
    return Message(content_of(body, advertisement=advertisement), reply_to=message)


def _model(message: Message, opened: Opened) -> Message:
    reader = Reader(body_of(message), "the round")
    (round_,) = reader.numbers("I")
    reader.end()
    opened.checked_model(message, round_)
    return Message(content_of(b""), reply_to=message)


def _compute(opened: Opened, terms: Terms, model: bytes) -> np.ndarray:
    """The encoded update; the adapted user embedding is stored, whether or not the round completes."""
    import torch

    from client.device import participate
    from common.offer import read_offer

    device, settings = opened.device, opened.settings
    offer = read_offer(terms, read_arrays(model), settings, len(device.catalogue))
    stored = device.load_user()
    user = torch.zeros(settings.model.user_width) if stored is None else torch.from_numpy(stored)
    part = participate(offer, terms.n, device.number, device.window(offer.round), user)
    device.save_user(part.local_user.numpy())
    return part.residues


def _answer(open_device: OpenDevice, handler: Handler, message: Message, context: Context) -> Message:
    """Answer with why the device does not take part, in place of a traceback. What else goes wrong is not the server's
    to know: a full disk's error names a folder, one of the history an item."""
    try:
        return handler(message, Opened(open_device, context))
    except (AggregationError, ModelError, SettingsError) as error:
        return Message(Error(_REFUSED, str(error)), reply_to=message)
