"""A device from its first key to its end, by the commands that its owner and the authority type."""

import json
from pathlib import Path

from running import fedtopk

EVENTS = "item,rating,timestamp\n318,5.0,964982400\n50,3.5,964981200\n"


def made(folder: Path) -> Path:
    """A device that an authority enrolled."""
    done = fedtopk("authority", "init", folder / "authority", "--format", "json")
    public: str = json.loads(done.stdout)["public_key"]
    phone, asked, enrolment = folder / "phone", folder / "request.json", folder / "enrolment.json"
    assert fedtopk("device", "init", phone, "--request", asked).returncode == 0
    done = fedtopk("authority", "enrol", folder / "authority", asked, "--out", enrolment, "--name", "phone")
    assert done.returncode == 0, done.stderr
    done = fedtopk("device", "enrol", phone, enrolment, "--authority", public, "--format", "json")
    assert json.loads(done.stdout)["device"] == 0
    return phone


def test_a_device_from_its_first_key_to_its_end(tmp_path: Path) -> None:
    phone = made(tmp_path)
    (tmp_path / "events.csv").write_text(EVENTS)
    done = fedtopk("device", "add-events", phone, tmp_path / "events.csv", "--format", "json")
    assert json.loads(done.stdout) == {"added": 2, "events": 2}
    exported = json.loads(fedtopk("device", "export", phone).stdout)
    assert [event["item"] for event in exported["events"]] == ["50", "318"]  # by time
    listed = json.loads(fedtopk("authority", "list", tmp_path / "authority", "--format", "json").stdout)
    assert [(entry["name"], entry["status"]) for entry in listed] == [("phone", "enrolled")]
    assert fedtopk("authority", "revoke", tmp_path / "authority", "0").returncode == 0

    (tmp_path / "stolen").mkdir()
    for path in phone.iterdir():
        (tmp_path / "stolen" / path.name).write_bytes(path.read_bytes())
    assert fedtopk("device", "forget", phone).returncode == 0
    assert not (tmp_path / "phone.key").exists()
    for folder in (phone, tmp_path / "stolen"):
        done = fedtopk("device", "export", folder)
        assert done.returncode == 1 and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr


def test_mistakes_are_told_in_one_line_and_change_nothing(tmp_path: Path) -> None:
    phone = made(tmp_path)
    (tmp_path / "bad.csv").write_text(EVENTS + "1,many,2\n")
    (tmp_path / "odd.csv").write_text("movie,stars\n1,2\n")
    (tmp_path / "items.csv").write_text("item\n318\n")
    server = ["server", "init", tmp_path / "server", "--address", "a:1", "--catalogue", tmp_path / "items.csv"]
    mistakes = [
        ([*server, "--authority", "xyz"], "authority=xyz to be 32 bytes in hexadecimal"),
        ([*server, "--authority", "00" * 31], "to be 32 bytes in hexadecimal"),
        (["device", "add-events", phone, tmp_path / "bad.csv"], "line 4"),
        (["device", "add-events", phone, tmp_path / "odd.csv"], "columns item, rating and timestamp"),
        (["device", "add-events", phone, tmp_path / "none.csv"], "readable"),
        (["device", "enrol", phone, tmp_path / "enrolment.json", "--authority", "00" * 32], "of the authority"),
        (["device", "enrol", phone, tmp_path / "enrolment.json", "--authority", "xyz"], "hexadecimal"),
        (["device", "init", phone, "--request", tmp_path / "again.json"], "Expected"),
        (["authority", "enrol", tmp_path / "authority", tmp_path / "request.json", "--out", tmp_path / "x"], "before"),
    ]
    for words, said in mistakes:
        done = fedtopk(*words)
        assert done.returncode == 1, words
        assert said in done.stderr and "Traceback" not in done.stderr
    assert json.loads(fedtopk("device", "export", phone).stdout)["events"] == [] and not (tmp_path / "server").exists()
