"""Popularity and Markov scores against counts made by hand."""

import numpy as np
import pytest
import torch
from handmade import interactions

from simulations.baselines import BACK_OFF, Markov, Popularity

TRAIN = interactions([[0, 1, 2, 1], [0, 1], [], [3]], items=5)
SHARE = np.array([2, 3, 1, 1, 0]) / 7


def test_popularity_is_the_share_in_training_for_everybody() -> None:
    scores = Popularity(TRAIN).scores(interactions([[4], []], items=5), np.array([1, 0]))
    assert scores.shape == (2, 5)
    assert np.allclose(scores, SHARE)


def test_markov_follows_the_last_item() -> None:
    histories = interactions([[3, 0], [2, 1]], items=5)
    first, second = Markov(TRAIN).scores(histories, np.array([0, 1])).numpy()
    # 0 → 1 twice; 1 → 2 once. No pair joins two users: 1 → 0 and 1 → 3 never happened.
    assert first == pytest.approx((np.array([0, 2, 0, 0, 0]) + BACK_OFF * SHARE) / (2 + BACK_OFF))
    assert second == pytest.approx((np.array([0, 0, 1, 0, 0]) + BACK_OFF * SHARE) / (1 + BACK_OFF))


def test_markov_backs_off_to_popularity() -> None:
    histories = interactions([[], [0, 4], []], items=5)
    assert np.allclose(Markov(TRAIN).scores(histories, np.array([0, 1, 2])), SHARE)


def test_markov_gives_probabilities_in_the_order_of_the_users() -> None:
    histories = interactions([[0], [1], [2]], items=5)
    markov = Markov(TRAIN)
    scores = markov.scores(histories, np.array([2, 0]))
    assert torch.equal(scores[1:], markov.scores(histories, np.array([0])))
    assert torch.allclose(scores.sum(dim=1), torch.ones(2, dtype=torch.float64))
