"""The server's TLS certificate, and the certificate of the authority that devices pin."""

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import RunError, SettingsError
from server.durable import make_folder, replacing

CA, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"

_ALWAYS = ("localhost", "127.0.0.1")
_SKEW = timedelta(hours=1)
"""How far a device's clock may be behind when the certificate is new."""
_MOST_DAYS = 36_500
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*(?!\d+$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""An ASCII host name; its last label is not a number, so that a mistyped address is not taken for one."""


def make_tls(folder: Path, hosts: Sequence[str], *, now: datetime, days: int = 3650) -> None:
    """Make a private authority and, signed by it, a server certificate for ``hosts`` and always for loopback.

    ``ca.crt`` is what devices pin, ``server.crt`` with ``server.key`` (mode 0600) what a server presents; all are PEM,
    ECDSA on P-256. They pass OpenSSL's strict checks, which Python 3.13 makes by default
    (tests/unit/test_tls.py::test_strict_verification).

    The authority's private key is never written and gone when this returns: whoever breaks into the server can present
    this one certificate until it expires, but cannot make another, for any host, that the devices would trust
    (tests/unit/test_tls.py::test_one_private_key). The price is that another host or a new term takes a new authority,
    whose certificate the devices must be given.

    Args:
        hosts: names or addresses by which devices reach the server, without ports.
        now: the certificates are valid from an hour before, for clocks that are late.
        days: for how long after ``now``, in [1, 36500].

    Raises:
        SettingsError: a host is neither a name nor an address, or ``days`` is out of range.
        RunError: one of the files exists already, or the folder cannot be written to.
    """
    if not 1 <= days <= _MOST_DAYS:
        raise SettingsError(f"Expected days={days} in [1, {_MOST_DAYS}].")
    subjects = list(dict.fromkeys(_general_name(host) for host in (*hosts, *_ALWAYS)))
    make_folder(folder)
    for name in (CA, CERTIFICATE, KEY):
        if (folder / name).exists():
            raise RunError(f"Expected {folder / name} not to exist yet.")

    start, end = now.astimezone(UTC) - _SKEW, now.astimezone(UTC) + timedelta(days=days)
    authority_key, key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    serial = x509.random_serial_number()
    # A name of its own: two authorities of one name but different keys make verifiers complain about the signature
    # instead of the issuer.
    issuer = _name(f"fedtopk authority {serial:x}"[:64])
    authority = (
        _builder(issuer, issuer, authority_key.public_key(), serial, start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority_key, SHA256())
    )
    certificate = (
        _builder(issuer, _name("fedtopk server"), key.public_key(), x509.random_serial_number(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, SHA256())
    )
    with replacing(folder / KEY) as file:
        file.touch(mode=0o600)
        file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with replacing(folder / CERTIFICATE) as file:
        file.write_bytes(certificate.public_bytes(Encoding.PEM))
    with replacing(folder / CA) as file:
        file.write_bytes(authority.public_bytes(Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    """What the certificate calls a host. Raises :class:`SettingsError`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host.lower()):
            raise SettingsError(f"Expected host={host!r} to be a host name or an IP address.") from None
        return x509.DNSName(host.lower())
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise SettingsError(f"Expected host={host!r} to be an address without the name of an interface.")
    return x509.IPAddress(address)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    issuer: x509.Name, subject: x509.Name, key: EllipticCurvePublicKey, serial: int, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    """What both certificates have."""
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
