"""What a recommender must beat: popularity and a first-order Markov chain, fitted on training histories.

Both answer ``scores(histories, users)`` as every scorer of :mod:`simulations.evaluation` does.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from simulations.datasets.interactions import Interactions

BACK_OFF = 100.0
"""μ of :class:`Markov`: on the validation targets of MovieLens small 1 to 500 are alike and 1,000 or more drown the
pairs; chains whose pairs tell more are weakened from 300 on."""


class Popularity:
    """Ranks items by how often they occur in training, for everybody alike."""

    def __init__(self, train: Interactions) -> None:
        """Count the items of the training histories, which must not all be empty."""
        counts = train.counts()
        self.share = counts / counts.sum()
        """(A,) float64 share of each item in all training interactions."""

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        """(B, A) float64 shares, the same row for each of the (B,) users."""
        return torch.from_numpy(self.share).expand(len(users), -1)


class Markov:
    """Ranks items by how often they came right after the last item of the history.

    P(b | a) = (n(a, b) + μ·share(b)) / (n(a, ·) + μ), with n(a, b) the number of times that b directly follows a
    in a training history and share(b) b's popularity. After an item with few successors, or none, popularity
    decides; and it settles the many ties between small counts. Users without a history get popularity.
    """

    def __init__(self, train: Interactions) -> None:
        """Count the pairs of the training histories, which must not all be empty."""
        items = len(train.catalogue)
        # Row A has no successors: it stands for "no last item".
        self.transitions = sparse.csr_array((items + 1, items), dtype=np.int32)
        for users in train.blocks():
            places, lengths = train.places(users), train.lengths()[users]
            followed = np.ones(len(places), bool)
            followed[np.cumsum(lengths)[lengths > 0] - 1] = False
            before = places[followed]
            pairs = np.ones(len(before), np.int32), (train.items[before], train.items[before + 1])
            self.transitions = self.transitions + sparse.csr_array(pairs, shape=(items + 1, items))
        self.share = Popularity(train).share

    def scores(self, histories: Interactions, users: np.ndarray) -> Tensor:
        """(B, A) float64 probabilities of each (B,) user's next item."""
        start, lengths = histories.offsets[users], histories.lengths()[users]
        last = np.where(lengths > 0, histories.items[start + lengths - 1], len(self.share))
        counts = self.transitions[last].toarray()
        total = counts.sum(axis=1, keepdims=True)
        return torch.from_numpy((counts + BACK_OFF * self.share) / (total + BACK_OFF))
