"""Csv and parquet files with named columns."""

import csv
import gzip
import importlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd

from common.errors import DataError, MissingDependency
from common.settings import Columns, DataSettings
from simulations.datasets.interactions import Interactions
from simulations.datasets.table import check_columns, from_frame

Opener = Callable[[], IO[bytes]]
"""Opens a file afresh at its first byte."""


def read(settings: DataSettings, *, seed: int) -> Interactions:
    """Read `settings.path`, a .csv, .csv.gz or .parquet file with the columns that `settings.columns` names.

    Raises:
        DataError: the file is missing, damaged, of another kind, or holds something that is no interaction.
        MissingDependency: parquet without pyarrow.
    """
    path = Path(settings.path).expanduser()
    name = path.name.lower()
    if not path.is_file():
        found = "it is a folder" if path.exists() else "there is none"
        raise DataError(f"Expected data.path={path} to be a file: {found}.")
    if name.endswith((".csv", ".csv.gz")):
        frame = read_csv(opener_of(path), columns=settings.columns, origin=str(path))
    elif name.endswith(".parquet"):
        frame = _read_parquet(path, settings.columns)
    else:
        raise DataError(f"Expected data.path={path} to end in .csv, .csv.gz or .parquet.")
    return from_frame(frame, columns=settings.columns, settings=settings, seed=seed, origin=str(path))


def opener_of(path: Path) -> Opener:
    """Opens the file at a path, through gzip if its name says so."""
    if path.name.lower().endswith(".gz"):
        return lambda: cast(IO[bytes], gzip.open(path))
    return lambda: path.open("rb")


def read_csv(opener: Opener, *, columns: Columns, origin: str) -> pd.DataFrame:
    """Read a comma-separated UTF-8 file with a header; ids of any column stay text unless all are whole numbers.

    Raises:
        DataError: no csv, a line with too many fields, or one of the four columns is missing.
    """
    with reading(origin):
        with opener() as file:
            check_columns(pd.read_csv(file, nrows=0).columns, columns, origin)
        return parse_csv(opener, columns)


def parse_csv(opener: Opener, columns: Columns, **options: Any) -> pd.DataFrame:
    """`pd.read_csv` with the `options`, for use inside :func:`reading`; ids are all int64 or all text.

    pandas would infer their type piece by piece, and the name of an id would depend on its neighbours. Text takes
    five times as long, so it is the second try.
    """

    def attempt(kind: str) -> pd.DataFrame:
        with opener() as file:
            types = {columns.user: kind, columns.item: kind}
            frame: pd.DataFrame = pd.read_csv(file, dtype=types, index_col=False, **options)
            return frame

    with warnings.catch_warnings():
        # All columns are read, since with `usecols` pandas drops surplus fields silently; without an index column it
        # warns of those in the first row. Mixed types are for `from_frame` to report, with the row.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        warnings.simplefilter("ignore", pd.errors.DtypeWarning)
        try:
            return attempt("int64")
        except ValueError:
            return attempt("str")


def _read_parquet(path: Path, columns: Columns) -> pd.DataFrame:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        hint = "pip install 'fedtopk[data]'"
        raise MissingDependency(f"Expected pyarrow to read {path} ({hint}): {_line(error)}") from None
    try:
        check_columns(parquet.read_schema(path).names, columns, str(path))
        table = parquet.read_table(path, columns=[name for _, name in columns if name])
        # The metadata of pandas would turn a column into the index if it was one when the file was written.
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
        return frame
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"Expected {path} to be a parquet file: {_line(error)}") from None


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Turn what broken files make the readers raise into a :class:`DataError` that names the file."""
    try:
        yield
    except pd.errors.EmptyDataError:
        raise DataError(f"Expected {origin} to hold interactions: it is empty.") from None
    except pd.errors.ParserWarning:
        raise DataError(f"Expected {origin} to have as many fields in its rows as in its header: found more.") from None
    except (pd.errors.ParserError, csv.Error) as error:
        raise DataError(f"Expected {origin} to be a csv file: {_line(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"Expected {origin} to be UTF-8 text: found byte 0x{error.object[error.start]:02x}.") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError is how zipfile says that a member is encrypted or compressed in an unknown way.
        raise DataError(f"Expected {origin} to be undamaged: {_line(error)}") from None
    except OSError as error:
        raise DataError(f"Expected {origin} to be readable: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """The message of another library on one line, with a full stop."""
    text = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
    return text.rstrip(".") + "."
