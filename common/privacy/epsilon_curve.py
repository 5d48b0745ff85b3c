"""ε_model for many numbers of releases of one mechanism, such as of a curve over a run's rounds."""

import math
import warnings
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from common.privacy.accounting import PRV_ERROR, PRV_LARGEST, check_mechanism, epsilon_model, rough_epsilon

if TYPE_CHECKING:
    from opacus.accountants.analysis.prv.prvs import DiscretePRV


def epsilon_model_of_many(noise_multiplier: float, rate: float, releases: int, delta: float, at_most: int) -> float:
    """:func:`~common.privacy.accounting.epsilon_model` where it is wanted for many `releases`, none above `at_most`.

    The first one takes as long as there, half a second; the others a tenth of that, for one discretised privacy loss
    serves all. A grid as fine and a range as wide as `at_most` compositions need do for fewer (Gopi, Lee and
    Wutschitz, "Numerical composition of differential privacy", NeurIPS 2021, remark 5.6): it is an upper bound as that
    one is, at most 0.02 above the truth; the two differ by some 1e-5.
    Test: ``tests/unit/test_accounting.py::test_epsilon_of_many_is_that_of_each``.

    Raises :class:`PrivacyError` as :func:`~common.privacy.accounting.check_mechanism` does.
    """
    check_mechanism(noise_multiplier, rate, releases, delta)
    table = _table(noise_multiplier, rate, max(at_most, releases), delta) if releases else None
    if table is not None:
        from opacus.accountants.analysis.prv import compose_heterogeneous

        with np.errstate(all="ignore"), suppress(RuntimeError, ValueError):
            composed = compose_heterogeneous([table], [releases])
            return max(0.0, float(composed.compute_epsilon(delta, _delta_error(delta), PRV_ERROR)[2]))
    return epsilon_model(noise_multiplier, rate, releases, delta)


@lru_cache(maxsize=16)
def _table(noise_multiplier: float, rate: float, at_most: int, delta: float) -> "DiscretePRV | None":
    """One release's privacy loss, as opacus's PRV accountant makes it; None where that one is not to be used."""
    from opacus.accountants.analysis import prv

    if not noise_multiplier or rate == 1 or rough_epsilon(((noise_multiplier, rate, at_most),), delta) > PRV_LARGEST:
        return None
    loss, error = prv.PoissonSubsampledGaussianPRV(rate, noise_multiplier), _delta_error(delta)
    mesh = PRV_ERROR / math.sqrt(at_most * math.log(12 / error) / 2)
    with np.errstate(all="ignore"), suppress(RuntimeError, ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflow far out in the tails
        reach = prv.compute_safe_domain_size([loss], [at_most], PRV_ERROR, error)
        domain = prv.Domain.create_aligned(-reach, reach, mesh)
        return prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain)
    return None


def _delta_error(delta: float) -> float:
    """What the grid may lose of δ; opacus's default."""
    return delta / 1000
