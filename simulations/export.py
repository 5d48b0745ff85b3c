"""`fedtopk export RUN`: the shared model for other programs."""

import json
from pathlib import Path

import pandas as pd
from safetensors.torch import save as to_bytes

from common.model import check_parameters, shapes
from server.durable import make_folder, write_file
from server.run_folder import RunFolder
from simulations.simulate import load_split


def export_run(folder: RunFolder, to: Path) -> dict[str, str]:
    """Write ``model.safetensors``, ``catalogue.csv`` and ``model.json``; returns their paths by name.

    No user embedding and no history is among them: they belong to the devices.
    """
    settings, model = folder.settings(), folder.load_model()
    catalogue = load_split(settings).train.catalogue
    expected = shapes(settings.model, len(catalogue), settings.objective.estimator)
    parameters = {name: model[name] for name in expected if name in model}
    check_parameters(parameters, expected)
    make_folder(to)
    description = {
        "settings": settings.model_dump(mode="json"),
        "parameters": {name: list(shape) for name, shape in expected.items()},
        "scores": "softmax of policy.embedding @ [state + user.projection @ user, 1] / temperature",
    }
    items = pd.DataFrame({"index": range(len(catalogue)), "id": catalogue.ids, "title": catalogue.titles})
    files = {
        "model": ("model.safetensors", to_bytes({name: value.contiguous() for name, value in parameters.items()})),
        "catalogue": ("catalogue.csv", items.to_csv(index=False).encode()),
        "description": ("model.json", (json.dumps(description, indent=2) + "\n").encode()),
    }
    for name, data in files.values():
        write_file(to / name, data)
    return {key: str(to / name) for key, (name, _) in files.items()}
