"""Full-ranking metrics: where the one held-out item of each user stands among all items the user has not seen.

Scores are (B, A) for B users and A items, higher is better. What a user has seen is a (2, S) int64 tensor of
``[row of the scores, item]`` pairs, in any order, repetitions allowed. Ties are settled at random, never by the
order of the catalogue, which is the order of popularity and would flatter every scorer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ModelError

RESAMPLES = 2000
"""Bootstrap resamples behind a 95 % interval."""


def target_ranks(scores: Tensor, targets: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of each user's target among the items the user has not seen.

    A target competes even if it was seen before. Among equal scores its place is uniform: the rank is the number
    of strictly better items plus a uniform integer in [0, number of other items with the same score].

    Args:
        scores: (B, A) floating point, finite.
        targets: (B,) int64 item indices in [0, A).
        seen: (2, S) int64 pairs of row and item.
        generator: draws one number per row, in order, so that splitting the rows into blocks changes nothing.

    Returns:
        (B,) int64, 0 is the best.

    Raises:
        ModelError: a score is not finite.
    """
    own = scores.gather(1, targets[:, None])
    rivals = _without(scores, seen).scatter_(1, targets[:, None], -torch.inf)
    better = (rivals > own).sum(dim=1)
    ties = (rivals == own).sum(dim=1)
    # A double in [0, 1) times a count of items rounds down to each integer equally often, and never to the count.
    uniform = torch.rand(len(scores), dtype=torch.float64, generator=generator)
    return better + (uniform * (ties + 1)).long()


def top_items(scores: Tensor, seen: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The best k unseen items of each user, best first.

    One random order of the items settles the ties of all rows, so that chance alone does not make the lists of
    two users differ (coverage would take it for diversity).

    Args:
        scores: (B, A) floating point, finite.
        seen: (2, S) int64 pairs of row and item.
        k: length of a list, at least 1.
        generator: draws the order; the same state gives the same order, whatever B is.

    Returns:
        (B, min(k, A)) int64 item indices; -1 fills up the list of a user with fewer unseen items.

    Raises:
        ModelError: a score is not finite.
    """
    items = scores.shape[1]
    order = torch.randperm(items, generator=generator)
    best = _without(scores, seen)[:, order].topk(min(k, items))
    return order[best.indices].masked_fill(best.values == -torch.inf, -1)


def summarise(
    ranks: Tensor, recommended: Tensor, items: int, cutoffs: Sequence[int], generator: np.random.Generator
) -> dict[str, Any]:
    """Hit rate, NDCG and coverage at each cut-off, with bootstrap intervals over users.

    With one target per user, HR@k is the share of ranks below k, and NDCG@k the mean of 1/log2(rank + 2) over
    the same ranks and 0 over the others. Coverage@k is the share of the catalogue in anybody's best k.

    Args:
        ranks: (U,) int64 ranks of the targets, U ≥ 1.
        recommended: (U, ≥ max(cutoffs)) item indices, -1 for none; fewer columns if the catalogue is smaller.
        items: A, the size of the catalogue.
        cutoffs: the k's, each at least 1.
        generator: draws the bootstrap.

    Returns:
        ``{"users": U, "hr@k": …, "hr@k_ci95": [low, high], "ndcg@k": …, "ndcg@k_ci95": [low, high],
        "coverage@k": …}``, all but the first in [0, 1].
    """
    users, deepest = len(ranks), max(cutoffs)
    # Ranks from `deepest` on all count the same, so a user is one of deepest + 1 kinds, and drawing users with
    # replacement is one multinomial draw of how many there are of each kind.
    counts = np.bincount(ranks.clamp(max=deepest).numpy(), minlength=deepest + 1)
    resampled = generator.multinomial(users, counts / users, size=RESAMPLES)

    places = np.arange(deepest + 1)
    report: dict[str, Any] = {"users": users}
    for k in cutoffs:
        for name, value in (("hr", places < k), ("ndcg", (places < k) / np.log2(places + 2))):
            low, high = np.quantile(resampled @ value / users, [0.025, 0.975])
            report[f"{name}@{k}"] = float(counts @ value / users)
            report[f"{name}@{k}_ci95"] = [float(low), float(high)]
        shown = np.unique(recommended[:, :k].numpy())
        report[f"coverage@{k}"] = float(np.count_nonzero(shown >= 0) / items)
    return report


def _without(scores: Tensor, seen: Tensor) -> Tensor:
    """A copy of the scores with -inf at what has been seen."""
    if not torch.isfinite(scores).all():
        raise ModelError("Expected finite scores for ranking, found nan or inf: the model has diverged.")
    rows, items = seen
    return scores.index_put((rows, items), scores.new_tensor(-torch.inf))
