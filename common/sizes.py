"""What a configuration makes devices download and upload: its parameters by group, and bytes."""

from dataclasses import dataclass

from common.errors import SettingsError
from common.model import group_of, shapes, trained
from common.settings import Settings

_FLOAT = 4
"""Bytes of a number in a model."""


@dataclass(frozen=True)
class Sizes:
    """Of one round.

    Attributes:
        trained: numbers of an update by group of parameters, in the order of the model; 0 for frozen groups.
        fixed: numbers that devices are sent and that no update has, by group; the features are one.
    """

    trained: dict[str, int]
    fixed: dict[str, int]

    @property
    def dimension(self) -> int:
        """d, the length of an update."""
        return sum(self.trained.values())

    @property
    def model_bytes(self) -> int:
        """Of the model that a device is sent, but for some names and a signature."""
        return _FLOAT * (self.dimension + sum(self.fixed.values()))


def sizes_of(settings: Settings) -> Sizes:
    """Over a catalogue of `data.items`, or a slice of it.

    Raises :class:`SettingsError` where the settings leave the size of the catalogue to the data.
    """
    items, least = settings.data.items, settings.objective.slice_items
    if not items:
        raise SettingsError("Expected data.items=0 to be the size of the catalogue, for a plan to count parameters.")
    expected = shapes(settings, min(least, items) if least else items)
    uploaded = trained(settings, expected)
    groups: dict[str, int] = dict.fromkeys(map(group_of, expected), 0)
    sizes = Sizes(dict(groups), dict(groups))
    for name, (rows, columns) in expected.items():
        of = sizes.trained if name in uploaded else sizes.fixed
        of[group_of(name)] += rows * columns
    return sizes
