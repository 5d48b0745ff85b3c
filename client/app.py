"""The ClientApp: one device's answers to the server's Messages.

===========  =========================  ===========================================
message      server → device            device → server
===========  =========================  ===========================================
`identify`   nothing                    the device's number
`update`     model, round, roster size  the encoded update (:mod:`client.device`)
===========  =========================  ===========================================
"""

from collections.abc import Callable
from typing import Protocol

import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client.device import participate
from common.messages import IDENTIFY, UPDATE, identity_message, read_offer, update_message
from common.settings import Settings, parse_flat
from common.trajectory import Trajectories

_LOCAL_USER = "local_user"


class Device(Protocol):
    """What is this device's own and stays with it."""

    @property
    def number(self) -> int:
        """The device's number, in [0, N)."""

    @property
    def items(self) -> int:
        """A, the size of the catalogue."""

    def window(self, round_: int) -> Trajectories:
        """The stretch of the history to train on in a round, a batch of one."""


def make_app(open_device: Callable[[Settings, Context], Device]) -> ClientApp:
    """The ClientApp of the device that `open_device` finds in its node's configuration."""
    app = ClientApp()

    @app.query(IDENTIFY)
    def identify(message: Message, context: Context) -> Message:
        return identity_message(open_device(parse_flat(context.run_config), context).number, message)

    @app.train(UPDATE)
    def update(message: Message, context: Context) -> Message:
        settings = parse_flat(context.run_config)
        device = open_device(settings, context)
        offer, roster = read_offer(message, settings, device.items)
        part = participate(offer, roster, device.number, device.window(offer.round), _load_user(context, settings))
        # Stored before the upload: it is committed whether or not the round completes.
        context.state[_LOCAL_USER] = ArrayRecord({"user": Array(part.local_user.numpy())})
        return update_message(part.residues, message)

    return app


def _load_user(context: Context, settings: Settings) -> Tensor:
    """(w,) the user embedding of earlier rounds, or zeros."""
    record = context.state.get(_LOCAL_USER)
    if not isinstance(record, ArrayRecord):
        return torch.zeros(settings.model.user_width)
    return torch.from_numpy(record["user"].numpy().copy())
