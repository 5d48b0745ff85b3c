"""MovieLens as GroupLens publishes it: a folder or a zip, of any edition.

========================================  =============================================================
editions                                  files
========================================  =============================================================
latest-small, latest, 20M, 25M, 32M       ``ratings.csv`` and ``movies.csv``, with headers
1M, 10M                                   ``ratings.dat`` and ``movies.dat``, fields separated by ``::``
100K                                      ``u.data`` separated by tabs and ``u.item`` by ``|``
========================================  =============================================================

The edition is told by these files, whatever the folder is called; they lie at its top or one folder below.
"""

import csv
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from common.errors import DataError
from common.settings import Columns, DataSettings
from simulations.datasets.files import Opener, opener_of, parse_csv, read_csv, reading
from simulations.datasets.interactions import Interactions
from simulations.datasets.table import from_frame

_TITLES = {"ratings.csv": "movies.csv", "ratings.dat": "movies.dat", "u.data": "u.item"}
"""The file of ratings of each format, and that of its titles."""

_SEPARATORS = {"ratings.dat": "::", "movies.dat": "::", "u.data": "\t", "u.item": "|"}

_COLUMNS = Columns()


def read(settings: DataSettings, *, seed: int) -> Interactions:
    """Read the edition at `settings.path`; a missing file of titles leaves the ids as titles, and no genres.

    Raises:
        DataError: nothing there, no or several files of ratings, a damaged zip, or a line that is no rating.
    """
    path = Path(settings.path).expanduser()
    with _contents(path) as files:
        found = sorted(name for name in files if PurePosixPath(name).name in _TITLES)
        if len(found) != 1:
            raise DataError(
                f"Expected data.path={path} to hold one of {', '.join(_TITLES)}, at its top or one folder below: "
                f"found {' and '.join(found) or 'none'}."
            )
        ratings = PurePosixPath(found[0])
        titles = ratings.with_name(_TITLES[ratings.name])
        origin = f"{path}/{ratings}"
        named, genres = dict[str, str](), dict[str, str]()
        if str(titles) in files:
            named, genres = _read_movies(files[str(titles)], titles.name, f"{path}/{titles}")
        return from_frame(
            _read_ratings(files[str(ratings)], ratings.name, origin),
            columns=_COLUMNS,
            settings=settings,
            seed=seed,
            titles=named,
            labels=genres,
            origin=origin,
        )


@contextmanager
def _contents(path: Path) -> Iterator[Mapping[str, Opener]]:
    """The files at the top of a folder or zip and one folder below, by their path inside it."""
    if path.is_dir():
        below = [file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file()]
        yield {file.relative_to(path).as_posix(): opener_of(file) for file in below}
    elif not path.exists():
        raise DataError(f"Expected data.path={path} to be a folder or a zip of MovieLens: there is none.")
    elif not zipfile.is_zipfile(path):
        raise DataError(f"Expected data.path={path} to be a folder or a zip of MovieLens: it is no whole zip file.")
    else:
        with reading(str(path)):
            archive = zipfile.ZipFile(path)
        with archive:
            members = {PurePosixPath(name): name for name in archive.namelist()}
            yield {str(place): partial(archive.open, name) for place, name in members.items() if len(place.parts) <= 2}


def _read_ratings(opener: Opener, name: str, origin: str) -> pd.DataFrame:
    """The table of ratings, with the column names of ``ratings.csv`` in every format."""
    if name not in _SEPARATORS:
        return read_csv(opener, columns=_COLUMNS, origin=origin)
    separator = _SEPARATORS[name]
    with reading(origin), opener() as file:
        # pandas reads separators of two characters with its slow Python parser.
        data = file.read().replace(separator.encode(), b"\t")
        for number, line in enumerate(io.BytesIO(data), 1):
            if line.count(b"\t") != 3 and line.strip():
                shown = line.decode("latin-1").rstrip().replace("\t", separator)[:60]
                raise DataError(
                    f"Expected line {number:,} of {origin} to be user, item, rating and time separated by "
                    f"{separator!r}: found {shown!r}."
                )
        names = [_COLUMNS.user, _COLUMNS.item, _COLUMNS.rating, _COLUMNS.timestamp]
        options = {"sep": "\t", "names": names, "quoting": csv.QUOTE_NONE, "encoding": "latin-1"}
        return parse_csv(lambda: io.BytesIO(data), _COLUMNS, **options)


def _read_movies(opener: Opener, name: str, origin: str) -> tuple[dict[str, str], dict[str, str]]:
    """Titles and genres by item id, from the lines that have them."""
    with reading(origin), opener() as file:
        data = file.read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")  # 100K and 1M; 10M and the csv editions are UTF-8
        if name not in _SEPARATORS:
            return column_by_item(text, "title"), column_by_item(text, "genres")
        lines = [line.rstrip("\r").split(_SEPARATORS[name]) for line in text.split("\n")]
        movies = [line for line in lines if len(line) >= 3]
        return {line[0]: line[1] for line in movies}, {line[0]: _genres(line) for line in movies}


def _genres(line: list[str]) -> str:
    """Of a line of ``movies.dat``, which ends in their names, or of ``u.item``, whose last 19 fields are flags."""
    if len(line) < _FLAGS:
        return line[-1]
    return "|".join(f"genre {at}" for at, flag in enumerate(line[-_FLAGS:]) if flag == "1")


_FLAGS = 19


def column_by_item(text: str, column: str) -> dict[str, str]:
    """A column by item id of a csv text with the column ``movieId``; empty without either."""
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    if "movieId" not in header or column not in header:
        return {}
    item, at = header.index("movieId"), header.index(column)
    return {row[item]: row[at] for row in rows if len(row) == len(header)}
