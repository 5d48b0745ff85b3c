"""The ServerApp of `flwr run .`: the real one, for a simulated population, whose model it can evaluate."""

from typing import Any

from common.features import features_of
from common.model import Parameters
from common.settings import Settings
from server.app import Deployment, make_app
from server.nodes import Nodes
from server.secure_sum import SecureSum, Trust
from simulations.identities import simulated_authority, simulated_publisher
from simulations.population import Population
from simulations.simulate import evaluate_model, load_split


def _deploy(settings: Settings) -> Deployment:
    data = load_split(settings)
    population = Population(settings, data.train)

    def evaluate(parameters: Parameters) -> dict[str, Any]:
        """With user embeddings adapted from 0: the trained ones are the devices'."""
        return evaluate_model(settings, parameters, population, data)

    seed, catalogue = settings.training.seed, data.train.catalogue
    trust = Trust(simulated_authority(seed), simulated_publisher(seed), catalogue.digest)

    def gather(nodes: Nodes, cohort: SecureSum) -> None:
        cohort.find(settings.data.users or None, len(population))

    return Deployment(len(catalogue), trust, gather, evaluate, features=features_of(settings.model, catalogue))


server_app = make_app(_deploy)
