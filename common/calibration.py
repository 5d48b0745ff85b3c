"""Whether predicted probabilities are right: of a binary outcome, and of β for the actions that were logged.

Derivations, and when each figure misleads: ``docs/formulas/calibration.md``. Tests: ``test_calibration.py``.
"""

import numpy as np
from numpy.typing import ArrayLike

from common.errors import DataError
from common.ope import column


def expected_calibration_error(predicted: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> float:
    """Σ_j (n_j/n) |mean outcome − mean prediction| over bins j of about n/bins predictions each.

    Guo et al. 2017, equation 3, with the equal-mass bins of Nguyen & O'Connor 2015: most probabilities of a
    recommender are tiny, and bins of equal width would throw them all into the first. Equal predictions share a bin,
    so that the order of the events doesn't matter.

    Args:
        predicted: (n,) in [0, 1], n ≥ 1.
        outcomes: (n,) 0 or 1; for β, whether the item of the prediction is the one that was logged.
        bins: at least 1.

    Returns:
        In [0, 1]. Noise alone gives about sqrt(2 bins / (π n)) times the mean over bins of sqrt(p (1 − p)).

    Raises:
        DataError: an argument is not as above.
    """
    if bins < 1:
        raise DataError(f"Expected bins={bins} ≥ 1.")
    n = _events(predicted)
    probabilities, happened = column("predicted", predicted, n, "in [0, 1]"), column("outcomes", outcomes, n, "finite")
    fractional = (happened != 0) & (happened != 1)
    if fractional.any():
        first = int(np.argmax(fractional))
        raise DataError(f"Expected outcomes[{first}]={happened[first]} to be 0 or 1.")
    firsts = np.sort(probabilities)[np.arange(1, bins) * n // bins]  # of every bin but the lowest
    gaps = np.bincount(np.searchsorted(firsts, probabilities, side="right"), weights=happened - probabilities)
    return float(np.abs(gaps).sum() / n)


def cross_entropy(estimated: ArrayLike) -> float:
    """Mean of −log β̂(a_i|s_i) in nats, over logged actions: the entropy of the true β, plus KL(β‖β̂), in expectation.

    Args:
        estimated: (n,) β̂(a_i|s_i) in (0, 1], n ≥ 1.

    Raises:
        DataError: an argument is not as above.
    """
    return float(-np.log(column("estimated", estimated, _events(estimated), "in (0, 1]")).mean())


def kl_divergence(true: ArrayLike, estimated: ArrayLike) -> float:
    """Mean of log β(a_i|s_i) − log β̂(a_i|s_i) in nats: an unbiased estimate of KL(β‖β̂).

    KL itself is never negative; an estimate from few events can be (Kullback & Leibler 1951).

    Args:
        true, estimated: (n,) in (0, 1], n ≥ 1, of actions that were drawn from the true β.

    Raises:
        DataError: an argument is not as above.
    """
    b = column("true", true, _events(true), "in (0, 1]")
    return float((np.log(b) - np.log(column("estimated", estimated, len(b), "in (0, 1]"))).mean())


def _events(values: ArrayLike) -> int:
    if np.size(values) == 0:
        raise DataError("Expected at least 1 event, found 0.")
    return int(np.size(values))
