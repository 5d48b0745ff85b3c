"""Tables with a row per item that are made of fewer numbers: T = F W + U R.

=========================  =======  =====================================================================
parameter                  shape    use
=========================  =======  =====================================================================
``<table>.by_feature``     (f, m)   W, trained; with `model.items` = features
``<table>.loadings``       (r, m)   R, trained; with a `model.rank` = r below the table's own width m
``<table>.factors``        (A, r)   U, trained
``features.matrix``        (A, f)   F, public and fixed (:mod:`common.features`), the same for all tables
``start.<table>``          (A, 1)   where biases start, fixed: added to the last column of a head's table, made of
                                    parts or not, with `training.start` = popularity (:mod:`common.popularity`)
=========================  =======  =====================================================================

A device forms the tables (:func:`formed`) and computes with those. What it clips and uploads are the gradients by the
parts, linear in a user's gradient G of the table: Fᵀ G, Uᵀ G and G Rᵀ (:func:`by_parts`). The first two are as small as
W and R and are formed for each user; the last one is never formed, as G itself is not (:mod:`common.ghost`).
Exact: ``tests/unit/test_item_tables.py`` holds it to autograd.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.ghost import Both, Formed, Gradient, Grams, Rows, Scattered
from common.settings import ModelSettings

FEATURES = "features.matrix"
START = "start."
BY_FEATURE, LOADINGS, FACTORS = "by_feature", "loadings", "factors"


def parts_of(model: ModelSettings, table: str, rows: int, width: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of what a table is made of: itself, or its parts."""
    low_rank = {f"{table}.{LOADINGS}": (model.rank, width), f"{table}.{FACTORS}": (rows, model.rank)}
    parts = low_rank if 0 < model.rank < width else {}
    if model.items == "features":
        return {f"{table}.{BY_FEATURE}": (model.feature_width, width)} | parts
    return parts or {table: (rows, width)}


def formed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with whole tables in place of their parts, differentiable by those; starts come after tables."""
    tables: dict[str, Tensor] = {}
    for name, value in parameters.items():
        table, _, part = name.rpartition(".")
        if name.startswith(START):
            table = name.removeprefix(START)
            tables[table] = tables[table] + pad(value, (tables[table].shape[-1] - 1, 0))
        elif part == BY_FEATURE:
            tables[table] = parameters[FEATURES] @ value
        elif part == FACTORS:
            low_rank = value @ parameters[f"{table}.{LOADINGS}"]
            tables[table] = tables[table] + low_rank if table in tables else low_rank
        elif part != LOADINGS and name != FEATURES:
            tables[name] = value
    return tables


def by_parts(
    wanted: Collection[str], parameters: dict[str, Tensor], gradients: list[tuple[str, Gradient]]
) -> list[tuple[str, Gradient]]:
    """The users' gradients by those of the `parameters` that are wanted, from those by the tables that they form; the
    parts of a table are wanted together."""
    found, small = list[tuple[str, Gradient]](), dict[str, Tensor]()
    for table, gradient in gradients:
        weights, loadings, factors = (f"{table}.{part}" for part in (BY_FEATURE, LOADINGS, FACTORS))
        if table in wanted:
            found.append((table, gradient))
        if weights in wanted:
            _add(small, weights, _projected(gradient, parameters[FEATURES]))
        if factors in wanted:
            _add(small, loadings, _projected(gradient, parameters[factors]))
            found.append((factors, _narrowed(gradient, parameters[loadings].T)))
    return found + [(name, _formed(value)) for name, value in small.items()]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    # Several uses of a table touch different rows of it, but all of W and R.
    sums[name] = sums[name] + value if name in sums else value


def _projected(gradient: Gradient, matrix: Tensor) -> Tensor:
    """(B, k, m) matrixᵀ G of each user's G (A, m), for a matrix (A, k)."""
    match gradient:
        case Formed(values):
            return matrix.T @ values
        case Grams(deltas, inputs):
            return torch.cat([delta @ matrix for delta in deltas]).transpose(1, 2) @ inputs
        case Rows(inner, ids):
            return _projected(inner, matrix[ids])
        case Scattered(delta, ids):
            return matrix[ids].transpose(1, 2) @ delta
        case Both(one, other):
            return _projected(one, matrix) + _projected(other, matrix)
    raise TypeError(f"Expected a kind of gradient that is known, found {type(gradient).__name__}.")


def _narrowed(gradient: Gradient, matrix: Tensor) -> Gradient:
    """G · matrix of each user's G (A, m), for a matrix (m, r)."""
    match gradient:
        case Formed(values):
            return _formed(values @ matrix)
        case Grams(deltas, inputs, delta_gram):
            return Grams(deltas, inputs @ matrix, delta_gram)
        case Rows(inner, ids):
            return Rows(_narrowed(inner, matrix), ids)
        case Scattered(delta, ids):
            return Scattered(delta @ matrix, ids)
        case Both(one, other):
            return Both(_narrowed(one, matrix), _narrowed(other, matrix))
    raise TypeError(f"Expected a kind of gradient that is known, found {type(gradient).__name__}.")


def _formed(values: Tensor) -> Formed:
    return Formed(values, values.flatten(1).square().sum(1))
