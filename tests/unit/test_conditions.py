"""A command decides when a device takes part."""

import pytest

from client.conditions import command


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", ""),
        ("true", ""),
        ("sh -c 'echo fine'", ""),
        ("false", "ended with 1"),
        ("sh -c 'echo on battery; exit 3'", "on battery"),
        ("sh -c 'echo metered >&2; exit 1'", "metered"),
        ("a-command-that-is-not-there", "could not be checked"),
        ("sh -c 'unfinished", "could not be checked"),
    ],
)
def test_a_condition(words: str, reason: str) -> None:
    said = command(words)()
    assert reason in said and bool(said) == bool(reason)
