"""A data set as a deployment takes it: the public catalogue, and a history for each user."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.durable import make_folder, replacing
from simulations.datasets.interactions import Interactions

CATALOGUE, HISTORIES = "catalogue.csv", "histories"


def write_histories(interactions: Interactions, folder: Path) -> None:
    """Write ``catalogue.csv`` (item, title, and labels if there are any) and ``histories/<user>.csv`` (item, rating,
    timestamp) into a folder.

    They are what `fedtopk server init --catalogue` and `fedtopk device add-events` read. Raises :class:`RunError`.
    """
    make_folder(folder / HISTORIES)
    catalogue = interactions.catalogue
    public = {"item": catalogue.ids, "title": catalogue.titles}
    if catalogue.labels is not None:
        public["labels"] = catalogue.labels
    _write(folder / CATALOGUE, tuple(public), zip(*public.values(), strict=True))
    for user, own in zip(interactions.user_ids, interactions.slices(), strict=True):
        columns = (catalogue.ids[interactions.items[own]], interactions.ratings[own], interactions.timestamps[own])
        name = str(user).replace("/", "_").lstrip(".") or "_"
        _write(folder / HISTORIES / f"{name}.csv", ("item", "rating", "timestamp"), zip(*columns, strict=True))


def _write(path: Path, heading: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with replacing(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([heading, *rows])
