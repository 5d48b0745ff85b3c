"""One device's part in one round, from its history to the encoded update that leaves it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.local_update import update_of
from common.offer import Offer
from common.privacy.adaptive_clip import with_its_bit
from common.privacy.encoding import encode
from common.threads import one_thread
from common.trajectory import Trajectories


@dataclass(frozen=True)
class Participation:
    """What a device did in a round.

    Attributes:
        residues: (2^m,) uint32 in [0, 2^bits): the clipped, rotated, rounded and noised update. All that may leave.
        local_user: (w,) the adapted user embedding, which stays; to be stored before the upload.
    """

    residues: np.ndarray
    local_user: Tensor


def participate(offer: Offer, roster: int, device: int, window: Trajectories, user: Tensor) -> Participation:
    """Compute and encode one device's update.

    Args:
        roster: n, the realised size of the round's roster, from which the device's share of the noise follows.
        device: the device's number, which labels its reproducible randomness.
        window: its own window of the round, a batch of one.
        user: (w,) its user embedding.
    """
    with one_thread():
        update = update_of(offer, window, user.unsqueeze(0))
        vector = update.gradients.weighted_sum(torch.ones(1)).numpy()
    local_user = update.local_users[0]
    # Numbers of a model that overflow for some histories only must not tell whose: such a device sends noise alone.
    if not np.isfinite(vector).all():
        vector = np.zeros_like(vector)
    if not bool(torch.isfinite(local_user).all()):
        local_user = user
    if offer.adaptive:
        vector = with_its_bit(vector, offer.clip)
    residues = encode(
        vector,
        offer.encoding,
        roster,
        offer.signs,
        offer.stream("rounding", device),
        offer.stream("noise", device),
    )
    return Participation(residues, local_user)
