"""What a server's operator hands out to those who run devices: where the server is, whom to believe, which items the
model is of, and under which terms devices are asked to take part. A small JSON document; nothing in it is secret.

A device pins all of it when it joins. That the document is the operator's is for whoever hands it over to see to, as
with the authority's public key.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
from pydantic import TypeAdapter, ValidationError

from common.catalogue import Catalogue
from common.errors import DataError, SettingsError
from common.settings import load_toml


@dataclass(frozen=True)
class Invitation:
    """The document.

    Attributes:
        server: ``host:port`` that devices connect to.
        root_certificate: PEM, with which the server's TLS certificate is verified.
        authority: hexadecimal, the enrolment authority's public key.
        publisher: hexadecimal, the public key that models are signed with.
        items: id and title of each item, in the catalogue's order.
        labels: public labels of each item, as of :class:`common.catalogue.Catalogue`; empty where there are none.
        settings: of the runs to come, as TOML; a device derives its policy from them unless its owner has another one.
    """

    server: str
    root_certificate: str
    authority: str
    publisher: str
    items: list[tuple[str, str]]
    settings: str
    labels: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str | bytes) -> "Invitation":
        """Raises :class:`DataError`."""
        try:
            found = _READER.validate_json(text)
            load_toml(found.settings)
            if not found.server.rpartition(":")[2].isdecimal():
                raise ValueError(f"server={found.server!r} is not host:port")
            if len(bytes.fromhex(found.authority)) != 32 or len(bytes.fromhex(found.publisher)) != 32:
                raise ValueError("its keys do not have 32 bytes")
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(str(part) for part in detail["loc"])
            raise DataError(
                f"Expected an invitation, as `fedtopk server init` writes it: {where} {detail['msg']}."
            ) from None
        except (ValueError, SettingsError) as error:
            raise DataError(f"Expected an invitation, as `fedtopk server init` writes it: {error}.") from None
        if len({item for item, _ in found.items}) != len(found.items) or not found.items:
            raise DataError("Expected the items of an invitation to be different, and some.")
        if len(found.labels) not in (0, len(found.items)):
            raise DataError(
                f"Expected the {len(found.labels)} labels of an invitation to be as many as its items, or none."
            )
        return found

    @property
    def port(self) -> int:
        """Of the server."""
        return int(self.server.rpartition(":")[2])

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items."""
        ids, titles = zip(*self.items, strict=True)
        labels = np.array(self.labels, object) if self.labels else None
        return Catalogue(np.array(ids, object), np.array(titles, object), labels)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


_READER = TypeAdapter(Invitation)
