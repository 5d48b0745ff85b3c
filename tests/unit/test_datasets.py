"""Tables, csv and parquet files become interactions that depend on the rows alone, or a message that says why not."""

import gzip
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from handmade import interactions
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError, FedtopkError, MissingDependency
from common.settings import Columns, DataSettings
from simulations.datasets import available, load, summary
from simulations.datasets.interactions import Interactions
from simulations.datasets.table import from_frame

NAMES = ["userId", "movieId", "rating", "timestamp"]
HEADER = "userId,movieId,rating,timestamp\n"
ROW = "1,31,2.5,1260759144\n"

Row = tuple[Any, Any, Any, Any]

rows = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 10).map(lambda n: n / 2), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


def convert(table: list[Row], *, seed: int = 0, titles: dict[str, str] | None = None, **settings: Any) -> Interactions:
    frame = pd.DataFrame(table, columns=NAMES)
    return from_frame(
        frame, columns=Columns(), settings=DataSettings(**settings), seed=seed, titles=titles, origin="log.csv"
    )


def read(path: Path, text: str, **settings: Any) -> Interactions:
    path.write_text(text)
    return load(DataSettings(source="csv", path=str(path), **settings), seed=0)


def assert_equal(one: Interactions, other: Interactions) -> None:
    for name in ("offsets", "items", "ratings", "timestamps", "user_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.catalogue.ids, other.catalogue.ids)
    np.testing.assert_array_equal(one.catalogue.titles, other.catalogue.titles)


def back(data: Interactions) -> list[Row]:
    """The rows that are left, in the terms of the source."""
    users = np.repeat(data.user_ids, data.lengths())
    items = data.catalogue.ids[data.items]
    return list(zip(users.tolist(), items.tolist(), data.ratings.tolist(), data.timestamps.tolist(), strict=True))


def as_text(table: list[Row]) -> list[Row]:
    return [(str(user), str(item), rating, time) for user, item, rating, time in table]


class TestConversion:
    @given(rows, st.randoms(use_true_random=False), st.integers(0, 4), st.integers(0, 4))
    def test_the_order_of_the_rows_does_not_matter(self, table: list[Row], random: Any, items: int, users: int) -> None:
        shuffled = random.sample(table, len(table))
        assert_equal(convert(table, items=items, users=users), convert(shuffled, items=items, users=users))

    @given(rows)
    def test_every_row_is_kept_once(self, table: list[Row]) -> None:
        assert Counter(back(convert(table, items=0))) == Counter(set(as_text(table)))

    @given(rows, st.integers(1, 4))
    def test_the_catalogue_is_the_most_frequent_items(self, table: list[Row], items: int) -> None:
        counts = Counter(item for _, item, _, _ in set(table))
        expected = sorted(counts, key=lambda item: (-counts[item], item))[:items]
        data = convert(table, items=items)
        assert data.catalogue.ids.tolist() == [str(item) for item in expected]
        assert Counter(back(data)) == Counter(as_text([row for row in set(table) if row[1] in expected]))

    @given(rows)
    def test_histories_are_sorted_and_typed(self, table: list[Row]) -> None:
        data = convert(table)
        assert all((np.diff(data.timestamps[user]) >= 0).all() for user in data.slices())
        assert data.user_ids.tolist() == [str(user) for user in sorted({user for user, *_ in table})]
        assert data.offsets[0] == 0
        assert data.offsets[-1] == len(data.items) == len(data.ratings) == len(data.timestamps)
        kinds = [data.offsets.dtype, data.items.dtype, data.ratings.dtype, data.timestamps.dtype]
        assert kinds == [np.int64, np.int32, np.float32, np.int64]

    def test_users_are_chosen_before_the_catalogue(self) -> None:
        data = convert([(10, 7, 3, 0), (10, 7, 3, 1), (2, 8, 3, 0), (1, 9, 3, 0), (1, 8, 3, 1)], users=2, items=1)
        assert data.user_ids.tolist() == ["1", "2"]
        assert data.catalogue.ids.tolist() == ["8"]

    def test_users_outlive_their_items(self) -> None:
        data = convert([(1, 5, 3, 0), (2, 5, 3, 0), (3, 6, 3, 0)], items=1)
        assert data.user_ids.tolist() == ["1", "2", "3"]
        assert data.lengths().tolist() == [1, 1, 0]

    def test_equal_times_are_shuffled_by_the_seed(self) -> None:
        table = [(1, item, 3, 5) for item in range(40)] + [(1, 99, 3, 4), (1, 98, 3, 6)]
        first, again, other = convert(table), convert(table), convert(table, seed=1)
        assert_equal(first, again)
        assert Counter(back(first)) == Counter(back(other))
        assert back(first) != back(other)
        assert [item for _, item, _, _ in back(first)][:: len(table) - 1] == ["99", "98"]
        assert [item for _, item, _, _ in back(first)][1:-1] != [str(item) for item in range(40)]

    def test_only_identical_rows_are_merged(self) -> None:
        data = convert([(1, 5, 3, 0), (1, 5, 3, 0), (1, 5, 4, 0), (1, 5, 3, 1)])
        assert Counter(back(data)) == Counter([("1", "5", 3, 0), ("1", "5", 4, 0), ("1", "5", 3, 1)])

    def test_merged_rows_count_once_for_the_catalogue(self) -> None:
        assert convert([(1, 5, 3, 0), (1, 5, 3, 0), (1, 4, 3, 0), (2, 4, 3, 0)]).catalogue.ids.tolist() == ["4", "5"]

    def test_titles(self) -> None:
        data = convert([(1, 5, 3, 0), (1, 6, 3, 0), (1, 7, 3, 0)], titles={"5": "Heat (1995)", "6": ""})
        assert data.catalogue.titles.tolist() == ["Heat (1995)", "6", "7"]


class TestIds:
    @pytest.mark.parametrize("one", [1, 1.0, "1", "1.0", "01"])
    def test_one_number_is_one_id(self, one: Any) -> None:
        data = convert([(one, one, 3, 0), (2, 2, 3, 0), ("1", "1", 3, 0)])
        assert data.user_ids.tolist() == ["1", "2"]
        assert data.catalogue.ids.tolist() == ["1", "2"]

    def test_text_stays_as_it_is(self) -> None:
        data = convert([("007", "a.0", 3, 0), ("7", "a", 3, 0), ("bond", "1.0", 3, 0)])
        assert data.user_ids.tolist() == ["007", "7", "bond"]
        assert data.catalogue.ids.tolist() == ["1.0", "a", "a.0"]

    def test_natural_order(self) -> None:
        users = ["u10", "b", "u2", "10", "9", "-3", "-20", "u2a", "a1", "9" * 5000]
        expected = ["-20", "-3", "9", "10", "9" * 5000, "a1", "b", "u2", "u2a", "u10"]
        assert convert([(user, 1, 3, 0) for user in users]).user_ids.tolist() == expected

    def test_large_numbers_are_exact(self) -> None:
        users = [2**53, 2**53 + 1, 2**63 - 1]
        assert convert([(user, 1, 3, 0) for user in users]).user_ids.tolist() == [str(user) for user in users]


class TestTimestamps:
    @pytest.mark.parametrize(
        "times",
        [
            [1260759144, 1260759145],
            [1260759144.0, 1260759145.9],
            ["1260759144", "1260759145"],
            ["2009-12-14T02:52:24Z", "2009-12-14 02:52:25"],
            ["2009-12-14T02:52:24.250", "2009-12-14T04:52:25+02:00"],
            [pd.Timestamp("2009-12-14 02:52:24"), pd.Timestamp("2009-12-14 02:52:25")],
            [pd.Timestamp("2009-12-14 02:52:24", tz="UTC"), pd.Timestamp("2009-12-14 02:52:25", tz="UTC")],
        ],
    )
    def test_seconds_and_dates(self, times: list[Any]) -> None:
        assert convert([(1, 1, 3, times[0]), (1, 2, 3, times[1])]).timestamps.tolist() == [1260759144, 1260759145]


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ((None, 2, 3, 4), "column 'userId' of log.csv to name an id in each row: found nan in data row 2 (1 of 3 "),
            ((1, float("nan"), 3, 4), "column 'movieId' of log.csv to name an id in each row: found nan in data row 2"),
            ((1, 2, float("nan"), 4), "column 'rating' of log.csv to hold a finite number in each row: found nan"),
            ((1, 2, float("inf"), 4), "column 'rating' of log.csv to hold a finite number in each row: found inf"),
            ((1, 2, 1e300, 4), "column 'rating' of log.csv to hold a finite number in each row: found 1e+300"),
            ((1, 2, "good", 4), "column 'rating' of log.csv to hold a finite number in each row: found 'good'"),
            ((1, 2, 5.5, 4), "'rating' of log.csv to lie in data.rating_range=0.5,5 (change that setting): found 5.5"),
            ((1, 2, 0, 4), "'rating' of log.csv to lie in data.rating_range=0.5,5 (change that setting): found 0"),
            ((1, 2, 3, -4), "column 'timestamp' of log.csv to hold seconds since 1970 or ISO 8601 dates: found -4"),
            ((1, 2, 3, "noon"), "'timestamp' of log.csv to hold seconds since 1970 or ISO 8601 dates: found 'noon'"),
            ((1, 2, 3, "2009-12-14"), "to hold seconds since 1970 or ISO 8601 dates: found '2009-12-14'"),
            ((1, 2, 3, None), "column 'timestamp' of log.csv to hold seconds since 1970 or ISO 8601 dates: found nan"),
            ((1, 2, 3, float("inf")), "'timestamp' of log.csv to hold seconds since 1970 or ISO 8601 dates: found inf"),
            ((1, 2, 3, 1260759144000), "'timestamp' of log.csv to hold seconds since 1970, not milliseconds or less"),
        ],
    )
    def test_a_bad_value(self, row: Row, message: str) -> None:
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            convert([(1, 2, 3, 4), row, (3, 4, 5, 6)])
        assert "in data row 2 (1 of 3 rows are so)." in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("time", ["12/14/2009", "14.12.2009", "noon"])
    def test_an_ambiguous_date(self, time: str) -> None:
        with pytest.raises(DataError, match=f"ISO 8601 dates: found '{time}' in data row 1"):
            convert([(1, 2, 3, time)])

    def test_no_rows(self) -> None:
        with pytest.raises(DataError, match=r"Expected log.csv to hold interactions: it has no rows\."):
            convert([])

    def test_a_range_is_compared_as_it_is_stored(self) -> None:
        assert convert([(1, 2, 0.3, 4)], rating_range=(0.1, 0.3)).ratings.tolist() == [np.float32(0.3)]


class TestCsv:
    def test_columns_of_other_names_and_more_of_them(self, tmp_path: Path) -> None:
        text = "when,note,who,what,stars\n2020-01-01,first,ann,x,4\n2020-01-02,,bob,x,5\n"
        columns = Columns(user="who", item="what", rating="stars", timestamp="when")
        data = read(tmp_path / "log.csv", text, columns=columns)
        assert back(data) == [("ann", "x", 4, 1577836800), ("bob", "x", 5, 1577923200)]

    def test_texts_of_items_do_not_depend_on_the_order_of_rows(self, tmp_path: Path) -> None:
        rows = ["1,007,4,5,Heat,Action|Crime\n", "2,7,3,6,,\n", "2,8,3,7,Up,\n", "3,7,3,6,Heat 2,Crime\n"]
        columns = Columns(title="name", labels="kinds")
        for ordered in (rows, rows[::-1]):
            text = HEADER.rstrip("\n") + ",name,kinds\n" + "".join(ordered)
            catalogue = read(tmp_path / "log.csv", text, columns=columns).catalogue
            assert (catalogue.ids.tolist(), catalogue.titles.tolist()) == (["7", "8"], ["Heat", "Up"])
            assert catalogue.labels is not None and catalogue.labels.tolist() == ["Action|Crime", ""]
        missing = r"to have a column 'other' \(data.columns.labels\)"
        with pytest.raises(DataError, match=missing):
            read(tmp_path / "log.csv", HEADER + ROW, columns=Columns(labels="other"))

    def test_gzip_and_parquet_hold_the_same(self, tmp_path: Path) -> None:
        plain = read(tmp_path / "log.csv", HEADER + ROW + "2,31,3,5\nx,7,1,6\n")
        with gzip.open(tmp_path / "log.csv.gz", "wb") as file:
            file.write((tmp_path / "log.csv").read_bytes())
        pd.read_csv(tmp_path / "log.csv").set_index("userId").to_parquet(tmp_path / "log.parquet")
        for name in ("log.csv.gz", "log.parquet"):
            assert_equal(plain, load(DataSettings(source="csv", path=str(tmp_path / name)), seed=0))

    def test_ids_do_not_depend_on_their_neighbours(self, tmp_path: Path) -> None:
        # Large enough for pandas to infer types piece by piece.
        more = "".join(f",more{n}" for n in range(100))
        numbers = "".join(f"{n:07},1,3,0{more}\n" for n in range(9000))
        data = read(tmp_path / "log.csv", HEADER.strip() + more + "\n" + numbers + f"x,1,3,0{more}\n")
        assert data.user_ids[7] == "0000007"

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        assert back(read(tmp_path / "log.csv", "\ufeff" + HEADER + ROW)) == [("1", "31", 2.5, 1260759144)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "to hold interactions: it is empty."),
            (HEADER, "to hold interactions: it has no rows."),
            ("userId,item\n1,2\n", "to have a column 'movieId' (data.columns.item): it has 'userId', 'item'."),
            (HEADER + ROW + "1,31,2,5,1260759144\n", "to be a csv file: Expected 4 fields in line 3, saw 5."),
            (HEADER + "1,31,2,5,1260759144\n", "to have as many fields in its rows as in its header: found more."),
            (HEADER + "1,31\n", "'rating' of FILE to hold a finite number in each row: found nan in data row 1"),
            (HEADER + ",31,4,5\n", "column 'userId' of FILE to name an id in each row: found nan in data row 1"),
            (HEADER + ROW + "1,31,many,5\n", "to hold a finite number in each row: found 'many' in data row 2 (1 of 2"),
            (HEADER + '1,"31,4,5\n', "to be a csv file: EOF inside string starting at row 1."),
        ],
    )
    def test_a_bad_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "log.csv"
        with pytest.raises(DataError, match=re.escape(message.replace("FILE", str(path)))) as caught:
            read(path, text)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.parquet"])
    @pytest.mark.parametrize("data", [bytes(range(256)) * 20, b"\x00" * 500, b"PAR1" + b"\x01" * 40 + b"PAR1"])
    def test_garbage(self, tmp_path: Path, name: str, data: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=re.escape(str(path))) as caught:
            load(DataSettings(source="csv", path=str(path)), seed=0)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(path))

    @given(st.binary(max_size=200))
    def test_any_garbage_is_a_data_error_or_data(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "garbage.csv"
        path.write_bytes(HEADER.encode() + data)
        try:
            load(DataSettings(source="csv", path=str(path)), seed=0)
        except DataError as error:
            assert re.fullmatch(".*garbage.csv.*", str(error))  # noqa: PT017 - it need not be raised

    def test_a_truncated_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv.gz"
        path.write_bytes(gzip.compress((HEADER + ROW * 1000).encode())[:-20])
        with pytest.raises(DataError, match=r"log.csv.gz to be undamaged: "):
            load(DataSettings(source="csv", path=str(path)), seed=0)

    def test_no_such_file_or_kind(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.path=.*none.csv to be a file: there is none\."):
            load(DataSettings(source="csv", path=str(tmp_path / "none.csv")), seed=0)
        with pytest.raises(DataError, match=r"to be a file: it is a folder\."):
            load(DataSettings(source="csv", path=str(tmp_path)), seed=0)
        with pytest.raises(DataError, match=r"log.xls to end in .csv, .csv.gz or .parquet\."):
            read(tmp_path / "log.xls", HEADER)

    def test_parquet_lacks_a_column(self, tmp_path: Path) -> None:
        path = tmp_path / "log.parquet"
        pd.DataFrame({"userId": [1], "movieId": [2], "rating": [3.0]}).to_parquet(path)
        with pytest.raises(DataError, match=r"a column 'timestamp' \(data.columns.timestamp\): it has 'userId', "):
            load(DataSettings(source="csv", path=str(path)), seed=0)

    def test_parquet_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "log.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(
            MissingDependency, match=r"Expected pyarrow to read .*log.parquet \(pip install 'fedtopk\[data\]'\): "
        ):
            load(DataSettings(source="csv", path=str(tmp_path / "log.parquet")), seed=0)
        assert issubclass(MissingDependency, FedtopkError)


def test_available_names_each_source() -> None:
    assert list(available()) == list(get_args(DataSettings.model_fields["source"].annotation))


def test_summary() -> None:
    assert summary(interactions([[0, 1, 2], [], [2]], items=4, times=[[10, 20, 86400], [], [15]])) == {
        "users": 3,
        "items": 4,
        "interactions": 4,
        "shortest": 0,
        "median": 1.0,
        "longest": 3,
        "density": 4 / 12,
        "first": "1970-01-01T00:00:10+00:00",
        "last": "1970-01-02T00:00:00+00:00",
    }


def test_summary_of_nothing() -> None:
    assert summary(interactions([[]], items=1)) == {
        "users": 1,
        "items": 1,
        "interactions": 0,
        "shortest": 0,
        "median": 0.0,
        "longest": 0,
    }
