"""FedJAX on the same work: its `for_each_client`, compiled by XLA, one client after the other.

Federated averaging with a learning rate of 1 on a device; the clients' updates are clipped, and added up, by FedJAX.
The GRU and the softmax are written again in JAX. FedJAX's own way to several devices, `pmap`, fails with JAX 0.10
(`jax.device_put_replicated` is gone): here independent processes each play rounds of their own. They are without
PyTorch, whose memory and start would count otherwise.

Not installed with fedtopk; the README says how.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from simulations.bench.meter import Effort, Measured, rate
from simulations.processes import start_bare_worker

if TYPE_CHECKING:
    from simulations.bench.engine_workloads import Workload


@dataclass(frozen=True)
class _Work:
    """What the processes get.

    Attributes:
        parameters: by name.
        items: (N, T) of each device.
        negatives: (m',) their ids and log-weights; None: the full softmax.
    """

    parameters: dict[str, np.ndarray]
    items: np.ndarray
    negatives: tuple[np.ndarray, np.ndarray] | None
    clip_norm: float
    cohort: int


def measure_fedjax(workload: "Workload", effort: Effort) -> Measured:
    """Whole rounds in independent processes, after one over the few devices that are checked.

    Args:
        workload: `reference`.

    Raises:
        AggregationError: its sum is not the batched engine's.
    """
    from simulations.bench.engine_loops import CHECKED, measure_apart

    checked = workload.limited(CHECKED)
    start = partial(_start, _work_of(workload), checked.cohort)
    return measure_apart("FedJAX simulation", checked, effort, start, _run, start_bare_worker)


def _work_of(workload: "Workload") -> _Work:
    from common.candidates import Negatives

    offer, windows = workload.offer(1, workload.parameters()), workload.population()
    drawn = offer.candidates
    return _Work(
        {name: value.numpy() for name, value in offer.parameters.items()},
        windows.windows(offer.round, np.arange(workload.devices)).items.numpy().astype(np.int32),
        (drawn.ids.numpy(), drawn.log_weights.numpy()) if isinstance(drawn, Negatives) else None,
        offer.settings.privacy.clip_norm,
        workload.cohort,
    )


def _loss(parameters: dict[str, Any], items: Any, negatives: tuple[np.ndarray, np.ndarray] | None) -> Any:
    """The mean cross-entropy of (T,) items, each from the state before it: :mod:`common.recurrence` and
    :mod:`common.softmax`."""
    import jax
    import jax.numpy as jnp

    inputs = parameters["items.embedding"][items]
    gates, candidate, policy = (parameters[name] for name in ("cell.gates", "cell.candidate", "policy.embedding"))
    x = inputs.shape[-1]

    def step(state: Any, driven: tuple[Any, Any]) -> tuple[Any, Any]:
        keep, kept = jnp.split(jax.nn.sigmoid(driven[0] + gates[:, x + 1 :] @ state), 2)
        fresh = jnp.tanh(driven[1] + candidate[:, x + 1 :] @ (kept * state))
        return keep * state + (1 - keep) * fresh, state

    driven = tuple(inputs @ weight[:, :x].T + weight[:, x] for weight in (gates, candidate))
    _, states = jax.lax.scan(step, jnp.zeros(len(candidate)), driven)
    queries = jnp.concatenate([states, jnp.ones((len(items), 1))], -1)
    if negatives is None:
        own = (queries * policy[items]).sum(-1)
        return (jax.nn.logsumexp(queries @ policy.T, axis=-1) - own).mean()
    ids, log_weights = negatives
    own = (queries * policy[items]).sum(-1)
    masses = jnp.where(items[:, None] == ids, -jnp.inf, queries @ policy[ids].T + log_weights)
    return (jnp.logaddexp(jax.nn.logsumexp(masses, axis=-1), own) - own).mean()


class _Simulation:
    """This process's rounds."""

    def __init__(self, work: _Work) -> None:
        import fedjax
        import jax

        self._work, self._next = work, 0
        self._parameters = jax.tree_util.tree_map(jax.numpy.asarray, work.parameters)
        self._clients = fedjax.InMemoryFederatedData(
            {user: {"items": row[None]} for user, row in enumerate(work.items)}
        )
        self._each_client = _each_client(work)

    def run(self, seconds: float) -> float:
        """Devices per second of rounds over whole cohorts."""

        def play() -> int:
            self.play(self._work.cohort)
            return self._work.cohort

        return rate(play, seconds)

    def play(self, cohort: int) -> np.ndarray:
        """One round. Returns (d,) the sum over the cohort."""
        import fedjax
        import jax

        users = [(self._next + place) % len(self._work.items) for place in range(cohort)]
        self._next += cohort
        batches = ((user, data.batch(batch_size=1), ()) for user, data in self._clients.get_clients(users))
        total = fedjax.tree_util.tree_sum(update for _, update in self._each_client(self._parameters, batches))
        arrays = jax.device_get(total)
        return np.concatenate([arrays[name].ravel() for name in self._work.parameters]).astype(np.float64)


def _each_client(work: _Work) -> Callable[..., Any]:
    """FedJAX's loop over clients, whose updates are what they leave off the server's parameters, clipped."""
    import fedjax
    import jax

    gradient = jax.grad(_loss)

    def begin(server: Any, _: Any) -> Any:
        return server

    def step(parameters: Any, batch: dict[str, Any]) -> Any:
        slope = gradient(parameters, batch["items"][0], work.negatives)
        return jax.tree_util.tree_map(lambda value, by: value - by, parameters, slope)

    def end(server: Any, parameters: Any) -> Any:
        update = jax.tree_util.tree_map(lambda before, after: before - after, server, parameters)
        return fedjax.tree_util.tree_clip_by_global_norm(update, work.clip_norm)

    return fedjax.for_each_client(begin, step, end)  # type: ignore[no-any-return]


_simulation: _Simulation


def _start(work: _Work, devices: int) -> np.ndarray:
    """Make this process's simulation. Returns the sum over the first devices."""
    global _simulation
    _simulation = _Simulation(work)
    return _simulation.play(devices)


def _run(seconds: float) -> float:
    return _simulation.run(seconds)
