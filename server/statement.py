"""A signed statement of what a run released, when, and at which ε: for whoever was not there.

JSON with the run's mechanism, every attempt at a round with its times, both figures with their unit, δ, adjacency and
observer, and the end of the event log, under an Ed25519 signature: of the key that signs a server's models, which its
devices have pinned, or of another one. It binds whoever signed it: kept elsewhere, it shows any later change of what it
covers (:mod:`server.verification`). It does not show that nothing else was released.
Tests: ``tests/integration/test_privacy.py``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import FedtopkError, RunError
from common.secagg.identity import signed, verified
from server.events import Head
from server.ledger import Entry
from server.run_folder import RunFolder
from server.store import open_store_read_only
from server.verification import Check, Log, compare, covers, entries_of, mechanism_of, read_log, recompute

_LABEL = "privacy statement"


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    format: Literal["fedtopk-privacy-statement"] = "fedtopk-privacy-statement"
    version: Literal[1] = 1
    run: str
    """The first digest of the run's event log."""
    issued: float
    """Seconds since the epoch."""
    log: Head
    mechanism: dict[str, Any]
    attempts: list[Entry]
    privacy: dict[str, Any]
    """As in the run's report."""


@dataclass(frozen=True)
class Statement:
    """What was signed, by whom. Made by :meth:`make` or :meth:`parse`; neither says that the signature holds."""

    content: str
    publisher: str
    signature: str

    @classmethod
    def make(cls, folder: RunFolder, key: Ed25519PrivateKey, now: float) -> Self:
        """The statement of a finished run. Raises :class:`RunError` where its log or its report is not whole."""
        with open_store_read_only(folder.path) as store:
            log = read_log(store)
        try:
            report = json.loads(folder.report_file.read_text(encoding="utf-8"))
            privacy = report["privacy"]
            expected = covers(log, Head(**report["log"]), folder.report_file.name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"Expected {folder.report_file} to be the report of a run that ended: {error!r}.") from None
        if not expected.ok:
            raise RunError(f"Expected the report to be of the whole run: {expected.found}.")
        content = _Content(
            run=log.heads[0].digest,
            issued=now,
            log=log.head,
            mechanism=mechanism_of(log.events),
            attempts=entries_of(log.events),
            privacy=privacy,
        )
        text = json.dumps(content.model_dump(), sort_keys=True, ensure_ascii=False)
        return cls(text, key.public_key().public_bytes_raw().hex(), signed(key, _LABEL, text.encode()).hex())

    def to_json(self) -> str:
        """One JSON object: what was signed, readable, beside the key and the signature."""
        whole = {"statement": json.loads(self.content), "publisher": self.publisher, "signature": self.signature}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises :class:`RunError`."""
        try:
            found = json.loads(text)
            _Content.model_validate(found["statement"])
            content = json.dumps(found["statement"], sort_keys=True, ensure_ascii=False)
            bytes.fromhex(found["publisher"]), bytes.fromhex(found["signature"])
            return cls(content, found["publisher"], found["signature"])
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            raise RunError(f"Expected a privacy statement: {' '.join(str(error).split())}.") from None

    def verify(self, key: str | None = None) -> tuple[list[Check], dict[str, Any]]:
        """Check the signature and recompute the figures from the attempts that are stated.

        Args:
            key: hexadecimal, the public key that it must be signed with; None for the one that it names, which shows
                only that whoever has that key signed it.
        """
        content = _Content.model_validate(json.loads(self.content))
        expected = self.publisher if key is None else key.strip().lower()
        try:
            parts = (self.content.encode(), bytes.fromhex(self.signature))
            holds = expected == self.publisher.lower() and verified(bytes.fromhex(self.publisher), _LABEL, *parts)
        except UnicodeEncodeError:
            holds = False
        words = f"signed by {self.publisher}" + ("" if key else ": compare it with the key that you know")
        checks = [Check("signature", holds, words if holds else f"not signed by {expected}")]
        try:
            figures = recompute(content.mechanism, content.attempts)
        except (FedtopkError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            return [*checks, Check("attempts", False, f"no such run can be: {error!r}")], {}
        return [*checks, *compare(content.privacy, figures)], figures

    def covers(self, log: Log) -> Check:
        """Whether a run's log is the one that this was signed for, and nothing was released since."""
        content = _Content.model_validate(json.loads(self.content))
        check = covers(log, content.log, "the statement")
        return Check("statement", check.ok, check.found)


def read_statement(path: Path) -> Statement:
    """Raises :class:`RunError`."""
    try:
        return Statement.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"Expected {path} to be a readable statement: {error}.") from None
