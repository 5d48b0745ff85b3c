"""Checkpoints: exact, atomic, and never silently wrong."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import CheckpointError, RunError
from server.checkpoint import Checkpoint, load, load_latest, save
from server.durable import replacing
from server.tensor_tree import flatten, unflatten

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "amsgrad": partial(torch.optim.Adam, lr=torch.tensor(0.1), betas=(0.8, 0.95), amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5, centered=True),
}


def small(round: int = 1) -> Checkpoint:
    model = {"items.weight": torch.arange(6.0).reshape(2, 3), "policy.bias": torch.tensor([1.5, -0.0])}
    optimizer = torch.optim.SGD([torch.zeros(2)], lr=0.1).state_dict()
    return Checkpoint(round, model, optimizer, {"mean": torch.ones(2)}, {"settings": 'ab"c\n', "sha256": "0" * 64})


def assert_same(left: Any, right: Any) -> None:
    """Equal in type and bit, tensors and containers alike."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo[RunError]) -> str:
    message = str(error.value)
    assert message.startswith("Expected ") and message.endswith(".") and "\n" not in message
    return message


def train(parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("first_steps", [0, 1, 5])
def test_training_goes_on_bit_identically(tmp_path: Path, make: Make, first_steps: int) -> None:
    parameters = [torch.linspace(-1, 1, 7), torch.ones(2, 3)]
    optimizer = make(parameters)
    train(parameters, optimizer, range(first_steps))
    saved = Checkpoint(first_steps, dict(zip("ab", parameters, strict=True)), optimizer.state_dict())
    save(tmp_path, saved)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert_same(loaded.optimizer, saved.optimizer)

    resumed = [loaded.model["a"], loaded.model["b"]]
    resumed_optimizer = make(resumed)
    resumed_optimizer.load_state_dict(loaded.optimizer)
    train(parameters, optimizer, range(first_steps, 10))
    train(resumed, resumed_optimizer, range(first_steps, 10))
    assert_same(resumed, parameters)
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_all_parts_come_back(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", small(123))
    assert path == tmp_path / "checkpoints" / "round-000123.safetensors"
    loaded = load(path)
    assert_same(vars(loaded), vars(small(123)))


def test_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(save(tmp_path, small()))
    assert set(tensors) == {"model.items.weight", "model.policy.bias", "extra.mean"}


def test_saving_copies_what_is_shared_or_transposed(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    model = {"whole": flat, "part": flat[2:4], "again": flat, "transposed": flat.reshape(2, 3).T, "none": flat[:0]}
    model |= {"half": torch.ones(2, dtype=torch.float16), "count": torch.tensor(2**62), "parameter": flat[0]}
    loaded = load(save(tmp_path, Checkpoint(1, model, {})))
    assert_same(loaded.model, model)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(torch.ones(2))
keys = st.integers() | st.text(alphabet="ab.'", max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_tree_comes_back(tree: Any) -> None:
    json_value, tensors = flatten(tree)
    assert_same(unflatten(json.loads(json.dumps(json_value)), tensors), tree)


def test_unknown_leaf_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.0\.momentum .* not object"):
        flatten({"state": [{"momentum": object()}]})


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_keeps_the_newest(tmp_path: Path) -> None:
    for round in (1, 2, 999_999, 1_000_000):
        save(tmp_path, small(round), keep=2)
    assert names(tmp_path) == ["round-1000000.safetensors", "round-999999.safetensors"]
    latest = load_latest(tmp_path)
    assert latest is not None and latest.round == 1_000_000


def test_leftovers_are_ignored_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-round-000009.safetensors").write_bytes(b"half")
    (tmp_path / ".tmpA7bC9d").write_bytes(b"half")  # as safetensors names its own
    (tmp_path / "notes.txt").write_text("not ours")
    assert load_latest(tmp_path) is None
    save(tmp_path, small())
    assert names(tmp_path) == ["notes.txt", "round-000001.safetensors"]


def damaged(tmp_path: Path, change: Callable[[bytes], bytes]) -> str:
    """The message for a newest checkpoint whose bytes were changed."""
    save(tmp_path, small(1))
    path = save(tmp_path, small(2))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path)
    assert str(path) in one_line(error)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[:5], "not a safetensors file"),
        (lambda data: data[:100], "not a safetensors file"),
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: data + b"\0", "truncated or damaged"),
        (lambda data: data[:-1] + b"!", "truncated or damaged"),
        (lambda data: data.replace(b'"round":"2"', b'"round":"3"'), "truncated or damaged"),
        (lambda data: b"garbage " * 1000, "not a safetensors file"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        (lambda data: safetensors.torch.save({"weight": torch.ones(2)}), "another program"),
        (lambda data: safetensors.torch.save({"weight": torch.ones(2)}, {"format": "pt"}), "another program"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"9"'), "it has version 9"),
    ],
)
def test_damage_is_explained(tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    message = damaged(tmp_path, change)
    assert problem in message
    assert message.endswith("delete it to resume from round 1.")


def test_deleting_a_damaged_checkpoint_resumes_from_the_previous(tmp_path: Path) -> None:
    damaged(tmp_path, lambda data: b"")
    (tmp_path / "round-000002.safetensors").unlink()
    latest = load_latest(tmp_path)
    assert latest is not None and latest.round == 1


def test_damage_to_the_only_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, small()).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path)
    assert one_line(error).endswith("delete it to start again.")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One changed bit or one cut anywhere, in the header or the tensors."""
    path = save(tmp_path_factory.getbasetemp() / "flips", small())
    intact = path.read_bytes()
    position = data.draw(st.integers(0, len(intact) - 1))
    changed = bytearray(intact)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(data.draw(st.sampled_from([bytes(changed), intact[:position]])))
    with pytest.raises(CheckpointError):
        load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        load(tmp_path / "round-000001.safetensors")
    assert "No such file" in one_line(error)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk that is full after ``size`` bytes, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full(tmp_path: Path) -> None:
    save(tmp_path, small(1))
    big = Checkpoint(2, {"weight": torch.zeros(1_000_000)}, {})
    with no_file_larger_than(1_000_000), pytest.raises(RunError) as error:
        save(tmp_path, big, keep=1)
    assert "round-000002.safetensors to be writable" in one_line(error)
    assert names(tmp_path) == ["round-000001.safetensors"]
    latest = load_latest(tmp_path)
    assert latest is not None and latest.round == 1


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failed_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    before = save(tmp_path, small(1)).read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    again = Checkpoint(1, {"weight": torch.zeros(3)}, {})
    with pytest.raises(RunError) as error:
        save(tmp_path, again)
    assert "No space left on device" in one_line(error)
    assert names(tmp_path) == ["round-000001.safetensors"]
    assert (tmp_path / "round-000001.safetensors").read_bytes() == before


def test_replacing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    for text in ("before", "{}"):
        with replacing(report) as file:
            file.write_text(text)
    with no_file_larger_than(10), pytest.raises(RunError) as error, replacing(report) as file:
        file.write_text("[" * 100_000)
    assert "report.json to be writable" in one_line(error)
    with pytest.raises(ZeroDivisionError), replacing(report) as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["report.json"]
    assert report.read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError) as error:
            save(tmp_path, small())
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in one_line(error)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunError) as error:
        save(tmp_path / "checkpoints", small())
    assert "checkpoints" in one_line(error)
