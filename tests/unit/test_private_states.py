"""Private states: each checkpoint that is kept gives the state of its round, whatever happened since."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import RunError
from common.settings import load_settings
from server.checkpoint import KEPT
from simulations.datasets.synthetic import synthetic
from simulations.population import Population
from simulations.private_states import PrivateStates

N, W = 9, 2
State = dict[str, Tensor]


def assert_all_give_their_round(file: Path, kept: list[tuple[State, Tensor]]) -> None:
    for state, rows in kept:
        states = PrivateStates(N, W, file)
        states.restore(state)
        assert torch.equal(states.rows, rows)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_killed_at_any_moment_each_kept_checkpoint_gives_its_round(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """As a run does it: rounds and checkpoints, of which the newest are kept. It is killed between any two steps, also
    when a checkpoint was asked for and not written and the file is written in part, and goes on from either."""
    file = tmp_path_factory.mktemp("states") / "users.npy"
    states, kept, value = PrivateStates(N, W, file), list[tuple[State, Tensor]](), 0.0
    for step in data.draw(st.lists(st.sampled_from(["round", "round", "checkpoint", "lost", "killed"]), max_size=25)):
        before = file.read_bytes() if file.exists() else b""
        if step == "round":
            members = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
            value += 1
            states.keep(members, torch.full((len(members), W), value))
        elif step == "checkpoint":
            state = states.checkpoint()
            assert all(torch.equal(state[name], again) for name, again in states.checkpoint().items())
            kept = [*kept, (state, states.rows.clone())][-KEPT:]
        else:
            if step == "lost":
                states.checkpoint()
            if before:  # a power cut: some of it was written
                unwritten = data.draw(st.lists(st.booleans(), min_size=W * N, max_size=W * N))
                mix(file, before, np.reshape(unwritten, (N, W)))
            assert_all_give_their_round(file, kept)
            if kept and data.draw(st.booleans()):
                kept.pop()  # it was damaged, and deleted
            states = PrivateStates(N, W, file)
            if kept:
                states.restore(kept[-1][0])
        assert_all_give_their_round(file, kept)


def mix(file: Path, before: bytes, old: np.ndarray) -> None:
    """Put back what a file held before, where `old` says so."""
    whole = np.load(file)
    earlier = np.frombuffer(before[-whole.nbytes :], np.float32).reshape(whole.shape)
    np.save(file, np.where(old, earlier, whole))


def test_a_run_that_begins_again_begins_at_nothing(tmp_path: Path) -> None:
    """Its checkpoints were deleted, as the message about a damaged one says."""
    states = PrivateStates(N, W, tmp_path / "users.npy")
    for device in range(KEPT + 1):
        states.keep(np.array([device]), torch.ones(1, W))
        states.checkpoint()
    again = PrivateStates(N, W, tmp_path / "users.npy")
    again.keep(np.array([8]), torch.ones(1, W))
    state = again.checkpoint()
    assert_all_give_their_round(tmp_path / "users.npy", [(state, again.rows)])
    assert again.rows.sum() == W


def test_a_checkpoint_is_of_those_who_changed_however_many_there_are(tmp_path: Path) -> None:
    states = PrivateStates(100_000, W, tmp_path / "users.npy")
    for round_ in range(1, 8):
        states.keep(np.arange(100 * round_, 100 * round_ + 100), torch.ones(100, W))
        assert len(states.checkpoint()["devices"]) <= KEPT * 100
    assert np.load(tmp_path / "users.npy")[:, 0].sum() == (7 - KEPT) * 100


@pytest.mark.parametrize("rows", [0.0, -0.0])
def test_nothing_is_kept_of_users_without_embeddings(tmp_path: Path, rows: float) -> None:
    states = PrivateStates(N, W, tmp_path / "users.npy")
    states.keep(np.arange(N), torch.full((N, W), rows))
    state = states.checkpoint()
    assert {name: len(value) for name, value in state.items()} == {"devices": 0, "users": 0}
    PrivateStates(N, W, tmp_path / "users.npy").restore(state)
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_no_checkpoint_has_them() -> None:
    people = Population(load_settings(None, []), synthetic(5, 5, seed=0)[0])
    people.states.keep(np.array([1]), torch.ones(1, 16))
    assert people.states.checkpoint() == {}
    assert people.users[1].sum() == 16


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (Path.unlink, "No such file"),
        (lambda file: file.write_bytes(b""), "another file, or truncated"),
        (lambda file: file.write_bytes(b"garbage" * 100), "another file, or truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "another file, or truncated"),
        (lambda file: np.save(file, np.zeros((N + 1, W), np.float32)), r"found \(10, 2\) of float32"),
        (lambda file: np.save(file, np.zeros((N, W))), r"found \(9, 2\) of float64"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: Callable[[Path], object], problem: str) -> None:
    states = PrivateStates(N, W, tmp_path / "users.npy")
    states.keep(np.array([3]), torch.ones(1, W))
    state = states.checkpoint()
    change(tmp_path / "users.npy")
    with pytest.raises(RunError, match=f"^Expected .*users.npy to hold the 9 users' embeddings.*: .*{problem}.*\\.$"):
        PrivateStates(N, W, tmp_path / "users.npy").restore(state)


def test_another_populations_checkpoint_is_refused(tmp_path: Path) -> None:
    states = PrivateStates(N, W, tmp_path / "users.npy")
    states.keep(np.array([8]), torch.ones(1, W))
    state = states.checkpoint()
    for devices, width in ((8, W), (N, W + 1)):
        with pytest.raises(RunError, match="Expected the checkpoint's user embeddings of"):
            PrivateStates(devices, width, tmp_path / "users.npy").restore(state)
    with pytest.raises(RunError, match="changed lately: it has none"):
        PrivateStates(N, W, tmp_path / "users.npy").restore({})
