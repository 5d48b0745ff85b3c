"""Where data is kept: the cache folder, and arrays that may be larger than memory."""

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from common.errors import DataError

_IN_MEMORY = 2**25
"""Bytes of an array from which on it is in a file."""


def cache_folder() -> Path:
    """``$FEDTOPK_CACHE``, ``$XDG_CACHE_HOME/fedtopk`` or ``~/.cache/fedtopk``; it may be missing."""
    if folder := os.environ.get("FEDTOPK_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtopk"


def unwritable(error: OSError) -> DataError:
    """What to tell the user of a cache folder that cannot be written to."""
    hint = "set FEDTOPK_CACHE to a folder that is"
    return DataError(f"Expected the cache folder {cache_folder()} to be writable: {error.strerror}; {hint}.")


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array to fill. From 32 MiB on it is memory-mapped: the system keeps of it in memory what there is room for.

    Its file is in the cache folder and has no name: whatever ends the process, nothing is left behind, and nothing can
    be stale. Its space is taken at once, so that a full disk is told of here. Raises :class:`DataError`.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size < _IN_MEMORY:
        return np.zeros(shape, dtype)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise unwritable(error) from None
