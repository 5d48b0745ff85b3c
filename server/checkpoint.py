"""Checkpoints: all that a run needs to go on from a round, in one safetensors file each.

``RUN/checkpoints/round-000123.safetensors`` is an ordinary safetensors file. Its metadata name the format and version,
the round, the tree that the tensors belong to, and the SHA-256 of the file with that sum itself read as zeros.
"""

import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from common.errors import CheckpointError, RunError
from server.durable import TEMPORARY, make_folder, replacing
from server.tensor_tree import flatten, unflatten

FORMAT = "fedtopk-checkpoint"
VERSION = "1"
KEPT = 2
"""Checkpoints in the folder of a run, the newest ones."""
_NAME = re.compile(r"round-(\d{6,})\.safetensors")
_UNSEALED = "0" * 64


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``round``.

    Attributes:
        round: the last round it contains, at least 0.
        model: the shared parameters by name.
        optimizer: the ``state_dict()`` of a torch optimizer.
        extra: further tensors by name.
        metadata: further strings, such as the hash of the settings.
    """

    round: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep: int = KEPT) -> Path:
    """Write ``checkpoint`` into ``folder`` (``RUN/checkpoints``), keep the newest ``keep`` ≥ 1, return its path.

    Guarantees:
        - when it returns, the checkpoint survives the process and a power cut; when it does not, the earlier ones are
          intact (tests/unit/test_checkpoint.py::test_disk_full, ::test_failed_replace);
        - training on from what :func:`load` returns is bit-identical to training on without a break, for every
          optimizer of the settings (::test_training_goes_on_bit_identically).

    Raises :class:`RunError` if the disk is full or the folder cannot be written to. Only one process may save.
    """
    make_folder(folder)
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    _write(path, checkpoint)
    outdated = [old for _, old in _list(folder)[:-keep]]
    try:
        for leftover in (*outdated, *folder.glob(f"{TEMPORARY}*")):
            leftover.unlink()
    except OSError as error:
        raise RunError(f"Expected old files in {folder} to be removable: {error.strerror}.") from None
    return path


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` (``RUN/checkpoints``), or None if there is none. Raises as :func:`load`."""
    checkpoints = _list(folder)
    return load(checkpoints[-1][1]) if checkpoints else None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Guarantee: it is the very content that was saved, or :class:`CheckpointError`, which names the file, what is wrong
    and what to do (tests/unit/test_checkpoint.py::test_any_damage_is_noticed).
    Raises :class:`RunError` if the file cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"Expected {path} to be readable: {error.strerror}.") from None
    try:
        return _parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"Expected {path} to be a checkpoint: {error}; {_remedy(path)}.") from None


def _remedy(path: Path) -> str:
    previous = [round for round, other in _list(path.parent) if other != path]
    return f"delete it to resume from round {previous[-1]}" if previous else "delete it to start again"


def _list(folder: Path) -> list[tuple[int, Path]]:
    """Rounds and paths of the checkpoints in ``folder``, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def _write(path: Path, checkpoint: Checkpoint) -> None:
    parts = {"model": checkpoint.model, "optimizer": checkpoint.optimizer, "extra": checkpoint.extra}
    tree, tensors = flatten(parts)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "round": str(checkpoint.round),
        "tree": json.dumps(tree),
        "metadata": json.dumps(checkpoint.metadata),
        "sha256": _UNSEALED,
    }
    with replacing(path) as temporary:
        # Sealed in the file, not in memory: another copy of the tensors would take longer than all the rest.
        safetensors.torch.save_file(tensors, temporary, metadata)
        with temporary.open("r+b") as file, mmap(file.fileno(), 0) as content:
            seal = _seal(sha256(content).hexdigest())
            start = content.find(_seal(_UNSEALED))
            content[start : start + len(seal)] = seal


def _parse(data: bytes) -> Checkpoint:
    metadata = _metadata(data)
    if metadata.get("format") != FORMAT:
        raise CheckpointError("another program made it")
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"it has version {metadata.get('version')}, and this program reads version {VERSION}")
    checksum = str(metadata.get("sha256"))
    # Before the tensors are parsed: what passes is what was saved, so that nothing below can fail.
    if sha256(data.replace(_seal(checksum), _seal(_UNSEALED), 1)).hexdigest() != checksum:
        raise CheckpointError("it is truncated or damaged, for its checksum does not match")
    parts = unflatten(json.loads(metadata["tree"]), safetensors.torch.load(data))
    return Checkpoint(round=int(metadata["round"]), metadata=json.loads(metadata["metadata"]), **parts)


def _metadata(data: bytes) -> dict[str, Any]:
    """The metadata in the header of a safetensors file: eight bytes of length, then JSON."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CheckpointError("it is empty, truncated or not a safetensors file")
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _seal(checksum: str) -> bytes:
    """The checksum as it stands in the header. Unescaped quotes occur in no other place where these words may."""
    return f'"sha256":"{checksum}"'.encode()
