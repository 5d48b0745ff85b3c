"""`fedtopk privacy utility`: how much of a policy's value is left under noise, where the true value is known.

For each seed one world and one log (:mod:`simulations.closed_loop`). The same devices train one model without privacy,
and one for each ε with the ordinary round loop, ledger and noise of a run, into run folders that `fedtopk privacy
verify` can check. The opponent has the same settings and seed, but neither noise nor clip.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError, SettingsError
from common.features import features_of
from common.privacy.planning import signal_to_noise
from common.settings import Settings, load_settings
from server.durable import make_folder, replacing
from server.report import build_report
from server.run import open_training
from server.run_folder import RunFolder
from simulations.batched_cohort import BatchedCohort
from simulations.closed_loop import BASE, Setup, first_log, for_everyone, reference_slates, slates_of
from simulations.datasets.interactions import Interactions
from simulations.dp_popularity import release_popularity
from simulations.environment import World, slate_value
from simulations.experiment import claim
from simulations.federated import Trained
from simulations.population import Population
from simulations.simulate import Watch
from simulations.utility_summary import DP_POPULARITY, MEASURES, NOT_PRIVATE, summarise

PRESET = [
    *BASE,
    "objective.estimator=direct",
    "objective.critic_start=0.1",
    "model.input_width=16",
    "model.state_width=16",
    "model.user_width=1",
    "model.items=features",
    "model.feature_width=24",
    "model.rank=4",
    "training.learning_rate=0.06",
    "training.checkpoint_every=10",
    "privacy.mechanism=skellam",
    "privacy.clip_norm=0.12",
    "privacy.group_scale.cell=0.25",
]
"""Settings of a private run beyond the defaults, tuned on other seeds and much smaller worlds (docs/utility.md).

One head, the reward model's, has a third of the numbers of a policy on a critic, which is worth no more. Items are made
of what the catalogue tells of them, and of four numbers of their own for what it does not. C is about the median norm.
The cell has few numbers and needs little of the norm.
"""

OPPONENT = ["privacy.mechanism=none", "privacy.clip_norm=inf"]
"""What the run without privacy changes of them."""

MOST_VALUED = 5_000
"""Users on whom policies are valued: the first so many, or all."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        setup: the world and its log; `setup.users` devices.
        rounds, cohort: T, and the expected members of a round.
        epsilons: targets of ε_model, each a training.
        seeds: worlds, logs and trainings; the first is `first_seed`.
        overrides: settings of the user's, above the preset, of all trainings alike.
    """

    setup: Setup
    rounds: int
    cohort: int
    epsilons: tuple[float, ...]
    seeds: int
    first_seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.setup.users:
            raise SettingsError(f"Expected a cohort of {self.cohort} in [1, {self.setup.users}], the devices.")
        if len(set(self.epsilons)) < len(self.epsilons) or not self.epsilons:
            raise SettingsError(f"Expected different targets of ε, at least one: found {list(self.epsilons)}.")
        trainings = self.settings_of(self.first_seed)
        if not all(settings.private for name, settings in trainings.items() if name != NOT_PRIVATE):
            raise SettingsError(
                "Expected privacy.mechanism=none not to be set: the study trains that beside the others."
            )

    @property
    def valued(self) -> int:
        return min(self.setup.users, MOST_VALUED)

    @property
    def stamp(self) -> dict[str, Any]:
        """What every result depends on but ε and seed, which results are named by."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("epsilons", "seeds", "first_seed")}
        return {**rest, "valued": self.valued, "preset": PRESET, "opponent": OPPONENT}

    def settings_of(self, seed: int) -> dict[str, Settings]:
        """The settings of each training of a seed, by name."""
        shared = [
            *PRESET,
            f"data.items={self.setup.items}",
            f"training.rounds={self.rounds}",
            f"training.cohort_rate={self.cohort / self.setup.users!r}",
            *self.overrides,
            f"training.seed={seed}",
        ]
        own = {NOT_PRIVATE: OPPONENT} | {
            private_name(epsilon): [f"privacy.target_epsilon={epsilon!r}"] for epsilon in self.epsilons
        }
        return {name: load_settings(None, [*shared, *changes]) for name, changes in own.items()}


def private_name(epsilon: float) -> str:
    """The name of a private training in results and file names."""
    return f"epsilon {epsilon:g}"


def run_study(out: Path, study: Study, workers: int, watch_of: Callable[[str, int], Watch]) -> dict[str, Any] | None:
    """Train and value everything, each result into a file of `out`; the summary, or None if the user stopped a run.

    What is there is not done again, and a training that was stopped goes on.

    Args:
        watch_of: makes the watch of a run from its name and number of rounds.

    Raises:
        RunError: `out` holds results of another study.
        FedtopkError: whatever else the user can mend.
    """
    make_folder(out)
    claim(out / "study.json", json.loads(json.dumps(study.stamp)))
    found: dict[int, dict[str, Any]] = {}
    for seed in range(study.first_seed, study.first_seed + study.seeds):
        site = _Site(out / f"seed-{seed}", study, seed)
        found[seed] = site.kept("references", site.references) or {}
        for name, settings in study.settings_of(seed).items():
            if settings.private:
                rival = f"{DP_POPULARITY}, {name}"
                found[seed][rival] = site.kept(rival, partial(site.rival, settings)) or {}
            result = site.kept(name, partial(site.training, name, settings, workers, watch_of))
            if result is None:
                return None
            found[seed][name] = result
    summary = {**study.stamp, **summarise(found)}
    with replacing(out / "utility.json") as file:
        file.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    return summary


@dataclass(frozen=True)
class _Site:
    """One seed's folder, world and log."""

    folder: Path
    study: Study
    seed: int

    @cached_property
    def users(self) -> np.ndarray:
        return np.arange(self.study.valued)

    def kept(self, name: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """The result in the file of that name; made where it is missing, unless the user stopped that."""
        file = self.folder / f"{_slug(name)}.json"
        if not file.exists():
            result = make()
            if result is None:
                return None
            make_folder(self.folder)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def references(self) -> dict[str, Any]:
        """What needs neither learner nor noise, by name."""
        world, _ = first_log(self.study.setup, self.seed)
        slates = reference_slates(self.study.setup, self.seed, self.study.valued)
        return {name: {"values": values_of(world, shown)} for name, shown in slates.items()}

    def rival(self, settings: Settings) -> dict[str, Any]:
        """DP popularity at the ε of a private training."""
        world, log = first_log(self.study.setup, self.seed)
        released = release_popularity(settings, log.interactions)
        best = np.argsort(-released.counts, kind="stable")[: self.study.setup.slate_size]
        return {"values": values_of(world, for_everyone(best, self.study.valued)), "privacy": released.privacy}

    def training(
        self, name: str, settings: Settings, workers: int, watch_of: Callable[[str, int], Watch]
    ) -> dict[str, Any] | None:
        """Values of the trained policy, beside its run's report; None if it was stopped."""
        world, log = first_log(self.study.setup, self.seed)
        folder = RunFolder(self.folder / _slug(name))
        watch = watch_of(f"seed {self.seed}, {name}", self.study.rounds)
        report, trained = train_in(folder, settings, log.interactions, workers, watch)
        if report["status"] != "finished":
            if report["status"] in ("stopped", "aborted"):
                return None
            raise RunError(f"Expected {folder.path} to finish its rounds: {report['status']}.")
        shown = slates_of(trained, log.interactions, self.users, self.study.setup.slate_size)
        result = {key: report[key] for key in ("seconds", "client_updates", "parameters", "privacy")}
        if settings.private:
            z, cohort = report["privacy"]["noise_multiplier"], self.study.cohort
            result["signal_to_noise"] = signal_to_noise(cohort, self.study.rounds, z, report["parameters"])
        return result | {"values": values_of(world, shown)}


def _slug(name: str) -> str:
    """A name as a file's."""
    return name.lower().replace(",", "").replace(" ", "-")


def train_in(
    folder: RunFolder, settings: Settings, histories: Interactions, workers: int, watch: Watch
) -> tuple[dict[str, Any], Trained]:
    """Train the histories' devices in a run folder, going on with what is there. Returns the report and the model.

    Raises :class:`RunError` if the folder was begun with other settings.
    """
    resume = folder.settings_file.exists()
    if resume and folder.settings() != settings:
        raise RunError(f"Expected {folder.path} to have been begun with the settings of this study.")
    population = Population(settings, histories, folder.user_embeddings)
    with folder.open(settings, resume) as store, BatchedCohort(population, workers) as cohort:
        features = features_of(settings.model, histories.catalogue)
        training = open_training(settings, folder, store, cohort, len(histories.catalogue), features=features)
        if resume:
            training.resume()
        with watch.patient() as should_stop:
            outcome = training.run(should_stop, lambda progress: watch.on_round(progress, ""))
        folder.save_model(outcome.parameters)
        report = build_report(training, outcome, {})
        folder.save_report(report)
    return report, Trained(settings, outcome.parameters, population)


def values_of(world: World, slates: np.ndarray) -> dict[str, list[float]]:
    """True values of (B, K) slates for the first B users, by measure: one number a user."""
    value = slate_value(world.likes_of(np.arange(len(slates)), slates))
    return {measure: [round(float(x), 6) for x in getattr(value, measure)] for measure in MEASURES}
