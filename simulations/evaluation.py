"""Full-ranking evaluation on held-out items, of any scorer, always beside popularity and first-order Markov."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.ranking import summarise, target_ranks, top_items
from simulations.baselines import Markov, Popularity
from simulations.datasets.interactions import Interactions
from simulations.splits import Kind, Split

CUTOFF = 10
"""k of HR@k, NDCG@k and coverage@k."""


class Scorer(Protocol):
    """Anything that scores items for users with histories."""

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        """(B, A) finite floating-point scores, higher is better, for the histories of the (B,) int64 users."""
        ...


_BLOCK, _BLOCK_SCORES = 256, 2**22
"""Most users scored at once, and most scores: a few copies of them are held, 8 bytes each."""


def evaluate(scorer: Scorer, split: Split, kind: Kind, *, seed: int, block: int | None = None) -> dict[str, Any]:
    """Rank every held-out item against all items that its user has not seen.

    Args:
        scorer: what to evaluate; it sees the histories before the targets, never the targets.
        split: the population.
        kind: which targets.
        seed: of tie-breaking and bootstrap; the same seed gives the same result, whatever the block.
        block: users scored at once; memory is a few times block · A numbers. None: as many as fit in some 200 MB.

    Returns:
        ``{"users", "hr@10", "hr@10_ci95", "ndcg@10", "ndcg@10_ci95", "coverage@10", "deciles@10"}``; the last are the
        shares of what is recommended that come from each tenth of the training log, the most popular items first.

    Raises:
        ModelError: a score is not finite.
    """
    histories, targets = split.history(kind), split.targets(kind)
    block = block or min(max(_BLOCK_SCORES // len(histories.catalogue), 1), _BLOCK)
    ties = torch.Generator().manual_seed(seed)
    ranks, recommended = [], []
    for start in range(0, len(targets.users), block):
        users = targets.users[start : start + block]
        items = torch.from_numpy(targets.items[start : start + block])
        scores, seen = scorer.scores(histories, users), _seen(histories, users)
        ranks.append(target_ranks(scores, items, seen, ties))
        # Seeded afresh: every block settles the ties of its lists by the same order of items.
        recommended.append(top_items(scores, seen, CUTOFF, torch.Generator().manual_seed(seed)))
    shown, size = torch.cat(recommended), len(histories.catalogue)
    figures = summarise(torch.cat(ranks), shown, size, (CUTOFF,), np.random.default_rng(seed))
    return figures | {f"deciles@{CUTOFF}": _deciles(shown, split.train)}


def compare(scorer: Scorer, split: Split, kind: Kind, *, seed: int) -> dict[str, Any]:
    """The ``evaluation`` object of ``report.json``: the scorer's figures with both baselines' beside them.

    Returns:
        ``{"protocol", **evaluate(scorer), "popularity": {…}, "markov": {…}}``.
    """
    return {
        "protocol": split.protocol,
        **evaluate(scorer, split, kind, seed=seed),
        "popularity": evaluate(Popularity(split.train), split, kind, seed=seed),
        "markov": evaluate(Markov(split.train), split, kind, seed=seed),
    }


def _deciles(shown: Tensor, train: Interactions) -> list[float]:
    """Ten shares of the (U, k) shown items (-1: none), by the tenth of the log that each item's interactions are in."""
    counts = train.counts()
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    tenth = np.empty(len(counts), np.int64)
    tenth[order] = np.minimum(10 * before // max(counts.sum(), 1), 9)
    items = shown.numpy()
    hits = np.bincount(tenth[items[items >= 0]], minlength=10)
    return [float(share) for share in hits / max(hits.sum(), 1)]


def _seen(histories: Interactions, users: np.ndarray) -> Tensor:
    """(2, S) int64 pairs of position in `users` and item, for everything in these users' histories."""
    rows = np.repeat(np.arange(len(users)), histories.lengths()[users])
    return torch.from_numpy(np.stack([rows, histories.items[histories.places(users)]]))
