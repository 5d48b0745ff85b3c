"""The system under audit: a run's own code and settings again, at a size that fits, watched by an observer.

The round loop, the budget, the clip and the release are the very ones of a run (:mod:`server.training`,
:mod:`simulations.batched_cohort`). Around them, from the outside in::

    Training ─► Watched: what the observer of the models sees ─► Flawed: one step done wrong, or none ─► the devices
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor

from common.errors import PrivacyError
from common.model import shapes
from common.offer import Offer
from common.settings import Settings, parse_settings
from server.cohort import Cohort, CohortSum
from server.run import open_training
from server.run_folder import RunFolder
from server.store import open_store
from simulations.audits.flaws import Flaw, as_it_is
from simulations.batched_cohort import BatchedCohort
from simulations.datasets.interactions import Interactions
from simulations.population import Population
from simulations.simulate import load_split

DELTA = 1e-9
"""δ of an audit's claim and of its bounds: small beside the number of coins, which it is multiplied with."""

_ANY_EPSILON = 1e6


@dataclass(frozen=True)
class Size:
    """How much of a run an audit repeats; a run that has less of something is repeated with what it has.

    Attributes:
        users, items, rounds: at most so many.
        window: interactions of a user that are kept, the first ones.
        canaries: made-up devices with one chosen update each; at most as many as the model has parameters.
        shadow_runs: trainings of the membership attack, a quarter of which are attacked.
    """

    users: int = 100
    items: int = 200
    rounds: int = 10
    window: int = 20
    canaries: int = 32_768
    shadow_runs: int = 48


@dataclass(frozen=True)
class System:
    """What is audited.

    Attributes:
        settings: of the repetition.
        histories: what its devices hold.
        flaw: what is done wrong, on purpose.
    """

    settings: Settings
    histories: Interactions
    flaw: Flaw = as_it_is

    @property
    def items(self) -> int:
        return len(self.histories.catalogue)

    @property
    def dimension(self) -> int:
        """d, the number of shared parameters."""
        return sum(rows * columns for rows, columns in shapes(self.settings, self.items).values())

    @property
    def examples(self) -> np.ndarray:
        """(N,) how many examples each device has, over the average."""
        lengths = self.histories.lengths()
        return np.asarray(lengths / lengths.mean())

    def seeded(self, seed: int) -> "System":
        """The same with another initial model and other windows; and other coins and noise, if these are seeded."""
        training = self.settings.training.model_copy(update={"seed": seed})
        return replace(self, settings=self.settings.model_copy(update={"training": training}))

    def population(self) -> Population:
        return Population(self.settings, self.histories)


def repetition(run: Settings, noise_multiplier: float, size: Size) -> System:
    """A run's mechanism (z, q, C, group scales, objective, optimiser) with its first users, at an audit's size,
    and with whole tables of items, all of them trained from the first round on: attacks look for an item's own numbers
    there. A first round that counts is so not attacked itself; its clip and noise are those of the others.

    Always in the `central` kind, whose clip and noise have the same sensitivity and variance as the others'.
    Raises :class:`PrivacyError` for a run without noise, and what loading its data raises.
    """
    if not run.private:
        raise PrivacyError(
            "Expected privacy.mechanism=skellam: a run without noise claims nothing that an audit could contradict."
        )
    if run.privacy.mechanism == "tree":
        raise PrivacyError(
            "Expected privacy.mechanism=tree to be skellam: the audits' statistics are of noise that is independent in "
            "each round."
        )
    tree = run.model_dump()
    rounds = min(run.training.rounds, size.rounds)
    tree["data"] |= {
        "items": min(run.data.items or size.items, size.items),
        "users": min(run.data.users or size.users, size.users),
    }
    tree["model"] |= {"items": "table", "rank": 0}
    warm = round(run.objective.warmup_rounds * rounds / run.training.rounds)
    tree["objective"] |= {"warmup_rounds": warm, "slate_size": min(run.objective.slate_size, size.items)}
    tree["training"] |= {"rounds": rounds, "checkpoint_every": rounds, "frozen": (), "start": "random"}
    tree["privacy"] |= {"noise_multiplier": noise_multiplier, "delta": DELTA, "target_epsilon": _ANY_EPSILON}
    tree["aggregation"]["kind"] = "central"
    tree["guard"]["minimum_cohort"] = 1
    settings = parse_settings(tree)
    histories = load_split(settings).train
    return System(settings, histories.first(np.minimum(histories.lengths(), size.window)))


@dataclass(frozen=True)
class Seen:
    """One round, as the observer of the models sees it: the optimiser is public, so that it can compute the sum from
    two models.

    Attributes:
        offer: with the round's model.
        total: (d,) the released sum of updates, in units of the most that one user adds: C, or √1.01·C where C adapts.
        of_nobody: runs the public code once more, for an empty cohort, and gives what that releases.
        members: who was drawn. Not seen; it is what attacks are judged by.
    """

    offer: Offer
    total: np.ndarray
    of_nobody: Callable[[], np.ndarray]
    members: np.ndarray


def train(system: System, cohort: Cohort, examples: np.ndarray, watch: Callable[[Seen], None]) -> float:
    """Train on the system's settings over `cohort`, watched. Returns ε_model as the run would claim it."""
    watched = _Watched(Flawed(cohort, examples, system.flaw), watch)
    with TemporaryDirectory() as folder, open_store(Path(folder), durable=False) as store:
        training = open_training(system.settings, RunFolder(Path(folder)), store, watched, system.items)
        training.run(lambda: False, lambda progress: None)
        statement = training.budget.statement(training.ledger.model_releases, training.ledger.attempts)
    return float(statement["epsilon_model"])


class _Around:
    """A cohort around another one."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort

    @property
    def devices(self) -> int:
        return self._cohort.devices

    def state(self) -> dict[str, Tensor]:
        return self._cohort.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._cohort.restore(state)


class Flawed(_Around):
    """A cohort whose sums are formed with a flaw."""

    def __init__(self, cohort: Cohort, examples: np.ndarray, flaw: Flaw) -> None:
        super().__init__(cohort)
        self._examples, self._flaw = examples, flaw

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        return self._cohort.sum_updates(*self._flaw(offer, members, self._examples))


class Present(_Around):
    """A cohort of which only some devices exist; the others contribute nothing when they are drawn.

    Attributes:
        present: (N,) bool.
    """

    def __init__(self, cohort: Cohort, present: np.ndarray) -> None:
        super().__init__(cohort)
        self.present = present

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        return self._cohort.sum_updates(offer, members[self.present[members]])


class _Watched(_Around):
    def __init__(self, cohort: Cohort, watch: Callable[[Seen], None]) -> None:
        super().__init__(cohort)
        self._watch = watch

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        released = self._cohort.sum_updates(offer, members)

        def update_of(total: np.ndarray) -> np.ndarray:
            return np.asarray(total[: offer.dimension] / offer.encoding.clip)

        def of_nobody() -> np.ndarray:
            return update_of(self._cohort.sum_updates(offer, members[:0]).total)

        self._watch(Seen(offer, update_of(released.total), of_nobody, members))
        return released


def devices_of(system: System) -> BatchedCohort:
    """The system's devices, computed by one process."""
    return BatchedCohort(system.population())
