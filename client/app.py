"""The ClientApp: one device's answers to the server's Messages, the five exchanges of a round.

===========  ==============================================  ==========================================================
message      server → device                                 device → server
===========  ==============================================  ==========================================================
`advertise`  nothing                                         certificate and fresh keys, signed
`share`      terms, roster root, own and neighbours' places  shares of two secrets, sealed for each neighbour
`upload`     the neighbours' shares, the model               the encoded update (:mod:`client.device`), masked
`agree`      who uploaded                                    a signature under it
`unmask`     the neighbours' signatures                      one share of each neighbour's secrets; the next `advertise`
===========  ==============================================  ==========================================================

Only `upload` imports torch. What a device refuses it answers with an error that says why.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from client.secure_upload import Secured, SecureUpload
from common.errors import FedtopkError
from common.messages import body_of, content_of, model_of, run_digest
from common.secagg.terms import Terms
from common.settings import Settings, parse_flat

if TYPE_CHECKING:
    from common.trajectory import Trajectories

_LOCAL_USER = "local_user"
_REFUSED = 2  # what Flower gives for an exception in a ClientApp, which would come with its traceback


class Device(Secured, Protocol):
    """What is this device's own and stays with it."""

    @property
    def number(self) -> int:
        """The device's number, in [0, N)."""

    @property
    def items(self) -> int:
        """A, the size of the catalogue."""

    def window(self, round_: int) -> "Trajectories":
        """The stretch of the history to train on in a round, a batch of one."""


OpenDevice = Callable[[Settings, Context], Device]
Handler = Callable[[Message, Context], Message]


def make_app(open_device: OpenDevice) -> ClientApp:
    """The ClientApp of the device that `open_device` finds in its node's configuration."""
    app = ClientApp()

    def opened(context: Context) -> tuple[Settings, Device, SecureUpload]:
        settings = parse_flat(context.run_config)
        device = open_device(settings, context)
        return settings, device, SecureUpload(device, context.state, run_digest(settings, context.run_id))

    @app.query("advertise")
    @_refusing
    def advertise(message: Message, context: Context) -> Message:
        _, _, secure = opened(context)
        return Message(content_of(secure.advertise()), reply_to=message)

    @app.query("share")
    @_refusing
    def share(message: Message, context: Context) -> Message:
        _, _, secure = opened(context)
        return Message(content_of(secure.share(body_of(message))), reply_to=message)

    @app.train("upload")
    @_refusing
    def upload(message: Message, context: Context) -> Message:
        settings, device, secure = opened(context)
        body = secure.upload(body_of(message), lambda terms: _compute(settings, device, terms, message, context))
        return Message(content_of(body), reply_to=message)

    @app.query("agree")
    @_refusing
    def agree(message: Message, context: Context) -> Message:
        _, _, secure = opened(context)
        return Message(content_of(secure.agree(body_of(message))), reply_to=message)

    @app.query("unmask")
    @_refusing
    def unmask(message: Message, context: Context) -> Message:
        _, _, secure = opened(context)
        body, advertisement = secure.unmask(body_of(message))
        return Message(content_of(body, advertisement=advertisement), reply_to=message)

    return app


def _compute(settings: Settings, device: Device, terms: Terms, message: Message, context: Context) -> np.ndarray:
    """The encoded update; the adapted user embedding is stored, whether or not the round completes."""
    import torch

    from client.device import participate
    from common.offer import read_offer

    offer = read_offer(terms, model_of(message), settings, device.items)
    user = torch.zeros(settings.model.user_width)
    if _LOCAL_USER in context.state.array_records:
        user = torch.from_numpy(context.state.array_records[_LOCAL_USER]["user"].numpy().copy())
    part = participate(offer, terms.n, device.number, device.window(offer.round), user)
    context.state[_LOCAL_USER] = ArrayRecord({"user": Array(part.local_user.numpy())})
    return part.residues


def _refusing(handler: Handler) -> Handler:
    """Answer with what a FedtopkError says, in place of a traceback."""

    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FedtopkError as error:
            return Message(Error(_REFUSED, str(error)), reply_to=message)

    return answer
