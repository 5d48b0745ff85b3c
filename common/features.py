"""Public features of the items: a fixed matrix that a few trained numbers turn into a whole table of embeddings.

A row is made of what anybody can read in the catalogue, in this order of columns:

1. the item's place in the order of frequency: hat functions of its logarithm, which sum to 1;
2. its labels (genres), a column for each of the most frequent ones;
3. random projections: the sum of fixed codes of ±1 (Achlioptas 2003) of the words of its title, of its year's decade
   and of the labels without a column, each weighted by the logarithm of how rare it is. An item without a title has
   the code of its id, so that a catalogue without any text is projected at random.

Codes follow from the words by SHAKE-128: they are the same on every machine and for every run.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from common.catalogue import Catalogue
from common.settings import ModelSettings

ORDER_COLUMNS = 8
"""Of the order of frequency."""

_WORD = re.compile(r"\w+")
_YEAR = re.compile(r"\((\d{3})\d\)\s*$")


def features_of(model: ModelSettings, catalogue: Catalogue) -> Tensor | None:
    """(A, `model.feature_width`) float32 features of the items; None for a model without them.

    Labels and codes each have norm 1 in every row that has any.
    """
    if model.items != "features":
        return None
    given = [""] * len(catalogue) if catalogue.labels is None else catalogue.labels
    labels = [frozenset(filter(None, str(row).split("|"))) for row in given]
    frequent = [label for label, _ in Counter(sorted(label for row in labels for label in row)).most_common()]
    columns = {label: at for at, label in enumerate(frequent[: (model.feature_width - ORDER_COLUMNS) // 2])}
    own = np.zeros((len(catalogue), len(columns)))
    for item, row in enumerate(labels):
        own[item, [columns[label] for label in row if label in columns]] = 1
    rest = [
        _words(str(name), str(title)) | {f"|{label}" for label in row if label not in columns}
        for name, title, row in zip(catalogue.ids, catalogue.titles, labels, strict=True)
    ]
    codes = _codes(rest, model.feature_width - ORDER_COLUMNS - len(columns))
    return torch.from_numpy(np.hstack([order_columns(len(catalogue)), _normed(own), _normed(codes)])).float()


def order_columns(items: int) -> np.ndarray:
    """(A, 8) hat functions of log(1 + k) for items k = 0, …, A − 1: each row interpolates between two of the knots."""
    place = np.log1p(np.arange(items)) / max(np.log(items), 1) * (ORDER_COLUMNS - 1)
    return np.asarray(np.clip(1 - np.abs(place[:, None] - np.arange(ORDER_COLUMNS)), 0, None))


def order_knots(items: int) -> np.ndarray:
    """(8,) the places k, not whole, at which one column of :func:`order_columns` is 1."""
    return np.asarray(np.expm1(np.arange(ORDER_COLUMNS) * max(np.log(items), 1) / (ORDER_COLUMNS - 1)))


def _words(name: str, title: str) -> set[str]:
    if title == name:
        return {f"#{name}"}
    decade = {f"({year[1]}0s)"} if (year := _YEAR.search(title)) else set[str]()
    return set(_WORD.findall(_YEAR.sub("", title).lower())) | decade


def _codes(words: list[set[str]], width: int) -> np.ndarray:
    """(A, width) sums of the codes of each item's words."""
    counts = Counter(word for own in words for word in own)
    code = {word: np.log(len(words) / count) * _code(word, width) for word, count in counts.items()}
    return np.array([_summed((code[word] for word in sorted(own)), width) for own in words])


def _summed(codes: Iterable[np.ndarray], width: int) -> np.ndarray:
    return np.asarray(sum(codes, start=np.zeros(width)))


def _code(word: str, width: int) -> np.ndarray:
    """(width,) ±1."""
    digest = hashlib.shake_128(word.encode(errors="surrogatepass")).digest(-(-width // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:width] * 2.0 - 1


def _normed(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1))
