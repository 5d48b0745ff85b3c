"""One torch thread for every test: two cores are enough for the suite, and sums do not depend on the machine. What
commands print is as wide as a wide terminal."""

import os

import pytest
import torch

os.environ["COLUMNS"] = "200"

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes of its own comes first, so that the end of `make test` waits for none."""
    items.sort(key=lambda item: "unit" in item.path.parts)
