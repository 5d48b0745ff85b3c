"""A real device: what the ClientApp needs of one, from its own encrypted store."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord

from client.device_contents import ReceivedModel, known
from client.device_store import DeviceStore
from client.guard import Policy
from client.ledger import Charge
from common.catalogue import Catalogue
from common.enrolment import Enrolment, Revocations
from common.errors import ModelError, ProtocolError, Refusal, RunError
from common.invitation import Invitation
from common.secagg.identity import Certificate
from common.secagg.member import Identity
from common.secagg.wire import Reader
from common.settings import Settings

if TYPE_CHECKING:
    from common.trajectory import Trajectories

IDENTITY_KEY, TRANSPORT_KEY = "identity key", "transport key"
ENROLMENT, REVOCATIONS, INVITATION, EDITION = "enrolment", "revocations", "invitation", "edition"
"""Names of the store's records: 32 secret bytes, a PEM, two documents of the authority, one of the operator, and of
which run and round the stored model is."""

_DONE = {ENROLMENT: "enrolled first: fedtopk device enrol", INVITATION: "joined to a server: fedtopk device join"}

Condition = Callable[[], str]
"""Why the device does not want to take part now; empty where it does."""


class StoredDevice:
    """The device of an open store, in a run of some settings.

    Args:
        condition: asked before every participation.

    Raises :class:`RunError` where it was not enrolled or has not joined.
    """

    def __init__(self, store: DeviceStore, settings: Settings, condition: Condition = str) -> None:
        self._store = store
        self._settings = settings
        self._condition = condition
        for name in (ENROLMENT, INVITATION):
            _record(store, name)  # read when it is needed: most messages need no catalogue of thousands of items
        self.records: MutableMapping[str, ConfigRecord] = _ConfigRecords(store.records)

    @cached_property
    def identity(self) -> Identity:
        enrolment = enrolment_of(self._store)
        certificate = Certificate.read(Reader(bytes.fromhex(enrolment.certificate), "a certificate"))
        key = Ed25519PrivateKey.from_private_bytes(self._store.records[IDENTITY_KEY])
        return Identity(key, certificate, bytes.fromhex(enrolment.authority))

    @property
    def policy(self) -> Policy:
        """The pinned one. Raises :class:`Refusal` where there is none."""
        policy = self._store.load_policy()
        if policy is None:
            raise Refusal("This device does not take part: it has pinned no policy.")
        return policy

    @property
    def number(self) -> int:
        return self.identity.certificate.device

    @property
    def catalogue(self) -> Catalogue:
        return self._invitation.catalogue

    @property
    def publisher(self) -> bytes:
        return bytes.fromhex(self._invitation.publisher)

    @property
    def revoked(self) -> frozenset[int]:
        content = self._store.records.get(REVOCATIONS)
        if content is None:
            return frozenset()
        return frozenset(Revocations.parse(content, self.identity.authority).devices)

    def charges(self) -> list[Charge]:
        return [Charge.parse(entry) for entry in self._store.charges()]

    def charge(self, charge: Charge) -> None:
        self._store.charge(charge.to_json().encode())

    def window(self, round_: int) -> "Trajectories":
        """As :meth:`simulations.population.Population.windows` for this one user."""
        from common.objective import returns_of
        from common.trajectory import pad, rewards_of, window_starts

        training, objective = self._settings.training, self._settings.objective
        items, ratings = known(self._store.events(), self.catalogue)
        rewards = rewards_of(ratings, self._settings.data.rating_range)
        length, device = np.array([len(items)]), np.array([self.number])
        window = self._settings.window(round_)
        starts = window_starts(training.seed, round_, device, length, window)
        steps = np.minimum(length, window)
        return pad(items, rewards, returns_of(rewards, objective.discount), starts, steps, training.support_fraction)

    def load_user(self) -> np.ndarray | None:
        """Raises :class:`ModelError` where it is of another width than the run's."""
        user, width = self._store.load_user(), self._settings.model.user_width
        if user is not None and len(user) != width:
            raise ModelError(f"Expected the stored user embedding of width {len(user)} to have the run's, {width}.")
        return user

    def save_user(self, user: np.ndarray) -> None:
        self._store.save_user(user)

    def keep_model(self, content: bytes, metadata: Mapping[str, str]) -> None:
        """Raises :class:`ProtocolError` for an older one than the device has of the same run."""
        run, _, newest = self._store.records.get(EDITION, b"").decode().partition(" ")
        if run == metadata["run_id"] and int(metadata["round"]) < int(newest):
            raise ProtocolError(f"Expected a model of {metadata['round']} rounds to be of at least {newest}.")
        with self._store.transaction():
            self._store.records[EDITION] = f"{metadata['run_id']} {metadata['round']}".encode()
            self._store.save_model(ReceivedModel(content, metadata))

    def expect_willing(self) -> None:
        if reason := self._condition():
            raise Refusal(f"This device does not take part now: {reason}")

    @cached_property
    def _invitation(self) -> Invitation:
        return invitation_of(self._store)


def enrolment_of(store: DeviceStore) -> Enrolment:
    """What the authority says of a device. Raises :class:`RunError` where it is not enrolled."""
    return Enrolment.parse(_record(store, ENROLMENT))


def invitation_of(store: DeviceStore) -> Invitation:
    """The server that a device has pinned. Raises :class:`RunError` where it has not joined one."""
    return Invitation.parse(_record(store, INVITATION))


class _ConfigRecords(MutableMapping[str, ConfigRecord]):
    """Flower's records over a store's values."""

    def __init__(self, values: MutableMapping[str, bytes]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> ConfigRecord:
        return ConfigRecord.inflate(self._values[name])

    def __setitem__(self, name: str, record: ConfigRecord) -> None:
        self._values[name] = record.deflate()

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _record(store: DeviceStore, name: str) -> bytes:
    content = store.records.get(name)
    if content is None:
        raise RunError(f"Expected this device to be {_DONE[name]}.")
    return content
