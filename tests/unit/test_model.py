"""The cells against scalar loops over their equations, and the properties of the shared parameters."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ModelError
from common.model import (
    KEEP_BIAS,
    Parameters,
    check_parameters,
    condition,
    flatten,
    group_of,
    initialise,
    queries,
    shapes,
    unflatten,
)
from common.recurrence import Recurrence
from common.settings import Estimator, ModelSettings, Settings, parse_flat

ITEMS, M, N, W = 6, 3, 4, 2
X = 2 * M + 1
CELLS = ("cfn", "gru")
quick = hypothesis_settings(max_examples=30, deadline=None)


def model_of(cell: str) -> ModelSettings:
    return settings_of(cell).model


def settings_of(cell: str, **more: object) -> Settings:
    widths = {"model.input_width": M, "model.state_width": N, "model.user_width": W}
    name, _, rest = cell.partition(" ")
    cells = {"model.cell": name, "model.ratings": not rest}
    return parse_flat(cells | widths | {key.replace("__", "."): value for key, value in more.items()})


def random_parameters(cell: str, seed: int = 0, scale: float = 2.0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    drawn = shapes(settings_of(cell), ITEMS).items()
    return {name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in drawn}


def history(users: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(0, ITEMS, (users, steps), generator=generator)
    return items, 10 * torch.rand(users, steps, generator=generator, dtype=torch.float64) - 5


def run(cell: str, parameters: Parameters, items: Tensor, rewards: Tensor, start: Tensor | None = None) -> Tensor:
    return Recurrence(model_of(cell)).run(parameters, items, rewards, start)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dot(row: list[float], column: list[float]) -> float:
    return sum(a * b for a, b in zip(row, column, strict=True))


def inputs(parameters: Parameters, item: int, reward: float) -> list[float]:
    """[u, ρu, ρ], ρ = reward/5; u alone where the cell has no more columns."""
    embedding = parameters["items.embedding"][item].tolist()
    if parameters["cell.gates"].shape[1] == M + 1 + N:
        return embedding
    return [*embedding, *(reward / 5 * number for number in embedding), reward / 5]


def cfn_step(parameters: Parameters, item: int, reward: float, s: list[float]) -> list[float]:
    """s' = z ⊙ tanh(s) + i ⊙ tanh(W u), z and i = σ(W u + b + U s)."""
    u = inputs(parameters, item, reward)
    gates, candidate = parameters["cell.gates"].tolist(), parameters["cell.candidate"].tolist()
    z = [sigmoid(dot(gates[k], [*u, 1, *s])) for k in range(N)]
    i = [sigmoid(dot(gates[N + k], [*u, 1, *s])) for k in range(N)]
    return [z[k] * math.tanh(s[k]) + i[k] * math.tanh(dot(candidate[k], u)) for k in range(N)]


def gru_step(parameters: Parameters, item: int, reward: float, s: list[float]) -> list[float]:
    """s' = z ⊙ s + (1 − z) ⊙ tanh(W u + b + U (r ⊙ s)), z and r = σ(W u + b + U s)."""
    u = [*inputs(parameters, item, reward), 1.0]
    gates, candidate = parameters["cell.gates"].tolist(), parameters["cell.candidate"].tolist()
    z = [sigmoid(dot(gates[k], u + s)) for k in range(N)]
    r = [sigmoid(dot(gates[N + k], u + s)) for k in range(N)]
    kept = [r[k] * s[k] for k in range(N)]
    return [z[k] * s[k] + (1 - z[k]) * math.tanh(dot(candidate[k], u + kept)) for k in range(N)]


@pytest.mark.parametrize("cell", [*CELLS, "cfn without ratings", "gru without ratings"])
@quick
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 6))
def test_a_cell_equals_a_scalar_loop(cell: str, seed: int, steps: int) -> None:
    parameters, (items, rewards) = random_parameters(cell, seed, scale=1), history(2, steps, seed)
    step = cfn_step if cell.startswith("cfn") else gru_step
    expected = []
    for user in range(2):
        states = [[0.0] * N]
        for item, reward in zip(items[user].tolist(), rewards[user].tolist(), strict=True):
            states.append(step(parameters, item, reward, states[-1]))
        expected.append(states)
    found = run(cell, parameters, items, rewards)
    assert found.shape == (2, steps + 1, N)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@quick
@given(st.integers(0, 2**32))
def test_cfn_forgets_without_input(seed: int) -> None:
    parameters = random_parameters("cfn", seed, scale=5)
    parameters["items.embedding"][0] = 0
    start = 10 * torch.randn(1, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nothing = torch.zeros(1, 800)
    states = run("cfn", parameters, nothing.long(), nothing.double(), start).abs()
    assert (states[:, 1:] <= states[:, :-1]).all()
    assert states[:, -1].max() < 0.05


def test_cfn_state_is_bounded_by_two() -> None:
    assert run("cfn", random_parameters("cfn", scale=50), *history(20, 50)).abs().max() < 2


def test_gru_state_is_bounded_by_one() -> None:
    assert run("gru", random_parameters("gru", scale=50), *history(20, 50)).abs().max() <= 1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_two_pieces_equal_one(cell: str, cut: int) -> None:
    parameters, (items, rewards) = random_parameters(cell), history(3, 7)
    whole = run(cell, parameters, items, rewards)
    first = run(cell, parameters, items[:, :cut], rewards[:, :cut])
    second = run(cell, parameters, items[:, cut:], rewards[:, cut:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second[:, 1:]], 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_no_interaction_leaves_the_state_where_it_is(cell: str) -> None:
    start = torch.randn(2, N, dtype=torch.float64)
    states = run(cell, random_parameters(cell), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), start)
    assert (states == start[:, None]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_state_knows_the_past_alone(cell: str) -> None:
    parameters, (items, rewards) = random_parameters(cell), history(1, 6)
    other = rewards.clone()
    other[0, 3] += 1
    before, after = (run(cell, parameters, items, values)[0] for values in (rewards, other))
    assert (before[:4] == after[:4]).all()
    assert (before[4] != after[4]).any()


def test_user_embedding_shifts_every_state_by_its_projection() -> None:
    parameters, states = random_parameters("cfn"), torch.randn(3, 5, N, dtype=torch.float64)
    users = torch.randn(3, W, dtype=torch.float64)
    shifted = condition(parameters, states, users, None)
    for user in range(3):
        shift = parameters["user.projection"] @ users[user]
        torch.testing.assert_close(shifted[user] - states[user], shift.expand(5, N), rtol=1e-9, atol=1e-12)
    assert (condition(parameters, states, users * 0, None) == states).all()


def test_queries_carry_a_one_for_the_bias_over_the_temperature() -> None:
    states = torch.randn(2, 3, N)
    expected = torch.cat([states, torch.ones(2, 3, 1)], -1)
    torch.testing.assert_close(queries(states, 1.0), expected)
    torch.testing.assert_close(queries(states, 0.5), 2 * expected)


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_are_as_documented_and_beta_is_there_only_where_it_is_used(cell: str, estimator: Estimator) -> None:
    expected = {
        "items.embedding": (ITEMS, M),
        "cell.gates": (2 * N, X + 1 + N),
        "cell.candidate": (N, X) if cell == "cfn" else (N, X + 1 + N),
        "user.projection": (N, W),
    }
    expected["critic.embedding" if estimator == "direct" else "policy.embedding"] = (ITEMS, N + 1)
    if estimator in ("off-policy", "top-k"):
        expected["behaviour.embedding"] = (ITEMS, N + 1)
    settings = settings_of(cell, objective__estimator=estimator)
    found = shapes(settings, ITEMS)
    assert list(found.items()) == list(expected.items())
    drawn = initialise(settings, ITEMS, torch.Generator().manual_seed(0))
    check_parameters(drawn, found)


def test_groups() -> None:
    names = shapes(settings_of("cfn"), ITEMS)
    assert [group_of(name) for name in names] == ["items", "cell", "cell", "cell", "policy", "behaviour"]


@pytest.mark.parametrize("cell", CELLS)
def test_unflatten_inverts_flatten(cell: str) -> None:
    parameters = random_parameters(cell)
    vector = flatten(parameters)
    assert vector.shape == (sum(value.numel() for value in parameters.values()),)
    again = unflatten(vector, shapes(settings_of(cell), ITEMS))
    assert list(again) == list(parameters)
    assert all((again[name] == parameters[name]).all() for name in parameters)
    assert (flatten(again) == vector).all()


def test_unflatten_refuses_another_length() -> None:
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        unflatten(torch.zeros(7), shapes(settings_of("cfn"), ITEMS))


def float32_parameters() -> Parameters:
    return {name: value.float() for name, value in random_parameters("cfn").items()}


def test_foreign_parameters_are_refused() -> None:
    good, expected = float32_parameters(), shapes(settings_of("cfn"), ITEMS)
    check_parameters(good, expected)
    missing = {name: value for name, value in good.items() if name != "policy.embedding"}
    with pytest.raises(ModelError) as caught:
        check_parameters(missing, expected)
    assert str(caught.value) == f"Expected the parameters {list(expected)}, found {list(missing)}."
    with pytest.raises(ModelError, match=r"^Expected the parameters \['items\.embedding'"):
        check_parameters(dict(reversed(good.items())), expected)
    with pytest.raises(ModelError) as caught:
        check_parameters(good | {"user.projection": torch.zeros(W, N)}, expected)
    assert str(caught.value) == f"Expected user.projection of shape {(N, W)}, found {(W, N)}."


def test_parameters_of_another_precision_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^Expected items\.embedding as float32, found torch\.float64\.$"):
        check_parameters(random_parameters("cfn"), shapes(settings_of("cfn"), ITEMS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_are_refused(bad: float) -> None:
    parameters = float32_parameters()
    parameters["cell.gates"][2, 1] = bad
    with pytest.raises(ModelError) as caught:
        check_parameters(parameters, shapes(settings_of("cfn"), ITEMS))
    assert str(caught.value) == "Expected finite numbers in cell.gates."


@pytest.mark.parametrize("cell", CELLS)
def test_both_heads_start_near_uniform_and_apart(cell: str) -> None:
    settings, items = parse_flat({"model.cell": cell}), 1000
    model, parameters = settings.model, initialise(settings, items, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    logged = torch.randint(0, items, (8, 64), generator=generator)
    rewards = 10 * torch.rand(8, 64, generator=generator) - 5
    query = queries(Recurrence(model).run(parameters, logged, rewards), model.temperature)
    first, second = (
        (query @ parameters[head].T).log_softmax(-1) for head in ("policy.embedding", "behaviour.embedding")
    )
    for log_probability in (first, second):
        assert (log_probability + math.log(items)).abs().max() < 1.5
        entropy = -(log_probability.exp() * log_probability).sum(-1)
        assert entropy.min() > 0.99 * math.log(items)
    assert (first != second)[:, 1:].float().mean() > 0.99  # the empty history sees the biases alone, all 0


@pytest.mark.parametrize("cell", CELLS)
def test_initial_gates_are_open_and_draws_repeat(cell: str) -> None:
    drawn = [initialise(settings_of(cell), ITEMS, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert (drawn[0]["cell.gates"][:, X] == torch.tensor([KEEP_BIAS] * N + [1.0] * N)).all()
    assert (flatten(drawn[0]) == flatten(drawn[1])).all()
    assert (flatten(drawn[0]) != flatten(drawn[2])).any()


def test_initial_candidate_bias_of_the_gru_is_zero() -> None:
    drawn = initialise(settings_of("gru"), ITEMS, torch.Generator().manual_seed(0))
    assert not drawn["cell.candidate"][:, X].any()


def test_the_critic_starts_with_what_it_is_told_to_expect() -> None:
    settings = parse_flat({"objective.estimator": "direct", "objective.critic_start": 0.1})
    critic = initialise(settings, ITEMS, torch.Generator().manual_seed(0))["critic.embedding"]
    torch.testing.assert_close(torch.sigmoid(critic[:, -1]), torch.full((ITEMS,), 0.1))
    other = initialise(parse_flat({"objective.estimator": "direct"}), ITEMS, torch.Generator().manual_seed(0))
    assert not other["critic.embedding"][:, -1].any()
    assert torch.equal(other["critic.embedding"][:, :-1], critic[:, :-1])
