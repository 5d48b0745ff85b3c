"""What anybody but the device sees of its secrets, in whatever form: nothing."""

import base64
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from deployment import DEVICES, opened
from flwr.app import ConfigRecord
from recorded_fleet import HIDDEN, WIRE, Fleet, planted
from running import fedtopk, user_embeddings

from client.device_contents import known
from client.store_key import KeyFile
from client.stored_device import ENROLMENT, IDENTITY_KEY, TRANSPORT_KEY
from common.enrolment import Enrolment
from server.checkpoint import load
from server.site import Site

Needles = Mapping[str, bytes]

_SCALAR = 48  # bytes of a P-384 private key
_ITEMS, _NUMBERS, _LETTERS = 4, 3, 24  # how many in a row count as found


def find(needles: Needles, paths: Iterable[Path]) -> set[tuple[str, str]]:
    """Which needle is in which file."""
    found = set()
    for path in paths:
        content = path.read_bytes()
        found |= {(str(path), name) for name, needle in needles.items() if needle in content}
    return found


def files(*folders: Path) -> list[Path]:
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    assert found
    return found


def packed(numbers: np.ndarray, kinds: Iterable[str], length: int) -> Iterator[tuple[str, bytes]]:
    """All stretches of so many numbers, as a program would write them to a file or a socket."""
    for at in range(len(numbers) - length + 1):
        for kind in kinds:
            yield f"{kind} at {at}", numbers[at : at + length].astype(kind).tobytes()


def texts(words: list[str], length: int) -> Iterator[tuple[str, bytes]]:
    """All stretches of so many words, as in JSON, in a list that is printed, or in lines."""
    for at in range(len(words) - length + 1):
        for separator in (",", ", ", "', '", "\n"):
            yield f"{separator!r} at {at}", separator.join(words[at : at + length]).encode()


def history(fleet: Fleet, number: int) -> Needles:
    """Items of a device that nobody else names, and the order of those that everybody knows."""
    site = Site(fleet.run / "fleet" / "server")
    with opened(fleet.device(number)) as store:
        events = store.events()
    public = set(site.catalogue.ids.tolist())
    unknown = [event.item for event in events if event.item not in public]
    assert unknown == [event.item for event in planted(number)]
    items, _ = known(events, site.catalogue)
    numbers, ids = [str(item) for item in items], [str(site.catalogue.ids[item]) for item in items]
    return (
        {f"item {item}": item.encode() for item in unknown}
        | {f"escaped item {item}": json.dumps(item)[1:-1].encode() for item in unknown}
        | {f"index {name}": needle for name, needle in packed(items, ("<i4", ">i4", "<i8", ">i8"), _ITEMS)}
        | {f"index text {name}": needle for name, needle in texts(numbers, _ITEMS)}
        | {f"id text {name}": needle for name, needle in texts(ids, _ITEMS)}
    )


def embedding(fleet: Fleet, plain: Path, number: int) -> Needles:
    """A device's user embedding now and, as the simulation still has it, a round before."""
    with opened(fleet.device(number)) as store:
        user = store.load_user()
    assert user is not None and np.all(user != 0)
    checkpoints = sorted((plain / "checkpoints").iterdir())
    users = [user, *(user_embeddings(plain, load(path))[number] for path in checkpoints)]
    assert len(users) == 3
    return {
        f"user {age}, {name}": needle
        for age, numbers in enumerate(users)
        for name, needle in packed(numbers, ("<f4", ">f4", "<f8", ">f8"), _NUMBERS)
    }


def keys(fleet: Fleet, number: int) -> Needles:
    """A device's private keys, the key of its store, and the seeds of its next masks."""
    folder = fleet.device(number)
    with opened(folder) as store:
        identity, transport = store.records[IDENTITY_KEY], store.records[TRANSPORT_KEY]
        secure = ConfigRecord.inflate(store.records["secure"])
    key = load_ssh_private_key(transport, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    raw = {
        "identity": identity,
        "transport": key.private_numbers().private_value.to_bytes(_SCALAR, "big"),
        "store": KeyFile(folder.with_name(f"{number}.key")).find({}),
        **{
            name: value
            for name, value in secure.items()
            if name.endswith("seed") and isinstance(value, bytes) and value
        },
    }
    assert len(raw) == 6
    return (
        raw
        | {f"{name}, hexadecimal": value.hex().encode() for name, value in raw.items()}
        | {f"{name}, base64": base64.b64encode(value).rstrip(b"=")[:-1] for name, value in raw.items()}
        | dict(private_letters(transport, raw["transport"]))
    )


def private_letters(pem: bytes, secret: bytes) -> Iterator[tuple[str, bytes]]:
    """What the lines of a PEM file tell of the secret in it: the rest is the public key and the format."""
    lines = [line for line in pem.splitlines() if not line.startswith(b"-")]
    begin = 8 * base64.b64decode(b"".join(lines)).index(secret) // 6
    end, at = begin + 8 * len(secret) // 6, 0
    for number, line in enumerate(lines):
        own = line[max(0, begin + 1 - at) : max(0, end - at)]
        at += len(line)
        if len(own) >= _LETTERS:
            yield f"transport, line {number}", own


@cache
def needles_of(fleet: Fleet, plain: Path) -> Needles:
    return {
        f"device {number}, {name}": needle
        for number in range(DEVICES)
        for found in (history(fleet, number), embedding(fleet, plain, number), keys(fleet, number))
        for name, needle in found.items()
    } | {"a private key of OpenSSH": b"OPENSSH PRIVATE KEY"}


def test_the_search_finds_what_is_there(fleet: Fleet, plain: Path, tmp_path: Path) -> None:
    """In what its owner sees of an opened device, and in what a careless server would write."""
    needles, number = needles_of(fleet, plain), 1
    (tmp_path / "export").write_text(fedtopk("device", "export", fleet.device(number)).stdout)
    site = Site(fleet.run / "fleet" / "server")
    with opened(fleet.device(number)) as store:
        user = store.load_user()
        items, _ = known(store.events(), site.catalogue)
        assert user is not None
        values = [*store.records.values(), user.tobytes(), *(event.pack() for event in store.events())]
    (tmp_path / "opened").write_bytes(b"\n".join(values))
    np.save(tmp_path / "array.npy", items)
    (tmp_path / "array.npy").rename(tmp_path / "array")
    (tmp_path / "log").write_text(f"device {number}: {items.tolist()}")
    shutil.copy(fleet.device(number).with_name(f"{number}.key"), tmp_path / "key")
    found = {(Path(path).name, name) for path, name in find(needles, files(tmp_path))}
    assert all(name.startswith(f"device {number}, ") or name.startswith("a private") for _, name in found)
    for item in (event.item for event in planted(number)):
        assert ("export", f"device {number}, item {item}") in found
        assert ("opened", f"device {number}, item {item}") in found
    assert {
        ("opened", f"device {number}, user 0, <f4 at 0"),
        ("opened", f"device {number}, identity"),
        ("opened", f"device {number}, own_seed"),
        ("opened", "a private key of OpenSSH"),
        ("array", f"device {number}, index <i8 at 0"),
        ("log", f"device {number}, index text ', ' at 0"),
        ("key", f"device {number}, store, hexadecimal"),
    } <= found
    assert any("transport, line" in name for _, name in found)


def test_the_search_sees_through_what_server_and_network_do_with_contents(fleet: Fleet) -> None:
    """A model that was sent is found in it as it is, in the database and in the traffic, as are public keys."""
    with opened(fleet.device(0)) as store:
        model = store.load_model()
        enrolment = Enrolment.parse(store.records[ENROLMENT])
    assert model is not None
    needles = {"model": model.content[-200:], "public key": bytes.fromhex(enrolment.certificate)[12:44]}
    found = {name for _, name in find(needles, (fleet.run / "fleet" / "server").glob("superlink.sqlite*"))}
    assert found == set(needles)
    passed = find(needles, files(fleet.traffic / HIDDEN))
    assert {(path.rpartition("-")[2], name) for path, name in passed} >= {("down", "model"), ("up", "public key")}


@pytest.mark.parametrize("place", ["server", "devices", "network"])
def test_no_secret_of_a_device_is_elsewhere(fleet: Fleet, plain: Path, place: str) -> None:
    """Not with the server, which has all its messages in its database; not beside a device, in its logs or its store
    without the key; and not on the network, with the TLS or without it."""
    home = fleet.run / "fleet"
    everything = files(fleet.run)
    places = {
        "server": [path for path in everything if not path.is_relative_to(home / "devices")],
        "devices": [path for path in files(home / "devices") if path.suffix != ".key"],
        "network": files(fleet.traffic),
    }
    names = {path.name for path in places[place]}
    assert {
        "server": {"superlink.sqlite", "superlink.sqlite-wal", "superlink.log", "events.sqlite", "report.json"}
        | {"model.safetensors", "round-000003.safetensors", "register.jsonl", "invitation.json"},
        "devices": {"device.sqlite", "device.log", "supernode.log"},
        "network": {"0000-up", "0000-down"},
    }[place] <= names
    assert find(needles_of(fleet, plain), places[place]) == set()


def test_all_that_passes_is_tls(fleet: Fleet) -> None:
    hidden = b"".join(path.read_bytes() for path in files(fleet.traffic / HIDDEN))
    assert hidden.count(b"POST /v1/fleet/push-messages") == 3 * 4 * DEVICES + 2 * DEVICES  # and advertise and model
    wire = [path.read_bytes() for path in files(fleet.traffic / WIRE)]
    assert sum(map(len, wire)) > len(hidden)
    for content in filter(None, wire):  # a device that is told to end may have connected and not said anything
        assert content[:2] == b"\x16\x03"  # a handshake
        assert b"HTTP" not in content and b"fleet" not in content
