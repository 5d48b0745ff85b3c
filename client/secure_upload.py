"""A device's part in secure aggregation, stage by stage, with its state stored before each answer.

The device holds one state of :mod:`common.secagg.member` at a time. A message for any other stage than the one it is
in is refused, so a stage that was answered, or that a crash interrupted, is never answered again: the server begins a
new attempt, with fresh keys.
"""

import os
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import numpy as np
from flwr.app import ConfigRecord

from client.coins import Coins
from client.guard import Policy
from client.ledger import Charge, last_attempt
from common.errors import Refusal
from common.secagg import member
from common.secagg.member import Advertised, Agreed, Identity, Shared, Uploaded
from common.secagg.roster import View
from common.secagg.terms import Terms

_STATE = "secure"

_State = TypeVar("_State", Advertised, Shared, Uploaded, Agreed)


class Secured(Protocol):
    """What secure aggregation needs of a device."""

    @property
    def identity(self) -> Identity:
        """Its key and certificate, and the authority it has pinned."""

    @property
    def policy(self) -> Policy:
        """Its pinned policy."""

    @property
    def revoked(self) -> frozenset[int]:
        """Devices that it knows to be none any more."""

    @property
    def records(self) -> MutableMapping[str, ConfigRecord]:
        """What it keeps by name, durable when set."""

    def charges(self) -> Sequence[Charge]:
        """Its own ledger: all its uploads so far."""

    def charge(self, charge: Charge) -> None:
        """Add an upload to the ledger, durably."""


class SecureUpload:
    """One device in one run.

    Args:
        run: 32 bytes, which run this is.
    """

    def __init__(
        self,
        device: Secured,
        run: bytes,
        *,
        clock: Callable[[], float] = time.time,
        random: member.Random = os.urandom,
    ) -> None:
        self._device = device
        self._run = run
        self._clock = clock
        self._random = random

    def advertise(self) -> bytes:
        """Fresh keys; whatever attempt was under way is over."""
        hybrid = self._device.policy.hybrid
        state = member.advertise(self._device.identity, self._run, self._random, hybrid=hybrid)
        self._save(state)
        return state.message

    def share(self, body: bytes) -> bytes:
        """Check the offer and share the secrets. Raises :class:`Refusal` and :class:`AggregationError`."""
        state = self._load(Advertised)
        view = View.parse(body, self._check)
        if revoked := self._device.revoked.intersection(view.devices):
            raise Refusal(f"This device does not take part: expected no revoked devices, found {sorted(revoked)}.")
        shared, message = member.share(state, self._device.identity, view, self._clock(), self._random)
        self._save(shared)
        return message

    @property
    def terms(self) -> Terms:
        """What this device has agreed to. Raises :class:`Refusal` where it has agreed to nothing."""
        return Terms.parse(self._load(Shared).terms)

    def upload(self, body: bytes, compute: Callable[[Terms], np.ndarray]) -> bytes:
        """The masked update, charged to this device before it leaves.

        Args:
            compute: the update's residues (2^m,) for the terms that were agreed to.
        """
        shared = self._load(Shared)
        terms = Terms.parse(shared.terms)
        uploaded, masks = member.receive(shared, body)
        self._device.charge(Charge.of(self._run, terms))  # before the work: that it fails may already say something
        message = member.upload(uploaded, masks, compute(terms))
        self._save(uploaded)
        return message

    def agree(self, body: bytes) -> bytes:
        """This device's signature under the one set of survivors."""
        agreed, signature = member.agree(self._load(Uploaded), self._device.identity, body)
        self._save(agreed)
        return signature

    def unmask(self, body: bytes) -> tuple[bytes, bytes]:
        """The shares that unmask the sum, and the advertisement for a next attempt; the secrets are erased."""
        message = member.unmask(self._load(Agreed), body)
        return message, self.advertise()

    def _check(self, terms: Terms) -> None:
        """The policy, and that no attempt comes twice."""
        charges = self._device.charges()
        last = last_attempt(charges, self._run)
        if (terms.round, terms.attempt) <= last:
            raise Refusal(
                f"This device does not take part: expected round {terms.round}, attempt {terms.attempt} to come after "
                f"round {last[0]}, attempt {last[1]}, in which it took part."
            )
        self._device.policy.check(terms, charges, self._run)
        if self._device.policy.own_coins and not Coins(self._device.records, self._run).fell_for(terms.round):
            raise Refusal(f"This device does not take part: its own coin did not fall for round {terms.round}.")

    def _load(self, expected: type[_State]) -> _State:
        record = self._device.records.get(_STATE)
        stage = "nothing" if record is None else record["stage"]
        if record is None or stage != expected.__name__:
            raise Refusal(f"This device is at the stage {stage!r} and does not answer one of {expected.__name__!r}.")
        fields: dict[str, Any] = {name: value for name, value in record.items() if name != "stage"}
        return expected(**fields)

    def _save(self, state: Advertised | Shared | Uploaded | Agreed) -> None:
        self._device.records[_STATE] = ConfigRecord({"stage": type(state).__name__, **asdict(state)})
