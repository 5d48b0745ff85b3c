"""The key of correlated noise: for its owner alone, durable, and gone in the end."""

from pathlib import Path

import pytest

from common.errors import RunError
from server.noise_key import KeyFile, SeededKey


def test_a_key_is_its_owners_and_is_erased(tmp_path: Path) -> None:
    key, other = KeyFile(tmp_path / "noise.key"), KeyFile(tmp_path / "other.key")
    key.make()
    other.make()
    assert (tmp_path / "noise.key").stat().st_mode & 0o777 == 0o600
    assert len(key.read()) == 32 and key.read() == KeyFile(tmp_path / "noise.key").read() != other.read()
    key.erase()
    key.erase()
    assert not (tmp_path / "noise.key").exists()
    with pytest.raises(RunError, match="Without it the run cannot go on"):
        key.read()


def test_a_key_that_others_may_read_or_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    key = KeyFile(tmp_path / "noise.key")
    key.make()
    key.path.chmod(0o640)
    with pytest.raises(RunError, match="found 32 and 0640"):
        key.read()
    key.path.chmod(0o600)
    key.path.write_bytes(bytes(31))
    with pytest.raises(RunError, match="found 31 and 0600"):
        key.read()


def test_a_seeded_key_follows_from_the_seed() -> None:
    assert SeededKey(3).read() == SeededKey(3).read() != SeededKey(4).read()
