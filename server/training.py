"""The round loop: the same for a simulation, Flower's engine and real devices.

One round: reserve its privacy in the ledger, flip the coins, ask the cohort for its noisy sum, step the optimiser,
write the checkpoint, mark the release. A crash between any two of these leaves a run that can be resumed and a ledger
that shows at least what was released (``tests/integration/test_crash.py``). Between two rounds the loop does what the
operator asks for (:mod:`server.controls`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.errors import Aborted, AggregationError, BudgetExceeded, FedtopkError
from common.item_slice import cut, scatter, slice_of
from common.model import Parameters, check_parameters, group_of, items_in, trained, unflatten
from common.offer import Offer
from common.privacy.adaptive_clip import AdaptiveClip, at, share_within
from common.privacy.budget import Budget
from common.privacy.encoding import Encoding
from common.privacy.tree import CorrelatedNoise
from common.settings import Settings, TrainingSettings
from common.threads import one_thread
from server.checkpoint import Checkpoint, load_latest, save
from server.cohort import Cohort, CohortSum
from server.controls import Controls
from server.events import Events
from server.ledger import Ledger
from server.popularity_start import starts
from server.sampling import draw_roster

ATTEMPTS = 3
"""Attempts at one round, each with a new cohort, before the run ends."""


Status = Literal["finished", "stopped", "aborted", "budget spent"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and its model.

    Attributes:
        reason: why it ended before its last round, if the budget did it.
        rounds, client_updates, dropouts: of the whole run, what came before a resume included.
        seconds: spent in those rounds.
        bytes_up, bytes_down: sent by and to one device in a round, if anything was sent.
    """

    status: Status
    reason: str
    rounds: int
    parameters: Parameters
    client_updates: int
    dropouts: int
    seconds: float
    bytes_up: int | None
    bytes_down: int | None


@dataclass(frozen=True)
class Progress:
    """One completed round, for whoever watches."""

    round: int
    parameters: Parameters
    members: int
    seconds: float
    cohort_sum: CohortSum


@dataclass
class Training:
    """A run: its model and optimiser, its devices, and the books it keeps.

    Args:
        parameters: the initial shared parameters.
        cohort: the devices.
        budget: the mechanism.
        ledger, events, controls: opened in the run folder.
        checkpoints: folder of the checkpoints.
        noise: that the server adds, where it is the server's; its key is erased once no round is left to be noised.
    """

    settings: Settings
    parameters: Parameters
    cohort: Cohort
    budget: Budget
    ledger: Ledger
    events: Events
    controls: Controls
    checkpoints: Path
    noise: CorrelatedNoise | None = None

    def __post_init__(self) -> None:
        self._model = {name: torch.nn.Parameter(value.clone()) for name, value in self.parameters.items()}
        self._optimizer = make_optimizer(self.settings.training, list(self._model.values()))
        self._round = self._saved = self._client_updates = self._dropouts = 0
        self._seconds = 0.0
        self._adaptive = AdaptiveClip.of(self.settings)
        self._clip = self.settings.privacy.clip_norm

    def resume(self) -> None:
        """Go on from the newest checkpoint, or from the start where there is none.

        Raises :class:`CheckpointError` and :class:`ModelError` where it is damaged or does not fit.
        """
        self.controls.refuse("the process that it was meant for had ended", self._round)
        checkpoint = load_latest(self.checkpoints)
        if checkpoint is None:
            return
        check_parameters(checkpoint.model, {name: tuple(value.shape) for name, value in self._model.items()})  # type: ignore[misc]
        with torch.no_grad():
            for name, value in checkpoint.model.items():
                self._model[name].copy_(value)
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self.cohort.restore(checkpoint.extra)
        self._round = self._saved = checkpoint.round
        self._client_updates = int(checkpoint.metadata["client_updates"])
        self._dropouts = int(checkpoint.metadata["dropouts"])
        self._seconds = float(checkpoint.metadata["seconds"])
        self._clip = float(checkpoint.metadata.get("clip", self._clip))
        self.ledger.reconcile(checkpoint.round)
        self.events.record("resumed", self._round)

    @one_thread()  # several would wait for each other where the devices' processes keep the cores busy
    def run(self, should_stop: Callable[[], bool], on_round: Callable[[Progress], None]) -> Outcome:
        """Train until the last round, the end of the budget, or until `should_stop` or the operator says so."""
        status: Status = "finished"
        reason = ""
        bytes_up = bytes_down = None
        while self._round < self.settings.training.rounds:
            if ended := self.controls.between_rounds(self._round, should_stop):
                status = ended
                break
            try:
                progress = self._one_round(self._round + 1)
            except Aborted:
                continue  # the controls end the run
            except FedtopkError as error:
                if isinstance(error, BudgetExceeded) and self._round:
                    status, reason = "budget spent", str(error)
                    break
                self._checkpoint()
                self.events.record("failed", self._round, reason=str(error))
                raise
            cohort_sum = progress.cohort_sum
            bytes_up, bytes_down = cohort_sum.bytes_up or bytes_up, cohort_sum.bytes_down or bytes_down
            on_round(progress)
        self._checkpoint()
        self.controls.refuse("the run had ended", self._round)
        self.events.record(status, self._round, reason=reason)
        if self.noise is not None and status != "stopped":
            self.noise.end()
        return Outcome(
            status,
            reason,
            self._round,
            self.current(),
            self._client_updates,
            self._dropouts,
            self._seconds,
            bytes_up,
            bytes_down,
        )

    def current(self) -> Parameters:
        """The shared parameters as they are now."""
        return {name: value.detach() for name, value in self._model.items()}

    def _one_round(self, number: int) -> Progress:
        start = time.perf_counter()
        for last in [False] * (ATTEMPTS - 1) + [True]:
            attempt = self.ledger.reserve(number)
            members = draw_roster(self.settings, number, self.cohort.devices)
            if last and self.noise is not None:
                members = members[:0]  # whose turn it was uploaded in vain, and will not do so twice: noise alone
            item_slice = slice_of(self.settings, items_in(self.current()), number)
            sliced = cut(self.current(), item_slice)
            noise = None if self.noise is None else self.noise.of(number)
            offer = Offer(number, attempt, sliced, self._encoding(number), self.settings, item_slice, noise)
            if len(members):
                self.ledger.uploaded(number, attempt)
            try:
                cohort_sum = self.cohort.sum_updates(offer, members)
                self.controls.expect_no_abort()
            except AggregationError as error:
                self.events.record("attempt failed", number, attempt=attempt, reason=str(error))
                if last or self.settings.reproducible:
                    raise
                continue
            break
        if offer.counting:
            self._start(cohort_sum, offer)
        else:
            self._step(cohort_sum, offer)
        adapted = self._adapt(cohort_sum, offer)
        self._round = number
        self._client_updates += cohort_sum.survivors
        self._dropouts += cohort_sum.roster - cohort_sum.survivors
        # A round with correlated noise must not be released twice: none is that no checkpoint holds.
        if self.noise is not None or number % self.settings.training.checkpoint_every == 0:
            self._checkpoint()
        # Until here only this process has seen the new model; from here on it counts as released.
        self.ledger.released(number, attempt)
        seconds = time.perf_counter() - start
        self._seconds += seconds
        sent = {"bytes_up": cohort_sum.bytes_up, "bytes_down": cohort_sum.bytes_down}  # by and to one device
        self.events.record(
            "round",
            number,
            attempt=attempt,
            members=len(members),
            survivors=cohort_sum.survivors,
            dropouts=cohort_sum.roster - cohort_sum.survivors,
            seconds=seconds,
            **{name: value for name, value in sent.items() if value is not None},
            **adapted,
            **({"histogram": True} if offer.counting else {}),
        )
        return Progress(number, self.current(), len(members), seconds, cohort_sum)

    def _start(self, cohort_sum: CohortSum, offer: Offer) -> None:
        """Let the items' biases start where the histogram of a first round that counts says."""
        encoding = offer.encoding
        noise = math.sqrt(encoding.variance) / (encoding.scale * encoding.clip)
        with torch.no_grad():
            for name, value in starts(self.settings, cohort_sum.total / encoding.clip, noise, self._expected).items():
                self._model[name].copy_(value)

    def _step(self, cohort_sum: CohortSum, offer: Offer) -> None:
        """One step along the mean over the *expected* cohort: dividing by who answered would not be private.

        The rows of items outside of the round's slice have a gradient of 0 in it, and the optimiser steps with that
        (docs/decisions/item-slices.md).

        Raises :class:`AggregationError`, with the model as it was, if the step leads out of the finite numbers.
        """
        before = {name: value.detach().clone() for name, value in self._model.items()}
        update = cohort_sum.total[: offer.dimension]
        mean = torch.from_numpy(update / (self._expected * self._unit(offer))).float()
        parameters = trained(self.settings, offer.parameters)
        shapes = {name: (value.shape[0], value.shape[1]) for name, value in parameters.items()}
        for name, gradient in scatter(unflatten(mean, shapes), offer.item_slice, self._model).items():
            self._model[name].grad = gradient / getattr(self.settings.privacy.group_scale, group_of(name))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.training, self._round)
        self._optimizer.step()
        if not all(bool(torch.isfinite(value).all()) for value in self._model.values()):
            with torch.no_grad():
                for name, value in before.items():
                    self._model[name].copy_(value)
            raise AggregationError(
                f"Training diverged in round {self._round + 1}: lower training.learning_rate="
                f"{self.settings.training.learning_rate} or set a finite privacy.clip_norm."
            )

    def _encoding(self, number: int) -> Encoding:
        """Of a round, the next one."""
        if self.settings.counting(number) and self.budget.histogram:
            return self.budget.histogram
        return at(self.budget.encoding, self._clip) if self._adaptive else self.budget.encoding

    def _unit(self, offer: Offer) -> float:
        """C over the first one for optimisers that divide by the gradients' past size, or it would be that of another
        C; 1 for the others (docs/decisions/adaptive-clipping.md)."""
        by_size = self._adaptive and self.settings.training.optimizer != "sgd"
        return offer.clip / self.settings.privacy.clip_norm if by_size else 1.0

    def _adapt(self, cohort_sum: CohortSum, offer: Offer) -> dict[str, float]:
        """Move C by what was released of it. What is to be recorded: the round's C, and the noisy share within it."""
        if self._adaptive is None or not offer.adaptive:
            return {}
        share = share_within(float(cohort_sum.total[-1]), offer.clip, self._expected)
        used, self._clip = self._clip, self._adaptive.following(self._clip, share)
        return {"clip": used, "share_within": share}

    @property
    def _expected(self) -> float:
        """qN, members of a cohort."""
        return self.settings.rate * self.cohort.devices

    def _checkpoint(self) -> None:
        """Write the state after the last completed round, unless it is written."""
        if self._saved == self._round:
            return
        metadata = {
            "client_updates": str(self._client_updates),
            "dropouts": str(self._dropouts),
            "seconds": str(self._seconds),
            "clip": str(self._clip),
        }
        state = self._optimizer.state_dict()
        save(self.checkpoints, Checkpoint(self._round, self.current(), state, self.cohort.state(), metadata))
        self._saved = self._round


def learning_rate(training: TrainingSettings, completed: int) -> float:
    """The learning rate of the round after `completed` ones."""
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * (1 + math.cos(math.pi * completed / training.rounds)) / 2


def make_optimizer(training: TrainingSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The server's optimiser by its `training.optimizer` name."""
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    options: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    return kinds[training.optimizer](parameters, **options)
