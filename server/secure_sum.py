"""The `secure` kind: a cohort behind a Flower Grid, of which the server learns the noisy sum and nothing else.

Drives :class:`common.secagg.aggregate.Aggregate` over Messages. A device's keys for its next attempt come with the
last answer of the one before, so a round costs four exchanges, and a fifth one with those that have none in stock.
"""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, RecordDict
from torch import Tensor

from common.errors import AggregationError, ProtocolError
from common.item_slice import ItemSlice, rows_digest
from common.messages import Action, advertisement_of, body_of, content_of, model_bytes
from common.model import Parameters
from common.offer import Offer
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.keys import SEED_BYTES
from common.secagg.terms import Terms
from common.secagg.wire import numbers
from common.settings import Settings
from common.signed_model import Edition
from server.cohort import CohortSum, release
from server.nodes import Nodes, Traffic

Body = Callable[[int], bytes]
"""What a position is sent."""

Take = Callable[[int, Message], None]
"""What becomes of a position's answer."""

Record = Callable[..., Any]
"""``record("stage", round, stage=…, answers=…, asked=…, seconds=…, bytes_up=…, bytes_down=…)``, as
:meth:`server.events.Events.record`; bytes are all devices' together. What it raises ends the round."""


@dataclass(frozen=True)
class Trust:
    """Whom the server believes and whom the devices believe.

    Attributes:
        authority: 32 bytes, the public key of the devices' enrolment authority.
        publisher: signs the models that devices are sent.
        catalogue: 32 bytes, of the items that the model is of.
        revoked: the numbers of devices that are none any more.
    """

    authority: bytes
    publisher: Ed25519PrivateKey
    catalogue: bytes
    revoked: Callable[[], Collection[int]] = frozenset


class SecureSum:
    """The devices of a run.

    Args:
        run: 32 bytes, which run this is.
    """

    def __init__(self, nodes: Nodes, settings: Settings, run: bytes, trust: Trust, record: Record) -> None:
        self._nodes = nodes
        self._settings = settings
        self._run = run
        self._trust = trust
        self._record = record
        self._stock: dict[int, Advertisement] = {}
        self._own_coins = settings.training.coins == "device"

    @property
    def devices(self) -> int:
        return len(self._nodes)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def find(self, expected: int | None, most: int) -> None:
        """Wait for N simulated devices, or take those that are there (:meth:`Nodes.find`); numbers are below `most`."""

        def identify(reply: Message) -> int:
            advertisement = self._admitted(body_of(reply))
            if advertisement.device >= most:
                raise ProtocolError(f"Expected device {advertisement.device} to be one of {most} users.")
            self._stock[advertisement.device] = advertisement
            return advertisement.device

        self._nodes.find(expected, content_of(numbers("I", 0)), identify)

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        traffic = Traffic()
        roster = self._roster(offer, self._nodes.devices[members].tolist(), traffic)
        drawn = len(roster) if self._own_coins else len(members)
        least = max(1, self._settings.guard.minimum_cohort)
        if len(roster) < least:
            total = release(np.zeros(offer.encoding.padded, np.uint32), 0, 0, offer)
            return CohortSum(total, drawn, 0)
        try:
            aggregate = self._attempt(offer, roster, traffic)
            residues = aggregate.total()
        except AggregationError as error:
            raise AggregationError(f"Round {offer.round}: {error} {traffic.in_words()}".rstrip()) from None
        if traffic.reasons:
            self._record("dropouts", offer.round, reasons=dict(traffic.reasons))
        n, survivors = len(roster), len(aggregate.survivors)
        total = release(residues, survivors, n, offer)
        return CohortSum(total, drawn, survivors, traffic.up // n, traffic.down // n)

    def _roster(self, offer: Offer, members: list[int], traffic: Traffic) -> list[Advertisement]:
        """The advertisements of the members that are there, each used once: those in stock, and those of members that
        are asked for one; of all that say that their coin fell so, where devices flip the coins."""
        there = self._nodes.online() - set(self._trust.revoked())
        members = [device for device in members if device in there]
        if self._own_coins:
            self._stock.clear()
        question = content_of(numbers("I", offer.round))
        missing = {device: question for device in members if device not in self._stock}
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
        if self._own_coins and not content:
            return
        advertisement = self._admitted(content)
        if advertisement.device != device:
            raise ProtocolError(f"Expected device {device} to advertise itself.", device)
        self._stock[device] = advertisement

    def _admitted(self, content: bytes) -> Advertisement:
        advertisement = Advertisement.parse(content, self._settings.aggregation.hybrid)
        advertisement.check(self._run, self._trust.authority, time.time())
        return advertisement

    def _attempt(self, offer: Offer, roster: list[Advertisement], traffic: Traffic) -> Aggregate:
        """All stages, up to the last share. Raises :class:`AggregationError`: nothing was released."""
        aggregation = self._settings.aggregation
        fractions = (aggregation.corrupt_fraction, aggregation.dropout_fraction)
        terms = Terms(
            offer.round, offer.attempt, len(roster), *fractions, aggregation.hybrid, offer.encoding, offer.model
        )
        aggregate = Aggregate(self._run, terms, roster, os.urandom(SEED_BYTES))
        device_at = [advertisement.device for advertisement in roster]
        position_of = {device: position for position, device in enumerate(device_at)}
        model, signature = self._signed(offer.parameters, offer.round - 1, offer.item_slice)

        def stage(action: Action, positions: list[int], body: Body, take: Take) -> None:
            sent = {"model": model, "signature": signature} if action == "train.upload" else {}
            devices = [device_at[position] for position in positions]
            contents = {device: content_of(body(position_of[device]), **sent) for device in devices}
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

    def deliver(self, parameters: Parameters, round_: int) -> None:
        """Send all devices that are there the model after so many rounds."""
        model, signature = self._signed(parameters, round_, None)
        content = content_of(numbers("I", round_), model=model, signature=signature)
        contents = dict.fromkeys(sorted(self._nodes.online() - set(self._trust.revoked())), content)
        traffic = Traffic()
        answers = self._nodes.ask("query.model", contents, lambda device, reply: None, traffic, str(round_))
        self._record("delivered", round_, asked=len(contents), answers=answers, reasons=dict(traffic.reasons))

    def _signed(self, parameters: Parameters, round_: int, item_slice: ItemSlice | None) -> tuple[bytes, bytes]:
        model = model_bytes({name: value.numpy() for name, value in parameters.items()})
        edition = Edition(self._run, round_, rows_digest(self._trust.catalogue, item_slice))
        return model, edition.sign(self._trust.publisher, model)

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
        start, up, down = time.perf_counter(), traffic.up, traffic.down
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
            bytes_up=traffic.up - up,
            bytes_down=traffic.down - down,
        )
