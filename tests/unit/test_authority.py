"""The enrolment authority: one number and one key for one device, a register that survives crashes, signed lists."""

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from common.enrolment import Enrolment, Request, Revocations
from common.errors import ProtocolError, RunError
from server.authority import KEY, PUBLIC, REGISTER, REVOKED, Authority, read_register

NOW = 1_700_000_000
LATER = NOW + 1000


def transport(curve: object = None) -> str:
    key = generate_private_key(curve or SECP384R1())  # type: ignore[arg-type]
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request(number: int = 1) -> Request:
    return Request.make(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")), transport() + " phone@home")


def public_key(folder: Path) -> bytes:
    return bytes.fromhex((folder / PUBLIC).read_text())


def test_a_device_is_enrolled_under_its_own_number(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a")
    asked = request()
    enrolment = authority.enrol(Request.parse(asked.to_json()), LATER, NOW, name="phone")
    found = Enrolment.parse(enrolment.to_json())
    certificate = found.checked(public_key(tmp_path / "a"), NOW)
    assert (certificate.device, certificate.key.hex(), certificate.expires) == (0, asked.key, LATER)
    assert found.transport == asked.transport
    assert authority.enrol(request(2), LATER, NOW).checked(public_key(tmp_path / "a"), NOW).device == 1
    assert [(entry.device, entry.name) for entry in read_register(tmp_path / "a")] == [(0, "phone"), (1, "")]


def test_the_key_is_its_owners_alone(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a" / KEY).stat().st_mode) == 0o600
    with pytest.raises(RunError, match="not to hold an authority yet"):
        Authority.create(tmp_path / "a")


def test_a_passphrase_protects_the_key(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a", "secret")
    for wrong in (None, "other"):
        with pytest.raises(RunError, match="to open with this passphrase"):
            Authority(tmp_path / "a", wrong)
    Authority(tmp_path / "a", "secret").enrol(request(), LATER, NOW)


def test_numbers_and_keys_are_given_once(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a")
    authority.enrol(request(1), LATER, NOW, device=7)
    for again in ((request(2), 7), (request(1), 8)):
        with pytest.raises(RunError, match="not to be enrolled before"):
            authority.enrol(again[0], LATER, NOW, device=again[1])
    authority.revoke(7, NOW)
    with pytest.raises(RunError, match="not to be enrolled before"):
        authority.enrol(request(1), LATER, NOW)
    with pytest.raises(RunError, match="to be after now"):
        authority.enrol(request(3), NOW, NOW)


def test_revoked_devices_are_on_a_signed_list(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a")
    key = public_key(tmp_path / "a")
    for number in range(1, 5):
        authority.enrol(request(number), LATER, NOW)
    assert Revocations.parse((tmp_path / "a" / REVOKED).read_text(), key).devices == []
    authority.revoke(2, NOW)
    authority.revoke(0, NOW)
    authority.revoke(0, NOW)
    found = Revocations.parse((tmp_path / "a" / REVOKED).read_text(), key)
    assert (found.number, found.devices) == (2, [0, 2])
    assert [entry.revoked for entry in read_register(tmp_path / "a")] == [NOW, None, NOW, None]
    with pytest.raises(RunError, match="device 9 to be enrolled"):
        authority.revoke(9, NOW)
    changed = json.loads(found.to_json()) | {"devices": [2]}
    with pytest.raises(ProtocolError, match="to be of the authority"):
        Revocations.parse(json.dumps(changed), key)


def test_a_line_that_a_crash_cut_off_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a")
    authority.enrol(request(1), LATER, NOW)
    with (tmp_path / "a" / REGISTER).open("a") as file:
        file.write('{"device": 1, "na')
    assert len(read_register(tmp_path / "a")) == 1
    authority.enrol(request(2), LATER, NOW)
    assert [entry.device for entry in read_register(tmp_path / "a")] == [0, 1]
    with pytest.raises(RunError, match="to be an authority's folder"):
        read_register(tmp_path)
    (tmp_path / "a" / REGISTER).write_text("no register\n")
    with pytest.raises(RunError, match="to be an authority's register"):
        read_register(tmp_path / "a")


def test_an_enrolment_of_another_authority_or_time_is_refused(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a")
    other = Authority.create(tmp_path / "b")
    enrolment = authority.enrol(request(1), LATER, NOW)
    with pytest.raises(ProtocolError, match="to be of the authority"):
        enrolment.checked(public_key(tmp_path / "b"), NOW)
    with pytest.raises(ProtocolError, match="valid still"):
        enrolment.checked(public_key(tmp_path / "a"), LATER + 1)
    swapped = Enrolment(enrolment.certificate, transport(), enrolment.authority, enrolment.signature)
    with pytest.raises(ProtocolError, match="to be of the authority"):
        swapped.checked(public_key(tmp_path / "a"), NOW)
    assert other.enrol(request(1), LATER, NOW).checked(public_key(tmp_path / "b"), NOW).device == 0


def test_a_request_is_signed_with_its_own_key_and_names_the_right_kind_of_transport_key() -> None:
    good = json.loads(request().to_json())
    stranger = json.loads(request(2).to_json())
    with pytest.raises(ProtocolError, match="signed with its own key"):
        Request.parse(json.dumps(good | {"key": stranger["key"]}))
    with pytest.raises(ProtocolError, match="signed with its own key"):
        Request.parse(json.dumps(good | {"transport": transport()}))
    with pytest.raises(ProtocolError, match="P-384"):
        Request.make(Ed25519PrivateKey.generate(), transport(SECP256R1()))
    with pytest.raises(ProtocolError, match="OpenSSH"):
        Request.parse(json.dumps(good | {"transport": "nothing"}))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda x: st.lists(x, max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [*Request.__dataclass_fields__, *Revocations.__dataclass_fields__, *Enrolment.__dataclass_fields__]
        ),
        values,
    )
    | values,
    st.text(max_size=20),
)
def test_anything_else_is_refused(found: object, text: str) -> None:
    for content in (json.dumps(found), text):
        for parse in (Request.parse, Enrolment.parse, lambda content: Revocations.parse(content, bytes(32))):
            with pytest.raises(ProtocolError):
                parse(content)
