"""The recommender's parameters: item table, recurrent cell, user embedding, policy π and behaviour β.

Everything here is a pure function of ``parameters``, the *shared* part of the model by name, and of what one device
holds. Shapes: B users, T steps, A items, m input width, n state width, w user width.

=======================  =============  =============================================================
parameter                shape          use
=======================  =============  =============================================================
``items.embedding``      (R, m)         input embedding u_a; absent, as the cell, with `model.cell` = none
``cell.gates``           (2n, x+1+n)    the two gates, on [x, 1, state]
``cell.candidate``       (n, x)         CFN: the candidate, on x
..                       (n, x+1+n)     GRU: the candidate, on [x, 1, reset ⊙ state]
``user.projection``      (n, w)         takes the user embedding into the state
``policy.embedding``     (A, n+1)       v_a of π, on [state, 1]: its last column is a bias
``behaviour.embedding``  (A, n+1)       the same for β
``behaviour.frequency``  (A, 1)         log-frequencies up to a constant: β without a state
``critic.embedding``     (A, n+1)       the same for the logit of q(s, a)
=======================  =============  =============================================================

The cell reads x = [u_a, ρ u_a, ρ] with ρ = reward/5, 2m+1 numbers: a liked and a disliked item of the same kind must be
able to move the state in opposite directions, which no sum of u_a and ρ can. Without `model.ratings` it reads x = u_a,
m numbers. R is A, or `model.input_rows`, which items then share (:func:`input_rows`). Of the last four those are
present that the objective needs (:attr:`common.settings.Settings.heads`). With fewer shared numbers than that the
tables with a row per item are made of parts (:mod:`common.item_tables`), of which the functions below take what
:func:`common.item_tables.formed` makes. All but the fixed features and starts, and `training.frozen`, are trained and
uploaded (:func:`trained`).

The user embedding conditions the state by ``h_t = s_t + P e_u``, outside of the recurrence: a device whose embedding
moves does not have to replay its history, and one new interaction advances the state in O(1).
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.candidates import log_uniform
from common.errors import ModelError
from common.features import ORDER_COLUMNS, order_knots
from common.item_tables import FACTORS, FEATURES, LOADINGS, START, parts_of
from common.settings import Group, Head, ModelSettings, Settings
from common.tape import Dense, Tape

Parameters = dict[str, Tensor]
_Value = TypeVar("_Value")

HEADS: dict[Head, str] = {
    "policy": "policy.embedding",
    "behaviour": "behaviour.embedding",
    "frequency": "behaviour.frequency",
    "critic": "critic.embedding",
}
"""The parameter of each head."""


def shapes(settings: Settings, items: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the shared parameters, in the order of the flat vector."""
    model = settings.model
    n, x = model.state_width, _inputs(model)
    found = {"user.projection": (n, model.user_width)}
    if model.cell != "none":
        candidate = x if model.cell == "cfn" else x + 1 + n
        recurrent = {
            **parts_of(model, "items.embedding", model.input_rows or items, model.input_width),
            "cell.gates": (2 * n, x + 1 + n),
            "cell.candidate": (n, candidate),
        }
        found = recurrent | found
    for head in settings.heads:
        found |= parts_of(model, HEADS[head], items, 1 if head == "frequency" else n + 1)
    if model.items == "features":
        found[FEATURES] = (items, model.feature_width)
    if settings.training.start == "popularity":
        found |= {START + HEADS[head]: (items, 1) for head in settings.heads}
    return found


def _inputs(model: ModelSettings) -> int:
    return 2 * model.input_width + 1 if model.ratings else model.input_width


def input_rows(model: ModelSettings, items: Tensor) -> Tensor:
    """The rows of the input table that stand for catalogue indices, of the same shape.

    A fixed public hash: each R items in a row of the catalogue, by falling frequency, have R different rows, so that
    the R most frequent items do not collide with each other; the next R are shifted by Fibonacci hashing (Knuth, The
    Art of Computer Programming, 6.4) of how many such turns came before.
    """
    if not model.input_rows:
        return items
    turn = items // model.input_rows
    return (items + (turn * _HASH_KEY >> 33)) % model.input_rows


_HASH_KEY = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number


KEEP_BIAS = 3.0
"""First bias of the gate that keeps the state: a memory of some 20 interactions, where 0 would have 2."""


def items_in(parameters: Parameters) -> int:
    """A, the number of items: the rows of any head's table, factors or start, or of the features: one comes last."""
    return len(next(reversed(parameters.values())))


def group_of(name: str) -> Group:
    """The public group whose `privacy.group_scale` applies to a parameter."""
    prefix = name.split(".")[0]
    return "cell" if prefix == "user" else prefix  # type: ignore[return-value]


def trained(settings: Settings, parameters: Mapping[str, _Value]) -> dict[str, _Value]:
    """Of all parameters, or their shapes, those that are trained: what an update is made of, in this order."""
    fixed = ("features", "start", *settings.training.frozen)
    return {name: value for name, value in parameters.items() if group_of(name) not in fixed}


def dimension_of(settings: Settings, parameters: Parameters) -> int:
    """d, the length of an update."""
    return sum(value.numel() for value in trained(settings, parameters).values())


def initialise(
    settings: Settings, items: int, generator: torch.Generator, features: Tensor | None = None
) -> Parameters:
    """Draw the initial parameters: fan-in scaled normals, biases 0 but for gates that start open.

    The heads' item embeddings start small, so that π and β start near the uniform distribution; frequencies start
    log-uniform over the catalogue, which is in the order of falling frequency, or, where the first round counts, alike;
    ``start.`` parameters are 0 until it has counted. Whole tables or made of features and of low rank, their entries
    start about as large; next to features what is of low rank starts at 0.

    Args:
        features: (A, f) of :func:`common.features.features_of`; None draws them, where a model has any.
    """
    parameters = {}
    for name, shape in shapes(settings, items).items():
        weight = torch.randn(shape, generator=generator)
        table, _, part = name.rpartition(".")
        if part == LOADINGS:
            weight *= shape[0] ** -0.5
        elif part == FACTORS and (settings.model.items == "features" or _silent(settings, table)):
            weight *= 0
        elif part == FACTORS:
            weight *= _SPREAD["items" if table.startswith("items") else "heads"]
        elif name.startswith(START):
            weight *= 0
        elif name == FEATURES:
            weight = weight * shape[1] ** -0.5 if features is None else features
        elif name.startswith(("cell", "user")):
            weight *= shape[1] ** -0.5
        elif name.startswith("items"):
            weight *= _SPREAD["items"]
        elif HEADS["frequency"] in (name, table) and settings.training.start == "popularity":
            weight *= 0
            if name == HEADS["frequency"]:
                weight -= math.log(items)
        elif name == HEADS["frequency"]:
            weight = torch.from_numpy(np.log(log_uniform(items))).float().unsqueeze(-1)
        elif table == HEADS["frequency"]:
            weight *= 0
            weight[:ORDER_COLUMNS, 0] = -torch.from_numpy(np.log1p(order_knots(items))).float()
        else:
            weight *= 0 if _silent(settings, name) or _silent(settings, table) else _SPREAD["heads"]
            # Noise contrast learns the normaliser: it starts where the masses of all items sum to 1.
            weight[:, -1] = -math.log(items) if settings.objective.softmax == "nce" and "critic" not in name else 0
            if name == HEADS["critic"]:
                weight[:, -1] = math.log(settings.objective.critic_start / (1 - settings.objective.critic_start))
        bias = _inputs(settings.model)
        if name == "cell.gates":
            weight[:, bias] = 1
            weight[: settings.model.state_width, bias] = KEEP_BIAS
        elif name == "cell.candidate" and settings.model.cell == "gru":
            weight[:, bias] = 0
        parameters[name] = weight
    return parameters


_SPREAD = {"items": 0.3, "heads": 0.05}
"""Standard deviations of what tables start with."""


def _silent(settings: Settings, table: str) -> bool:
    """Whether a table starts at 0: that of a policy on top of the critic."""
    return table == HEADS["policy"] and settings.objective.prior == "critic"


def check_parameters(parameters: Parameters, expected: dict[str, tuple[int, int]]) -> None:
    """Raise :class:`ModelError` unless names and shapes are as expected, and all numbers finite float32."""
    if list(parameters) != list(expected):
        raise ModelError(f"Expected the parameters {list(expected)}, found {list(parameters)}.")
    for name, shape in expected.items():
        if tuple(parameters[name].shape) != shape:
            raise ModelError(f"Expected {name} of shape {shape}, found {tuple(parameters[name].shape)}.")
        if parameters[name].dtype != torch.float32:
            raise ModelError(f"Expected {name} as float32, found {parameters[name].dtype}.")
        if not bool(torch.isfinite(parameters[name]).all()):
            raise ModelError(f"Expected finite numbers in {name}.")


def flatten(parameters: Parameters) -> Tensor:
    """(d,) all parameters as one vector, in their order."""
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unflatten(vector: Tensor, expected: dict[str, tuple[int, int]]) -> Parameters:
    """The inverse of :func:`flatten`."""
    parts = torch.split(vector, [rows * columns for rows, columns in expected.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(expected.items(), parts, strict=True)}


def condition(parameters: Parameters, states: Tensor, users: Tensor, tape: Tape | None) -> Tensor:
    """h_t = s_t + P e_u: (B, T, n) states conditioned on (B, w) user embeddings."""
    shift = users.unsqueeze(1) @ parameters["user.projection"].T
    if tape is not None:
        tape.uses.append(Dense("user.projection", users.unsqueeze(1), tape.watch(shift)))
    return states + shift


def policy_weight(settings: Settings, parameters: Parameters) -> Tensor:
    """(A, n+1) what queries are multiplied with for π's logits: its own table, on top of the critic's if that is its
    prior, which it does not train."""
    weight = parameters[HEADS["policy"]]
    if settings.objective.prior == "none":
        return weight
    return weight + parameters[HEADS["critic"]].detach() / settings.objective.prior_temperature


def queries(conditioned: Tensor, temperature: float) -> Tensor:
    """(B, T, n+1) what an item embedding is multiplied with: [h, 1] over the temperature."""
    return torch.cat([conditioned, torch.ones_like(conditioned[..., :1])], -1) / temperature
