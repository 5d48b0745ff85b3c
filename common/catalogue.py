"""The catalogue: which items there are, most frequent first. A public input of a run."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.secagg.identity import digest


@dataclass(frozen=True)
class Catalogue:
    """Items by index. Index 0 is the most frequent one, which the log-uniform sampler relies on.

    Attributes:
        ids: (A,) strings, the items' names in the source, unique.
        titles: (A,) strings for people; the id again where the source has no title.
        labels: (A,) public labels of each item, such as genres, separated by ``|``; None where the source has none.
    """

    ids: np.ndarray
    titles: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each item, by its id."""
        return {str(item): at for at, item in enumerate(self.ids)}

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that tell this catalogue from any other: its items and their order."""
        return digest("catalogue", *(str(item).encode(errors="surrogatepass") for item in self.ids))
