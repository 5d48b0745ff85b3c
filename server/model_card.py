"""`model-card.md`: what a run's model is and what it cost, from its report and settings alone.

What was not measured is left out or said to be; no ε stands without its unit, δ, adjacency and observer.
Test: ``tests/unit/test_model_card.py``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from common.privacy import NOT_OFFERED
from common.settings import Settings


def model_card(report: Mapping[str, Any], settings: Settings) -> str:
    """The card in Markdown.

    Args:
        report: of :func:`server.report.build_report`.
    """
    return "\n".join((*_model(report, settings), *_privacy(report), *_quality(report), *_limits(report))) + "\n"


def _model(report: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    objective, model = settings.objective, settings.model
    yield "# Model card"
    yield ""
    yield (
        f"A recommender trained by fedtopk: status {report['status']}, {report['rounds']} rounds over "
        f"{report['devices']} devices."
    )
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| objective | `{objective.estimator}`, slates of {objective.slate_size} |"
    yield f"| architecture | {model.cell}, {report['parameters']:,} shared parameters, beside each device's own |"
    yield f"| data | `data.source={settings.data.source}`; no history left its device |"
    yield f"| sums | `aggregation.kind={report['aggregation']['kind']}`, {report['client_updates']} updates in them |"
    yield "| meant for | ranking a public catalogue's items for the holder of a device, on that device |"
    yield "| not meant for | statements about single users, or decisions about them |"
    yield ""


def _privacy(report: Mapping[str, Any]) -> Iterator[str]:
    privacy = report["privacy"]
    yield "## Privacy"
    yield ""
    if "epsilon_model" not in privacy:
        yield "No noise was added: the model may reveal any of its users' histories, and no ε is given."
        yield ""
        return
    yield "| figure | value | δ | unit | adjacency | observer |"
    yield "|---|---|---|---|---|---|"
    for name, words in (("epsilon_model", "ε_model"), ("epsilon_server", "ε_server")):
        yield _figure(words, name, privacy)
    if "population" in privacy:
        for name, words in (("epsilon_model", "ε_model"), ("epsilon_server", "ε_server")):
            yield _figure(
                f"{words}, all {privacy['population']['runs']} runs over these users", name, privacy["population"]
            )
    yield ""
    if privacy["mechanism"] == "tree":
        yield (
            f"Noise is added by {privacy['noise_added_by']}, which knows the sums without it: ε_server is not offered. "
            f"Noise is correlated over {privacy['band']} rounds; a user takes part once in {privacy['separation']} "
            f"rounds, {privacy['contributions']} times at most, and no sampling is assumed."
        )
    else:
        yield f"ε_server holds under {privacy['epsilon_server_holds_under']}."
        yield "That sampling amplifies Skellam noise as it does the Gaussian is assumed (docs/threat-model.md)."
    if privacy["noise"] != "cryptographic":
        yield f"**The noise is {privacy['noise']}: whoever knows the seed can take it away, and neither figure holds.**"
    yield (
        f"Mechanism `{privacy['mechanism']}`, noise multiplier {privacy['noise_multiplier']:.4g}, clip norm "
        f"{privacy['clip_norm']:g}, {privacy['releases']} releases. Catalogue: {privacy['catalogue']}."
    )
    if "first_release" in privacy:
        yield (
            f"The first release says {privacy['first_release']}, and is one of those that both figures count; the "
            "items' biases start from it."
        )
    if "clip" in report:
        yield _clip(report["clip"])
    yield "`fedtopk privacy verify` recomputes both figures from the run's event log with a second accountant."
    yield ""


def _clip(clip: Mapping[str, Any]) -> str:
    course = clip["by_round"]
    told = sorted({round(part * (len(course) - 1)) for part in (0, 0.25, 0.5, 0.75, 1)}) if course else []
    by_round = ", ".join(f"{value:.4g} in round {round_}" for round_, value in (course[place] for place in told))
    return (
        f"The clip norm is the first one. It follows the {clip['quantile']:g} quantile of the updates' norms, by a "
        f"noisy count that is part of every release and of both figures: {by_round or 'no round yet'}."
    )


def _figure(words: str, name: str, privacy: Mapping[str, Any]) -> str:
    value = privacy[name] if privacy[name] == NOT_OFFERED else f"{privacy[name]:.4g}"
    cells = (words, value, f"{privacy['delta']:.3g}", f"one {privacy['unit']}")
    return "| " + " | ".join((*cells, privacy["adjacency"][name], privacy["observer"][name])) + " |"


def _quality(report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Quality"
    yield ""
    if "evaluation" not in report:
        yield "Not measured."
        yield ""
        return
    evaluation = report["evaluation"]
    yield f"{evaluation['protocol']}, full ranking, {evaluation['users']} users; 95 % intervals over users."
    yield ""
    yield "| | HR@10 | NDCG@10 |"
    yield "|---|---|---|"
    rows = (
        ("this model", evaluation),
        ("popularity", evaluation["popularity"]),
        ("first-order Markov", evaluation["markov"]),
    )
    for name, row in rows:
        cells = (f"{row[m]:.3f} [{row[m + '_ci95'][0]:.3f}, {row[m + '_ci95'][1]:.3f}]" for m in ("hr@10", "ndcg@10"))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    if evaluation["hr@10_ci95"][0] <= evaluation["popularity"]["hr@10_ci95"][1]:
        yield "By HR@10 the model is not shown to be better than popularity: the intervals touch, or it is worse."
        yield ""


def _limits(report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- Next-item accuracy rewards repeating the log; it does not judge a policy that corrects the log's bias."
    yield "- A device can poison its update within the clip norm; nothing proves that updates are honest."
    yield "- What makes a figure above false, and what prevents it: docs/sharp-edges.md."
    if "log" in report:
        yield f"- Of the event log's {report['log']['events']} events, the last digest is `{report['log']['digest']}`."
