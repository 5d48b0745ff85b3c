"""Clipping: the factor that brings an update into the ball of radius C, so that no user weighs more than C."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import PrivacyError


def clip_factor(norm: ArrayLike, clip: float) -> NDArray[np.float64]:
    """min(1, C / norm) for every L2 norm; 1 where the norm is 0 and, with C = inf, everywhere.

    `norm` has any shape and the result the same one (a scalar for a scalar). Scaling by the factor bounds the norm
    by C up to the rounding of floats; the bound that privacy rests on is asserted in integers
    (:func:`common.privacy.rounding.conditional_round`).

    Raises :class:`PrivacyError` for a norm that is not finite or is negative, and for C ≤ 0.
    """
    norms = np.asarray(norm, np.float64)
    if not clip > 0:
        raise PrivacyError(f"Expected privacy.clip_norm={clip} > 0.")
    if not np.all((norms >= 0) & (norms < math.inf)):
        worst = norms[~((norms >= 0) & (norms < math.inf))].flat[0]
        raise PrivacyError(f"Expected the norm of every update to be finite and ≥ 0, got {worst}.")
    if math.isinf(clip):
        return np.ones_like(norms)
    return clip / np.maximum(norms, clip)
