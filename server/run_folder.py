"""A run folder: settings, checkpoints, event store, and at the end the model, the report and the model card."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from common.errors import RunError
from common.settings import Settings, load_settings
from server.durable import replacing
from server.events import EventReader, Events
from server.model_card import model_card
from server.store import DATABASE, Store, open_store

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only looks at a run does without
    from torch import Tensor

    from common.model import Parameters

_BEGUN = "begun"
ABORTED = "aborted"


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.toml"

    @property
    def report_file(self) -> Path:
        return self.path / "report.json"

    @property
    def card_file(self) -> Path:
        return self.path / "model-card.md"

    @property
    def model_file(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def noise_key(self) -> Path:
        """Of a run under way whose noise is correlated: secret (:mod:`server.noise_key`)."""
        return self.path / "noise.key"

    @property
    def user_embeddings(self) -> Path:
        """Of all simulated devices; the checkpoints hold what changed lately (:mod:`simulations.private_states`)."""
        return self.path / "users.npy"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def expect_new(self) -> None:
        """Raise :class:`RunError` if the folder holds a run, or what is left of one."""
        if any((self.path / name).exists() for name in (self.settings_file.name, DATABASE, self.checkpoints.name)):
            raise RunError(
                f"Expected {self.path} to hold no run yet: go on with it by --resume, or pick another --out."
            )

    def open(self, settings: Settings, resume: bool) -> Store:
        """The store of a new run, whose settings are written, or of one that is to go on.

        Raises :class:`RunError` if the folder cannot be written to, is in use, already holds a run, or, to go on, holds
        a run that was aborted, or other settings than the run was begun with: its ledger and its noise would not be
        those of its report.
        """
        if not resume:
            self.expect_new()
        store = open_store(self.path)
        try:
            digest = sha256(settings.to_toml().encode()).hexdigest()
            if resume:
                begun = EventReader(store).read(kinds=[_BEGUN])
                if EventReader(store).read(kinds=[ABORTED]):
                    raise RunError(f"Expected {self.path} to hold a run that may go on: this one was aborted.")
                if not begun or begun[0].fields["settings"] != digest:
                    raise RunError(f"Expected {self.settings_file} to be as it was when the run was begun.")
            else:
                Events(store, time.time).record(_BEGUN, settings=digest)
                with replacing(self.settings_file) as file:
                    file.write_text(settings.to_toml(), encoding="utf-8")
        except BaseException:
            store.close()
            raise
        return store

    def settings(self) -> Settings:
        """The run's settings. Raises :class:`RunError` where there is no run."""
        if not self.settings_file.exists():
            raise RunError(f"Expected {self.path} to hold a run: {self.settings_file.name} is missing.")
        return load_settings(self.settings_file)

    def save_model(self, parameters: "Parameters") -> None:
        """Write the shared model, atomically."""
        from safetensors.torch import save_file

        with replacing(self.model_file) as file:
            save_file({name: value.contiguous() for name, value in parameters.items()}, file)

    def load_model(self) -> dict[str, "Tensor"]:
        """The shared model of a run that ended. Raises :class:`RunError`."""
        from safetensors.torch import load as load_tensors

        try:
            return load_tensors(self.model_file.read_bytes())
        except OSError as error:
            raise RunError(f"Expected {self.model_file} to be readable: {error.strerror}.") from None
        except SafetensorError as error:
            raise RunError(f"Expected {self.model_file} to be a safetensors file: {error}.") from None

    def save_report(self, report: Mapping[str, Any]) -> None:
        """Write ``report.json`` and ``model-card.md``, each atomically."""
        with replacing(self.report_file) as file:
            file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with replacing(self.card_file) as file:
            file.write_text(model_card(report, self.settings()), encoding="utf-8")
