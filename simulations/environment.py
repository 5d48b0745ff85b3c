"""A world whose truth is known: what each user likes, what she does with a slate, and what could be had at best.

The preference of a user for an item has mean about 0 and variance about 1 over pairs: her taste times the item's
character, plus the item's appeal to everyone. She likes the item with probability σ(offset + scale·preference). Shown a
slate she scans it in order and consumes the first item that she likes: the cascade model (Craswell et al. 2008).

:func:`fit_world` fits characters, tastes and appeal to real ratings by matrix factorisation, and makes any number of
users and items of their kind. Those are a *likeness* of the data set's, none of its users. Of each item's fitted
character only the direction is kept: lengths say mostly how often an item was rated, since fitting shrinks the others.

Tastes may drift. Each number of a taste turns between two independent values at its own speed; speeds are Cauchy
distributed, so that over users the correlation after a time t is exp(−drift·t), as in an Ornstein–Uhlenbeck process,
and mean and covariance stay. A taste at any time can be had without those before it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse, special

from common.errors import DataError, SettingsError
from simulations.datasets.interactions import Interactions

_SWEEPS = 8  # of alternating least squares
_RIDGE, _OFFSET_RIDGE = 10.0, 4.0  # on ratings of unit variance; predicts held-out ratings of MovieLens small best
_KEPT = 0.8  # of the deviation of a resampled row; the rest is Gaussian with the same covariance
_PAIRS = 2**17  # of user and item, on which the base rate is met
_FIT, _ITEMS, _USERS, _RATE = 4, 5, 6, 7  # set the generators apart from others made from the same seed
_BLOCK = 256  # users made together, always as many


class SlateValue(NamedTuple):
    """What slates are worth in expectation, each (B,)."""

    first: np.ndarray
    """Probability that the first item is liked."""
    mean: np.ndarray
    """Mean over the slate of the probability of being liked."""
    consumed: np.ndarray
    """Probability that one of the items is consumed."""


@dataclass(frozen=True)
class World:
    """The truth about N users and A items. Users are given by index, mask or slice.

    Attributes:
        tastes: (N, 2, f) float32, the two independent tastes between which a user turns; the first holds at time 0.
        speeds: (N, f) float32 radians per unit of time; 0 in a world without drift.
        characters: (A, f) float32, all of length √personal_share.
        appeal: (A,) float32, what is liked about an item by everyone; its variance is 1 − personal_share.
        popularity: (A,) float32, log of how often an item was interacted with in the data set, falling.
        offset, scale: of the logits of liking.
    """

    tastes: np.ndarray
    speeds: np.ndarray
    characters: np.ndarray
    appeal: np.ndarray
    popularity: np.ndarray
    offset: float
    scale: float

    @property
    def users(self) -> int:
        return len(self.tastes)

    @property
    def items(self) -> int:
        return len(self.characters)

    def tastes_at(self, users: np.ndarray | slice, time: float = 0.0) -> np.ndarray:
        """(B, f) float32 tastes."""
        angles = self.speeds[users] * np.float32(time)
        tastes = self.tastes[users]
        turned: np.ndarray = np.cos(angles) * tastes[:, 0] + np.sin(angles) * tastes[:, 1]
        return turned

    def preferences(self, users: np.ndarray | slice, time: float = 0.0) -> np.ndarray:
        """(B, A) float32 preferences."""
        preferences: np.ndarray = self.tastes_at(users, time) @ self.characters.T
        preferences += self.appeal
        return preferences

    def likes(self, users: np.ndarray | slice, time: float = 0.0) -> np.ndarray:
        """(B, A) float32 probabilities that a user likes, and so consumes if she looks at it, each item."""
        return self._liking(self.preferences(users, time))

    def likes_of(self, users: np.ndarray | slice, items: np.ndarray, time: float = 0.0) -> np.ndarray:
        """(B, K) float32 probabilities for (B, K) items, or (K,) the same for all."""
        personal = (self.characters[items] @ self.tastes_at(users, time)[:, :, None])[:, :, 0]
        return self._liking(personal + self.appeal[items])

    def mean_likes(self, time: float = 0.0) -> np.ndarray:
        """(A,) probabilities averaged over all users, float64."""
        blocks = range(0, self.users, _BLOCK)
        total = sum(self.likes(slice(first, first + _BLOCK), time).sum(axis=0, dtype=np.float64) for first in blocks)
        return np.asarray(total / self.users)

    def best_slates(self, users: np.ndarray | slice, size: int, time: float = 0.0) -> np.ndarray:
        """(B, `size`) items that an oracle would show each user, most liked first."""
        return lowest(-self.preferences(users, time), size)

    def best_ranking(self, size: int, time: float = 0.0) -> np.ndarray:
        """(`size`,) items most liked on average: the best slate that is the same for everyone."""
        ranking: np.ndarray = lowest(-self.mean_likes(time)[None], size)[0]
        return ranking

    def _liking(self, preferences: np.ndarray) -> np.ndarray:
        return np.asarray(special.expit(np.float32(self.offset) + np.float32(self.scale) * preferences))


def choose(likes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(B,) positions of the items that users consume of slates with these (B, K) probabilities; −1 for none."""
    liked = generator.random(likes.shape) < likes
    return np.where(liked.any(axis=1), liked.argmax(axis=1), -1)


def slate_value(likes: np.ndarray) -> SlateValue:
    """What slates with these (B, K) probabilities, in order, are worth."""
    return SlateValue(likes[:, 0], likes.mean(axis=1), 1 - np.prod(1 - likes, axis=1))


def fit_world(
    interactions: Interactions,
    users: int,
    items: int,
    *,
    seed: int,
    factors: int = 16,
    personal_share: float = 0.7,
    base_rate: float = 0.2,
    scale: float = 1.5,
    drift: float = 0.0,
    popularity_link: float | None = 0.0,
) -> World:
    """A world in the likeness of a data set.

    A user depends on the seed, the items and her own number alone: the first 100 users of 10,000 are the users of a
    world of 100. Items are the data set's most frequent ones, then, if it has too few, others like them.

    Args:
        factors: f, the numbers in a taste and in a character.
        personal_share: share of the variance of preferences that is personal rather than appeal. The fitted one is
            not kept, as fitting to few ratings shrinks what is personal most.
        base_rate: mean probability of liking over random pairs.
        scale: how far a preference decides; 0 makes all items alike.
        drift: one over the time after which a taste's correlation with the former one has fallen to 1/e.
        popularity_link: about the correlation, in [−1, 1], of popularity and appeal: popularities are dealt anew to
            the items accordingly. None keeps the data set's own relation.

    Raises:
        SettingsError: an argument is out of range.
        DataError: no ratings, or all of them equal.
    """
    require(users >= 1, f"users={users} ≥ 1")
    require(items >= 1, f"items={items} ≥ 1")
    require(factors >= 1, f"factors={factors} ≥ 1")
    require(0 <= personal_share <= 1, f"personal_share={personal_share:g} in [0, 1]")
    require(0 < base_rate < 1, f"base_rate={base_rate:g} in (0, 1)")
    require(0 <= scale < np.inf, f"scale={scale:g} ≥ 0")
    require(0 <= drift < np.inf, f"drift={drift:g} ≥ 0")
    if popularity_link is not None:
        require(-1 <= popularity_link <= 1, f"popularity_link={popularity_link:g} in [-1, 1]")

    tastes, catalogue = _fit(interactions, factors, np.random.default_rng([seed, _FIT]))
    generator = np.random.default_rng([seed, _ITEMS])
    likeness = _resampled(generator, catalogue, max(items - len(catalogue), 0))
    rows = np.concatenate([catalogue[:items], likeness])
    popularity, appeal, characters = rows[:, 0], _standardised(rows[:, 1]), rows[:, 2:]
    if popularity_link is not None:
        popularity = _dealt(generator, popularity, appeal, popularity_link)
    order = np.argsort(-popularity, kind="stable")
    lengths = np.linalg.norm(characters, axis=1, keepdims=True)
    characters = np.sqrt(personal_share) * characters / np.maximum(lengths, 1e-30)
    appeal = np.sqrt(1 - personal_share) * appeal

    generator = np.random.default_rng([seed, _RATE])
    items_of_pairs = generator.integers(items, size=_PAIRS)
    personal = (_resampled(generator, tastes, _PAIRS) * characters[items_of_pairs]).sum(axis=1)
    logits = scale * (personal + appeal[items_of_pairs])
    reach = 50 + np.abs(logits).max()
    offset = optimize.brentq(lambda offset: special.expit(offset + logits).mean() - base_rate, -reach, reach)

    made, speeds = [], []
    for number in range(-(-users // _BLOCK)):
        generator = np.random.default_rng([seed, _USERS, number])
        made.append(_resampled(generator, tastes, 2 * _BLOCK).reshape(_BLOCK, 2, factors))
        speeds.append(drift * generator.standard_cauchy((_BLOCK, factors)))
    return World(
        tastes=np.concatenate(made)[:users].astype(np.float32),
        speeds=np.concatenate(speeds)[:users].astype(np.float32),
        characters=characters[order].astype(np.float32),
        appeal=appeal[order].astype(np.float32),
        popularity=popularity[order].astype(np.float32),
        offset=float(offset),
        scale=float(scale),
    )


def _fit(interactions: Interactions, factors: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Biased matrix factorisation by alternating ridge regressions (Koren et al. 2009).

    Returns:
        (N, f) tastes with mean 0 and covariance 1, or 0 where too few users leave it undefined; and (A', 2 + f) rows of
        log count, appeal and character of the items that occur, most frequent first.
    """
    ratings = interactions.ratings.astype(np.float64)
    if not len(ratings) or ratings.min() == ratings.max():
        raise DataError(f"Expected different ratings to fit a world to, got {len(ratings)} that do not differ.")
    counts = np.bincount(interactions.items, minlength=len(interactions.catalogue))
    order = np.argsort(-counts, kind="stable")
    columns = np.argsort(order)[interactions.items]
    counts = counts[order][: np.count_nonzero(counts)]
    rows = np.repeat(np.arange(interactions.users), interactions.lengths())
    shape = (interactions.users, len(counts))
    ratings = _standardised(ratings)

    def table(values: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((values, (rows, columns)), shape=shape)

    shown = table(np.ones(len(ratings)))
    appeal, characters = np.zeros(shape[1]), 0.3 * generator.standard_normal((shape[1], factors))
    for _ in range(_SWEEPS):
        generosity, tastes = _regressed(shown, table(ratings - appeal[columns]), characters)
        appeal, characters = _regressed(shown.T, table(ratings - generosity[rows]).T, tastes)

    centre = tastes.mean(axis=0)
    spectrum, axes = np.linalg.eigh(np.cov(tastes.T, bias=True))
    spread = np.sqrt(np.where(spectrum > 1e-9 * spectrum.max(), spectrum, 0))
    whitened = (tastes - centre) @ axes * np.divide(1, spread, where=spread > 0, out=np.zeros(factors))
    appeal = appeal + characters @ centre
    return whitened, np.column_stack([np.log(counts), appeal, characters @ axes * spread])


def _regressed(
    shown: sparse.csr_matrix, ratings: sparse.csr_matrix, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of each row's ratings on the columns' features.

    Args:
        shown, ratings: (R, C) how often a pair occurs and the sum of its ratings.
        features: (C, f).

    Returns:
        (R,) intercepts and (R, f) coefficients.
    """
    features = np.column_stack([np.ones(len(features)), features])
    width = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), width * width)
    gram = (shown @ products).reshape(-1, width, width)
    gram += np.diag([_OFFSET_RIDGE] + [_RIDGE] * (width - 1))
    solution = np.linalg.solve(gram, (ratings @ features)[:, :, None])[:, :, 0]
    return solution[:, 0], solution[:, 1:]


def _resampled(generator: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows like the given ones: a bootstrap, shrunk to the mean and smoothed so that the covariance stays."""
    mean = rows.mean(axis=0)
    spectrum, axes = np.linalg.eigh(np.cov(rows.T, bias=True))
    root = axes * np.sqrt(np.maximum(spectrum, 0))
    noise = generator.standard_normal((count, rows.shape[1])) @ root.T
    picked = rows[generator.integers(len(rows), size=count)]
    smoothed: np.ndarray = mean + _KEPT * (picked - mean) + np.sqrt(1 - _KEPT**2) * noise
    return smoothed


def _dealt(generator: np.random.Generator, popularity: np.ndarray, appeal: np.ndarray, link: float) -> np.ndarray:
    """The popularities, dealt to the items in the order of a score whose correlation with appeal is `link`."""
    other = generator.standard_normal(len(appeal))
    other = _standardised(other - appeal * (other @ appeal) / max(appeal @ appeal, 1e-30))
    score = link * appeal + np.sqrt(1 - link**2) * other
    dealt = np.empty_like(popularity)
    dealt[np.argsort(score)] = np.sort(popularity)
    return dealt


def _standardised(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1, unless they are all equal."""
    centred: np.ndarray = values - values.mean()
    return centred / (centred.std() or 1.0)


def lowest(scores: np.ndarray, size: int) -> np.ndarray:
    """(B, `size`) columns with the lowest scores of each row, lowest first; `size` in [1, A]."""
    require(1 <= size <= scores.shape[1], f"size={size} in [1, {scores.shape[1]}]")
    columns = np.argpartition(scores, size - 1, axis=1)[:, :size]
    return np.take_along_axis(columns, np.argsort(np.take_along_axis(scores, columns, 1), axis=1, kind="stable"), 1)


def require(holds: bool, what: str) -> None:
    """Refuse an argument that does not hold: "Expected items=0 ≥ 1." """
    if not holds:
        raise SettingsError(f"Expected {what}.")
