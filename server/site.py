"""A server's folder: its keys and certificates, the run's settings and catalogue, and who is enrolled.

::

    DIR/settings.toml      of the runs to come
    DIR/publisher.key      signs the models; devices pin its public key
    DIR/tls/               the server's certificate, its key, and what devices verify it with
    DIR/invitation.json    all that a device has to know of the server; the catalogue and the authority are what it says
    DIR/enrolments/        what the authority wrote for each device (`fedtopk authority enrol --out`)
    DIR/revoked.json       the authority's list; read again before every round
    DIR/ledger/            what all runs over these devices have spent of their privacy
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.catalogue import Catalogue
from common.enrolment import Enrolment, Revocations
from common.errors import DataError, ProtocolError, RunError
from common.invitation import Invitation
from common.settings import Settings, load_settings
from server.durable import make_folder, replacing
from server.signing_key import read_signing_key
from server.superlink import Tls
from server.tls import CA, CERTIFICATE, KEY, make_tls

SETTINGS, PUBLISHER, INVITATION = "settings.toml", "publisher.key", "invitation.json"
ENROLMENTS, REVOKED, TLS, LEDGER = "enrolments", "revoked.json", "tls", "ledger"


@dataclass(frozen=True)
class Site:
    """A server's folder. All that reads raises :class:`RunError` where a file is missing or not what it should be."""

    path: Path

    @classmethod
    def create(
        cls,
        path: Path,
        address: str,
        hosts: Sequence[str],
        settings: Settings,
        catalogue: Catalogue,
        authority: bytes,
    ) -> "Site":
        """Make one. Raises :class:`RunError` where there is one already.

        Args:
            address: ``host:port`` that devices connect to.
            hosts: names and addresses that the certificate is for, beside loopback's.
        """
        make_folder(path)
        if (path / SETTINGS).exists():
            raise RunError(f"Expected {path} to hold no server yet.")
        make_tls(path / TLS, hosts, now=datetime.now(UTC))
        publisher = Ed25519PrivateKey.generate()
        with replacing(path / PUBLISHER) as file:
            file.touch(mode=0o600)
            file.write_bytes(publisher.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        invitation = Invitation(
            server=address,
            root_certificate=(path / TLS / CA).read_text(encoding="ascii"),
            authority=authority.hex(),
            publisher=publisher.public_key().public_bytes_raw().hex(),
            items=[(str(item), str(title)) for item, title in zip(catalogue.ids, catalogue.titles, strict=True)],
            settings=settings.to_toml(),
            labels=[] if catalogue.labels is None else [str(row) for row in catalogue.labels],
        )
        make_folder(path / ENROLMENTS)
        for name, text in ((INVITATION, invitation.to_json()), (SETTINGS, settings.to_toml())):
            with replacing(path / name) as file:
                file.write_text(text, encoding="utf-8")
        return cls(path)

    @property
    def settings(self) -> Settings:
        if not (self.path / SETTINGS).exists():
            raise RunError(f"Expected {self.path} to be a server's folder: fedtopk server init makes one.")
        return load_settings(self.path / SETTINGS)

    @cached_property
    def invitation(self) -> Invitation:
        return Invitation.parse(self._text(INVITATION))

    @property
    def tls(self) -> Tls:
        folder = self.path / TLS
        return Tls(folder / CERTIFICATE, folder / KEY, folder / CA)

    @property
    def authority(self) -> bytes:
        return bytes.fromhex(self.invitation.authority)

    @property
    def publisher(self) -> Ed25519PrivateKey:
        return read_signing_key(self.path / PUBLISHER)

    @property
    def catalogue(self) -> Catalogue:
        return self.invitation.catalogue

    def enrolled(self) -> dict[int, str]:
        """Transport keys of all devices that are enrolled, not expired as of now and not revoked, by their numbers."""
        revoked, found = self.revoked(), dict[int, str]()
        for path in sorted((self.path / ENROLMENTS).glob("*.json")):
            try:
                enrolment = Enrolment.parse(path.read_bytes())
                certificate = enrolment.checked(self.authority, now=0)
            except (OSError, ProtocolError) as error:
                raise RunError(f"Expected {path} to be an enrolment, or not there: {error}") from None
            if certificate.device not in revoked and time.time() <= certificate.expires:
                found[certificate.device] = enrolment.transport
        return found

    def revoked(self) -> frozenset[int]:
        """Numbers of the revoked devices, by the authority's list of now."""
        path = self.path / REVOKED
        if not path.exists():
            return frozenset()
        try:
            return frozenset(Revocations.parse(path.read_bytes(), self.authority).devices)
        except (OSError, ProtocolError) as error:
            raise RunError(f"Expected {path} to be the authority's revocation list: {error}") from None

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"Expected {self.path / name} to be readable: {error}.") from None


def read_catalogue(path: Path) -> Catalogue:
    """A catalogue from a csv file with the columns item, title and labels (or item alone), most frequent first.

    Raises :class:`DataError`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Expected {path} to be a readable csv file: {error}.") from None
    ids = [row.get("item") or "" for row in rows]
    if not all(ids) or len(set(ids)) != len(ids) or not ids:
        raise DataError(f"Expected {path} to have a column item with a different item in every line.")
    titles = [row.get("title") or row["item"] for row in rows]
    labels = [row.get("labels") or "" for row in rows]
    return Catalogue(np.array(ids, object), np.array(titles, object), np.array(labels, object) if any(labels) else None)
