"""Which interactions train, which validate and which test.

Both protocols hold out single items: a user's history for a target is everything of that user before it, so a
history is always a prefix of the user's interactions and the target the interaction right after it.

``leave-last-out``
    A user's last interaction tests, the one before it validates, the rest trains. Users with fewer than three
    interactions train with all of them and are not evaluated.

``time-split``
    Two moments, the 80 % and 90 % quantiles of all timestamps, cut every history. What lies strictly before the
    first trains. A user's first interaction from the first moment on and before the second validates; the first
    one from the second moment on tests, after a history of everything before the second moment. Only users with
    a history before the target are evaluated. Nothing that trains is later than anything that tests.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.errors import DataError
from simulations.datasets.interactions import Interactions

Protocol = Literal["leave-last-out", "time-split"]
Kind = Literal["validation", "test"]

_DRAWN = 0x6576616C


@dataclass(frozen=True)
class Targets:
    """The held-out items of one kind.

    Attributes:
        users: (V,) int64 evaluated users, ascending, each once.
        items: (V,) int64 item that each of them took next.
    """

    users: np.ndarray
    items: np.ndarray


@dataclass(frozen=True)
class Split:
    """A population's interactions, cut into training, validation and test.

    Attributes:
        protocol: how they were cut.
        interactions: all of them.
        train: the same users and catalogue; users may have empty histories. Also the histories of the validation.
        validation: targets to choose settings by.
        test: targets to report.
        tested_after: (N,) int64 how many interactions of each user come before the test.
        left_out: number of users without a test target.
        notes: sentences that whoever reads the figures should be told.
    """

    protocol: Protocol
    interactions: Interactions
    train: Interactions
    validation: Targets
    test: Targets
    tested_after: np.ndarray
    left_out: int
    notes: tuple[str, ...]

    def limited(self, most: int, seed: int) -> "Split":
        """With at most so many users in either kind of target, drawn by the seed; 0: all."""
        validation, test = (_drawn(targets, most, seed) for targets in (self.validation, self.test))
        fewer = len(test.users) < len(self.test.users)
        note = f"{len(test.users):,} of the {len(self.test.users):,} test users are evaluated, drawn by the seed."
        return replace(self, validation=validation, test=test, notes=(*self.notes, *([note] if fewer else [])))

    def targets(self, kind: Kind) -> Targets:
        """Held-out items of that kind."""
        return self.validation if kind == "validation" else self.test

    def history(self, kind: Kind) -> Interactions:
        """All users' interactions before the targets of that kind; for the test, training and validation."""
        return self.train if kind == "validation" else self.interactions.first(self.tested_after)


def split(interactions: Interactions, protocol: Protocol) -> Split:
    """Cut the interactions as the protocol says.

    Raises:
        DataError: nobody can be evaluated.
    """
    if protocol == "leave-last-out":
        lengths = interactions.lengths()
        evaluated = lengths >= 3
        trained, tested_after = lengths - 2 * evaluated, lengths - evaluated
        validated = tested = evaluated
        reason = "have fewer than 3 interactions: they train and are not evaluated"
        need = "at least one user with 3 interactions or more"
    else:
        trained, tested_after = _before_quantiles(interactions)
        validated = (trained > 0) & (tested_after > trained)
        tested = (tested_after > 0) & (interactions.lengths() > tested_after)
        reason = "have no interaction before or none after the 90 % quantile of time: they are not tested"
        need = "users with interactions on both sides of the 80 % and of the 90 % quantile of time"

    if not (validated.any() and tested.any()):
        raise DataError(f"Expected {need} to evaluate by {protocol}, found none among {interactions.users} users.")
    left_out = int(np.count_nonzero(~tested))
    return Split(
        protocol=protocol,
        interactions=interactions,
        train=interactions.first(trained),
        validation=_targets(interactions, validated, trained),
        test=_targets(interactions, tested, tested_after),
        tested_after=tested_after,
        left_out=left_out,
        notes=(f"{left_out:,} of {interactions.users:,} users {reason}.",) if left_out else (),
    )


def _before_quantiles(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (N,) numbers of interactions of each user strictly before the two moments of the time split."""
    times = interactions.timestamps
    # "higher" picks moments that occur, so that interactions at one moment are always on the same side.
    first, second = np.quantile(times, [0.8, 0.9], method="higher") if len(times) else (0, 0)
    return _count_before(interactions, first), _count_before(interactions, second)


def _count_before(interactions: Interactions, moment: int) -> np.ndarray:
    """(N,) int64 number of interactions of each user before a moment."""
    counts = np.zeros(interactions.users, np.int64)
    for users in interactions.blocks():
        owners = np.repeat(np.arange(len(users)), interactions.lengths()[users])
        before = interactions.timestamps[interactions.places(users)] < moment
        counts[users] = np.bincount(owners[before], minlength=len(users))
    return counts


def _targets(interactions: Interactions, evaluated: np.ndarray, history: np.ndarray) -> Targets:
    """The interaction right after the history of each evaluated user."""
    users = np.flatnonzero(evaluated).astype(np.int64)
    return Targets(users, interactions.items[interactions.offsets[users] + history[users]].astype(np.int64))


def _drawn(targets: Targets, most: int, seed: int) -> Targets:
    if not most or len(targets.users) <= most:
        return targets
    chosen = np.sort(np.random.default_rng([_DRAWN, seed]).choice(len(targets.users), most, replace=False))
    return Targets(targets.users[chosen], targets.items[chosen])
