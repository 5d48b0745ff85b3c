"""TLS of the server: what clients verify strictly, and nothing that could sign another certificate."""

import ipaddress
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.errors import RunError, SettingsError
from server.tls import CA, CERTIFICATE, KEY, make_tls

NOW = datetime.now(UTC)


@contextmanager
def accepting(folder: Path) -> Iterator[int]:
    """The port of a server that shakes hands with one client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)

        def accept() -> None:
            connection, _ = listening.accept()
            connection.settimeout(5)
            with connection:
                try:
                    with context.wrap_socket(connection, server_side=True):
                        pass
                except OSError:
                    pass

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            thread.join()


def connect(port: int, context: ssl.SSLContext, host: str) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        context.wrap_socket(connection, server_hostname=host),
    ):
        pass


def strict(folder: Path) -> ssl.SSLContext:
    """What Python 3.13 verifies by default."""
    context = ssl.create_default_context(cafile=folder / CA)
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fed.example.org", "192.0.2.7", "2001:db8::1"])
def test_strict_verification(tmp_path: Path, host: str) -> None:
    make_tls(tmp_path, ["Fed.Example.org", "192.0.2.7", "2001:db8::1"], now=NOW)
    for context in (strict(tmp_path), ssl.create_default_context(cafile=tmp_path / CA)):
        with accepting(tmp_path) as port:
            connect(port, context, host)


def test_other_hosts_and_authorities_are_refused(tmp_path: Path) -> None:
    make_tls(tmp_path / "a", ["fed.example.org"], now=NOW)
    make_tls(tmp_path / "b", ["fed.example.org"], now=NOW)
    with accepting(tmp_path / "a") as port, pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(port, strict(tmp_path / "a"), "other.example.org")
    with accepting(tmp_path / "a") as port, pytest.raises(ssl.SSLCertVerificationError, match="local issuer"):
        connect(port, strict(tmp_path / "b"), "fed.example.org")


def test_term(tmp_path: Path) -> None:
    make_tls(tmp_path / "old", [], now=NOW - timedelta(days=3), days=2)
    with accepting(tmp_path / "old") as port, pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        connect(port, strict(tmp_path / "old"), "localhost")
    make_tls(tmp_path / "new", [], now=NOW + timedelta(minutes=50))
    with accepting(tmp_path / "new") as port:
        connect(port, strict(tmp_path / "new"), "localhost")
    for name in (CA, CERTIFICATE):
        term = load(tmp_path / "old" / name).not_valid_after_utc - NOW
        assert abs(term + timedelta(days=1)) < timedelta(seconds=2)


def test_one_private_key(tmp_path: Path) -> None:
    make_tls(tmp_path, [], now=NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CA, CERTIFICATE, KEY]
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600
    key = load_pem_private_key((tmp_path / KEY).read_bytes(), None).public_key()
    authority, certificate = load(tmp_path / CA), load(tmp_path / CERTIFICATE)
    assert key == certificate.public_key() != authority.public_key()
    assert b"PRIVATE" not in (tmp_path / CA).read_bytes() + (tmp_path / CERTIFICATE).read_bytes()
    certificate.verify_directly_issued_by(authority)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_names(tmp_path: Path) -> None:
    make_tls(tmp_path, ["a.example", "A.example", "localhost", "10.0.0.1"], now=NOW)
    names = load(tmp_path / CERTIFICATE).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "localhost"]
    addresses = [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("127.0.0.1")]
    assert names.get_values_for_type(x509.IPAddress) == addresses


@pytest.mark.parametrize(
    "host",
    [
        *("", "a b", "https://a.example", "a.example:443", "*.example", "-a.example", "a..b", "a.", "[::1]", "a\n"),
        *("300.1.1.1", "1.2.3", "fe80::1%eth0", "a_b.example", "münchen.de", "x" * 64, ".".join(["a" * 50] * 6)),
    ],
)
def test_neither_a_name_nor_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(SettingsError, match="Expected host="):
        make_tls(tmp_path / "tls", [host], now=NOW)
    assert not (tmp_path / "tls").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    for name in (CA, CERTIFICATE, KEY):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(RunError, match=f"{name} not to exist yet"):
            make_tls(folder, [], now=NOW)
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    for days in (0, 40_000):
        with pytest.raises(SettingsError, match="Expected days="):
            make_tls(tmp_path / "new", [], now=NOW, days=days)
