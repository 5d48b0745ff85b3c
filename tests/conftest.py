"""One torch thread for every test: two cores are enough for the suite, and sums do not depend on the machine. What
commands print is as wide as a wide terminal."""

import os

import pytest
import torch

os.environ["COLUMNS"] = "200"

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """How the processes of `make test` share the suite: by files, whose tests share what they start, and what looks at
    the one fleet together. What starts processes of its own comes first, so that the end waits for none.
    """
    for item in items:
        shared = "fleet" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("fleet" if shared else item.path.name))
    items.sort(key=lambda item: "unit" in item.path.parts)
