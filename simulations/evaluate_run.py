"""`fedtopk evaluate RUN`: evaluate the model of a run folder again, from its files."""

from typing import Any

from common.errors import RunError
from common.model import check_parameters, shapes
from server.checkpoint import load_latest
from server.run_folder import RunFolder
from simulations.population import Population
from simulations.simulate import evaluate_model, load_split


def evaluate_run(folder: RunFolder) -> dict[str, Any]:
    """The `evaluation` object of the report for the run's model and the user embeddings of its newest checkpoint."""
    settings = folder.settings()
    model = folder.load_model()
    data = load_split(settings)
    expected = shapes(settings, len(data.train.catalogue))
    parameters = {name: model[name] for name in expected if name in model}
    check_parameters(parameters, expected)
    checkpoint = load_latest(folder.checkpoints)
    if checkpoint is None:
        raise RunError(f"Expected a checkpoint in {folder.checkpoints}: it holds the simulated users' embeddings.")
    population = Population(settings, data.train, folder.user_embeddings)
    if "users" in checkpoint.extra:  # real devices, and Flower's simulated ones, keep theirs
        population.states.restore(checkpoint.extra)
    return evaluate_model(settings, parameters, population, data)
