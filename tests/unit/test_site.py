"""A server's folder: who is enrolled now, what devices are invited to, and files that are not what they should be."""

import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from protocol import AUTHORITY, key_of

from common.catalogue import Catalogue
from common.enrolment import Enrolment, Request, Revocations
from common.errors import DataError, RunError
from common.settings import load_settings
from server.site import Site, read_catalogue

SETTINGS = load_settings(None, ["aggregation.kind=secure", "training.rounds=3"])
CATALOGUE = Catalogue(
    np.array(["b", "a", "é,\n"], object), np.array(["B", "a", 'a "title"'], object), np.array(["x|y", "", "y"], object)
)
PUBLIC = AUTHORITY.public_key().public_bytes_raw()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.create(tmp_path / "server", "example.org:9000", ["example.org"], SETTINGS, CATALOGUE, PUBLIC)


def enrolment(device: int, expires: float, authority: object = AUTHORITY) -> Enrolment:
    transport = generate_private_key(SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    request = Request.make(key_of(device + 1), transport.decode())
    return Enrolment.make(authority, device, request, int(expires))  # type: ignore[arg-type]


def test_what_was_made_is_read_again(site: Site) -> None:
    again = Site(site.path)
    assert again.settings == SETTINGS
    assert again.authority == PUBLIC
    assert again.catalogue.digest == CATALOGUE.digest == again.invitation.catalogue.digest
    assert again.catalogue.titles.tolist() == CATALOGUE.titles.tolist()
    assert again.catalogue.labels is not None and again.catalogue.labels.tolist() == ["x|y", "", "y"]
    invitation = again.invitation
    assert bytes.fromhex(invitation.publisher) == again.publisher.public_key().public_bytes_raw()
    assert invitation.root_certificate == again.tls.root.read_text()
    for name in ("publisher.key", "tls/server.key"):
        assert (site.path / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunError, match="to hold no server yet"):
        Site.create(site.path, "example.org:9000", ["example.org"], SETTINGS, CATALOGUE, PUBLIC)


def test_who_is_enrolled_is_read_anew(site: Site) -> None:
    later = time.time() + 1000
    assert site.enrolled() == {} and site.revoked() == frozenset()
    given = {device: enrolment(device, later) for device in (0, 3, 12)}
    (site.path / "enrolments" / "7.json").write_text(enrolment(7, 5).to_json())
    for device, found in given.items():
        (site.path / "enrolments" / f"{device}.json").write_text(found.to_json())
    assert site.enrolled() == {device: found.transport for device, found in given.items()}
    (site.path / "revoked.json").write_text(Revocations.make(AUTHORITY, 1, [3]).to_json())
    assert set(site.enrolled()) == {0, 12} and site.revoked() == {3}


@pytest.mark.parametrize("kind", ["foreign", "garbage"])
def test_an_enrolment_that_is_none_is_named(site: Site, kind: str) -> None:
    later, path = time.time() + 1000, site.path / "enrolments" / "1.json"
    texts = {"foreign": enrolment(1, later, key_of(77)).to_json(), "garbage": "{"}
    path.write_text(texts[kind])
    with pytest.raises(RunError, match=r"1\.json to be an enrolment"):
        site.enrolled()


def test_a_foreign_revocation_list_is_refused(site: Site) -> None:
    (site.path / "revoked.json").write_text(Revocations.make(key_of(77), 1, [3]).to_json())
    with pytest.raises(RunError, match=r"revoked\.json to be the authority's"):
        site.revoked()


@pytest.mark.parametrize("text", ["", "item\n", "name\nx\n", "item\nx\nx\n", "item,title\nx,1\n,2\n"])
def test_a_catalogue_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(DataError, match="column item with a different item"):
        read_catalogue(tmp_path / "items.csv")
    with pytest.raises(DataError, match="readable csv"):
        read_catalogue(tmp_path / "none.csv")


def test_titles_are_optional(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item\nx\ny\n")
    found = read_catalogue(tmp_path / "items.csv")
    assert found.ids.tolist() == found.titles.tolist() == ["x", "y"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fedtopk server init makes one"):
        _ = Site(tmp_path).settings
