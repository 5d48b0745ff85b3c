"""`fedtopk recommend`: what a device's user may like, from the last model that the device received, without a server.

Guarantee: items are ranked by no model but one that the publisher whom the device has pinned signed for its run, its
round and the device's catalogue, however it got into the store
(tests/unit/test_recommend_command.py::test_no_model_is_used_but_the_publishers).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.cli import KeyFileOption, KeyringOption, PassphraseOption, opened_store
from common.console import FormatOption, answer
from common.errors import ModelError, RunError, SettingsError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from client.device_store import DeviceStore
    from client.recommender import Exploration, Recommender
    from common.settings import Settings

CANDIDATES_PER_ITEM = 10
"""M / K, unless M is given."""

_MODEL_FIELDS = ("version", "settings", "run_id", "round", "signature")


@dataclass(frozen=True)
class Received:
    """The last model that a device received, checked.

    Attributes:
        recommender: ranks its items.
        run_id: of the run that it comes from.
        round: after how many rounds.
    """

    recommender: "Recommender"
    run_id: int
    round: int


def recommend(
    device: Annotated[Path, typer.Option("--device", metavar="DIR", help="The device's folder.")],
    k: Annotated[int, typer.Option("--k", min=1, help="K, how many items.")] = 10,
    explore: Annotated[bool, typer.Option("--explore", help="Draw some of them from the model's policy.")] = False,
    certain: Annotated[
        int | None,
        typer.Option("--certain", min=0, help="K′, how many of the highest items are there for sure; by default K/2."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option("--candidates", min=1, help="M, from how many of the highest the others are; by default 10 K."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Draw the same items again.")] = None,
    consumed: Annotated[bool, typer.Option("--consumed", help="Items of the history may be among them.")] = False,
    key_file: KeyFileOption = None,
    passphrase: PassphraseOption = None,
    keyring: KeyringOption = False,
    format: FormatOption = "text",
) -> None:
    """Recommend items to a device's user, offline, from the last model that the device received.

    With --explore the K′ highest items come first and the others are drawn by the policy from the rest of the M
    highest, so that what follows in the logs is about more than the items that the model holds for the best.
    """
    exploration = _exploration(k, explore, certain, candidates, seed)
    with opened_store(device, key_file, passphrase, keyring) as store:
        found = recommendations(store, k, consumed=consumed, exploration=exploration)
    answer(format, found, lambda: _text(found))


def recommendations(
    store: "DeviceStore", k: int, *, consumed: bool = False, exploration: "Exploration | None" = None
) -> dict[str, Any]:
    """``{"model": {"run_id", "round"}, "events", "recommendations": [{"rank", "item", "title", "score"}]}``: K items,
    arguments as of :meth:`client.recommender.Recommender.recommend`; `events` counts the interactions that they rest
    on, those with items of the catalogue. The store keeps the recurrent states, caught up.

    Raises as :func:`received`; :class:`SettingsError` for a k that is too large, or an exploration that does not fit.
    """
    model = received(store)
    prepared = model.recommender.prepare(store)
    shown = model.recommender.recommend(prepared, k, consumed=consumed, exploration=exploration)
    return {
        "model": {"run_id": model.run_id, "round": model.round},
        "events": len(prepared.local_consumed),
        "recommendations": [
            {"rank": rank, "item": one.item, "title": one.title, "score": one.score}
            for rank, one in enumerate(shown, start=1)
        ],
    }


def received(store: "DeviceStore") -> Received:
    """The last model, once it is found to be one of this program and of the pinned publisher, for the device's items.

    Raises:
        RunError: the device has not joined a server, or has received no model yet.
        ModelError: the model is of another version, or its description or its parameters are not those of a model.
        ProtocolError: the publisher did not sign it as what it is said to be.
        DataError: the invitation is none.
    """
    from client.recommender import Recommender, read_model
    from client.stored_device import invitation_of
    from common.messages import run_digest
    from common.signed_model import Edition

    invitation = invitation_of(store)
    model = store.load_model()
    if model is None:
        raise RunError(
            "Expected this device to have received a model: it gets one when it takes part in a "
            "round, or, where rounds show slices of the items, when the run ends."
        )
    catalogue = invitation.catalogue
    settings, run_id, round_, signature = _described(model.metadata)
    edition = Edition(run_digest(settings, run_id), round_, catalogue.digest)
    edition.check(bytes.fromhex(invitation.publisher), model.content, signature)
    parameters = read_model(model.content, settings, len(catalogue))
    return Received(Recommender(settings, parameters, catalogue), run_id, round_)


def _described(metadata: Mapping[str, str]) -> "tuple[Settings, int, int, bytes]":
    """Settings, run, round and signature of a stored model, as :mod:`client.app` describes it."""
    from common.settings import load_toml
    from common.signed_model import VERSION

    if missing := [name for name in _MODEL_FIELDS if name not in metadata]:
        raise ModelError(f"Expected the stored model to come with its {', '.join(missing)}.")
    if metadata["version"] != str(VERSION):
        raise ModelError(
            f"Expected the stored model's version={metadata['version']} to be {VERSION}: the device gets one that "
            "this program reads in the next round."
        )
    run_id, round_ = (_number(name, metadata[name]) for name in ("run_id", "round"))
    try:
        signature = bytes.fromhex(metadata["signature"])
    except ValueError:
        raise ModelError("Expected the stored model's signature to be hexadecimal.") from None
    try:
        settings = load_toml(metadata["settings"])
    except SettingsError as error:
        raise ModelError(f"Expected the stored model's settings to be those of this program. {error}") from None
    # The signature is over this text: a program that knows one setting more would write, and check, another one.
    if settings.to_toml() != metadata["settings"]:
        raise ModelError(
            "Expected the stored model's settings to be complete: another version of this program wrote them."
        )
    return settings, run_id, round_, signature


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) >= 2**64:
        raise ModelError(f"Expected the stored model's {name}={text} to be a number of 64 bits.")
    return int(text)


def _exploration(
    k: int, explore: bool, certain: int | None, candidates: int | None, seed: int | None
) -> "Exploration | None":
    """How the slate is drawn, with defaults: half of it certain, the other half from M = 10 K."""
    given = {"certain": certain, "candidates": candidates, "seed": seed}
    if not explore:
        for name, value in given.items():
            if value is not None:
                raise SettingsError(f"Expected --{name}={value} only with --explore.")
        return None
    import torch

    from client.recommender import Exploration

    certain = k // 2 if certain is None else certain
    candidates = CANDIDATES_PER_ITEM * k if candidates is None else candidates
    seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
    return Exploration(certain, candidates, torch.Generator().manual_seed(seed))


def _text(found: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading, justify in (("rank", "right"), ("item", "left"), ("title", "left"), ("score", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in found["recommendations"]:
        table.add_row(str(row["rank"]), escape(row["item"]), escape(row["title"]), f"{row['score']:.3f}")
    model = found["model"]
    return Group(
        table,
        f"From the model of run {model['run_id']} after {model['round']} rounds, on {found['events']} interactions.",
    )
