"""What a budget allows before anything is trained: the noise, what is left of the signal, and what would change it.

The noise and both ε come from :func:`common.privacy.budget.make_budget`, the very code that a run with these settings
uses. Unit: one user. Tests: ``tests/unit/test_planning.py``.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import PrivacyError, SettingsError
from common.popularity import histogram_length
from common.privacy.accounting import default_delta, epsilon_model_pld, rough_multiplier
from common.privacy.budget import Budget, make_budget
from common.privacy.tree import best_band, coefficients, error_of_total, participations
from common.secagg.packing import packed_bytes
from common.settings import Settings, load_settings
from common.sizes import sizes_of

ALIGNMENT = 0.24
"""α: the norm of the mean clipped update over C in a round, of which .21 to .26 were measured on MovieLens."""

NEEDED = 1.0
"""Signal-to-noise below which the noise outweighs everything that was learned."""

USEFUL = 10.0
"""Signal-to-noise from which a model is clearly above popularity: at 23 one had .69 of its value without noise, and
popularity .36 of it (docs/utility.md)."""

AMPLE = 400.0
"""Signal-to-noise from which the clip costs more than the noise: in a small stand-in .78 of the value without noise and
clip was left at 51, .89 at 150, .92 at 400, and .94 without noise (docs/utility.md)."""


def signal_to_noise(cohort: float, rounds: int, noise_multiplier: float, parameters: int) -> float:
    """Norm of the sum of all released updates without their noise, over that of the noise: α·m·√T/(z·√d).

    Derivation. In each of T rounds m = qN members add a vector of norm α·m·C, and noise of standard deviation zC on
    each of d coordinates, of norm zC√d. As far as the mean update keeps its direction, T rounds add up to α·m·C·T, and
    the noise to zC√(dT). So it is an upper estimate: directions turn as the model learns. With the default model on
    MovieLens small, clipped at C = 1, without noise, the norm of the mean update was .21 C on average over 200 rounds,
    and that of the mean over the rounds .06 C after 50 of them, .03 C after 200.

    Scaling. Many Poisson-subsampled Gaussians are about μ-Gaussian-DP with μ = q√(T(e^{1/z²} − 1)) (Bu, Dong, Long and
    Su, "Deep learning with Gaussian differential privacy", HDSR 2020, §3.2; after Dong, Roth and Su, "Gaussian
    differential privacy", JRSS-B 2022, theorem 11). So it equals α·N·μ·η/√d with η = 1/(z√(e^{1/z²} − 1)) ≤ 1, which is
    near 1 once z is above 1: then only N, d and the budget μ matter, neither the rounds nor the cohort.

    Args:
        cohort: m = qN > 0, expected members of a round.
        rounds: T ≥ 1.
        noise_multiplier: z > 0.
        parameters: d ≥ 1, shared numbers.
    """
    return ALIGNMENT * cohort * math.sqrt(rounds) / (noise_multiplier * math.sqrt(parameters))


def correlation_gain(separation: int, rounds: int) -> float:
    """How many times smaller the noise of the sum of T releases is where it is correlated between them, at the same z:
    what :func:`signal_to_noise` is to be multiplied with. 1 for a `separation` of 0, where it is independent.

    Source: :func:`common.privacy.tree.error_of_total`, of an independent band over the chosen one.
    """
    if not separation:
        return 1.0
    return error_of_total(coefficients(1), rounds) / error_of_total(best_band(separation, rounds), rounds)


def default_parameters() -> int:
    """d of the default model over the default catalogue."""
    return sizes_of(Settings()).dimension


FEWER = {
    "items from public features": ("model.items=features",),
    "items from public features and rank 4": ("model.items=features", "model.rank=4"),
    "items of rank 4": ("model.rank=4",),
    "items from public features, only the heads trained": ("model.items=features", "training.frozen=items,cell"),
}
"""Settings with fewer shared parameters."""


def planned_budget(
    users: int,
    cohort: int,
    rounds: int,
    epsilon: float,
    delta: float,
    parameters: int,
    overrides: Sequence[str] = (),
    config: Path | None = None,
) -> Budget:
    """The budget of a run of T `rounds` over N `users` with an expected `cohort` and d `parameters`.

    Args:
        epsilon: the target of ε_model: one user added or removed, whoever sees every released model, at δ.
        delta: δ of both figures; 0 for N^-1.1.
        overrides: of other settings, as ``a.b=c``.
        config: a file of settings.

    Raises:
        PrivacyError: out of range, or a target that cannot be met.
        SettingsError: an override that does not fit.
    """
    for name, value, least in (("users", users, 1), ("cohort", cohort, 1), ("parameters", parameters, 1)):
        if value < least:
            raise PrivacyError(f"Expected {name}={value} ≥ {least}.")
    if cohort > users:
        raise PrivacyError(f"Expected cohort={cohort} to be at most users={users}.")
    own = (
        "aggregation.kind=secure",
        f"training.rounds={rounds}",
        f"training.cohort_rate={cohort / users!r}",
        f"privacy.target_epsilon={float(epsilon)!r}",
        f"privacy.delta={float(delta)!r}",
    )
    settings = load_settings(config, [*overrides, *own])
    if not settings.private:
        raise PrivacyError("Expected privacy.mechanism=none to be a mechanism with noise: nothing else has a budget.")
    return make_budget(settings, users, parameters, histogram=histogram_length(settings, settings.data.items))


def make_plan(
    users: int,
    cohort: int,
    rounds: int,
    epsilon: float,
    delta: float = 0.0,
    parameters: int = 0,
    overrides: Sequence[str] = (),
    config: Path | None = None,
) -> dict[str, Any]:
    """The plan of such a run as the ``privacy`` object of a report has it, with what is to be expected of it.

    Beside the figures of :meth:`common.privacy.budget.Budget.statement`: ``signal_to_noise``, a ``verdict`` in words,
    ``bytes_up`` of a device in a round, but for the protocol's own, and ``levers``: the same plan with one thing
    changed, and about which signal-to-noise it has then (its noise is this plan's times the quotient of two RDP
    bounds). Of the settings' own model also ``groups``, the numbers that are trained and those that are fixed, and
    ``bytes_down``.

    Arguments and errors as of :func:`planned_budget`; `parameters` of 0 are those of the model that the settings name.
    """
    sizes = None if parameters else sizes_of(load_settings(config, overrides))
    d = parameters if sizes is None else sizes.dimension
    budget = planned_budget(users, cohort, rounds, epsilon, delta, d, overrides, config)
    correlated = budget.tree is not None

    def signal(m: int, n: int, t: int, z: float, parameters: int) -> float:
        return signal_to_noise(m, t, z, parameters) * correlation_gain(n // m if correlated else 0, t)

    ratio = signal(cohort, users, rounds, budget.noise_multiplier, d)

    def rough(n: int, m: int, t: int, e: float) -> float:
        own_delta = budget.delta if n == users else min(budget.delta, default_delta(n))
        if correlated:
            return rough_multiplier(e, 1.0, participations(t, n // m), own_delta)
        return rough_multiplier(e, m / n, t, own_delta)

    def changed(words: str, n: int = users, m: int = cohort, t: int = rounds, e: float = epsilon) -> dict[str, Any]:
        z = budget.noise_multiplier * rough(n, m, t, e) / rough(users, cohort, rounds, epsilon)
        return {"change": words, "signal_to_noise": signal(m, n, t, z, d)}

    levers = [
        changed("10 × the users", n=10 * users, m=10 * cohort),
        {
            "change": "a tenth of the shared parameters",
            "signal_to_noise": signal(cohort, users, rounds, budget.noise_multiplier, max(1, d // 10)),
        },
        *(
            {
                "change": words,
                "parameters": fewer,
                "signal_to_noise": signal(cohort, users, rounds, budget.noise_multiplier, fewer),
            }
            for words, fewer in (() if parameters else _fewer(d, overrides, config))
        ),
        changed(f"ε_model={2 * epsilon:g} in place of {epsilon:g}", e=2 * epsilon),
        changed("4 × the rounds", t=4 * rounds),
    ]
    if cohort < users:
        levers.append(changed(f"a cohort of {min(4 * cohort, users)}", m=min(4 * cohort, users)))
    made_of = {}
    if sizes is not None:
        groups = {name: {"trained": sizes.trained[name], "fixed": sizes.fixed[name]} for name in sizes.trained}
        made_of = {"groups": groups, "bytes_down": sizes.model_bytes}
    return budget.statement(rounds, rounds) | {
        "users": users,
        "cohort": cohort,
        "rounds": rounds,
        "parameters": d,
        **made_of,
        "bytes_up": packed_bytes(budget.encoding.padded, budget.encoding.bits),
        "signal_to_noise": ratio,
        "verdict": _verdict(users, d, ratio, epsilon, budget.delta),
        "levers": levers,
    }


def _fewer(parameters: int, overrides: Sequence[str], config: Path | None) -> Iterator[tuple[str, int]]:
    """Names and numbers of the models of :data:`FEWER` that the other settings allow and that have fewer numbers."""
    for words, more in FEWER.items():
        try:
            fewer = sizes_of(load_settings(config, [*overrides, *more])).dimension
        except SettingsError:
            continue
        if fewer < parameters:
            yield f"{words} ({', '.join(more)})", fewer


def make_curve(plan: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Pairs (ε_model, signal-to-noise) along the noise, for the plan and for two levers, each at its own δ."""
    users, cohort, rounds, d = (plan[name] for name in ("users", "cohort", "rounds", "parameters"))
    multipliers = [plan["noise_multiplier"] * 2 ** (step / 2) for step in range(-1, 6)]
    separation = plan.get("separation", 0)
    rate, releases = (1.0, participations(rounds, separation)) if separation else (cohort / users, rounds)
    gain = correlation_gain(separation, rounds)

    def along(n: int, m: int, delta: float, parameters: int) -> list[tuple[float, float]]:
        return [
            (epsilon_model_pld(z, rate, releases, delta), gain * signal_to_noise(m, rounds, z, parameters))
            for z in multipliers
        ]

    return {
        f"{users:,} users, {d:,} parameters": along(users, cohort, plan["delta"], d),
        "a tenth of the parameters": along(users, cohort, plan["delta"], max(1, d // 10)),
        "10 × the users, the same part of them in a cohort": along(
            10 * users, 10 * cohort, min(plan["delta"], default_delta(10 * users)), d
        ),
    }


def _verdict(users: int, parameters: int, ratio: float, epsilon: float, delta: float) -> str:
    asked = f"ε_model={epsilon:g} at δ={delta:.2g} for {parameters:,} shared parameters"
    if ratio < NEEDED:
        words = (
            f"{users:,} users cannot support {asked}: the noise is {1 / ratio:.1f} times the signal. "
            "Expect popularity-level quality."
        )
    elif ratio < USEFUL:
        words = (
            f"{users:,} users support {asked} in part: the signal is {ratio:.1f} times the noise. Expect something "
            "between popularity and the model without noise, and measure which."
        )
    elif ratio < AMPLE:
        words = (
            f"{users:,} users can support {asked}: the signal is {ratio:.0f} times the noise. Expect more than "
            "popularity and less than the model without noise, and measure how much."
        )
    else:
        words = (
            f"{users:,} users can support {asked}: the signal is {ratio:.0f} times the noise, which is then not what "
            "limits quality."
        )
    if delta >= 1 / users:
        words += f" δ={delta:.2g} is not below 1/{users}: that permits to reveal one user outright."
    return words
