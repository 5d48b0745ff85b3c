"""Every setting: one frozen pydantic tree, whatever it was read from.

A TOML file, ``--set a.b=c`` on the command line and the flat run configuration of Flower all end in
:class:`Settings`. Unknown keys, wrong types and values out of range raise :class:`SettingsError` with the key,
the value and what was expected.

A setting is here only if it changes the result of a run; how many processes compute it, say, does not.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.errors import SettingsError

_COUNTED = ("popularity", "in-batch")
CLIP_RANGE = 1e4
"""How many times larger or smaller than the first one an adaptive clip may become."""
_WHOLE = 2**62
"""More interactions than any history has."""
Head = Literal["policy", "behaviour", "frequency", "critic"]
Estimator = Literal["cross-entropy", "likelihood", "reinforce", "off-policy", "top-k", "direct"]
Group = Literal["items", "cell", "policy", "behaviour", "critic"]
"""Of the shared parameters."""


def _two_numbers(value: Any) -> tuple[float, float]:
    """Flower's flat configuration has no lists: ``"0.5,5"`` stands for ``[0.5, 5]`` there."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"Expected data.rating_range={value!r} to be two finite numbers, the lower one first.")
    return low, high


def _several(value: Any) -> Any:
    """Of words: ``"items,cell"`` in Flower's flat configuration and on the command line stands for a list of two."""
    if isinstance(value, str):
        return tuple(filter(None, (word.strip() for word in value.split(","))))
    return tuple(value) if isinstance(value, list) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Columns(_Section):
    """Names of the columns of a csv or parquet file; those of the items' public text are empty where there are none."""

    user: str = "userId"
    item: str = "movieId"
    rating: str = "rating"
    timestamp: str = "timestamp"
    title: str = ""
    labels: str = ""
    """Genres, say, separated by ``|``."""


class DataSettings(_Section):
    """Which interactions the devices hold."""

    source: Literal["movielens-small", "movielens", "csv", "synthetic"] = "movielens-small"
    path: str = ""
    """File or folder of `movielens` and `csv`; empty for the others."""
    columns: Columns = Columns()
    items: int = Field(5000, ge=0)
    """Size of the catalogue: the most frequent items; 0 keeps all."""
    users: int = Field(0, ge=0)
    """Number of users: how many `synthetic` makes (0: 1,000), the first so many of any other source (0: all)."""
    rating_range: Annotated[tuple[float, float], BeforeValidator(_two_numbers)] = (0.5, 5.0)
    """Lowest and highest rating that may occur; a public input, never taken from the data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source in ("movielens", "csv") and not self.path:
            raise ValueError(f"Expected data.path='' to name the file or folder of data.source={self.source}.")
        return self


class ModelSettings(_Section):
    """Widths of the recommender."""

    cell: Literal["cfn", "gru", "none"] = "cfn"
    """`none` has no state: one policy for all but for the user embeddings."""
    items: Literal["table", "features"] = "table"
    """What the tables with a row per item are made of: numbers of each item's own, or public features of the items
    (title, year, labels, place in the order of frequency) times trained numbers that all items share."""
    feature_width: int = Field(64, ge=16, le=4096)
    """Public features of an item."""
    rank: int = Field(0, ge=0, le=4096)
    """Rank of what is trained for each item: 0: full with `table`, nothing with `features`."""
    input_width: int = Field(32, ge=1, le=4096)
    input_rows: int = Field(0, ge=0, le=8192)
    """Rows of the cell's table of items: 0: one each; else items share so many by a public hash, in which the most
    frequent ones do not meet each other."""
    state_width: int = Field(64, ge=1, le=4096)
    user_width: int = Field(16, ge=1, le=4096)
    ratings: bool = True
    """Whether the cell reads ratings beside items; clicks, which are all alike, can do without."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)

    @property
    def whole(self) -> bool:
        """Whether each table of items is trained as it is."""
        return self.items == "table" and not self.rank

    @model_validator(mode="after")
    def _check(self) -> Self:
        widths = {"input_width": self.input_width, "state_width": self.state_width}
        for name, width in widths.items():
            if self.rank >= width:
                raise ValueError(f"Expected model.rank={self.rank} < model.{name}={width}: full rank is model.rank=0.")
        if self.items == "features" and self.input_rows:
            raise ValueError(
                f"Expected model.input_rows={self.input_rows} to be 0 with model.items=features: there are features "
                "of items, not of rows that items share."
            )
        return self


class ObjectiveSettings(_Section):
    """What a device's gradient is the gradient of."""

    estimator: Estimator = "top-k"
    slate_size: int = Field(10, ge=1)
    """K, the number of items shown at once."""
    discount: float = Field(0.0, ge=0, le=1)
    """γ of the return, per interaction."""
    weight_cap: float = Field(20.0, gt=0)
    """c in min(π/β, c); e³ ≈ 20 in the paper; inf for none."""
    self_normalised: bool = True
    """Divide the weights by their mean over the device's own steps."""
    behaviour: Literal["neural", "frequency"] = "neural"
    """What β is: a softmax on the shared state, or each item's frequency whatever the state (Strehl et al. 2010)."""
    warmup_rounds: int = Field(200, ge=0)
    """First rounds in which the correction rests (`warmup`), while β, or a critic that π is to build on, learns."""
    warmup: Literal["reinforce", "inverse-propensity"] = "reinforce"
    """Weights of those rounds: 1, or min(1/(Aβ), c), what the uniform policy would have."""
    likelihood_weights: Literal["reward", "inverse-propensity"] = "reward"
    """What the estimator `likelihood` weighs log π by: the reward alone, or times min(1/(Aβ), c)."""
    critic: Literal["none", "baseline", "doubly-robust"] = "none"
    """What the learned reward model q(s, a) takes out of the variance."""
    critic_start: float = Field(0.5, gt=0, lt=1)
    """What q starts with, as a share of the highest reward, for every item: a public guess. Noise keeps it where little
    is known, and items that nobody looked at should not seem better than those that are."""
    prior: Literal["none", "critic"] = "none"
    """What π's logits are added to: nothing, or the critic's over `prior_temperature`; the critic then shapes the
    state, and π learns what is left to be gained."""
    prior_temperature: float = Field(0.25, gt=0, allow_inf_nan=False)
    watch: bool = False
    """Train β and the critic also where nothing uses them, on states that they do not shape: to see what they say."""
    entropy_bonus: float = Field(0.0, ge=0, allow_inf_nan=False)
    """η: adds η times π's entropy to the value of each step; exact in expectation where the estimator is corrected."""
    trust_region: Literal["none", "behaviour", "start"] = "none"
    """From what π may not stray: from β, or from the round's starting policy."""
    trust_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """κ: what a unit of the KL divergence costs there."""
    clip_ratio: float = Field(math.inf, gt=0)
    """ε of PPO: steps whose π has left the starting policy's by a factor outside of 1 ± ε, in the direction that the
    gradient goes on in, count no more; inf for none."""
    reuse: Literal["plain", "importance"] = "plain"
    """How later local steps use the same logs: as they are, or weighted by π / π_start (`reinforce`; the corrected
    estimators do so anyway)."""
    softmax: Literal["full", "sampled", "nce"] = "sampled"
    """How log π and log β are normalised: over all items, over sampled ones, or learned (noise contrast)."""
    negatives: int = Field(1024, ge=1)
    """Shared negatives a round, for all but the full softmax."""
    negatives_from: Literal["log-uniform", "uniform", "popularity", "in-batch"] = "log-uniform"
    """What they are drawn from: rank by frequency, all items in turns, the learned frequencies, or the device's own
    other items."""
    slice_items: int = Field(0, ge=0)
    """Items of the public slice that a round trains on, drawn anew each time; 0: all. The softmax is then over the
    slice's items, or over negatives among them, and corrected to be over all."""

    @property
    def corrected(self) -> bool:
        """Whether the estimator weighs by π/β."""
        return self.estimator in ("off-policy", "top-k")

    @property
    def head_of_behaviour(self) -> Head:
        """Which head β is."""
        return "behaviour" if self.behaviour == "neural" else "frequency"

    @property
    def needs_behaviour(self) -> bool:
        """Whether β is in a weight at all."""
        return self.corrected or (self.estimator == "likelihood" and self.likelihood_weights != "reward")

    @model_validator(mode="after")
    def _check(self) -> Self:
        article = ("reinforce", "off-policy", "top-k")
        if self.estimator not in article:
            idle = {"critic": "none", "entropy_bonus": 0.0, "trust_region": "none", "clip_ratio": math.inf}
            if self.estimator == "direct":
                idle["prior"] = "none"
            for name, rest in idle.items():
                if getattr(self, name) != rest:
                    raise ValueError(
                        f"Expected objective.{name}={getattr(self, name)} only with one of the estimators "
                        f"{', '.join(article)}: objective.estimator={self.estimator} has no use for it."
                    )
        if not self.corrected:
            for name, needs in {"critic": "doubly-robust", "trust_region": "start"}.items():
                if getattr(self, name) == needs:
                    raise ValueError(
                        f"Expected objective.{name}={needs} only with off-policy or top-k: objective.estimator="
                        f"{self.estimator} has no weights π/β."
                    )
        if self.critic != "none" and self.discount:
            raise ValueError(
                f"Expected objective.discount={self.discount:g} to be 0 with objective.critic={self.critic}: the "
                "critic predicts rewards, not returns."
            )
        if self.negatives_from == "in-batch" and (self.softmax == "nce" or self.critic != "none"):
            raise ValueError(
                "Expected objective.negatives_from=in-batch only with the sampled softmax and without a critic: "
                f"found softmax={self.softmax} and critic={self.critic}."
            )
        return self


class RewardSettings(_Section):
    """Where rewards come from."""

    source: Literal["logged", "critic"] = "logged"
    """The logged feedback, or what the learned reward model q(s, a) says of the logged item (RecNN's use of it)."""


class TrainingSettings(_Section):
    """The rounds, and the work of one device in one of them."""

    rounds: int = Field(400, ge=1)
    cohort_rate: float = Field(0.1, gt=0, le=1)
    """q: the probability with which each device takes part in a round, independently; with `privacy.mechanism=tree`
    each takes part in every ⌊1/q⌋-th round, in turns."""
    coins: Literal["server", "device"] = "server"
    """Who flips it: the server, which has one exchange less to make; or each device, so that no server can choose whom
    to ask. Neither lowers ε_server."""
    window: int = Field(64, ge=2)
    """Longest stretch of its history that a device trains on in one round."""
    support_fraction: float = Field(0.25, ge=0, lt=1)
    """Share of the window, its older part, that adapts the user embedding; the rest makes the shared update."""
    user_steps: int = Field(1, ge=0)
    """Local gradient steps on the user embedding."""
    user_learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    user_weight_decay: float = Field(3.0, ge=0, allow_inf_nan=False)
    """Pull of the user embedding towards 0: without it, it learns the device's own history by heart."""
    local_steps: int = Field(1, ge=1)
    """Local gradient steps on the shared part; above 1 a model per device is held in memory."""
    local_learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = "adam"
    learning_rate: float = Field(0.004, gt=0, le=1e6)
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on from there: as it is, or down to 0 over the rounds along half a cosine."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    start: Literal["random", "popularity"] = "random"
    """Where the items' biases start: alike, or, after a first round that releases a noisy histogram of the devices'
    interactions in place of a gradient, at each item's popularity (and the critic's at how much it is liked)."""
    frozen: Annotated[tuple[Group, ...], BeforeValidator(_several)] = ()
    """Groups of parameters that stay as they were drawn: neither trained nor uploaded, nor any part of the noise."""
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.user_learning_rate * self.user_weight_decay >= 2:
            raise ValueError(
                f"Expected training.user_learning_rate={self.user_learning_rate} × "
                f"user_weight_decay={self.user_weight_decay} < 2: user embeddings would grow without end."
            )
        return self


class GroupScale(_Section):
    """Public factors applied to the groups of the gradient before the one joint clip and undone after decoding."""

    items: float = Field(1.0, gt=0, allow_inf_nan=False)
    cell: float = Field(1.0, gt=0, allow_inf_nan=False)
    policy: float = Field(1.0, gt=0, allow_inf_nan=False)
    behaviour: float = Field(1.0, gt=0, allow_inf_nan=False)
    critic: float = Field(1.0, gt=0, allow_inf_nan=False)


class PrivacySettings(_Section):
    """The mechanism and the budget."""

    mechanism: Literal["skellam", "tree", "none"] = "skellam"
    """`tree`: noise that is correlated between rounds and added by the server, for devices that take turns; no sampling
    is assumed, and no ε_server is offered."""
    target_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    """Budget of ε_model; the noise multiplier is found for it unless one is given."""
    noise_multiplier: float = Field(0.0, ge=0, allow_inf_nan=False)
    """z; 0: found from the target. Given together with a target, the run stops when the target is spent."""
    clip_norm: float = Field(1.0, gt=0)
    """C, or the first one where it adapts; inf switches clipping off (only without noise, in the `central` kind)."""
    clip_quantile: float = Field(0.0, ge=0, lt=1)
    """γ: C goes from round to round to where this share of the updates is within it, as their noisy and charged count
    says; 0: C is fixed."""
    clip_learning_rate: float = Field(0.2, gt=0, allow_inf_nan=False)
    """η: a round moves log C by η times what the share is off by."""
    group_scale: GroupScale = GroupScale()
    delta: float = Field(0.0, ge=0, lt=1)
    """δ of (ε, δ); 0: N^-1.1 for N devices."""
    randomness: Literal["system", "seeded"] = "system"


class AggregationSettings(_Section):
    """How the sum over a cohort comes about."""

    kind: Literal["central", "plain", "secure"] = "central"
    corrupt_fraction: float = Field(0.1, ge=0, lt=0.5)
    """γ: share of a cohort that may collude with the server."""
    dropout_fraction: float = Field(0.1, ge=0, lt=0.5)
    """δ of secure aggregation: share of a cohort that may drop out."""
    bits: Literal[0, 16, 20, 32] = 0
    """Width of one coordinate on the wire; 0: the smallest that the noise and the cohort allow."""
    hybrid: bool = False
    """Whether the shares that devices send each other travel under ML-KEM-768 as well as X25519."""


class GuardSettings(_Section):
    """What a device insists on, beside `privacy.clip_norm` and the fractions and bits of `aggregation`."""

    minimum_cohort: int = Field(1, ge=1)
    """A smaller roster uploads nothing; its round releases noise alone. Above 1 one user can decide whether the others
    are in the sum: the budget refuses a population and a rate at which that is likely."""
    maximum_cohort: int = Field(100_000, ge=1)
    """A device does not join a larger roster: its share of the noise falls with the roster's size."""
    minimum_noise_multiplier: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Least z."""
    maximum_clip: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest C of any round; 0: `privacy.clip_norm`, or 10⁴ times it where C adapts."""
    maximum_contributions: int = Field(0, ge=0)
    """κ, how often a device uploads; 0: as often as it is asked, with `privacy.mechanism=tree` once in ⌊1/q⌋ rounds."""
    maximum_epsilon_server: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Most that all uploads of a device may tell the server, as ε at `privacy.delta`, or 1e-6 without one; 0: any."""
    trust_server: bool = False
    """Whether devices take part where the server adds the noise, and could see their sum without it
    (`privacy.mechanism=tree`)."""


class EvaluationSettings(_Section):
    """How a simulation is evaluated."""

    protocol: Literal["leave-last-out", "time-split"] = "leave-last-out"
    every: int = Field(0, ge=0)
    """Validate every so many rounds; 0: only at the end."""
    users: int = Field(20_000, ge=0)
    """Evaluate at most so many users, drawn by the seed; 0: all."""


class Settings(_Section):
    """All settings of a run."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    reward: RewardSettings = RewardSettings()
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = PrivacySettings()
    aggregation: AggregationSettings = AggregationSettings()
    guard: GuardSettings = GuardSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.isinf(self.privacy.clip_norm) and (self.private or self.aggregation.kind != "central"):
            raise ValueError(
                "Expected privacy.clip_norm=inf only with privacy.mechanism=none and aggregation.kind=central."
            )
        if math.isinf(self.privacy.clip_norm) and self.privacy.clip_quantile:
            raise ValueError(
                f"Expected privacy.clip_norm=inf to be finite with privacy.clip_quantile={self.privacy.clip_quantile}: "
                "it is where C begins."
            )
        if self.privacy.clip_norm > self.largest_clip:
            raise ValueError(
                f"Expected guard.maximum_clip={self.guard.maximum_clip} to be 0 or at least privacy.clip_norm="
                f"{self.privacy.clip_norm}."
            )
        if self.aggregation.corrupt_fraction + self.aggregation.dropout_fraction >= 1 / 2:
            raise ValueError(
                f"Expected aggregation.corrupt_fraction={self.aggregation.corrupt_fraction} + "
                f"dropout_fraction={self.aggregation.dropout_fraction} < 0.5."
            )
        if self.reward.source == "critic" and self.objective.discount:
            raise ValueError(
                f"Expected objective.discount={self.objective.discount:g} to be 0 with reward.source=critic: the "
                "critic predicts rewards, not returns."
            )
        if self.privacy.mechanism == "tree":
            for name, found, needed in (
                ("training.coins", self.training.coins, "server"),
                ("objective.slice_items", self.objective.slice_items, 0),
                ("privacy.clip_quantile", self.privacy.clip_quantile, 0),
                ("training.start", self.training.start, "random"),
            ):
                if found != needed:
                    raise ValueError(
                        f"Expected {name}={found} to be {needed} with privacy.mechanism=tree: devices take turns, and "
                        "a round's noise takes back that of earlier ones on the same coordinates, in the same units."
                    )
        if self.objective.slice_items == 1:
            raise ValueError("Expected objective.slice_items=1 to be 0 or at least 2: a choice needs another item.")
        if self.objective.slice_items and self.model.items == "features":
            raise ValueError(
                f"Expected objective.slice_items={self.objective.slice_items} to be 0 with model.items=features: what "
                "is trained has no row per item."
            )
        if self.objective.slice_items and self.model.cell != "none" and not self.model.input_rows:
            raise ValueError(
                f"Expected model.input_rows=0 > 0 with objective.slice_items={self.objective.slice_items}: the cell's "
                "table of items would still be as large as the catalogue."
            )
        if self.objective.softmax == "nce" and not self.model.whole:
            raise ValueError(
                "Expected objective.softmax=nce only with model.items=table and model.rank=0: it starts from biases of "
                "its own for each item."
            )
        groups = {"behaviour" if head == "frequency" else head for head in self.heads} | {"cell"}
        if groups | ({"items"} if self.model.cell != "none" else set()) <= set(self.training.frozen):
            raise ValueError(f"Expected training.frozen={','.join(self.training.frozen)} to leave a group to train.")
        if self.training.local_steps == 1:
            idle = {"trust_region": "start", "reuse": "importance", "clip_ratio": self.objective.clip_ratio}
            for name, active in idle.items():
                if getattr(self.objective, name) == active != math.inf:
                    raise ValueError(
                        f"Expected training.local_steps=1 > 1 with objective.{name}={active}: the first step is taken "
                        "where the round starts."
                    )
        return self

    @property
    def heads(self) -> tuple[Head, ...]:
        """The tables with a row per item that the objective trains beside the input embedding, in their order."""
        objective = self.objective
        behaviour = objective.needs_behaviour or (objective.watch and objective.estimator != "direct")
        neural = behaviour and objective.behaviour == "neural"
        counted = (
            objective.estimator != "direct" and objective.softmax != "full" and objective.negatives_from in _COUNTED
        )
        wanted: dict[Head, bool] = {
            "policy": objective.estimator != "direct",
            "behaviour": neural,
            "frequency": counted or (behaviour and not neural),
            "critic": self.needs_critic or objective.watch,
        }
        return tuple(head for head, present in wanted.items() if present)

    @property
    def serving_head(self) -> Head:
        """The head that items are ranked by."""
        return "critic" if self.objective.estimator == "direct" else "policy"

    @property
    def needs_critic(self) -> bool:
        """Whether the critic ranks, rewards or corrects at all."""
        objective = self.objective
        asked = objective.critic != "none" or objective.prior == "critic" or self.reward.source == "critic"
        return asked or objective.estimator == "direct"

    @property
    def largest_clip(self) -> float:
        """Above which no round's C goes."""
        return self.guard.maximum_clip or self.privacy.clip_norm * (CLIP_RANGE if self.privacy.clip_quantile else 1)

    @property
    def private(self) -> bool:
        """Whether what is released carries noise."""
        return self.privacy.mechanism != "none"

    def counting(self, round_: int) -> bool:
        """Whether a round, from 1, releases a histogram in place of a gradient (:mod:`common.popularity`)."""
        return self.training.start == "popularity" and round_ == 1

    def window(self, round_: int) -> int:
        """Longest stretch of its history that a device reads in a round: all of it where it counts."""
        return _WHOLE if self.counting(round_) else self.training.window

    @property
    def separation(self) -> int:
        """s = ⌊1/q⌋, rounds from one turn of a device to its next one; 0 where coins decide who takes part."""
        return math.floor(1 / self.training.cohort_rate + 1e-9) if self.privacy.mechanism == "tree" else 0

    @property
    def turns(self) -> int:
        """κ = ⌈T/s⌉, how often a device takes part at most; 0 where coins decide."""
        return -(-self.training.rounds // self.separation) if self.separation else 0

    @property
    def rate(self) -> float:
        """Part of all devices that is expected in a round's cohort: q, or 1/s where devices take turns."""
        return 1 / self.separation if self.separation else self.training.cohort_rate

    @property
    def reproducible(self) -> bool:
        """Whether every random choice follows from `training.seed`: no noise, or noise that is asked to be seeded."""
        return not self.private or self.privacy.randomness == "seeded"

    def to_toml(self) -> str:
        """The complete tree as TOML; :func:`load_settings` reads it back to an equal value."""
        return tomli_w.dumps(self.model_dump())

    def flat(self) -> dict[str, int | float | bool | str]:
        """The tree as Flower's flat run configuration: ``{"training.rounds": 300, ...}``."""

        def leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
            if isinstance(value, dict):
                for key, inner in value.items():
                    yield from leaves(f"{prefix}.{key}" if prefix else key, inner)
            elif isinstance(value, list | tuple):
                yield prefix, ",".join(str(part) for part in value)
            else:
                yield prefix, value

        return dict(leaves("", self.model_dump()))


def parse_settings(tree: Mapping[str, Any]) -> Settings:
    """Validate a nested mapping. Raises :class:`SettingsError` naming each offending key."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(" ".join(_explain(detail) for detail in error.errors())) from None


OUT = "out"
"""The one key of Flower's run configuration that is no setting: it names the run folder."""


def parse_flat(flat: Mapping[str, Any]) -> Settings:
    """Validate Flower's flat run configuration, whose keys are dotted paths; :data:`OUT` is passed over."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        if key != OUT:
            _put(tree, key, value)
    return parse_settings(tree)


def load_toml(text: str) -> Settings:
    """Read the TOML of :meth:`Settings.to_toml`. Raises :class:`SettingsError`."""
    try:
        return parse_settings(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"Expected settings as TOML: {error}.") from None


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Read a TOML file (defaults without one) and apply ``a.b=c`` overrides in order.

    The value of an override is TOML where it parses as TOML, and the text itself otherwise or where a text is expected.
    Raises :class:`SettingsError`.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise SettingsError(f"Expected {path} to be a readable TOML file: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"Expected {path} to be valid TOML: {error}.") from None
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not all(key.split(".")):
            raise SettingsError(f"Expected --set {override!r} to look like section.key=value.")
        _put(tree, key, _parse_value(text, _TYPES.get(key)))
    return parse_settings(tree)


def _parse_value(text: str, expected: type | None) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = text
    if expected is str and not isinstance(value, str):
        return text
    if expected is float and isinstance(value, str):  # TOML has no .5
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"Unknown setting {key}: {parent} is a value, not a section.")
        tree = inner
    tree[leaf] = value


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    kind, value, message = detail["type"], detail["input"], str(detail["msg"])
    if kind == "extra_forbidden":
        while isinstance(value, dict) and value:
            inner, value = next(iter(value.items()))
            key = f"{key}.{inner}"
        close = difflib.get_close_matches(key, _TYPES, n=1)
        hint = f"did you mean {close[0]}?" if close else "the settings.toml of any run lists all."
        return f"Unknown setting {key}={value!r}: {hint}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "model_type":
        return f"Expected {key}={value!r} to be a section of settings."
    return f"Expected {key}={value!r}: {message[0].lower()}{message[1:]}."


_LISTS = ("data.rating_range", "training.frozen")

_TYPES = {key: type(value) for key, value in Settings().flat().items() if key not in _LISTS}
"""Every setting with the type of its default."""
