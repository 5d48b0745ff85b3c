"""The `secure` kind: a cohort behind a Flower Grid, of which the server learns the noisy sum and nothing else.

Drives :class:`common.secagg.aggregate.Aggregate` over Messages. A device's keys for its next attempt come with the
last answer of the one before, so a round costs four exchanges, and a fifth one with those that have none in stock.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from torch import Tensor

from common.errors import AggregationError, ProtocolError
from common.messages import Action, advertisement_of, body_of, content_of, model_bytes
from common.offer import Offer
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.terms import Terms
from common.settings import Settings
from server.cohort import CohortSum, release
from server.nodes import Nodes, Traffic

Body = Callable[[int], bytes]
"""What a position is sent."""

Take = Callable[[int, Message], None]
"""What becomes of a position's answer."""

Record = Callable[..., Any]
"""``record("stage", round, name=…, answers=…, asked=…, seconds=…)``, as :meth:`server.events.Events.record`."""


class SecureSum:
    """The devices of a run.

    Args:
        run: 32 bytes, which run this is.
        authority: 32 bytes, the public key of the devices' enrolment authority.
    """

    def __init__(self, nodes: Nodes, settings: Settings, run: bytes, authority: bytes, record: Record) -> None:
        self._nodes = nodes
        self._settings = settings
        self._run = run
        self._authority = authority
        self._record = record
        self._stock: dict[int, Advertisement] = {}

    @property
    def devices(self) -> int:
        return len(self._nodes)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def find(self, expected: int | None, most: int) -> None:
        """Wait for N devices, or take those that are there (:meth:`Nodes.find`); their numbers are below `most`."""

        def identify(reply: Message) -> int:
            advertisement = self._admitted(body_of(reply))
            if advertisement.device >= most:
                raise ProtocolError(f"Expected device {advertisement.device} to be one of {most} users.")
            self._stock[advertisement.device] = advertisement
            return advertisement.device

        self._nodes.find(expected, identify)

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        traffic = Traffic()
        roster = self._roster(offer, members.tolist(), traffic)
        least = max(1, self._settings.guard.minimum_cohort)
        if len(roster) < least:
            total = release(np.zeros(offer.encoding.padded, np.uint32), 0, 0, offer)
            return CohortSum(total, len(members), 0)
        try:
            aggregate = self._attempt(offer, roster, traffic)
            residues = aggregate.total()
        except AggregationError as error:
            raise AggregationError(f"Round {offer.round}: {error} {traffic.in_words()}".rstrip()) from None
        if traffic.reasons:
            self._record("dropouts", offer.round, reasons=dict(traffic.reasons))
        n, survivors = len(roster), len(aggregate.survivors)
        total = release(residues, survivors, n, offer)
        return CohortSum(total, len(members), survivors, traffic.up // n, traffic.down // n)

    def _roster(self, offer: Offer, members: list[int], traffic: Traffic) -> list[Advertisement]:
        """The members' advertisements, each used once: those in stock, and those of members that are asked for one."""
        missing = {device: RecordDict() for device in members if device not in self._stock}
        self._stage(
            "query.advertise",
            offer,
            missing,
            lambda device, reply: self._take_advertisement(device, body_of(reply)),
            traffic,
        )
        return [self._stock.pop(device) for device in sorted(members) if device in self._stock]

    def _take_advertisement(self, device: int, content: bytes) -> None:
        """Put a device's keys in stock. Raises :class:`ProtocolError`, also where they are another device's."""
        advertisement = self._admitted(content)
        if advertisement.device != device:
            raise ProtocolError(f"Expected device {device} to advertise itself.", device)
        self._stock[device] = advertisement

    def _admitted(self, content: bytes) -> Advertisement:
        advertisement = Advertisement.parse(content, self._settings.aggregation.hybrid)
        advertisement.check(self._run, self._authority, time.time())
        return advertisement

    def _attempt(self, offer: Offer, roster: list[Advertisement], traffic: Traffic) -> Aggregate:
        """All stages, up to the last share. Raises :class:`AggregationError`: nothing was released."""
        aggregation = self._settings.aggregation
        fractions = (aggregation.corrupt_fraction, aggregation.dropout_fraction)
        terms = Terms(
            offer.round, offer.attempt, len(roster), *fractions, aggregation.hybrid, offer.encoding, offer.model
        )
        aggregate = Aggregate(self._run, terms, roster)
        device_at = [advertisement.device for advertisement in roster]
        position_of = {device: position for position, device in enumerate(device_at)}
        model = model_bytes({name: value.numpy() for name, value in offer.parameters.items()})

        def stage(action: Action, positions: list[int], body: Body, take: Take) -> None:
            sent = model if action == "train.upload" else b""
            devices = [device_at[position] for position in positions]
            contents = {device: content_of(body(position_of[device]), model=sent) for device in devices}
            self._stage(action, offer, contents, lambda device, reply: take(position_of[device], reply), traffic)

        def take_unmasking(position: int, reply: Message) -> None:
            aggregate.take_unmasking(position, body_of(reply))
            self._take_advertisement(device_at[position], advertisement_of(reply))

        def bodies(take: Callable[[int, bytes], None]) -> Take:
            return lambda position, reply: take(position, body_of(reply))

        stage("query.share", list(range(terms.n)), aggregate.view, bodies(aggregate.take_shares))
        if len(aggregate.sharers) < terms.least_survivors:  # before anybody is charged for an upload
            raise AggregationError(
                f"Expected {len(aggregate.sharers)} of {terms.n} devices to be at least {terms.least_survivors} that "
                "shared; nothing was uploaded."
            )
        stage("train.upload", aggregate.sharers, aggregate.inbox, bodies(aggregate.take_upload))
        survivors = aggregate.fix_survivors()
        stage("query.agree", aggregate.survivors, lambda position: survivors, bodies(aggregate.take_agreement))
        stage("query.unmask", aggregate.signers, aggregate.signatures, take_unmasking)
        return aggregate

    def _stage(
        self,
        action: Action,
        offer: Offer,
        contents: dict[int, RecordDict],
        take: Callable[[int, Message], None],
        traffic: Traffic,
    ) -> None:
        if not contents:
            return
        start = time.perf_counter()
        answers = self._nodes.ask(action, contents, take, traffic, str(offer.round))
        stage, seconds = action.partition(".")[2], time.perf_counter() - start
        self._record(
            "stage",
            offer.round,
            attempt=offer.attempt,
            stage=stage,
            asked=len(contents),
            answers=answers,
            seconds=seconds,
        )
