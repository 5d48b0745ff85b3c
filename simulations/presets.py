"""Other defaults than the settings' own, for a command that shows something."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.settings import Settings, load_settings


def load_with_presets(config: Path | None, presets: Mapping[str, object], overrides: Sequence[str]) -> Settings:
    """As :func:`common.settings.load_settings`, with the presets for what the file does not mention.

    Raises :class:`SettingsError`.
    """
    configured = load_settings(config)
    missing = (f"{key}={value}" for key, value in presets.items() if not _mentioned(configured, key))
    return load_settings(config, [*missing, *overrides])


def _mentioned(settings: Settings, key: str) -> bool:
    section, _, name = key.partition(".")
    return name in getattr(settings, section).model_fields_set
