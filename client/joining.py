"""How a device comes to take part: it makes its keys, the authority certifies them, and it pins a server."""

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client.device_store import DeviceStore
from client.guard import Policy
from client.store_key import KeySource
from client.stored_device import ENROLMENT, IDENTITY_KEY, INVITATION, REVOCATIONS, TRANSPORT_KEY, enrolment_of
from common.enrolment import Enrolment, Request, Revocations
from common.errors import DataError, ProtocolError
from common.invitation import Invitation
from common.secagg.identity import Certificate


def make_device(folder: Path, key: KeySource) -> Request:
    """A new store with new keys, and what the enrolment authority is to certify. Raises as `DeviceStore.create`."""
    identity, transport = Ed25519PrivateKey.generate(), generate_private_key(SECP384R1())
    public = transport.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with DeviceStore.create(folder, key) as store, store.transaction():
        store.records[IDENTITY_KEY] = identity.private_bytes_raw()
        store.records[TRANSPORT_KEY] = transport.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Request.make(identity, public)


def enrol(store: DeviceStore, enrolment: Enrolment, authority: bytes) -> Certificate:
    """Keep the authority's word for this device, and with it the authority.

    Raises:
        ProtocolError: it is not of this authority, or not valid now.
        DataError: it is another device's.
    """
    certificate = enrolment.checked(authority, time.time())
    own = Ed25519PrivateKey.from_private_bytes(store.records[IDENTITY_KEY]).public_key().public_bytes_raw()
    if certificate.key != own:
        raise DataError("Expected the enrolment to be of this device's key.")
    store.records[ENROLMENT] = enrolment.to_json().encode()
    return certificate


def keep_revocations(store: DeviceStore, revocations: str) -> Revocations:
    """Keep the authority's list of revoked devices, with which this device then takes part no more.

    Raises:
        RunError: the device is not enrolled.
        ProtocolError: the list is not of its authority, or older than the one that it has.
    """
    authority = bytes.fromhex(enrolment_of(store).authority)
    found = Revocations.parse(revocations, authority)
    if REVOCATIONS in store.records:
        newest = Revocations.parse(store.records[REVOCATIONS], authority).number
        if found.number < newest:
            raise ProtocolError(f"Expected the revocation list number {found.number} to be at least number {newest}.")
    store.records[REVOCATIONS] = found.to_json().encode()
    return found


def join(store: DeviceStore, invitation: Invitation, policy: Policy) -> None:
    """Pin a server, and the policy under which this device takes part.

    Raises:
        RunError: the device is not enrolled.
        DataError: the server names another authority than the one that enrolled it.
    """
    if enrolment_of(store).authority != invitation.authority:
        raise DataError("Expected the invitation to name the authority that enrolled this device.")
    with store.transaction():
        store.records[INVITATION] = invitation.to_json().encode()
        store.save_policy(policy)
