"""`fedtopk paper`: the two simulations of Chen et al. 2019, trained federatedly, and centrally beside it.

Ten items and no state: π is one softmax for everybody. Each device holds a few actions that β chose for it, with their
rewards; every reward is known, so the policy that each estimator must end at is known too. The derivations are in
``docs/formulas/paper.md``.

==============  =======================================  ============================================
simulation      logged by                                rewards
==============  =======================================  ============================================
``exp1``        β_i = (11 − i)/55: the better, the rarer  r_i = i
``exp2``        β uniform                                10, 9, and 1 for the eight others
==============  =======================================  ============================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from rich.table import Table

from common.catalogue import Catalogue
from common.model import HEADS
from common.settings import Head, Settings, parse_flat
from common.slate import inclusion
from simulations.central import train_centrally
from simulations.datasets.interactions import Interactions
from simulations.federated import Trained, train

ITEMS = 10
SLATE = 2
"""Items of a shown set in `exp2`: that many independent draws from π."""
CAP = float(np.exp(3))
"""The paper's cap of w, below the largest weight of `exp1`, 1/β₁₀ = 55."""
ROUNDS = 120

_DEVICES, _ACTIONS = 1000, 16
_LOG = 0x6C6F67

_SHARED: dict[str, Any] = {
    "model.cell": "none",
    "model.input_width": 1,
    "model.state_width": 1,
    "model.user_width": 1,
    # π is everybody's: no embedding is adapted, and all of a device's actions make its update.
    "training.user_steps": 0,
    "training.support_fraction": 0,
    # Rewards are mapped to [-5, 5] with 0 in the middle: r/2, which moves no policy.
    "data.rating_range": "-10,10",
    "privacy.mechanism": "none",
    "privacy.clip_norm": float("inf"),
    "objective.softmax": "full",
    "objective.behaviour": "frequency",
    "objective.self_normalised": False,
    "objective.weight_cap": float("inf"),
    "objective.warmup_rounds": 0,
    # Adam, since an item's gradient shrinks with its probability: plain gradient descent needs far more rounds for the
    # last items, or steps so long that π has settled, on item 8 of exp1, before β is learned. Steps of .15, since with
    # longer ones π still swings about exp2's K = 2 at the end. Nine devices in ten, 14,400 actions a round, since the
    # noise of smaller cohorts moves that policy: one device in two by a standard deviation of .01.
    "training.cohort_rate": 0.9,
    "training.optimizer": "adam",
    "training.learning_rate": 0.15,
    "training.rounds": ROUNDS,
    "training.checkpoint_every": ROUNDS,
}


@dataclass(frozen=True)
class Case:
    """One way of training on one simulation's logs.

    Attributes:
        settings: what it changes of the settings that all share.
        exact: (10,) the policy it must end at.
    """

    name: str
    settings: dict[str, Any]
    exact: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """Ten items, who logged them, and what each earns.

    Attributes:
        rewards: (10,) in [1, 10].
        behaviour: (10,) β.
        slate: whether the value of a shown set is of interest.
    """

    name: str
    rewards: np.ndarray
    behaviour: np.ndarray
    slate: bool
    cases: Sequence[Case]

    def log(self, seed: int) -> Interactions:
        """What β makes the devices do: independent draws, whatever the device."""
        generator = np.random.default_rng([_LOG, seed])
        items = generator.choice(ITEMS, _DEVICES * _ACTIONS, p=self.behaviour).astype(np.int32)
        names = np.array([f"item {item + 1}" for item in range(ITEMS)])
        return Interactions(
            offsets=np.arange(0, len(items) + 1, _ACTIONS),
            items=items,
            ratings=self.rewards[items].astype(np.float32),
            timestamps=np.zeros(len(items), np.int64),
            user_ids=np.arange(_DEVICES).astype(str),
            catalogue=Catalogue(names, names),
        )

    def worth(self, policy: np.ndarray) -> dict[str, float]:
        """E[r] of one item drawn from the (10,) policy and, with `slate`, the expected sum over a set of two draws."""
        worth = {"value": float(policy @ self.rewards)}
        if self.slate:
            shown = inclusion(torch.from_numpy(policy).log(), SLATE).numpy()
            worth["slate_value"] = float(shown @ self.rewards)
        return worth


def _only(probabilities: dict[int, float]) -> np.ndarray:
    """(10,) a policy from the probabilities of its items, which are counted from 1."""
    policy = np.zeros(ITEMS)
    for item, probability in probabilities.items():
        policy[item - 1] = probability
    return policy


_FALLING = np.arange(ITEMS, 0, -1) / 55
_RISING = np.arange(1.0, ITEMS + 1)
_CAPPED = CAP * _FALLING[9] * 10 / 9

SIMULATIONS = (
    Simulation(
        "exp1",
        _RISING,
        _FALLING,
        slate=False,
        cases=(
            Case("uncorrected", {"objective.estimator": "reinforce"}, _FALLING * _RISING / (_FALLING @ _RISING)),
            Case("corrected", {"objective.estimator": "off-policy"}, _only({10: 1})),
            Case(
                "corrected_capped",
                {"objective.estimator": "off-policy", "objective.weight_cap": CAP},
                _only({9: 1 - _CAPPED, 10: _CAPPED}),
            ),
        ),
    ),
    Simulation(
        "exp2",
        np.array([10.0, 9.0] + [1.0] * 8),
        np.full(ITEMS, 1 / ITEMS),
        slate=True,
        cases=(
            Case("k1", {"objective.estimator": "top-k", "objective.slate_size": 1}, _only({1: 1})),
            Case("k2", {"objective.estimator": "top-k", "objective.slate_size": 2}, _only({1: 10 / 19, 2: 9 / 19})),
        ),
    ),
)


def settings_of(case: Case, seed: int) -> Settings:
    """The settings of one training."""
    return parse_flat(_SHARED | case.settings | {"training.seed": seed})


def trainings(seeds: int) -> int:
    """How many federated trainings of :data:`ROUNDS` rounds :func:`run_paper` makes."""
    return seeds * sum(len(simulation.cases) for simulation in SIMULATIONS)


def run_paper(seeds: int, on_round: Callable[[int, str], None]) -> dict[str, Any]:
    """Train every case with each of the seeds 0, 1, …: the answer of `fedtopk paper`, by simulation and case.

    Args:
        on_round: called after each federated round, with how many there were so far and what is being trained.
    """
    done = count(1)
    answer: dict[str, Any] = {}
    for simulation in SIMULATIONS:
        answer[simulation.name] = {}
        for case in simulation.cases:
            pairs = [
                _train_both(simulation, case, seed, lambda what: on_round(next(done), what)) for seed in range(seeds)
            ]
            federated, central = zip(*pairs, strict=True)
            answer[simulation.name][case.name] = summarise(simulation, federated) | {
                "central": summarise(simulation, central),
                "exact": _policy(simulation, case.exact),
                "logged": _policy(simulation, simulation.behaviour),
            }
    return answer


def _train_both(
    simulation: Simulation, case: Case, seed: int, on_round: Callable[[str], None]
) -> tuple[Trained, Trained]:
    """The same logs trained on federatedly and centrally."""
    settings, log, what = settings_of(case, seed), simulation.log(seed), f"{simulation.name} {case.name}, seed {seed}"
    return train(settings, log, on_round=lambda *_: on_round(what)), train_centrally(settings, log)


def probabilities(trained: Trained, head: Head) -> np.ndarray:
    """(10,) π or β. There is no state, so each item's bias alone is its logit."""
    logits = trained.parameters[HEADS[head]][:, -1]
    return torch.softmax(logits.double(), 0).numpy()


def summarise(simulation: Simulation, trained: Sequence[Trained]) -> dict[str, Any]:
    """Means over seeds of the policies, of their values and, where one is learned, of β."""
    policies = [probabilities(one, "policy") for one in trained]
    worths = [simulation.worth(policy) for policy in policies]
    summary: dict[str, Any] = {"policy": np.mean(policies, 0).tolist()}
    summary |= {name: float(np.mean([worth[name] for worth in worths])) for name in worths[0]}
    summary |= {
        "value_std": float(np.std([worth["value"] for worth in worths])),
        "seeds": len(trained),
        "policy_by_seed": [policy.tolist() for policy in policies],
    }
    if "frequency" in trained[0].settings.heads:
        learned = np.mean([probabilities(one, "frequency") for one in trained], 0)
        summary["behaviour"] = _policy(simulation, learned)
    return summary


def _policy(simulation: Simulation, policy: np.ndarray) -> dict[str, Any]:
    return {"policy": policy.tolist()} | simulation.worth(policy)


def results_table(answer: dict[str, Any]) -> Table:
    """Values of all cases, federated, central and exact; and how far the worst seed's policy is off, at any item."""
    caption = "± standard deviation over seeds; off by: largest of |π − exact|"
    table = Table(title="Expected reward of one item, and of a set", caption=caption)
    for heading in ("", "federated", "central", "exact", "off by"):
        table.add_column(heading, no_wrap=True)
    for simulation in SIMULATIONS:
        cases = answer[simulation.name]
        logged = next(iter(cases.values()))["logged"]
        table.add_row(f"{simulation.name} β itself", "", "", f"{logged['value']:.3f}", "")
        for name, row in cases.items():
            arms = (row, row["central"])
            worst = np.abs(np.array(row["policy_by_seed"]) - row["exact"]["policy"]).max()
            spread = (f"{arm['value']:.3f} ± {arm['value_std']:.3f}" for arm in arms)
            table.add_row(f"{simulation.name} {name}", *spread, f"{row['exact']['value']:.3f}", f"{worst:.3f}")
            if simulation.slate:
                sets = (f"{arm['slate_value']:.3f}" for arm in (*arms, row["exact"]))
                table.add_row(f"{simulation.name} {name}, set of {SLATE}", *sets, "")
        table.add_section()
    return table
