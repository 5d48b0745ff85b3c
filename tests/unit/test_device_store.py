"""The device's store: sealed, whole, durable within a process, and gone once it is forgotten."""

import hashlib
import os
import shutil
import sqlite3
import struct
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import client.device_store
import client.erasure
import client.store_key
from client.device_contents import Event, ReceivedModel, State
from client.device_store import DATABASE, DeviceStore
from client.erasure import forget
from client.guard import Policy
from client.sealed_database import Contents
from client.store_key import KeyFile, Keyring, KeySource, Passphrase
from common.errors import DataError, FedtopkError, MissingDependency, PrivacyError, RunError, SettingsError

EVENTS = [Event("planted-item-1", 4.5, 1_112_486_027), Event("planted-item-22", 0.5, 1_112_486_028)]
USER = np.array([0.123456789, -2.5, 1e-9], np.float32)
STATE = State(hashlib.sha256(b"model").digest(), 2, np.arange(6, dtype=np.float32).reshape(2, 3) / 7)
MODEL = ReceivedModel(b"planted model " * 10, {"round": "planted round"})
POLICY = Policy(3, 1000, 0.1, 0.2, (16, 20), float("inf"), 1.5, 40, True)
RECORDS = {"planted name": b"planted record", "secure": bytes(range(64))}


def fill(store: DeviceStore) -> None:
    store.add_events(EVENTS)
    store.save_user(USER)
    store.save_state(STATE)
    store.save_model(MODEL)
    store.save_policy(POLICY)
    store.records.update(RECORDS)
    store.charge(b"planted charge")


def check(store: DeviceStore) -> None:
    """The very contents of :func:`fill`."""
    assert store.events() == EVENTS and store.event_count == 2
    assert has_user(store, USER)
    state = store.load_state()
    assert state is not None and (state.model, state.events) == (STATE.model, STATE.events)
    assert state.values.dtype == np.float32 and (state.values == STATE.values).all()
    assert store.load_model() == MODEL
    assert store.load_policy() == POLICY
    assert dict(store.records) == RECORDS
    assert store.charges() == [b"planted charge"]


def has_user(store: DeviceStore, expected: np.ndarray) -> bool:
    user = store.load_user()
    return user is not None and user.tobytes() == expected.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A filled store, closed."""
    with DeviceStore.create(tmp_path / "device", KeyFile(tmp_path / "key")) as store:
        fill(store)
    return tmp_path / "device"


def reopen(folder: Path) -> DeviceStore:
    return DeviceStore.open(folder, KeyFile(folder.parent / "key"), clock=lambda: 1_767_225_600.5)


def one_line(error: pytest.ExceptionInfo[FedtopkError]) -> str:
    message = str(error.value)
    assert message.startswith("Expected ") and message.endswith(".") and "\n" not in message
    return message


def raw(folder: Path) -> closing[sqlite3.Connection]:
    """The database, as anybody sees it who can write to it."""
    return closing(sqlite3.connect(folder / DATABASE, isolation_level=None))


# Contents


def test_what_is_stored_is_read_again(folder: Path) -> None:
    with reopen(folder) as store:
        check(store)
    with reopen(folder) as store:
        check(store)


def test_a_new_store_is_empty(tmp_path: Path) -> None:
    with DeviceStore.create(tmp_path / "device", Passphrase("pass")) as store:
        assert store.events() == [] and store.event_count == 0 and store.charges() == []
        assert store.load_user() is None and store.load_state() is None and store.load_model() is None
        assert store.load_policy() is None and not store.records
        assert store.events(5) == []


@given(
    events=st.lists(
        st.builds(
            Event,
            st.text(min_size=1, max_size=80),
            st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-(2**63), 2**63 - 1),
        ),
        max_size=5,
    )
)
@examples(max_examples=100)
def test_any_event_is_read_again(events: list[Event]) -> None:
    assert [Event.unpack(event.pack()) for event in events] == events
    assert all(len(event.pack()) % 64 == 0 for event in events)


def test_events_from_a_place_on(folder: Path) -> None:
    with reopen(folder) as store:
        store.add_events([Event("third", 1, 3)])
        assert store.events(1) == [EVENTS[1], Event("third", 1, 3)]
        assert store.events(3) == []


@pytest.mark.parametrize("event", [Event("", 1, 1), Event("x", float("nan"), 1), Event("x", 1, 2**63)])
def test_what_is_no_event_is_refused_with_all_that_come_along(folder: Path, event: Event) -> None:
    with reopen(folder) as store:
        with pytest.raises(DataError, match="Expected Event"):
            store.add_events([Event("fine", 1, 1), event])
        check(store)
    with reopen(folder) as store:
        check(store)


def test_records_are_a_mapping(folder: Path) -> None:
    with reopen(folder) as store:
        store.records["user"] = b"a record, not the user embedding"
        del store.records["secure"]
        assert sorted(store.records) == ["planted name", "user"]
        assert store.records.get("secure") is None
        with pytest.raises(KeyError):
            del store.records["secure"]
    with reopen(folder) as store:
        assert dict(store.records) == {
            "planted name": b"planted record",
            "user": b"a record, not the user embedding",
        }
        assert has_user(store, USER)


def test_a_policy_of_other_fields_is_named(folder: Path) -> None:
    with reopen(folder) as store:
        store._database.set("policy", b'{"minimum_cohort": 3}')
        with pytest.raises(DataError) as error:
            store.load_policy()
    assert "policy" in one_line(error)


# Transactions


def test_a_transaction_is_made_whole_or_not_at_all(folder: Path) -> None:
    with reopen(folder) as store:
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.add_events([Event("third", 1, 3)])
            store.save_user(USER + 1)
            store.records["new"] = b"new"
            store.charge(b"2")
            assert store.event_count == 3 and store.records["new"] == b"new"
            raise ZeroDivisionError
        check(store)
        with store.transaction():
            store.add_events([Event("third", 1, 3)])
            store.save_user(USER + 1)
    with reopen(folder) as store:
        assert store.event_count == 3 and has_user(store, USER + 1)


def test_a_transaction_whose_failure_was_swallowed_is_not_made(folder: Path) -> None:
    with reopen(folder) as store:
        with pytest.raises(RunError) as error, store.transaction():
            store.save_user(USER + 1)
            with suppress(DataError):
                store.add_events([Event("", 1, 1)])
            store.charge(b"2")
        assert "none was made" in one_line(error)
        check(store)
        store.charge(b"2")
    with reopen(folder) as store:
        assert store.charges() == [b"planted charge", b"2"]


def test_a_full_disk_loses_nothing(folder: Path) -> None:
    with reopen(folder) as store:
        connection = store._database._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(RunError) as error:
            store.save_model(ReceivedModel(bytes(100_000), {}))
        assert "full" in one_line(error) and "nothing was changed" in one_line(error)
        with pytest.raises(RunError, match="none was made"), store.transaction():
            store.charge(b"2")
            with suppress(RunError):
                store.save_model(ReceivedModel(bytes(100_000), {}))
            check(store)  # SQLite has ended the transaction: what is written now would stay
            store.save_user(USER + 1)
        check(store)
        connection.execute("PRAGMA max_page_count=1000000")
        store.save_model(MODEL)
        check(store)
    with reopen(folder) as store:
        check(store)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts written bytes as Linux does")
def test_adding_an_event_costs_the_same_in_a_long_history(folder: Path) -> None:
    def cost(store: DeviceStore) -> tuple[list[str], int]:
        statements: list[str] = []
        store._database._connection.set_trace_callback(lambda statement: statements.append(statement.split()[0]))
        before = written()
        store.add_events([Event("one more", 3, 4)])
        after = written()
        store._database._connection.set_trace_callback(None)
        return statements, after - before

    def written() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    with reopen(folder) as store:
        short, few = cost(store)
        store.add_events(Event("filler", 3, at) for at in range(4000))
        long, many = cost(store)
    assert short == long == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert few > 0 and many < few + 4 * 2 * 4096  # two more pages, in file and journal, for a tree two levels higher


# Secrecy


def test_a_stolen_store_shows_nothing(folder: Path) -> None:
    key = (folder.parent / "key").read_bytes().split()[-1]
    planted = [b"planted", b"item", bytes(range(8)), USER.tobytes(), USER.tobytes()[:4], STATE.values.tobytes()]
    planted += [STATE.values.tobytes()[-4:], STATE.model, b"user", b"state", b"secure", b"policy", b"cohort"]
    planted += [struct.pack(order, event.timestamp) for event in EVENTS for order in ("<i", ">i", "<q")]
    planted += [str(event.timestamp).encode() for event in EVENTS] + [key, bytes.fromhex(key.decode())]
    with reopen(folder) as store:
        store.save_user(USER + 1)  # what was replaced shows nothing either, nor does the journal
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert DATABASE in files
    for name, content in files.items():
        for value in planted:
            assert value not in content, (name, value)


def test_events_look_alike(folder: Path) -> None:
    with reopen(folder) as store:
        store.add_events([Event(item, 1, at) for at, item in enumerate(["1", "118661", "x" * 46])])
    with raw(folder) as connection:
        rows = connection.execute("SELECT sealed FROM log WHERE name = 'history'").fetchall()
    assert len({len(sealed) for (sealed,) in rows}) == 1
    assert len({sealed[:12] for (sealed,) in rows}) == len(rows) == 5


def test_equal_events_are_sealed_differently(folder: Path) -> None:
    with reopen(folder) as store:
        store.add_events([EVENTS[0], EVENTS[0]])
    with raw(folder) as connection:
        rows = connection.execute("SELECT sealed FROM log WHERE name = 'history'").fetchall()
    assert len({sealed for (sealed,) in rows}) == 4


def test_only_the_owner_may_read_the_files(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder.parent / "key").stat().st_mode & 0o777 == 0o600
    with reopen(folder) as store:
        store.charge(b"")
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


# Damage

TAMPER = {
    "two events swapped": """UPDATE log SET sealed = (SELECT sealed FROM log AS o WHERE o.name = log.name
        AND o.position = 1 - log.position) WHERE name = 'history'""",
    "two positions swapped": "UPDATE log SET position = 1 - position + 10 WHERE name = 'history'",
    "the last event removed": "DELETE FROM log WHERE name = 'history' AND position = 1",
    "the first event removed": "DELETE FROM log WHERE name = 'history' AND position = 0",
    "the history removed": "DELETE FROM log WHERE name = 'history'",
    "an event repeated": "INSERT INTO log SELECT name, 2, sealed FROM log WHERE name = 'history' AND position = 1",
    "an event in the ledger": """UPDATE log SET sealed = (SELECT sealed FROM log WHERE name = 'history'
        AND position = 0) WHERE name = 'ledger'""",
    "a log that is none": "INSERT INTO log VALUES ('other', 0, x'00')",
    "a charge removed": "DELETE FROM log WHERE name = 'ledger'",
    "two values swapped": "UPDATE value SET sealed = (SELECT sealed FROM value AS o WHERE o.slot = 1 - value.slot) "
    "WHERE slot < 2",
    "a value removed": "DELETE FROM value WHERE slot = 2",
    "a value repeated": "INSERT INTO value SELECT 100, sealed FROM value WHERE slot = 0",
    "the head removed": "DELETE FROM head",
    "an event for a head": "UPDATE head SET sealed = (SELECT sealed FROM log)",
    "the key removed": "DELETE FROM key_record",
    "the key's record changed": "UPDATE key_record SET record = record || x'00'",
    "an empty row": "UPDATE value SET sealed = x'' WHERE slot = 0",
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON log BEGIN DELETE FROM log; END",
    "a table less": "DROP TABLE value",
    "another program's mark": "PRAGMA application_id=1",
    "no version": "PRAGMA user_version=0",
    "a version that its key was not made for": "PRAGMA user_version=2",
}


@pytest.mark.parametrize("change", TAMPER)
def test_rows_cannot_be_exchanged(folder: Path, change: str) -> None:
    with raw(folder) as connection:
        connection.execute(TAMPER[change])
    before = (folder / DATABASE).read_bytes()
    with pytest.raises(DataError) as error:
        reopen(folder)
    aside = folder / f"{DATABASE}.quarantined-20260101T000000Z"
    assert f"It was moved to {aside}; nothing was deleted." in one_line(error)
    assert aside.read_bytes() == before
    assert not (folder / DATABASE).exists()


@pytest.mark.parametrize("table", ["value", "head"])
def test_one_row_cannot_be_put_back_to_an_older_one(folder: Path, table: str) -> None:
    with raw(folder) as connection:
        [(rowid, older), *_] = connection.execute(f"SELECT rowid, sealed FROM {table}").fetchall()
    with reopen(folder) as store:
        store.save_user(USER + 1)
        store.charge(b"2")
    with raw(folder) as connection:
        connection.execute(f"UPDATE {table} SET sealed = ? WHERE rowid = ?", (older, rowid))
    with pytest.raises(DataError):
        reopen(folder)


def opens_unchanged(folder: Path) -> bool:
    """Whether the store opens with its very contents; else it was set aside."""
    with suppress(DataError), reopen(folder) as store:
        check(store)
        return True
    assert [path.name for path in folder.glob("*Z")] == [f"{DATABASE}.quarantined-20260101T000000Z"]
    assert not (folder / DATABASE).exists()
    return False


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("pristine")
    with DeviceStore.create(parent / "device", KeyFile(parent / "key")) as store:
        fill(store)
    return parent / "device"


def damaged_copy(pristine: Path, change: Callable[[bytearray], object]) -> Path:
    """A copy of a store with a changed database."""
    content = bytearray((pristine / DATABASE).read_bytes())
    change(content)
    folder = pristine.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / DATABASE).write_bytes(content)
    return folder


def flip(at: int, mask: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[at % len(content)] ^= mask

    return change


def test_any_changed_byte_is_noticed_or_means_nothing(pristine: Path) -> None:
    """Every byte of the header, and one of every 61 elsewhere: page headers, cells, and the space between them."""
    size = (pristine / DATABASE).stat().st_size
    noticed = 0
    for at in [*range(100), *range(100, size, 61)]:
        for mask in (0xFF, 1 << at % 8):
            noticed += not opens_unchanged(damaged_copy(pristine, flip(at, mask)))
    assert noticed > 50


@given(at=st.integers(0, 1 << 20), mask=st.integers(1, 255))
@examples(max_examples=100, deadline=None)
def test_any_changed_byte_anywhere(pristine: Path, at: int, mask: int) -> None:
    opens_unchanged(damaged_copy(pristine, flip(at, mask)))


def test_any_changed_byte_of_a_row_is_noticed(pristine: Path) -> None:
    content = (pristine / DATABASE).read_bytes()
    with raw(pristine) as connection:
        rows = [
            row[0] for table in ("value", "log", "head") for row in connection.execute(f"SELECT sealed FROM {table}")
        ]
        rows += [row[0] for row in connection.execute("SELECT record FROM key_record")]
    assert len(rows) == 6 + 3 + 1 + 1
    for row in rows:
        start = content.index(row)
        for at in (start, start + 11, start + 12, start + len(row) // 2, start + len(row) - 1):
            assert not opens_unchanged(damaged_copy(pristine, flip(at, 4)))


@pytest.mark.parametrize("left", [0, 1, 50, 4096, 10_000, -1])
def test_a_truncated_file_is_noticed(pristine: Path, left: int) -> None:
    def truncate(content: bytearray) -> None:
        del content[left:]

    assert not opens_unchanged(damaged_copy(pristine, truncate))


def test_a_file_of_anything_is_noticed(pristine: Path) -> None:
    def fill_with(content: bytearray) -> None:
        content[:] = b"nothing of the kind" * 1000

    assert not opens_unchanged(damaged_copy(pristine, fill_with))


def test_two_stores_set_aside_in_one_second_are_both_kept(folder: Path) -> None:
    content = (folder / DATABASE).read_bytes()
    for _ in range(3):
        (folder / DATABASE).write_bytes(content[:5000])
        with pytest.raises(DataError):
            reopen(folder)
    aside = {path.name for path in folder.glob(f"{DATABASE}.quarantined-*")}
    assert {name for name in aside if not name.endswith("-journal")} == {
        f"{DATABASE}.quarantined-20260101T000000Z{number}" for number in ("", "-2", "-3")
    }


# Keys


class FakeKeyring(ModuleType):
    """The package keyring, as far as it is used."""

    def __init__(self) -> None:
        super().__init__("keyring")
        self.kept: dict[tuple[str, str], str] = {}
        self.errors = ModuleType("keyring.errors")
        self.errors.KeyringError = type("KeyringError", (Exception,), {})  # type: ignore[attr-defined]

    def set_password(self, service: str, account: str, password: str) -> None:
        self.kept[service, account] = password

    def get_password(self, service: str, account: str) -> str | None:
        return self.kept.get((service, account))

    def delete_password(self, service: str, account: str) -> None:
        del self.kept[service, account]


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch) -> FakeKeyring:
    fake = FakeKeyring()
    monkeypatch.setitem(sys.modules, "keyring", fake)
    return fake


@pytest.mark.parametrize("kind", ["key file", "passphrase", "keyring"])
def test_each_kind_of_key_opens_its_store(tmp_path: Path, keyring: FakeKeyring, kind: str) -> None:
    keys: dict[str, KeySource] = {
        "key file": KeyFile(tmp_path / "key"),
        "passphrase": Passphrase("correct horse"),
        "keyring": Keyring(),
    }
    with DeviceStore.create(tmp_path / "device", keys[kind]) as store:
        fill(store)
    before = (tmp_path / "device" / DATABASE).read_bytes()
    for other, key in keys.items():
        if other != kind:
            with pytest.raises(RunError) as error:
                DeviceStore.open(tmp_path / "device", key)
            assert one_line(error) == f"Expected the key of the store to be a {kind}, not a {other}."
    assert (tmp_path / "device" / DATABASE).read_bytes() == before
    with DeviceStore.open(tmp_path / "device", keys[kind]) as store:
        check(store)


def test_a_wrong_passphrase_is_told_from_damage(tmp_path: Path) -> None:
    DeviceStore.create(tmp_path, Passphrase("correct horse")).close()
    with pytest.raises(RunError) as error:
        DeviceStore.open(tmp_path, Passphrase("correct house"))
    assert "does not open it" in one_line(error)
    DeviceStore.open(tmp_path, Passphrase("correct horse")).close()


def test_a_passphrase_may_be_typed_in_any_form_but_empty(tmp_path: Path) -> None:
    DeviceStore.create(tmp_path / "device", Passphrase("é")).close()
    DeviceStore.open(tmp_path / "device", Passphrase("e\u0301")).close()
    with pytest.raises(SettingsError):
        DeviceStore.create(tmp_path / "other", Passphrase(""))
    assert not list((tmp_path / "other").iterdir())
    assert "secret" not in repr(Passphrase("secret"))


def test_the_costs_of_a_passphrase_are_those_that_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DeviceStore.create(tmp_path, Passphrase("correct horse")).close()
    with raw(tmp_path) as connection:
        description = client.store_key.describe(connection.execute("SELECT record FROM key_record").fetchone()[0])
    assert (description["n"], description["r"], description["p"]) == (2**15, 8, 1)
    monkeypatch.setattr(client.store_key, "_SCRYPT", {"n": 2, "r": 1, "p": 1})
    DeviceStore.open(tmp_path, Passphrase("correct horse")).close()
    with pytest.raises(RunError, match="at most"):
        Passphrase("x").find(description | {"n": 2**30})


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o644, 0o777])
def test_a_key_file_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    (folder.parent / "key").chmod(mode)
    with pytest.raises(PrivacyError) as error:
        reopen(folder)
    assert f"mode 600, not {mode:o}" in one_line(error)
    (folder.parent / "key").chmod(0o400)
    with reopen(folder) as store:
        check(store)


def test_a_key_file_is_not_shared(folder: Path) -> None:
    before = (folder.parent / "key").read_bytes()
    with pytest.raises(RunError) as error:
        DeviceStore.create(folder.parent / "other", KeyFile(folder.parent / "key"))
    assert "belongs to one store" in one_line(error)
    assert (folder.parent / "key").read_bytes() == before
    assert not list((folder.parent / "other").iterdir())


@pytest.mark.parametrize("content", [None, b"", b"something else", b"fedtopk device key 1 00ff\n"])
def test_what_is_no_key_file_is_refused(folder: Path, content: bytes | None) -> None:
    (folder.parent / "key").unlink()
    if content is not None:
        (folder.parent / "key").touch(0o600)
        (folder.parent / "key").write_bytes(content)
    with pytest.raises(RunError) as error:
        reopen(folder)
    assert "key file" in one_line(error)
    assert (folder / DATABASE).exists()


def test_the_key_file_of_another_store_is_refused(folder: Path) -> None:
    DeviceStore.create(folder.parent / "other", KeyFile(folder.parent / "other key")).close()
    with pytest.raises(RunError) as error:
        DeviceStore.open(folder, KeyFile(folder.parent / "other key"))
    assert "does not open it" in one_line(error)
    with reopen(folder) as store:
        check(store)


def test_without_a_keyring_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(MissingDependency) as error:
        DeviceStore.create(tmp_path / "device", Keyring())
    assert "pip install keyring" in one_line(error)


def test_a_keyring_that_fails_or_lost_the_key(tmp_path: Path, keyring: FakeKeyring) -> None:
    DeviceStore.create(tmp_path, Keyring()).close()
    keyring.kept.clear()
    with pytest.raises(RunError) as error:
        DeviceStore.open(tmp_path, Keyring())
    assert "to hold the key" in one_line(error)

    def fail(service: str, account: str) -> None:
        raise keyring.errors.KeyringError("No recommended backend was available")

    keyring.get_password = fail  # type: ignore[method-assign]
    with pytest.raises(RunError, match="No recommended backend"):
        DeviceStore.open(tmp_path, Keyring())


def test_keys_and_nonces_come_from_the_randomness_that_is_given(tmp_path: Path) -> None:
    drawn: list[bytes] = []

    def random(count: int) -> bytes:
        drawn.append(os.urandom(count))
        return drawn[-1]

    with DeviceStore.create(tmp_path / "device", KeyFile(tmp_path / "key"), random=random) as store:
        fill(store)
    assert drawn[0].hex().encode() in (tmp_path / "key").read_bytes()
    with raw(tmp_path / "device") as connection:
        rows = connection.execute("SELECT sealed FROM log UNION SELECT sealed FROM value").fetchall()
    assert {sealed[:12] for (sealed,) in rows} <= set(drawn)


# Opening


def test_a_store_is_made_once(folder: Path) -> None:
    with pytest.raises(RunError) as error:
        DeviceStore.create(folder, KeyFile(folder.parent / "another key"))
    assert "no device store yet" in one_line(error)
    assert not (folder.parent / "another key").exists()


def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(RunError) as error:
        DeviceStore.create(tmp_path / "device", KeyFile(tmp_path / "key"))
    assert "No space left on device" in one_line(error)
    assert [path.name for path in tmp_path.rglob("*")] == ["device"]


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        DeviceStore.open(tmp_path, Passphrase("x"))
    assert "is missing" in one_line(error)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as error:
        DeviceStore.create(tmp_path / "file", Passphrase("x"))
    assert "folder to write to" in one_line(error)


def test_a_store_is_open_once(folder: Path) -> None:
    with reopen(folder) as store:
        for again in (lambda: reopen(folder), lambda: forget(folder)):
            with pytest.raises(RunError) as error:
                again()
            assert "a running process has this store open" in one_line(error)
        check(store)
    reopen(folder).close()


@pytest.fixture
def newer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that a program of version 2 has opened, which knows users by twice their embedding."""

    def double(contents: Contents) -> Contents:
        user = np.frombuffer(contents.values["user"], "<f4") * 2
        return Contents(contents.values | {"user": user.tobytes()}, contents.logs)

    with monkeypatch.context() as later:
        later.setattr(client.device_store, "VERSION", 2)
        later.setattr(client.device_store, "MIGRATIONS", {1: double})
        with reopen(folder) as store:
            assert has_user(store, 2 * USER)
            assert store.events() == EVENTS and dict(store.records) == RECORDS
            store.save_user(USER)
        with reopen(folder) as store:  # once
            check(store)
    return folder


def test_a_newer_version_is_refused_in_words(newer: Path) -> None:
    before = (newer / DATABASE).read_bytes()
    with pytest.raises(RunError) as error:
        reopen(newer)
    assert "version 1 or older, not 2: a newer program made it" in one_line(error)
    with raw(newer) as connection:
        connection.execute("DROP TABLE key_record")  # of a form that this program does not know
    with pytest.raises(RunError, match="a newer program made it"):
        reopen(newer)
    assert len((newer / DATABASE).read_bytes()) == len(before)


def test_a_migration_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(contents: Contents) -> Contents:
        raise ZeroDivisionError

    with monkeypatch.context() as later:
        later.setattr(client.device_store, "VERSION", 2)
        later.setattr(client.device_store, "MIGRATIONS", {1: fail})
        with pytest.raises(ZeroDivisionError):
            reopen(folder)
    with reopen(folder) as store:
        check(store)


# Forgetting


def test_a_forgotten_store_stays_closed(folder: Path) -> None:
    parent, key = folder.parent, (folder.parent / "key").read_bytes().split()[-1]
    copy = shutil.copytree(folder, parent / "copy")
    done = forget(folder)
    assert done[0] == f"key file {parent / 'key'}"
    assert str(folder / DATABASE) in done
    assert not list(folder.iterdir()) and not (parent / "key").exists()
    assert all(key not in path.read_bytes() for path in parent.rglob("*") if path.is_file())
    for source in (KeyFile(parent / "key"), Passphrase(""), Passphrase("x")):
        with pytest.raises(RunError):
            DeviceStore.open(copy, source)
    DeviceStore.create(folder, KeyFile(parent / "key")).close()
    with pytest.raises(RunError, match="does not open it"):  # a new key in the old one's place
        DeviceStore.open(copy, KeyFile(parent / "key"))


def test_what_is_destroyed_is_overwritten_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last: dict[str, bytes] = {}
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        last[path.name] = path.read_bytes()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    size = (folder / DATABASE).stat().st_size
    forget(folder)
    assert next(iter(last)) == "key"  # before anything else
    assert last[DATABASE] == bytes(size)
    assert not any(b"".join(last.values()))


def test_stores_that_were_set_aside_are_forgotten_too(folder: Path) -> None:
    shutil.copy(folder / DATABASE, folder / f"{DATABASE}.quarantined-20250101T000000Z")
    assert len(forget(folder)) >= 3
    assert not list(folder.iterdir())


def test_a_store_that_was_only_set_aside_is_forgotten_with_its_key(folder: Path) -> None:
    with raw(folder) as connection:
        connection.execute("DELETE FROM head")
    with pytest.raises(DataError):
        reopen(folder)
    forget(folder)
    assert not list(folder.iterdir()) and not (folder.parent / "key").exists()


def test_a_forgotten_passphrase_or_keyring(tmp_path: Path, keyring: FakeKeyring) -> None:
    DeviceStore.create(tmp_path / "one", Passphrase("x")).close()
    DeviceStore.create(tmp_path / "two", Keyring()).close()
    DeviceStore.create(tmp_path / "three", Keyring()).close()
    assert len(keyring.kept) == 2
    forget(tmp_path / "one")
    forget(tmp_path / "two")
    assert len(keyring.kept) == 1
    DeviceStore.open(tmp_path / "three", Keyring()).close()
    assert not list((tmp_path / "one").iterdir()) and not list((tmp_path / "two").iterdir())


def test_a_forgetting_that_was_interrupted_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(client.erasure, "erase", fail)
        with pytest.raises(KeyboardInterrupt):
            forget(folder)
    assert not (folder.parent / "key").exists()  # the key is the first to go
    with pytest.raises(DataError) as error:
        forget(folder)
    assert "The files there are destroyed" in one_line(error)
    assert not list(folder.iterdir())


def test_a_key_file_that_was_moved(folder: Path) -> None:
    (folder.parent / "key").rename(folder.parent / "moved")
    copy = shutil.copytree(folder, folder.parent / "copy")
    forget(folder, key_file=folder.parent / "moved")
    assert not list(folder.iterdir()) and not (folder.parent / "moved").exists()
    (folder.parent / "key").write_text("somebody's own file")
    with pytest.raises(DataError) as error:
        forget(copy)
    assert "copy of them would open with the key" in one_line(error)
    assert not list(copy.iterdir())
    assert (folder.parent / "key").read_text() == "somebody's own file"


@given(at=st.integers(0, 1 << 20), mask=st.integers(1, 255))
@examples(max_examples=50, deadline=None)
def test_a_damaged_store_can_be_forgotten(pristine: Path, at: int, mask: int) -> None:
    folder, key = damaged_copy(pristine, flip(at, mask)), pristine.parent / "key"
    content = key.read_bytes()
    try:
        with suppress(DataError):  # its record of the key is what was damaged
            forget(folder)
        assert not list(folder.iterdir())
    finally:
        key.touch(0o600)
        key.write_bytes(content)


def test_there_is_nothing_to_forget(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(RunError, match="is missing"):
        forget(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "kept"
