"""The run's database: durable, ours alone while it is open, and readable meanwhile."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from common.errors import RunError
from server.store import DATABASE, Store, event_table, open_store, open_store_read_only

LINE = {"time": 0.0, "kind": "round", "round": 1, "fields": "{}", "digest": ""}


def add_line(store: Store) -> None:
    with store.transaction() as connection:
        connection.execute(insert(event_table).values(LINE))


def count_lines(store: Store) -> int:
    with store.transaction() as connection:
        return connection.execute(select(func.count()).select_from(event_table)).scalar_one()


def one_line(error: pytest.ExceptionInfo[RunError]) -> str:
    message = str(error.value)
    assert message.startswith("Expected ") and message.endswith(".") and "\n" not in message
    return message


def test_reopens_with_its_rows(tmp_path: Path) -> None:
    with open_store(tmp_path / "new" / "run") as store:
        add_line(store)
    with open_store(tmp_path / "new" / "run") as store:
        assert count_lines(store) == 1


def test_durable_mode(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL


def test_failed_transaction_writes_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(ZeroDivisionError), store.transaction() as connection:
            connection.execute(insert(event_table).values(LINE))
            raise ZeroDivisionError
        assert count_lines(store) == 0


def test_transactions_of_threads_run_one_after_another(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:

        def copy_count() -> None:
            for _ in range(10):
                with store.transaction() as connection:
                    count = connection.execute(select(func.count()).select_from(event_table)).scalar_one()
                    connection.execute(insert(event_table).values(LINE | {"round": count}))

        threads = [threading.Thread(target=copy_count) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with store.transaction() as connection:
            assert connection.execute(select(event_table.c.round)).scalars().all() == list(range(30))


def test_reads_while_another_writes(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, open_store_read_only(tmp_path) as reader:
        add_line(store)
        assert count_lines(reader) == 1
        with store.transaction() as connection:
            connection.execute(insert(event_table).values(LINE))
            assert count_lines(reader) == 1
        assert count_lines(reader) == 2


def test_reads_a_run_that_is_over(tmp_path: Path) -> None:
    folder = tmp_path / "50% of #1?"  # what an address must escape
    with open_store(folder) as store:
        add_line(store)
    with open_store_read_only(folder) as reader:
        assert count_lines(reader) == 1


def test_reader_cannot_write(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with open_store_read_only(tmp_path) as reader, pytest.raises(RunError) as error:
        add_line(reader)
    assert "readonly" in one_line(error)


def test_reader_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        open_store_read_only(tmp_path)
    assert DATABASE in one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opener", [open_store, open_store_read_only])
def test_not_a_database(tmp_path: Path, opener: Callable[[Path], Store]) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database, but long enough to be looked at" * 100)
    with pytest.raises(RunError) as error:
        opener(tmp_path)
    assert "not a database" in one_line(error)


@pytest.mark.parametrize("opener", [open_store, open_store_read_only])
def test_of_another_program(tmp_path: Path, opener: Callable[[Path], Store]) -> None:
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.execute("CREATE TABLE events (id)")
    connection.close()
    before = (tmp_path / DATABASE).read_bytes()
    with pytest.raises(RunError) as error:
        opener(tmp_path)
    assert "another program" in one_line(error)
    assert (tmp_path / DATABASE).read_bytes() == before


@pytest.mark.parametrize("opener", [open_store, open_store_read_only])
def test_of_another_version(tmp_path: Path, opener: Callable[[Path], Store]) -> None:
    with open_store(tmp_path) as store, store.transaction() as connection:
        connection.exec_driver_sql("PRAGMA user_version=7")
    with pytest.raises(RunError) as error:
        opener(tmp_path)
    assert "version 2, not 7" in one_line(error)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError) as error:
        open_store(tmp_path / "run")
    assert "run" in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError) as error:
            open_store(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in one_line(error)


def test_locked_in_the_same_process(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(RunError) as error:
        open_store(tmp_path)
    assert "running process" in one_line(error)
    open_store(tmp_path).close()  # the failed attempt left no lock behind


def test_failed_opening_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"?" * 1000)
    with pytest.raises(RunError):
        open_store(tmp_path)
    (tmp_path / DATABASE).unlink()
    open_store(tmp_path).close()


HOLDER = """
import os, sys, time
from pathlib import Path
from server.store import open_store
store = open_store(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def start_holder(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the run open, and the id of its forked worker."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def test_second_process_is_refused(tmp_path: Path) -> None:
    holder, worker = start_holder(tmp_path)
    try:
        with pytest.raises(RunError) as error:
            open_store(tmp_path)
        assert "running process" in one_line(error)
        os.kill(worker, signal.SIGKILL)  # the end of a worker does not end the lock
        with pytest.raises(RunError):
            open_store(tmp_path)
    finally:
        with holder:
            holder.kill()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    holder, worker = start_holder(tmp_path)
    try:
        with holder:
            holder.kill()
        open_store(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
