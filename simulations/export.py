"""`fedtopk export RUN`: the shared model for other programs."""

from pathlib import Path

import pandas as pd
from safetensors.torch import save_file

from common.model import check_parameters, shapes
from server.durable import make_folder, replacing
from server.run_folder import RunFolder
from simulations.simulate import load_split


def export_run(folder: RunFolder, to: Path) -> dict[str, str]:
    """Write ``model.safetensors``, ``catalogue.csv`` and ``settings.toml``; returns their paths by name.

    No user embedding and no history is among them: they belong to the devices.
    """
    settings, model = folder.settings(), folder.load_model()
    catalogue = load_split(settings).train.catalogue
    expected = shapes(settings, len(catalogue))
    parameters = {name: model[name] for name in expected if name in model}
    check_parameters(parameters, expected)
    make_folder(to)
    items = pd.DataFrame({"index": range(len(catalogue)), "id": catalogue.ids, "title": catalogue.titles})
    with replacing(to / "model.safetensors") as file:
        save_file({name: value.contiguous() for name, value in parameters.items()}, file)
    with replacing(to / "catalogue.csv") as file:
        items.to_csv(file, index=False)
    with replacing(to / "settings.toml") as file:
        file.write_text(settings.to_toml(), encoding="utf-8")
    return {name: str(to / name) for name in ("model.safetensors", "catalogue.csv", "settings.toml")}
