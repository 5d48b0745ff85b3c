"""A round on a slice of the items is, in expectation, one on all of them; and nobody chooses the slice."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from client.local_update import LocalUpdate, compute_update
from common.candidates import Candidates
from common.errors import ModelError, SettingsError
from common.item_slice import ItemSlice, cut, rows_digest, scatter, slice_of
from common.model import Parameters, flatten, initialise, input_rows, items_in, shapes, unflatten
from common.offer import Offer, candidates_of, read_offer
from common.privacy.encoding import Encoding
from common.recurrence import Recurrence
from common.secagg.terms import Terms
from common.settings import Settings, load_settings, parse_flat
from common.softmax import likelihood
from common.trajectory import Trajectories, pad

quick = hypothesis_settings(max_examples=40, deadline=None)

SMALL = {
    "model.input_width": 3,
    "model.state_width": 4,
    "model.user_width": 2,
    "model.input_rows": 5,
    "privacy.mechanism": "none",
}
LENGTHS = (9, 0, 1, 30, 2, 3, 17, 4)


def settings_of(size: int, **changes: object) -> Settings:
    options = {name.replace("__", "."): value for name, value in changes.items()}
    return parse_flat(SMALL | {"objective.slice_items": size} | options)


def ids_of(settings: Settings, items: int, round_: int) -> list[int]:
    item_slice = slice_of(settings, items, round_)
    assert item_slice is not None and item_slice.items == items
    ids: list[int] = item_slice.ids.tolist()
    return ids


# The slice of a round


@quick
@given(st.integers(3, 200), st.data(), st.integers(0, 2**63 - 1))
def test_items_take_turns(items: int, data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(2, items - 1))
    settings, turns = settings_of(size, training__seed=seed), items // size
    for begin in (1, 1 + 3 * turns):
        rounds = [ids_of(settings, items, round_) for round_ in range(begin, begin + turns)]
        for ids in rounds:
            assert len(ids) == size and ids == sorted(ids)
        seen = [item for ids in rounds for item in ids]
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(items))


def test_every_set_of_items_is_as_likely() -> None:
    settings = settings_of(2)
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    rounds = 4000
    for round_ in range(1, rounds + 1):
        first, second = ids_of(settings, 5, round_)
        counts[first, second] += 1
    # The two slices of a permutation are not independent: far less than the variance of independent draws is expected.
    assert max(abs(count - rounds / 10) for count in counts.values()) < 5 * math.sqrt(rounds / 10)


def test_a_slice_is_the_same_for_everybody_for_ever() -> None:
    """Devices of another version, or on another machine, must come to these items."""
    settings = settings_of(4, training__seed=3)
    assert [ids_of(settings, 11, round_) for round_ in (1, 2, 3)] == [[3, 6, 7, 10], [1, 4, 8, 9], [3, 6, 8, 9]]
    assert ids_of(settings, 11, 1) != ids_of(settings_of(4, training__seed=4), 11, 1)


@pytest.mark.parametrize("size", [0, 7, 8, 1000])
def test_without_slices_there_is_none(size: int) -> None:
    settings = settings_of(size)
    assert slice_of(settings, 7, 3) is None
    parameters = initialise(settings, 7, torch.Generator().manual_seed(0))
    assert cut(parameters, None) == parameters and scatter(parameters, None, parameters) is parameters
    assert rows_digest(bytes(32), None) == bytes(32)


@quick
@given(st.sets(st.integers(0, 29), min_size=2, max_size=29))
def test_what_is_cut_is_scattered_to_where_it_was(chosen: set[int]) -> None:
    settings = settings_of(len(chosen), objective__critic="baseline", objective__behaviour="frequency")
    model = initialise(settings, 30, torch.Generator().manual_seed(0))
    item_slice = ItemSlice(torch.tensor(sorted(chosen)), 30)
    sliced = cut(model, item_slice)
    assert {name: tuple(value.shape) for name, value in sliced.items()} == shapes(settings, len(chosen))
    assert list(sliced) == list(model) and items_in(sliced) == len(chosen)
    outside = sorted(set(range(30)) - chosen)
    for name, value in scatter(sliced, item_slice, model).items():
        assert value.shape == model[name].shape
        if len(value) == 30:
            assert (value[outside] == 0).all()
            assert (value[item_slice.ids] == model[name][item_slice.ids]).all()
        else:
            assert (value == model[name]).all()
    positions = item_slice.positions(torch.arange(30).view(5, 6)).flatten()
    assert positions[item_slice.ids].tolist() == list(range(len(chosen))) and (positions[outside] == -1).all()


def test_the_rows_of_a_model_are_told_apart() -> None:
    one, other = ItemSlice(torch.tensor([0, 2]), 5), ItemSlice(torch.tensor([0, 3]), 5)
    found = [rows_digest(catalogue, rows) for catalogue in (bytes(32), b"1" * 32) for rows in (None, one, other)]
    assert len(set(found)) == 6


# The input table


@quick
@given(st.integers(1, 60), st.integers(1, 500))
def test_frequent_items_have_rows_of_their_own_and_all_rows_are_used_alike(rows: int, items: int) -> None:
    model = settings_of(0, model__input_rows=rows).model
    found = input_rows(model, torch.arange(items)).numpy()
    assert found[:rows].tolist() == list(range(min(rows, items)))
    assert np.bincount(found, minlength=rows).max() - np.bincount(found, minlength=rows).min() <= 1


def test_turns_through_the_input_table_are_shifted() -> None:
    """Otherwise items of the ranks k, k + R, k + 2R would share a row, whatever R."""
    model = settings_of(0, model__input_rows=8192).model
    shifts = input_rows(model, torch.arange(0, 100_000, 8192))
    assert len(set(shifts.tolist())) == len(shifts)


def test_the_cell_reads_hashed_rows() -> None:
    settings = settings_of(0)
    parameters = initialise(settings, 30, torch.Generator().manual_seed(0))
    items, rewards = torch.tensor([[3, 29, 12]]), torch.ones(1, 3)
    whole = dict(
        parameters, **{"items.embedding": parameters["items.embedding"][input_rows(settings.model, torch.arange(30))]}
    )
    model = settings_of(0, model__input_rows=0).model
    expected = Recurrence(model).run(whole, items, rewards)
    assert (Recurrence(settings.model).run(parameters, items, rewards) == expected).all()


# What is estimated from a slice

SAMPLES = {
    "the whole slice": {"objective.softmax": "full"},
    "a sample of it": {"objective.negatives": 3, "objective.negatives_from": "uniform"},
}
A, S = 7, 4


@pytest.mark.parametrize("sample", list(SAMPLES))
def test_the_normaliser_over_all_items_is_estimated_without_bias(sample: str) -> None:
    """Over all slices that hold the logged item, and all draws from them."""
    settings, name = parse_flat(SMALL | {"objective.slice_items": S} | SAMPLES[sample]), "policy.embedding"
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in initialise(settings, A, generator).items()
    }
    queries = torch.randn(1, 1, 5, generator=generator, dtype=torch.float64)

    def log_pi(weight: Tensor, item: int, candidates: Candidates) -> Tensor:
        logged = torch.tensor([[item]])
        found = likelihood(weight, name, queries, logged, logged >= 0, candidates, None)
        return found.log_probability[0, 0]

    rounds = range(1, 1 + (1 if sample == "the whole slice" else 12))  # three turns through a slice by four draws of 3
    for item in range(A):
        truth, ratios = log_pi(parameters[name], item, None), []
        for chosen in itertools.combinations(range(A), S):
            if item in chosen:
                item_slice = ItemSlice(torch.tensor(chosen), A)
                sliced = cut(parameters, item_slice)
                for round_ in rounds:
                    candidates = candidates_of(settings, sliced, round_, item_slice)
                    ratios.append((truth - log_pi(sliced[name], chosen.index(item), candidates)).exp())
        assert len(ratios) == math.comb(A - 1, S - 1) * len(rounds)
        assert torch.stack(ratios).mean().item() == pytest.approx(1, rel=1e-6)


def windows_of(histories: list[list[int]], support_fraction: float = 0.0) -> Trajectories:
    lengths = np.array([len(history) for history in histories])
    items = np.array([item for history in histories for item in history], np.int64)
    rewards = np.random.default_rng(1).uniform(-5, 5, len(items)).astype(np.float32)
    return pad(items, rewards, rewards, np.cumsum(lengths) - lengths, lengths, support_fraction)


def gradient_of(update: LocalUpdate, users: int = 1) -> Tensor:
    return update.gradients.weighted_sum(torch.ones(users))


def test_the_expected_update_is_that_of_all_items() -> None:
    """Exactly, for a loss without a normaliser and different items, but for devices that a slice misses."""
    settings = settings_of(S, objective__estimator="direct")
    model = initialise(settings, A, torch.Generator().manual_seed(0))
    windows, users = windows_of([[4, 1, 6]]), torch.ones(1, 2)
    expected = gradient_of(compute_update(settings, model, windows, users, None, True))
    total, hit = torch.zeros_like(expected), 0
    slices = list(itertools.combinations(range(A), S))
    for chosen in slices:
        item_slice = ItemSlice(torch.tensor(chosen), A)
        sliced = cut(model, item_slice)
        candidates = candidates_of(settings, sliced, 1, item_slice)
        update = gradient_of(compute_update(settings, sliced, windows, users, candidates, True, item_slice))
        total += flatten(scatter(unflatten(update, shapes(settings, S)), item_slice, model))
        hit += bool(set(chosen) & {4, 1, 6})
    torch.testing.assert_close(total / hit, expected, rtol=1e-5, atol=1e-6)


def some_devices(**changes: object) -> tuple[Settings, Parameters, ItemSlice, Candidates]:
    settings = settings_of(12, **changes)
    item_slice = slice_of(settings, 30, 2)
    assert item_slice is not None
    parameters = cut(initialise(settings, 30, torch.Generator().manual_seed(0)), item_slice)
    return settings, parameters, item_slice, candidates_of(settings, parameters, 2, item_slice)


@pytest.mark.parametrize("softmax", ["full", "sampled", "nce"])
@pytest.mark.parametrize("local_steps", [1, 2])
def test_a_batch_is_its_devices_one_by_one(softmax: str, local_steps: int) -> None:
    settings, parameters, item_slice, candidates = some_devices(
        objective__softmax=softmax, objective__negatives=8, training__local_steps=local_steps
    )
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 30, length).tolist() for length in LENGTHS]
    histories[5] = [item for item in range(30) if item not in item_slice.ids][:3]
    users = torch.randn(len(LENGTHS), 2, generator=torch.Generator().manual_seed(1))

    def update(chosen: list[int]) -> LocalUpdate:
        windows = all_windows if len(chosen) > 1 else alone(chosen[0])
        return compute_update(settings, parameters, windows, users[chosen], candidates, True, item_slice)

    all_windows = windows_of(histories, 0.25)

    def alone(device: int) -> Trajectories:
        w, own, steps = all_windows, slice(device, device + 1), slice(max(1, LENGTHS[device]))
        return Trajectories(
            w.items[own, steps], w.rewards[own, steps], w.returns[own, steps], w.lengths[own], w.support[own]
        )

    together = update(list(range(len(LENGTHS))))
    singles = [update([device]) for device in range(len(LENGTHS))]
    torch.testing.assert_close(
        together.gradients.norms(), torch.cat([one.gradients.norms() for one in singles]), rtol=1e-4, atol=1e-6
    )
    expected = torch.stack([gradient_of(one) for one in singles]).sum(0)
    assert (gradient_of(together, len(LENGTHS)) - expected).norm() <= 1e-5 * expected.norm()
    torch.testing.assert_close(
        together.local_users, torch.cat([one.local_users for one in singles]), rtol=1e-5, atol=1e-6
    )
    assert singles[3].gradients.norms() > 0 and singles[5].gradients.norms() == 0
    assert (singles[5].local_users == users[5]).all(), "a device without a step in the slice keeps its embedding"


# What a device refuses


def test_an_offer_of_other_rows_than_a_slices_is_refused() -> None:
    settings = load_settings(None, [f"{key}={value}" for key, value in (SMALL | {"objective.slice_items": 12}).items()])
    whole = initialise(settings, 30, torch.Generator().manual_seed(0))
    item_slice = slice_of(settings, 30, 5)
    sliced = cut(whole, item_slice)
    encoding = Encoding(sum(value.numel() for value in sliced.values()), 1.0, 8.0, 16, 4.0, 0.8)
    offer = Offer(5, 1, sliced, encoding, settings, item_slice)
    terms = Terms(5, 1, 10, 0.1, 0.1, False, encoding, offer.model)
    found = read_offer(terms, {name: value.numpy() for name, value in sliced.items()}, settings, 30)
    assert found.item_slice is not None and item_slice is not None
    assert (found.item_slice.ids == item_slice.ids).all() and found.model == offer.model
    with pytest.raises(ModelError, match=r"Expected policy.embedding of shape \(12, 5\), found \(30, 5\)"):
        read_offer(terms, {name: value.numpy() for name, value in whole.items()}, settings, 30)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"objective.slice_items": 1}, "Expected objective.slice_items=1 to be 0 or at least 2"),
        (
            {"objective.slice_items": 9, "model.input_rows": 0},
            "Expected model.input_rows=0 > 0 with objective.slice_items=9",
        ),
        ({"model.input_rows": 8193}, "less than or equal to 8192"),
    ],
)
def test_settings_that_do_not_fit_are_refused(option: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        parse_flat(SMALL | option)


def test_without_a_cell_there_is_no_input_table_to_hash() -> None:
    settings = parse_flat({"objective.slice_items": 9, "model.cell": "none"})
    assert "items.embedding" not in shapes(settings, 9)
