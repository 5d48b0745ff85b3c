"""Tables of items made of fewer numbers: exact gradients per user, public features, and what is refused."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from client.local_update import compute_update, losses_of
from common.candidates import InBatch, Negatives
from common.catalogue import Catalogue
from common.errors import SettingsError
from common.features import ORDER_COLUMNS, features_of, order_knots
from common.ghost import Gradient
from common.item_slice import ItemSlice, cut, slice_of
from common.item_tables import FEATURES, by_parts, formed
from common.model import HEADS, Parameters, dimension_of, initialise, items_in, shapes, trained
from common.offer import candidates_of
from common.settings import Settings, load_settings, parse_flat
from common.trajectory import Trajectories, pad

ITEMS = 30
LENGTHS = (9, 0, 1, 20, 2)
FEATURES_ALONE = {"model.items": "features", "model.feature_width": 16}
LOW_RANK = {"model.rank": 2}
BOTH = FEATURES_ALONE | LOW_RANK


def settings_of(*options: Mapping[str, object]) -> Settings:
    widths = {"model.input_width": 4, "model.state_width": 5, "model.user_width": 2, "objective.negatives": 12}
    scales = {"privacy.group_scale.items": 2.0, "privacy.group_scale.policy": 0.5}
    flat: dict[str, object] = widths | scales
    for option in options:
        flat |= option
    return parse_flat(flat)


def doubled(candidates: Negatives | InBatch | None) -> Negatives | InBatch | None:
    if isinstance(candidates, Negatives):
        return replace(candidates, log_weights=candidates.log_weights.double())
    return candidates


def case(settings: Settings) -> tuple[Parameters, Trajectories, Tensor, Negatives | InBatch | None, ItemSlice | None]:
    """Random parameters that are 0 nowhere, and some devices."""
    generator, rng, lengths = torch.Generator().manual_seed(0), np.random.default_rng(0), np.array(LENGTHS)
    item_slice = slice_of(settings, ITEMS, 1)
    drawn = cut(initialise(settings, ITEMS, generator), item_slice)
    parameters = {name: torch.randn(value.shape, generator=generator).double() / 2 for name, value in drawn.items()}
    items, rewards = rng.integers(0, ITEMS, lengths.sum()), rng.uniform(-5, 5, lengths.sum()).astype(np.float32)
    windows = pad(items, rewards, rewards, np.cumsum(lengths) - lengths, lengths, 0.25)
    windows = replace(windows, rewards=windows.rewards.double(), returns=windows.returns.double())
    users = torch.randn(len(LENGTHS), 2, generator=generator).double()
    return parameters, windows, users, doubled(candidates_of(settings, parameters, 1, item_slice)), item_slice


OPTIONS: list[dict[str, object]] = [
    {"objective.softmax": "full"},
    {"objective.softmax": "full", "model.cell": "gru", "objective.critic": "baseline"},
    {"objective.negatives_from": "uniform"},
    {"objective.negatives_from": "in-batch"},
    {"objective.behaviour": "frequency", "model.cell": "none"},
    {"objective.critic": "doubly-robust"},
    {"objective.estimator": "direct"},
    {"objective.estimator": "cross-entropy", "training.frozen": "items"},
    {"objective.prior": "critic", "training.frozen": "policy,cell"},
]


@pytest.mark.parametrize("tables", [FEATURES_ALONE, LOW_RANK, BOTH], ids=["features", "rank", "both"])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_an_update_equals_autograd_for_each_user(option: dict[str, object], tables: dict[str, object]) -> None:
    settings = settings_of(option, tables)
    parameters, windows, users, candidates, item_slice = case(settings)
    update = compute_update(settings, parameters, windows, users, candidates, True, item_slice)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    losses, adapted = losses_of(settings, leaves, windows, users, candidates, True, item_slice)
    scale = settings.privacy.group_scale
    factors = {name: getattr(scale, name.split(".")[0].replace("user", "cell")) for name in trained(settings, leaves)}
    rows = []
    for loss in losses:
        own = trained(settings, leaves)
        gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([factors[name] * value.flatten() for name, value in zip(own, gradients, strict=True)]))
    expected = torch.stack(rows)
    assert expected.shape[1] == dimension_of(settings, parameters)
    assert (expected.norm(dim=1) > 1e-3).sum() >= 3
    torch.testing.assert_close(update.local_users, adapted)
    found = torch.stack([update.gradients.weighted_sum(row) for row in torch.eye(len(LENGTHS), dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(update.gradients.norms(), expected.norm(dim=1), rtol=1e-6, atol=1e-8)


def test_slices_cut_the_factors_of_the_heads() -> None:
    settings = settings_of(LOW_RANK, {"objective.slice_items": 20, "model.input_rows": 7, "objective.softmax": "full"})
    parameters, *_, item_slice = case(settings)
    assert parameters["policy.embedding.factors"].shape == (20, 2)
    assert parameters["items.embedding.factors"].shape == (7, 2)
    assert items_in(parameters) == 20 and item_slice is not None


def test_several_local_steps_train_the_parts() -> None:
    """Two infinitesimal ones are twice the gradient."""
    for frozen in ("", "items"):
        sums = []
        for count in (1, 2):
            steps = {"training.local_steps": count, "training.local_learning_rate": 1e-12, "training.frozen": frozen}
            settings = settings_of(BOTH, steps)
            parameters, windows, users, candidates, _ = case(settings)
            update = compute_update(settings, parameters, windows, users, candidates, True)
            sums.append(update.gradients.weighted_sum(torch.ones(len(LENGTHS), dtype=torch.float64)))
        torch.testing.assert_close(sums[1], 2 * sums[0], rtol=1e-5, atol=1e-7)


def test_a_kind_of_gradient_that_is_not_known_is_no_silent_zero() -> None:
    class Unknown(Gradient):
        def square_norms(self) -> Tensor:
            return torch.zeros(1)

        def add_sum(self, weights: Tensor, into: Tensor) -> None:
            pass

    parameters = {FEATURES: torch.ones(3, 2), "items.embedding.by_feature": torch.ones(2, 4)}
    with pytest.raises(TypeError, match="found Unknown"):
        by_parts(parameters, parameters, [("items.embedding", Unknown())])


# Shapes and what they start with


def test_fewer_numbers_are_trained_and_the_tables_are_as_large() -> None:
    whole, features = settings_of(), settings_of(FEATURES_ALONE)
    names = ["items.embedding", "policy.embedding", "behaviour.embedding"]
    expected = {name: shapes(whole, ITEMS)[name] for name in names}
    for settings in (features, settings_of(LOW_RANK), settings_of(BOTH)):
        parameters = initialise(settings, ITEMS, torch.Generator().manual_seed(0))
        assert {name: tuple(value.shape) for name, value in parameters.items()} == shapes(settings, ITEMS)
        tables = formed(parameters)
        assert {name: tuple(tables[name].shape) for name in names} == expected
        assert items_in(parameters) == items_in(tables) == ITEMS
        assert dimension_of(settings, parameters) < sum(a * b for a, b in shapes(whole, ITEMS).values())
        assert FEATURES not in trained(settings, parameters)
    rest = 10 * 15 + 5 * 9 + 5 * 2  # the cell and the user's projection
    assert dimension_of(features, initialise(features, ITEMS, torch.Generator())) == 16 * (4 + 6 + 6) + rest


def test_whole_tables_are_formed_as_they_are() -> None:
    parameters = initialise(settings_of(), ITEMS, torch.Generator().manual_seed(0))
    assert all(value is parameters[name] for name, value in formed(parameters).items())


def test_tables_start_about_as_large_whatever_they_are_made_of() -> None:
    spread = {}
    for name, option in {"whole": {}, "features": FEATURES_ALONE, "rank": LOW_RANK, "both": BOTH}.items():
        settings = settings_of(option, {"model.input_width": 40, "model.state_width": 40})
        tables = formed(initialise(settings, 2000, torch.Generator().manual_seed(0)))
        spread[name] = [float(tables[table].std()) for table in ("items.embedding", "policy.embedding")]
    for found in spread.values():
        np.testing.assert_allclose(found, spread["whole"], rtol=0.5)


def test_frequencies_by_feature_start_log_uniform() -> None:
    option = {"objective.behaviour": "frequency", "model.feature_width": 16, "model.items": "features"}
    settings, catalogue = settings_of(option), catalogue_of([f"Title {at}" for at in range(500)])
    features = features_of(settings.model, catalogue)
    tables = formed(initialise(settings, 500, torch.Generator(), features))
    plain = settings_of({"objective.behaviour": "frequency"})
    expected = initialise(plain, 500, torch.Generator())[HEADS["frequency"]]
    found = torch.log_softmax(tables[HEADS["frequency"]], 0)
    assert (found - torch.log_softmax(expected, 0)).abs()[5:].max() < 0.15


# Public features


def catalogue_of(titles: list[str], labels: list[str] | None = None) -> Catalogue:
    ids = np.array([str(at) for at in range(len(titles))])
    return Catalogue(ids, np.array(titles), None if labels is None else np.array(labels))


def rows_of(catalogue: Catalogue, width: int = 64) -> np.ndarray:
    features = features_of(settings_of({"model.items": "features", "model.feature_width": width}).model, catalogue)
    assert features is not None and features.shape == (len(catalogue), width) and features.dtype == torch.float32
    return features.double().numpy()


def test_features_are_of_what_the_catalogue_says() -> None:
    titles = ["Heat (1995)", "Toy Story (1995)", "Toy Story 2 (1999)", "Up", "Heat (1971)"]
    rows = rows_of(catalogue_of(titles, ["Action|Crime", "Comedy", "Comedy", "", "Action"]))
    order, labels, codes = (
        rows[:, :ORDER_COLUMNS],
        rows[:, ORDER_COLUMNS : ORDER_COLUMNS + 3],
        rows[:, ORDER_COLUMNS + 3 :],
    )
    np.testing.assert_allclose(order.sum(1), 1)
    assert order[0].tolist() == [1.0, *[0.0] * 7] and order[-1].tolist() == [*[0.0] * 7, 1.0]
    assert labels.round(3).tolist() == [[0.707, 0, 0.707], [0, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]
    likeness = codes @ codes.T
    np.testing.assert_allclose(np.diag(likeness), 1)
    assert likeness[1, 2] > 0.5 > likeness[1, 3]
    assert likeness[0, 4] > 0.4  # by its word, though not of the same decade


def test_features_do_not_depend_on_anything_but_the_catalogue() -> None:
    catalogue = catalogue_of(["A b", "C", "é \udcff"], ["x|y", "", "y"])
    np.testing.assert_array_equal(rows_of(catalogue), rows_of(catalogue))
    assert rows_of(catalogue, 16).shape == (3, 16)


def test_an_item_without_text_has_a_code_of_its_own() -> None:
    names = np.array([f"{at}" for at in range(200)])
    codes = rows_of(Catalogue(names, names))[:, ORDER_COLUMNS:]
    likeness = codes @ codes.T
    np.testing.assert_allclose(np.diag(likeness), 1)
    assert np.abs(likeness - np.eye(200)).max() < 0.7
    assert abs((likeness - np.eye(200)).mean()) < 0.01


@pytest.mark.parametrize("items", [1, 2, 3])
def test_tiny_catalogues(items: int) -> None:
    rows = rows_of(catalogue_of(["same"] * items))
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows[:, :ORDER_COLUMNS].sum(1), 1, rtol=1e-6)
    assert np.isfinite(order_knots(items)).all()


# Settings


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"model.rank": 32}, "Expected model.rank=32 < model.input_width=32: full rank is model.rank=0."),
        ({"model.items": "features", "model.input_rows": 5}, "Expected model.input_rows=5 to be 0 with model.items"),
        ({"model.items": "features", "objective.slice_items": 5}, "Expected objective.slice_items=5 to be 0"),
        ({"model.rank": 3, "objective.softmax": "nce"}, "Expected objective.softmax=nce only with model.items=table"),
        ({"training.frozen": "items,cell,policy,behaviour"}, "Expected training.frozen=items,cell,policy,behaviour to"),
        ({"training.frozen": "head"}, "Expected training.frozen.0='head': input should be 'items', 'cell'"),
        ({"training.frozen": 3}, "Expected training.frozen=3: input should be a valid tuple"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(option: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_flat(option)
    assert sentence in str(caught.value)


def test_frozen_groups_are_a_list_of_words() -> None:
    for text in ("items,cell", " items , cell ", '["items", "cell"]'):
        assert load_settings(None, [f"training.frozen={text}"]).training.frozen == ("items", "cell")
    settings = load_settings(None, ["training.frozen=items,cell"])
    assert parse_flat(settings.flat()) == settings
