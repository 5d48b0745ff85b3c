"""The private states of a simulated population, a row a device: memory-mapped, and safe against a crash.

The file lags behind what is known in memory, where only rows that changed lately are. A checkpoint holds the rows that
changed since the last :data:`~server.checkpoint.KEPT` checkpoints, and a row reaches the file when all checkpoints that
are kept hold it. So each of them, laid over the file, is the state of its round, whenever the process was killed and
however far the file got: whatever was written meanwhile is what the checkpoint covers. Memory, and what a checkpoint
writes, are those of the cohorts between checkpoints, however many devices there are.

Tests: ``tests/unit/test_private_states.py``, ``tests/integration/test_crash.py``.
"""

import os
from collections import deque
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError
from server.checkpoint import KEPT
from server.durable import replacing

_DEVICES, _ROWS = "devices", "users"
"""Names of the tensors in a checkpoint: (M,) int64 devices, ascending, and (M, w) their rows."""


class PrivateStates:
    """(N, w) float32 rows, which begin at 0.

    Args:
        file: where they are kept between rounds, an array of numpy's; made at the first checkpoint after a row has
            changed. None: in memory alone, and no checkpoint has them.

    Attributes:
        rows: (N, w) to read.
    """

    def __init__(self, devices: int, width: int, file: Path | None = None) -> None:
        self.rows = torch.zeros(devices, width)  # takes no memory before it is written to
        self._file = file
        self._made = False
        self._changed: list[np.ndarray] = []
        self._covered: deque[np.ndarray] = deque()  # what changed before each of the newest checkpoints, oldest first

    def keep(self, devices: np.ndarray, rows: Tensor) -> None:
        """Take (B, w) new rows of (B,) different devices."""
        index = torch.from_numpy(devices)
        changed = (self.rows[index] != rows).any(1)
        self.rows[index[changed]] = rows[changed]
        if self._file is not None:
            self._changed.append(devices[changed.numpy()])

    def checkpoint(self) -> dict[str, Tensor]:
        """What the next checkpoint is to hold. Asked again before anything has changed, it is the same.

        Raises :class:`RunError` if the file cannot be written.
        """
        if self._file is None:
            return {}
        changed = _union(self._changed)
        if len(changed):
            self._changed.clear()
            self._covered.append(changed)
            if not self._made:
                self._make()
            if len(self._covered) > KEPT:
                self._write(self._covered.popleft())
            recent = _union(self._covered)
            self._lay_over(recent, self.rows[torch.from_numpy(recent)])
        recent = _union(self._covered)
        return {_DEVICES: torch.from_numpy(recent), _ROWS: self.rows[torch.from_numpy(recent)]}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint holds. Raises :class:`RunError` if it does not belong to these rows."""
        if _DEVICES not in state or _ROWS not in state:
            found = ", ".join(state) or "none"
            raise RunError(f"Expected the checkpoint to hold the user embeddings that changed lately: it has {found}.")
        devices, rows = state[_DEVICES].numpy(), state[_ROWS]
        if rows.shape[1:] != self.rows.shape[1:] or devices.max(initial=-1) >= len(self.rows):
            raise RunError(
                f"Expected the checkpoint's user embeddings of {len(self.rows)} devices, {self.rows.shape[1]} numbers "
                f"each: found {rows.shape[1]} numbers each, and device {devices.max(initial=0)}."
            )
        self._changed.clear()
        self._covered.clear()
        if len(devices):  # none has changed otherwise, and there is no file
            self._made = True
            self._covered.append(devices)
            self._lay_over(devices, rows)

    def _make(self) -> None:
        """A file of zeros, in the place of what an earlier run without a checkpoint may have left."""
        assert self._file is not None
        with replacing(self._file) as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.float32, tuple(self.rows.shape))
            with temporary.open("r+b") as file:  # a mapped page that finds no room would end the process
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        self._made = True

    def _write(self, devices: np.ndarray) -> None:
        """Bring the devices' rows into the file, durably."""
        mapped = self._mapped("r+")
        mapped[devices] = self.rows[torch.from_numpy(devices)].numpy()
        try:
            mapped.flush()
        except OSError as error:
            raise RunError(f"Expected {self._file} to be writable: {error.strerror}.") from None

    def _lay_over(self, devices: np.ndarray, rows: Tensor) -> None:
        """Read from the file, but for these rows."""
        self.rows = torch.from_numpy(self._mapped("c"))  # what is assigned to stays in memory, page by page
        self.rows[torch.from_numpy(devices)] = rows

    def _mapped(self, mode: Literal["c", "r+"]) -> "np.memmap[Any, Any]":
        expected = f"Expected {self._file} to hold the {len(self.rows)} users' embeddings, as the checkpoint does"
        try:
            mapped: np.memmap[Any, Any] = np.load(self._file, mmap_mode=mode)  # type: ignore[arg-type]
        except OSError as error:
            raise RunError(f"{expected}: {error.strerror}.") from None
        except (ValueError, EOFError):
            raise RunError(f"{expected}: it is another file, or truncated.") from None
        if mapped.shape != self.rows.shape or mapped.dtype != np.float32:
            raise RunError(f"{expected}: found {mapped.shape} of {mapped.dtype}.")
        return mapped


def _union(parts: "list[np.ndarray] | deque[np.ndarray]") -> np.ndarray:
    """(M,) the different devices in the parts, ascending."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
