"""The device is a batch of one: a padded batch of devices and the same devices alone give the same numbers."""

import itertools
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from client.local_update import LocalUpdate, adapt_users, compute_update
from common.candidates import Negatives, draw_negatives, log_uniform
from common.model import Parameters, condition, initialise, queries
from common.objective import Evidence, coefficients, mean_over, returns_of
from common.recurrence import Recurrence
from common.settings import Settings, parse_flat
from common.softmax import likelihood
from common.trajectory import Trajectories, pad

LENGTHS = (9, 0, 1, 30, 2, 3, 17, 4)
ITEMS = 60
CASES = list(itertools.product(("cfn", "gru"), ("full", "sampled"), ("cross-entropy", "reinforce", "top-k"), (1, 3)))
COMBINED = list(itertools.product(("cfn", "gru"), ("full", "sampled")))


@dataclass(frozen=True)
class Devices:
    """Devices with their windows, embeddings and the round's public part."""

    settings: Settings
    parameters: Parameters
    windows: Trajectories
    users: Tensor
    negatives: Negatives | None

    def __len__(self) -> int:
        return len(self.users)

    def alone(self, device: int) -> "Devices":
        """One device, with a window as long as its own history."""
        w, own, steps = self.windows, slice(device, device + 1), slice(max(1, int(self.windows.lengths[device])))
        items, rewards, returns = (values[own, steps] for values in _steps(w))
        window = Trajectories(items, rewards, returns, w.lengths[own], w.support[own])
        return replace(self, windows=window, users=self.users[own])

    def padded(self, more: int) -> "Devices":
        """The same devices with `more` steps of padding."""
        items, rewards, returns = (torch.nn.functional.pad(values, (0, more)) for values in _steps(self.windows))
        return replace(self, windows=replace(self.windows, items=items, rewards=rewards, returns=returns))

    def update(self) -> LocalUpdate:
        return compute_update(self.settings, self.parameters, self.windows, self.users, self.negatives, warm=True)

    def gradients(self) -> Tensor:
        """(B, d) every device's own gradient."""
        update = self.update()
        return torch.stack([update.gradients.weighted_sum(row) for row in torch.eye(len(self), dtype=self.users.dtype)])

    def double(self) -> "Devices":
        w, public = self.windows, self.negatives
        return Devices(
            self.settings,
            {name: value.double() for name, value in self.parameters.items()},
            Trajectories(w.items, w.rewards.double(), w.returns.double(), w.lengths, w.support),
            self.users.double(),
            None if public is None else replace(public, log_weights=public.log_weights.double()),
        )


def _steps(windows: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    return windows.items, windows.rewards, windows.returns


@cache
def devices(
    cell: str, softmax: str, estimator: str, local_steps: int, embedded: bool = False, support_fraction: float = 0.25
) -> Devices:
    """Devices of very different lengths; `embedded`: with embeddings from earlier rounds, instead of new ones."""
    settings = parse_flat(
        {
            "model.cell": cell,
            "model.input_width": 8,
            "model.state_width": 12,
            "model.user_width": 4,
            "objective.softmax": softmax,
            "objective.estimator": estimator,
            "objective.discount": 0.5,
            "training.local_steps": local_steps,
            "training.support_fraction": support_fraction,
            "privacy.group_scale.policy": 0.5,
        }
    )
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    parameters = {name: 2 * value for name, value in initialise(settings, ITEMS, generator).items()}
    items = rng.integers(0, ITEMS, sum(LENGTHS))
    rewards = rng.uniform(-5, 5, sum(LENGTHS)).astype(np.float32)
    lengths = np.array(LENGTHS)
    starts = np.cumsum(lengths) - lengths
    returns = np.concatenate([returns_of(own, 0.5) for own in np.split(rewards, starts[1:])])
    windows = pad(items, rewards, returns, starts, lengths, support_fraction)
    users = torch.randn(len(LENGTHS), 4, generator=generator) * float(embedded)
    negatives = draw_negatives(log_uniform(ITEMS), 20, rng) if softmax == "sampled" else None
    return Devices(settings, parameters, windows, users, negatives)


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Equal as vectors: ‖found − expected‖ ≤ relative · ‖expected‖."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= relative * expected.norm()


def assert_each_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, relative)


@pytest.mark.parametrize(("cell", "softmax", "estimator", "local_steps"), CASES)
def test_a_batch_is_its_devices_one_by_one(cell: str, softmax: str, estimator: str, local_steps: int) -> None:
    batch = devices(cell, softmax, estimator, local_steps)
    together = batch.update()
    alone = [batch.alone(device).update() for device in range(len(batch))]
    weights = torch.linspace(0.2, 1.5, len(batch))
    expected = sum(one.gradients.weighted_sum(weights[at : at + 1]) for at, one in enumerate(alone))
    assert isinstance(expected, Tensor)
    assert_near(together.gradients.weighted_sum(weights), expected)
    norms = torch.cat([one.gradients.norms() for one in alone])
    assert (norms > 0).tolist() == [length > 0 for length in LENGTHS]
    torch.testing.assert_close(together.gradients.norms(), norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        together.local_users, torch.cat([one.local_users for one in alone]), rtol=1e-5, atol=1e-7
    )
    for name, values in together.local_metrics.items():
        torch.testing.assert_close(values, torch.cat([one.local_metrics[name] for one in alone]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("device", range(8))
def test_a_device_with_an_old_embedding_is_the_same_alone(device: int, local_steps: int) -> None:
    batch = devices("cfn", "sampled", "top-k", local_steps, embedded=True)
    assert_near(batch.update().local_users[device], batch.alone(device).update().local_users[0])
    assert_near(batch.gradients()[device], batch.alone(device).gradients()[0])


@pytest.mark.parametrize("local_steps", [1, 3])
def test_without_a_support_embeddings_stay(local_steps: int) -> None:
    batch = devices("gru", "full", "top-k", local_steps, embedded=True, support_fraction=0.0)
    assert (batch.update().local_users == batch.users).all()
    for device in range(len(batch)):
        assert_near(batch.gradients()[device], batch.alone(device).gradients()[0])


@pytest.mark.parametrize(("cell", "softmax"), COMBINED)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_norms_are_those_of_the_gradients(cell: str, softmax: str, local_steps: int) -> None:
    batch = devices(cell, softmax, "top-k", local_steps, embedded=True)
    torch.testing.assert_close(batch.update().gradients.norms(), batch.gradients().norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_the_length_of_the_padding_does_not_matter(softmax: str, local_steps: int) -> None:
    batch = devices("cfn", softmax, "top-k", local_steps, embedded=True)
    longer = batch.padded(13)
    assert_each_near(longer.gradients(), batch.gradients())
    assert_each_near(longer.update().local_users, batch.update().local_users)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_what_stands_in_the_padding_does_not_matter(local_steps: int) -> None:
    batch = devices("gru", "sampled", "top-k", local_steps, embedded=True)
    w = batch.windows
    padded = torch.arange(w.items.shape[1]) >= w.lengths[:, None]
    filled = (w.items.masked_fill(padded, 7), w.rewards.masked_fill(padded, 5), w.returns.masked_fill(padded, 50))
    other = replace(batch, windows=Trajectories(*filled, w.lengths, w.support))
    assert padded.any()
    assert_each_near(other.gradients(), batch.gradients(), 1e-6)


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("cell", ["cfn", "gru"])
def test_a_device_does_not_depend_on_the_others(cell: str, local_steps: int) -> None:
    batch, changed = devices(cell, "sampled", "top-k", local_steps, embedded=True), 3
    w, users = batch.windows, batch.users.clone()
    items, rewards, returns = (values.clone() for values in _steps(w))
    items[changed] = (items[changed] + 11) % ITEMS
    rewards[changed], returns[changed], users[changed] = 5, 9, 3
    other = replace(batch, windows=Trajectories(items, rewards, returns, w.lengths, w.support), users=users)
    others = [device for device in range(len(batch)) if device != changed]
    before, after = batch.gradients(), other.gradients()
    assert (before[changed] - after[changed]).norm() > 0.1 * before[changed].norm()
    assert_each_near(after[others], before[others], 1e-6)
    assert_each_near(other.update().local_users[others], batch.update().local_users[others], 1e-6)
    torch.testing.assert_close(other.update().gradients.norms()[others], batch.update().gradients.norms()[others])


@pytest.mark.parametrize(("cell", "softmax"), COMBINED)
@pytest.mark.parametrize("estimator", ["likelihood", "off-policy", "top-k"])
@pytest.mark.parametrize("local_steps", [2, 4])
def test_local_steps_are_gradient_steps_on_an_own_copy(
    cell: str, softmax: str, estimator: str, local_steps: int
) -> None:
    one = devices(cell, softmax, estimator, local_steps, embedded=True).double().alone(3)
    embedding, support = one.update().local_users, int(one.windows.support[0])
    own = {name: value.clone().requires_grad_() for name, value in one.parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in own.items()}
    for _ in range(local_steps):
        policy, behaviour, _ = loss_by_hand(one, own, embedding, slice(support, LENGTHS[3]))
        gradients = torch.autograd.grad(policy + behaviour, list(own.values()))
        for (name, value), gradient in zip(own.items(), gradients, strict=True):
            total[name] += gradient
            own[name] = (value - one.settings.training.local_learning_rate * gradient).detach().requires_grad_()
    total["policy.embedding"] *= 0.5
    expected = torch.cat([value.flatten() for value in total.values()])
    assert_near(one.update().gradients.weighted_sum(torch.ones(1).double()), expected, 1e-10)


@pytest.mark.parametrize(("cell", "softmax"), COMBINED)
@pytest.mark.parametrize("estimator", ["cross-entropy", "top-k"])
def test_an_embedding_adapts_by_decayed_gradient_steps_on_the_support(cell: str, softmax: str, estimator: str) -> None:
    one = devices(cell, softmax, estimator, 1, embedded=True).double().alone(3)
    training, support = one.settings.training, int(one.windows.support[0])
    user = one.users
    for _ in range(training.user_steps):
        leaf = user.clone().requires_grad_()
        policy, _, mean_coefficient = loss_by_hand(one, one.parameters, leaf, slice(0, support))
        (gradient,) = torch.autograd.grad(policy / mean_coefficient, leaf)
        user = user - training.user_learning_rate * (gradient + training.user_weight_decay * user)
    assert_near(one.update().local_users, user, 1e-10)


def test_serving_adapts_a_device_in_a_batch_as_alone() -> None:
    batch = devices("cfn", "full", "top-k", 1, embedded=True)
    recurrence = Recurrence(batch.settings.model)

    def adapted(some: Devices) -> Tensor:
        w = some.windows
        states = recurrence.run(some.parameters, w.items, w.rewards)[:, :-1]
        return adapt_users(some.settings, some.parameters, states, w, some.users)

    assert_each_near(adapted(batch), torch.cat([adapted(batch.alone(device)) for device in range(len(batch))]))


def loss_by_hand(one: Devices, parameters: Parameters, user: Tensor, steps: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's and β's loss over some steps of one device, and the mean coefficient."""
    w, objective = one.windows, one.settings.objective
    states = Recurrence(one.settings.model).run(parameters, w.items, w.rewards)[:, steps]
    query = queries(condition(parameters, states, user, None), one.settings.model.temperature)
    items, rewards, returns = (values[:, steps] for values in _steps(w))
    every = torch.ones_like(items, dtype=torch.bool)
    log_pi = likelihood(parameters["policy.embedding"], "", query, items, every, one.negatives, None).log_probability
    log_beta = None
    if objective.corrected:
        head = parameters["behaviour.embedding"]
        log_beta = likelihood(head, "", query.detach(), items, every, one.negatives, None).log_probability
    evidence = Evidence(rewards, returns, every, log_pi.detach(), log_beta, None, None, ITEMS)
    c = coefficients(objective, evidence, True)
    behaviour = torch.zeros(()) if log_beta is None else -log_beta.mean()
    return -(c * log_pi).mean(), behaviour, mean_over(c, every)[0]
