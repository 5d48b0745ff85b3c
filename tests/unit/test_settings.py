"""Every way into the settings ends in the same value, and every bad input in a message one can act on."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import SettingsError
from common.settings import Settings, load_settings, parse_flat, parse_settings

LISTED = "the settings.toml of any run lists all."
NOT_REFUSED = pytest.fail.Exception
quick = hypothesis_settings(max_examples=40, deadline=None)


def positive(maximum: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(min_value=0, exclude_min=True, max_value=maximum)


def sections(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the given fields."""
    return st.fixed_dictionaries({}, optional=fields)


def trees() -> st.SearchStrategy[dict[str, Any]]:
    """Valid settings, as nested dictionaries."""
    bounds = st.tuples(st.floats(-100, 0), st.floats(0.5, 100))
    return sections(
        data=sections(path=st.text(), rating_range=bounds, columns=sections(user=st.text(), item=st.text())),
        model=sections(
            cell=st.sampled_from(["cfn", "gru", "none"]), input_width=st.integers(1, 4096), temperature=positive()
        ),
        objective=sections(
            estimator=st.sampled_from(["cross-entropy", "likelihood", "reinforce", "off-policy", "top-k"]),
            weight_cap=positive() | st.just(math.inf),
            discount=st.floats(0, 1),
            self_normalised=st.booleans(),
        ),
        training=sections(cohort_rate=positive(1), seed=st.integers(0, 2**63 - 1), learning_rate=positive()),
        privacy=sections(clip_norm=positive(), delta=st.floats(0, 0.5), group_scale=sections(policy=positive())),
        aggregation=sections(bits=st.sampled_from([0, 16, 20, 32])),
    )


def failure(*overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, overrides)
    return str(caught.value)


def overridden(override: str) -> Any:
    """The value that the overridden key has afterwards."""
    value: Any = load_settings(None, [override])
    for name in override.partition("=")[0].strip().split("."):
        value = getattr(value, name)
    return value


@quick
@given(trees())
def test_toml_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    settings = parse_settings(tree)
    file = tmp_path_factory.mktemp("settings") / "settings.toml"
    file.write_text(settings.to_toml(), encoding="utf-8")
    assert load_settings(file) == settings


@quick
@given(trees())
def test_flat_configuration_reads_back_equal(tree: dict[str, Any]) -> None:
    settings = parse_settings(tree)
    flat = settings.flat()
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert parse_flat(flat) == settings


def test_no_clip_survives_both_ways(tmp_path: Path) -> None:
    settings = load_settings(None, ["privacy.clip_norm=inf", "privacy.mechanism=none"])
    (tmp_path / "settings.toml").write_text(settings.to_toml(), encoding="utf-8")
    assert load_settings(tmp_path / "settings.toml") == parse_flat(settings.flat()) == settings
    assert settings.privacy.clip_norm == math.inf


def test_flat_configuration_names_every_leaf_by_its_path() -> None:
    flat = parse_settings({"training": {"rounds": 7}}).flat()
    assert flat["training.rounds"] == 7
    assert flat["data.columns.user"] == "userId"
    assert flat["privacy.group_scale.policy"] == 1.0
    assert flat["data.rating_range"] == "0.5,5.0"


def test_flat_configuration_may_be_partial() -> None:
    assert parse_flat({"training.rounds": 5}) == parse_settings({"training": {"rounds": 5}})
    assert parse_flat({}) == Settings()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.rounds=7", 7),
        ("training.cohort_rate=0.5", 0.5),
        ("training.learning_rate=1", 1.0),
        ("training.learning_rate = 1e-3", 1e-3),
        ("model.cell=gru", "gru"),
        ('model.cell="gru"', "gru"),
        ("objective.estimator=cross-entropy", "cross-entropy"),
        ("objective.self_normalised=false", False),
        ("objective.weight_cap=inf", math.inf),
        ("data.rating_range=1,5", (1.0, 5.0)),
        ("data.rating_range=[1, 5]", (1.0, 5.0)),
        ("data.rating_range=-1.5, 5", (-1.5, 5.0)),
        ("data.path=/data/a=b.csv", "/data/a=b.csv"),
        ("data.path=", ""),
        ("data.columns.user=user id", "user id"),
        ("privacy.group_scale.policy=0.25", 0.25),
        ("aggregation.bits=20", 20),
    ],
)
def test_override_sets_a_typed_value(override: str, value: Any) -> None:
    assert overridden(override) == value
    assert type(overridden(override)) is type(value)


@pytest.mark.parametrize(("override", "value"), [("data.path=2024", "2024"), ("data.columns.user=1", "1")])
def test_override_of_a_text_needs_no_quotes(override: str, value: str) -> None:
    assert overridden(override) == value


def test_overrides_apply_in_order_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nrounds = 5\nseed = 9\n", encoding="utf-8")
    settings = load_settings(file, ["training.rounds=6", "training.rounds=7"])
    assert (settings.training.rounds, settings.training.seed) == (7, 9)


BAD = {
    "foo=1": f"Unknown setting foo=1: {LISTED}",
    "training.round=1": "Unknown setting training.round=1: did you mean training.rounds?",
    "privacy.group_scale.cel=2": "Unknown setting privacy.group_scale.cel=2: did you mean privacy.group_scale.cell?",
    "training.rounds=many": "Expected training.rounds='many': input should be a valid integer.",
    "training.rounds=2.5": "Expected training.rounds=2.5: input should be a valid integer.",
    "objective.self_normalised=2": "Expected objective.self_normalised=2: input should be a valid boolean.",
    "training.cohort_rate=1.5": "Expected training.cohort_rate=1.5: input should be less than or equal to 1.",
    "training.cohort_rate=0": "Expected training.cohort_rate=0: input should be greater than 0.",
    "privacy.target_epsilon=0": "Expected privacy.target_epsilon=0: input should be greater than 0.",
    "privacy.target_epsilon=-1": "Expected privacy.target_epsilon=-1: input should be greater than 0.",
    "privacy.target_epsilon=nan": "Expected privacy.target_epsilon=nan: input should be a finite number.",
    "privacy.clip_norm=-1": "Expected privacy.clip_norm=-1: input should be greater than 0.",
    "privacy.clip_norm=nan": "Expected privacy.clip_norm=nan: input should be greater than 0.",
    "privacy.clip_quantile=1": "Expected privacy.clip_quantile=1: input should be less than 1.",
    "privacy.clip_learning_rate=0": "Expected privacy.clip_learning_rate=0: input should be greater than 0.",
    "guard.maximum_clip=0.5": "Expected guard.maximum_clip=0.5 to be 0 or at least privacy.clip_norm=1.0.",
    "privacy.delta=1": "Expected privacy.delta=1: input should be less than 1.",
    "privacy.noise_multiplier=inf": "Expected privacy.noise_multiplier=inf: input should be a finite number.",
    "objective.slate_size=0": "Expected objective.slate_size=0: input should be greater than or equal to 1.",
    "objective.weight_cap=nan": "Expected objective.weight_cap=nan: input should be greater than 0.",
    "objective.discount=1.1": "Expected objective.discount=1.1: input should be less than or equal to 1.",
    "objective.estimator=td3": "Expected objective.estimator='td3': input should be 'cross-entropy', 'likelihood', "
    "'reinforce', 'off-policy', 'top-k' or 'direct'.",
    "aggregation.bits=17": "Expected aggregation.bits=17: input should be 0, 16, 20 or 32.",
    "data.rating_range=5,1": "Expected data.rating_range='5,1' to be two finite numbers, the lower one first.",
    "data.rating_range=nan,1": "Expected data.rating_range='nan,1' to be two finite numbers, the lower one first.",
    "data.source=csv": "Expected data.path='' to name the file or folder of data.source=csv.",
    "privacy.clip_norm=inf": "Expected privacy.clip_norm=inf only with privacy.mechanism=none and "
    "aggregation.kind=central.",
    "aggregation.corrupt_fraction=0.45": "Expected aggregation.corrupt_fraction=0.45 + dropout_fraction=0.1 < 0.5.",
    "training.rounds": "Expected --set 'training.rounds' to look like section.key=value.",
    "=3": "Expected --set '=3' to look like section.key=value.",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_override_is_refused_with_key_value_and_expectation(override: str) -> None:
    assert failure(override) == BAD[override]


@pytest.mark.parametrize("override", ["training.rounds=true", "training.cohort_rate=true"])
def test_truth_value_is_not_a_number(override: str) -> None:
    failure(override)


def test_seed_beyond_64_bits_is_refused() -> None:
    assert "training.seed" in failure(f"training.seed={2**64}")


def test_every_offence_is_named() -> None:
    message = failure("training.rounds=0", "model.cell=lstm", "nothing.here=1")
    assert all(key in message for key in ("training.rounds=0", "model.cell='lstm'", "nothing"))


def test_no_clip_needs_no_noise_and_the_central_kind() -> None:
    unclipped = ["privacy.clip_norm=inf", "privacy.mechanism=none"]
    assert load_settings(None, unclipped).privacy.clip_norm == math.inf
    for kind in ("plain", "secure"):
        assert failure(*unclipped, f"aggregation.kind={kind}") == BAD["privacy.clip_norm=inf"]
    assert failure(*unclipped, "privacy.clip_quantile=0.5").endswith("clip_quantile=0.5: it is where C begins.")


def test_key_below_a_value_is_refused() -> None:
    expected = "Unknown setting training.rounds.x: rounds is a value, not a section."
    with pytest.raises(SettingsError, match="^" + expected.replace(".", r"\.")):
        parse_flat({"training.rounds": 5, "training.rounds.x": 1})


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert str(caught.value) == f"Expected {path} to be a readable TOML file: No such file or directory."


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[training\nrounds = 1", "Expected ']' at the end of a table declaration (at line 1, column 10)"),
        (b"[training]\nrounds = 1\nrounds = 2", "Cannot overwrite a value"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0"),
    ],
)
def test_broken_file_is_named_with_the_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"Expected {path} to be valid TOML: {fault}")


def test_settings_are_frozen_at_every_level() -> None:
    settings = Settings()
    for section, name in ((settings, "training"), (settings.training, "rounds"), (settings.data.columns, "user")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
    assert hash(settings) == hash(Settings())
