"""A device's part in secure aggregation, stage by stage, with its state stored before each answer.

The device holds one state of :mod:`common.secagg.member` at a time. A message for any other stage than the one it is
in is refused, so a stage that was answered, or that a crash interrupted, is never answered again: the server begins a
new attempt, with fresh keys.
"""

import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import numpy as np
from flwr.app import ConfigRecord

from client.guard import Policy
from common.errors import Refusal
from common.secagg import member
from common.secagg.member import Advertised, Agreed, Identity, Shared, Uploaded
from common.secagg.roster import View
from common.secagg.terms import Terms

_STATE, _HISTORY, _ALL = "secure", "contributions", "all"

_State = TypeVar("_State", Advertised, Shared, Uploaded, Agreed)


class Secured(Protocol):
    """What secure aggregation needs of a device."""

    @property
    def identity(self) -> Identity:
        """Its key and certificate, and the authority it has pinned."""

    @property
    def policy(self) -> Policy:
        """Its pinned policy."""


class SecureUpload:
    """One device in one run.

    Args:
        store: what the device keeps, by name; written before a message leaves.
        run: 32 bytes, which run this is.
    """

    def __init__(
        self,
        device: Secured,
        store: MutableMapping[str, Any],
        run: bytes,
        *,
        clock: Callable[[], float] = time.time,
        random: member.Random = os.urandom,
    ) -> None:
        self._device = device
        self._store = store
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
        shared, message = member.share(state, self._device.identity, view, self._clock(), self._random)
        self._save(shared)
        return message

    def upload(self, body: bytes, compute: Callable[[Terms], np.ndarray]) -> bytes:
        """The masked update, charged to this device before it leaves.

        Args:
            compute: the update's residues (2^m,) for the terms that were agreed to.
        """
        shared = self._load(Shared)
        terms = Terms.parse(shared.terms)
        uploaded, masks = member.receive(shared, body)
        self._charge(terms)  # before the work: that it fails may already say something
        message = member.upload(uploaded, self._device.identity, masks, compute(terms))
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
        last, contributions = self._history()
        if (terms.round, terms.attempt) <= last:
            raise Refusal(
                f"This device does not take part: expected round {terms.round}, attempt {terms.attempt} to come after "
                f"round {last[0]}, attempt {last[1]}, in which it took part."
            )
        self._device.policy.check(terms, contributions)

    def _charge(self, terms: Terms) -> None:
        _, contributions = self._history()
        changed = {_ALL: contributions + 1, self._run.hex(): [terms.round, terms.attempt]}
        self._store[_HISTORY] = ConfigRecord(dict(self._store.get(_HISTORY) or {}) | changed)

    def _history(self) -> tuple[tuple[int, int], int]:
        """The last round and attempt of this run that this device uploaded in, and all its uploads."""
        record = self._store.get(_HISTORY) or {}
        round_, attempt = record.get(self._run.hex(), (0, 0))
        return (round_, attempt), record.get(_ALL, 0)

    def _load(self, expected: type[_State]) -> _State:
        record = self._store.get(_STATE)
        stage = "nothing" if record is None else record["stage"]
        if record is None or stage != expected.__name__:
            raise Refusal(f"This device is at the stage {stage!r} and does not answer one of {expected.__name__!r}.")
        return expected(**{name: value for name, value in record.items() if name != "stage"})

    def _save(self, state: Advertised | Shared | Uploaded | Agreed) -> None:
        self._store[_STATE] = ConfigRecord({"stage": type(state).__name__, **asdict(state)})
