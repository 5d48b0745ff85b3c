"""The device's own ledger: what its uploads add up to."""

import math
from dataclasses import replace

import pytest

from client.ledger import Charge, epsilon_server, last_attempt
from common.errors import DataError
from common.privacy.accounting import epsilon_server as of_gaussian

CHARGE = Charge(bytes(32).hex(), 1, 1, 100, 2.0, 0.8)


def test_equal_uploads_compose_as_the_accountant_says() -> None:
    for times in (1, 2, 30):
        expected = of_gaussian(2.0 / math.sqrt(1.001), 0.8, times, 1e-5)
        assert epsilon_server([CHARGE] * times, 1e-5) == pytest.approx(expected, rel=1e-9)
    assert epsilon_server([], 1e-5) == 0


def test_unlike_uploads_lie_between() -> None:
    louder = replace(CHARGE, noise_multiplier=4.0)
    both = epsilon_server([CHARGE, louder], 1e-5)
    assert epsilon_server([louder] * 2, 1e-5) < both < epsilon_server([CHARGE] * 2, 1e-5)
    assert epsilon_server([CHARGE], 1e-5) < both
    assert epsilon_server([CHARGE, replace(CHARGE, noise_multiplier=0.0)], 1e-5) == math.inf


def test_the_last_attempt_is_of_its_run() -> None:
    charges = [replace(CHARGE, round=3, attempt=2), replace(CHARGE, round=3), replace(CHARGE, run="ff" * 32, round=9)]
    assert last_attempt(charges, bytes(32)) == (3, 2)
    assert last_attempt(charges, bytes([1]) * 32) == (0, 0)


def test_an_entry_is_read_as_it_was_written() -> None:
    assert Charge.parse(CHARGE.to_json()) == CHARGE
    for text in ("", "{}", "[1]", '{"run": 3, "x": 1}'):
        with pytest.raises(DataError, match="entry of the device's ledger"):
            Charge.parse(text)
