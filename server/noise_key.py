"""The key that a run's correlated noise follows from: ``RUN/noise.key``, for the server's process alone.

Who has it and the released models can take all noise away, so it is as secret as the updates' sums themselves: it must
not be copied, backed up or published with the run folder. Its file has the mode 0600 and is erased when the run ends;
one that was stopped, or killed, keeps it to go on with. (Erased means unlinked: what a disk or a snapshot keeps is not
in this program's hands.) Tests: ``tests/unit/test_noise_key.py``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import RunError
from common.privacy.randomness import KEY_BYTES, seeded_stream
from server.durable import replacing


@dataclass(frozen=True)
class KeyFile:
    """The key of a run with private noise, in a file."""

    path: Path

    def make(self) -> None:
        """Draw the key from the system's randomness, durably; before the first round. Raises :class:`RunError`."""
        with replacing(self.path) as temporary:
            temporary.touch(0o600)
            temporary.write_bytes(os.urandom(KEY_BYTES))

    def read(self) -> bytes:
        """The 32 bytes. Raises :class:`RunError` where they are not there, or others may read them."""
        try:
            mode, content = self.path.stat().st_mode & 0o777, self.path.read_bytes()
        except OSError as error:
            raise RunError(
                f"Expected {self.path} to hold the key of the run's noise: {error.strerror}. Without it the run cannot "
                "go on; it is erased when a run ends."
            ) from None
        if mode & 0o077 or len(content) != KEY_BYTES:
            raise RunError(
                f"Expected {self.path} to have {KEY_BYTES} bytes and the mode 0600, found {len(content)} and "
                f"{mode:04o}: whoever reads it can take the noise away."
            )
        return content

    def erase(self) -> None:
        """Raises :class:`RunError`."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"Expected {self.path} to be removable: {error.strerror}.") from None


@dataclass(frozen=True)
class SeededKey:
    """The key of a run whose noise protects nobody: it follows from the seed."""

    seed: int

    def read(self) -> bytes:
        """The 32 bytes."""
        return seeded_stream(self.seed, "correlated noise").words(KEY_BYTES // 8).tobytes()

    def erase(self) -> None:
        """There is nothing to erase."""
