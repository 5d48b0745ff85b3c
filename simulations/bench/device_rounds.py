"""The rounds that `fedtopk bench device` plays with one real device: their server, and the cohort's other devices,
which do all that a device does but to mask."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from common.invitation import Invitation
from common.messages import Action, model_bytes, run_digest
from common.model import initialise
from common.offer import Offer
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.keys import SEED_BYTES
from common.secagg.roster import View
from common.secagg.terms import Terms
from common.secagg.wire import numbers
from common.settings import Settings, load_settings
from common.signed_model import Edition
from simulations.bench.secagg import Case
from simulations.identities import simulated_authority, simulated_identity, simulated_publisher

SEED, RUN_ID = 0, 1


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        items: A, size of the catalogue.
        events: interactions of the device's history.
        devices: n of the round that does not count; each further round has one device more.
        repeats: rounds that count, and how often each part is measured by itself.
    """

    items: int = 5000
    events: int = 200
    devices: int = 100
    repeats: int = 9

    @property
    def steps(self) -> int:
        """How often :func:`bench_device` tells of its progress."""
        return self.repeats + 3

    @cached_property
    def settings(self) -> Settings:
        """Of the run: the default ones, with secure aggregation."""
        return load_settings(None, [f"data.items={self.items}", "aggregation.kind=secure"])


class Rounds:
    """The server and the other devices.

    Args:
        ask: the body of the device's answer to a message, and the CPU seconds until it was there.
    """

    def __init__(self, workload: Workload, ask: Callable[..., tuple[bytes, float]]) -> None:
        self._workload, self._ask = workload, ask
        self._run = run_digest(workload.settings, RUN_ID)
        self._parameters = initialise(workload.settings, workload.items, torch.Generator().manual_seed(SEED))
        self._model = model_bytes({name: value.numpy() for name, value in self._parameters.items()})

    def case(self, number: int) -> Case:
        """The cohort of a round, from 0, that loses nobody."""
        aggregation, dimension = self._workload.settings.aggregation, sum(v.numel() for v in self._parameters.values())
        fractions = (aggregation.corrupt_fraction, aggregation.dropout_fraction)
        return Case(self._workload.devices + number, dimension, 0.0, 0, *fractions)

    def terms(self, number: int) -> Terms:
        """After the warm-up, for the work of a device grows with the correction."""
        terms, settings = self.case(number).terms, self._workload.settings
        round_ = settings.objective.warmup_rounds + 1 + number
        return replace(terms, round=round_, model=Offer(round_, 1, self._parameters, terms.encoding, settings).model)

    def play(self, number: int) -> dict[Action, float]:
        """Seconds that the device spent on each message of a round."""
        terms, own, seconds = self.terms(number), self._workload.devices // 2, dict[Action, float]()
        edition = Edition(self._run, terms.round - 1, invitation(self._workload).catalogue.digest)
        signature = edition.sign(simulated_publisher(SEED), self._model)

        def ask(action: Action, body: bytes, model: bytes = b"") -> bytes:
            answer, seconds[action] = self._ask(action, body, model, signature if model else b"")
            return answer

        others = [position for position in range(terms.n) if position != own]
        identities = {position: simulated_identity(SEED, position) for position in others}
        advertised = {at: member.advertise(identities[at], self._run, os.urandom) for at in others}
        messages = {at: state.message for at, state in advertised.items()}
        messages[own] = ask("query.advertise", numbers("I", terms.round))
        roster = [Advertisement.parse(messages[position], terms.hybrid) for position in range(terms.n)]
        aggregate = Aggregate(self._run, terms, roster, os.urandom(SEED_BYTES))

        shared = {}
        for at, state in advertised.items():
            view = View.parse(aggregate.view(at), lambda terms: None)
            shared[at], message = member.share(state, identities[at], view, time.time(), os.urandom)
            aggregate.take_shares(at, message)
        aggregate.take_shares(own, ask("query.share", aggregate.view(own)))

        nothing = np.zeros(terms.encoding.padded, np.uint32)
        uploaded = {at: member.receive(state, aggregate.inbox(at))[0] for at, state in shared.items()}
        for at, before in uploaded.items():
            aggregate.take_upload(at, member.upload(before, [], nothing))
        aggregate.take_upload(own, ask("train.upload", aggregate.inbox(own), self._model))

        survivors = aggregate.fix_survivors()
        for at, before in uploaded.items():
            aggregate.take_agreement(at, member.agree(before, identities[at], survivors)[1])
        aggregate.take_agreement(own, ask("query.agree", survivors))
        aggregate.take_unmasking(own, ask("query.unmask", aggregate.signatures(own)))
        return seconds


def invitation(workload: Workload) -> Invitation:
    """What the device has joined by."""
    publisher = simulated_publisher(SEED).public_key().public_bytes_raw().hex()
    items = [(str(item), f"A title of some length, number {item}") for item in range(workload.items)]
    return Invitation(
        "localhost:9092", "", simulated_authority(SEED).hex(), publisher, items, workload.settings.to_toml()
    )
