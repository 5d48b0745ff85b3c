"""The first round of a run whose items start at their popularity (`training.start` = popularity).

In that round a member sends, in place of a gradient, how often it met each item and, where the model has a critic, a
second block beside that: the sum of what the rewards were above the critic's public first guess g
(`objective.critic_start`), Σ (r⁺/5 − g). From the released sum the server computes where the items' biases start
(:mod:`server.popularity_start`), which is post-processing. No later round counts.

Why it costs what any round does (unit: one user; adjacencies of :mod:`common.privacy.accounting`). A member's vector is
scaled to a joint L2 norm of exactly C (:mod:`client.histogram`), clipped and noised by the very code that clips and
noises gradients, for the same Poisson cohort: one release of sensitivity C under noise z·C at rate q, of the T that the
run is accounted for. So z, q, T and both ε are those of the same run without it. The vector has a length of its own,
and so an encoding of its own, with the same z; where their Skellam noise differs from the Gaussian by different 1e-4's
the account takes the worse (``tests/unit/test_popularity_start.py::test_the_budget_is_that_of_a_run_without``). An
attempt that uploaded and failed is charged as in any round. C itself plays no part in what is released: the server
divides by it, and where C adapts, it begins to in the second round.
"""

from common.settings import Settings

CONCENTRATION = 5
"""By how much more than spread evenly a sum of histograms may be: devices agree on what is popular, so that the sum may
be as long as the cohort, and its rotation has coordinates like a Gaussian's, of which one in a million is above 5."""


def histogram_length(settings: Settings, items: int) -> int:
    """How many numbers a member sends in the first round, of A `items`; 0 where that round does not count."""
    return histogram_blocks(settings) * items if settings.counting(1) else 0


def histogram_blocks(settings: Settings) -> int:
    """How many numbers a member sends of each item: its count, and with a critic the sum of its rewards."""
    return 2 if "critic" in settings.heads else 1
