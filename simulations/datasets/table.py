"""From a table with one row per interaction to :class:`Interactions`.

The result depends on the rows, the settings and the seed, never on the order of the rows:

1. ids become names, and names are put in natural order (2 before 10, u2 before u10);
2. the first ``data.users`` users stay;
3. rows are put in the order (user, time, item, rating), and of identical rows one is kept;
4. the catalogue is the ``data.items`` most frequent items, and rows of other items go;
5. rows of one user with equal timestamps are shuffled with a generator made from the seed.

In a column whose ids are all whole numbers, 7, 7.0 and 007 are one id, named "7": csv files do not tell them apart.
Two ratings of one item by one user at different times, or different ratings at one time, are two interactions.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from common.catalogue import Catalogue
from common.errors import DataError
from common.settings import Columns, DataSettings
from simulations.datasets.interactions import Interactions

LATEST = 100_000_000_000
"""Seconds in the year 5138: what lies beyond is milliseconds."""

_TIES = 1
"""Sets the generator that breaks ties apart from others made from the same seed."""

_OPTIONAL = ("title", "labels")
"""Columns that a table may lack."""

_WHOLE = re.compile(r"(-?)0*(\d+)(?:\.0+)?")
_DIGITS = re.compile(r"((?:^-)?\d{1,4000})")


class _Rows(NamedTuple):
    """Columns of equal length."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray

    def take(self, which: np.ndarray) -> "_Rows":
        """The rows at an index or under a mask, in its order."""
        return _Rows(*(column[which] for column in self))

    def repeated(self) -> np.ndarray:
        """Mask of the rows that equal the row before them in every column."""
        same = np.ones(len(self.users), bool)
        same[:1] = False
        for column in self:
            same[1:] &= column[1:] == column[:-1]
        return same


def from_frame(
    frame: pd.DataFrame,
    *,
    columns: Columns,
    settings: DataSettings,
    seed: int,
    titles: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    origin: str = "the table",
) -> Interactions:
    """Validate a table and convert it.

    Args:
        frame: one row per interaction. Ids are whole numbers or text; ratings are numbers in
            `settings.rating_range`; timestamps are seconds since 1970 (fractions are cut off) or ISO 8601 dates
            (UTC where they name no zone).
        columns: the names of the four columns, and of the items' texts if they are in the table; others are ignored.
        settings: `users`, `items` and `rating_range` are used.
        seed: orders a user's interactions with equal timestamps.
        titles, labels: item id to title and labels, for the catalogue, in place of columns of the table.
        origin: what error messages call the table.

    Returns:
        All users that were asked for, in natural order of their ids, also those left without interactions.

    Raises:
        DataError: naming the column, the first offending value, its row and the number of such rows.
    """
    check_columns(frame.columns, columns, origin)
    if frame.empty:
        raise DataError(f"Expected {origin} to hold interactions: it has no rows.")
    users, user_ids = _identify(frame[columns.user], origin)
    items, item_ids = _identify(frame[columns.item], origin)
    ratings = _ratings(frame[columns.rating], settings.rating_range, origin)
    rows = _Rows(users, items, ratings, _seconds(frame[columns.timestamp], origin))

    titles = titles or _texts(frame, columns.title, items, item_ids)
    labels = labels or _texts(frame, columns.labels, items, item_ids)

    if settings.users:
        user_ids = user_ids[: settings.users]
        rows = rows.take(rows.users < len(user_ids))
    rows = rows.take(np.lexsort((rows.ratings, rows.items, rows.timestamps, rows.users)))
    rows = rows.take(~rows.repeated())

    chosen = _most_frequent(rows.items, len(item_ids), settings.items)
    index = np.full(len(item_ids), -1, np.int32)
    index[chosen] = np.arange(len(chosen), dtype=np.int32)
    rows = rows._replace(items=index[rows.items])
    rows = rows.take(rows.items >= 0)
    rows = rows.take(_shuffle_ties(rows, seed))

    ids = item_ids[chosen]
    return Interactions(
        offsets=np.concatenate(([0], np.cumsum(np.bincount(rows.users, minlength=len(user_ids))))).astype(np.int64),
        items=rows.items,
        ratings=rows.ratings,
        timestamps=rows.timestamps,
        user_ids=user_ids,
        catalogue=_catalogue(ids, titles, labels),
    )


def _catalogue(ids: np.ndarray, titles: Mapping[str, str] | None, labels: Mapping[str, str] | None) -> Catalogue:
    known = np.array([(titles or {}).get(name) or name for name in ids.tolist()])
    return Catalogue(ids, known, np.array([labels.get(name, "") for name in ids.tolist()]) if labels else None)


def _texts(frame: pd.DataFrame, column: str, items: np.ndarray, item_ids: np.ndarray) -> dict[str, str] | None:
    """Item id to its text in a column: the first in the order of the alphabet, where an item has several."""
    if not column:
        return None
    texts = frame[column].reset_index(drop=True).dropna().astype(str)
    first = texts.groupby(items[texts.index]).min()
    return dict(zip(item_ids[first.index].tolist(), first.tolist(), strict=True))


def check_columns(present: Iterable[Any], columns: Columns, origin: str) -> None:
    """Raise :class:`DataError` for the first of the named columns that is not present, listing those that are."""
    names = list(present)
    for role, name in columns:
        if name not in names and (name or role not in _OPTIONAL):
            listed = ", ".join(_show(other) for other in names[:10]) + (", …" if len(names) > 10 else "")
            raise DataError(f"Expected {origin} to have a column {name!r} (data.columns.{role}): it has {listed}.")


def _identify(column: "pd.Series[Any]", origin: str) -> tuple[np.ndarray, np.ndarray]:
    """The (rows,) int32 position of each row's id in the (ids,) sorted unique names, and those names."""
    codes, values = pd.factorize(column)
    if (missing := codes < 0).any():
        _refuse(column, missing, origin, "to name an id in each row")
    names = [str(value) for value in values.tolist()]
    numbers = [_WHOLE.fullmatch(name) for name in names]
    whole = [number.group(1) + number.group(2) for number in numbers if number]
    if len(whole) == len(names):
        names = whole
    ordered = sorted(set(names), key=_natural)
    rank = {name: position for position, name in enumerate(ordered)}
    return np.array([rank[name] for name in names], np.int32)[codes], np.array(ordered)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares runs of digits as numbers, and a leading minus with them."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(_DIGITS.split(name))], name


def _ratings(column: "pd.Series[Any]", allowed: tuple[float, float], origin: str) -> np.ndarray:
    """(rows,) float32 ratings, compared with the range as float32."""
    with np.errstate(over="ignore"):
        ratings = _numbers(column).astype(np.float32)
    if (bad := ~np.isfinite(ratings)).any():
        _refuse(column, bad, origin, "to hold a finite number in each row")
    low, high = np.array(allowed, np.float32)
    if (bad := (ratings < low) | (ratings > high)).any():
        _refuse(column, bad, origin, f"to lie in data.rating_range={allowed[0]:g},{allowed[1]:g} (change that setting)")
    return ratings


def _seconds(column: "pd.Series[Any]", origin: str) -> np.ndarray:
    """(rows,) int64 seconds since 1970. The first row tells whether the column holds numbers or dates."""
    dates = pd.api.types.is_datetime64_any_dtype(column)
    if not dates:
        seconds = _numbers(column)
        dates = np.isnan(seconds[0]) and isinstance(column.iloc[0], str | date)
    if dates:
        moments = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
        seconds = ((moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).to_numpy(np.float64)
    if (bad := ~((seconds >= 0) & np.isfinite(seconds))).any():
        _refuse(column, bad, origin, "to hold seconds since 1970 or ISO 8601 dates")
    if (bad := seconds >= LATEST).any():
        _refuse(column, bad, origin, "to hold seconds since 1970, not milliseconds or less")
    return seconds.astype(np.int64)


def _numbers(column: "pd.Series[Any]") -> np.ndarray:
    """(rows,) float64, NaN where there is no number."""
    return pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _most_frequent(items: np.ndarray, total: int, limit: int) -> np.ndarray:
    """The items that occur, most frequent first and ties in their own order; at most `limit` unless it is 0."""
    counts = np.bincount(items, minlength=total)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return order[:limit] if limit else order


def _shuffle_ties(rows: _Rows, seed: int) -> np.ndarray:
    """An order of the sorted rows that shuffles those of one user and one time among themselves."""
    later = (rows.users[1:] != rows.users[:-1]) | (rows.timestamps[1:] != rows.timestamps[:-1])
    moment = np.concatenate(([0], np.cumsum(later)))[: len(rows.users)]
    generator = np.random.default_rng([seed, _TIES])
    return np.argsort(moment + generator.random(len(moment)), kind="stable")


def _refuse(column: "pd.Series[Any]", bad: np.ndarray, origin: str, expected: str) -> NoReturn:
    """Raise :class:`DataError` for a column with bad rows, showing the first."""
    first = int(np.argmax(bad))
    raise DataError(
        f"Expected column {column.name!r} of {origin} {expected}: found {_show(column.iloc[first])} in data row "
        f"{first + 1:,} ({np.count_nonzero(bad):,} of {len(bad):,} rows are so)."
    )


def _show(value: Any) -> str:
    """A value on one short line."""
    return repr(value[:40]) if isinstance(value, str) else str(value)
