"""`fedtopk privacy verify`: a run's ε recomputed from its event log alone, by a second accountant.

===============  ==========================================  =====================================================
figure           the run's own accountant                    here
===============  ==========================================  =====================================================
ε_model          opacus's PRV                                dp-accounting's privacy loss distributions
ε_server         dp-accounting's Gaussian                    opacus's dual of Gaussian differential privacy
ε_model, `tree`  dp-accounting's Gaussian, κ whole columns   opacus's dual, at the largest ‖Cu‖ that is found over all
                                                             patterns of participation
===============  ==========================================  =====================================================

What is recomputed starts from the events `mechanism`, `reserved`, `uploaded` and `released`; the run's ledger table and
its report are compared with that, and not read for it. Beyond ε = 200 (noise that protects nobody) both figures come
from the run's own accountants.

What the chain of digests shows (tests: ``tests/integration/test_privacy.py``). Each event's digest is the SHA-256 of
its number, time, kind, round and fields, and of the digest before it; no key is part of it, so somebody who may write
``events.sqlite`` may also compute all digests anew. So:

- **Found by the log alone**: an event that was changed, removed, inserted or moved by whoever did not compute all later
  digests anew; a ledger table that differs from the events.
- **Found against report.json** (its ``log``: how many events, and the last digest): the same by somebody who did, and
  events cut off at the end, which the log alone cannot show. Whoever writes both files passes.
- **Found against a signed statement** (:mod:`server.statement`) kept by somebody else: the same for all that it covers,
  also if both files were written anew, unless the signing key is theirs.
- **Never found**: a server that lied from the start, by releasing what it did not record. A device does not rely on
  this log: it counts its own uploads (:mod:`client.ledger`).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select

from common.errors import FedtopkError, RunError
from common.privacy import NOT_OFFERED
from common.privacy.accounting import (
    contributions,
    effective_multiplier,
    epsilon_model,
    epsilon_model_pld,
    epsilon_server,
    epsilon_server_gdp,
)
from common.privacy.adaptive_clip import AdaptiveClip, at
from common.privacy.budget import ADJACENCY, OBSERVER, Spending, spendable_delta
from common.privacy.encoding import Encoding
from common.privacy.tree import BAND_BETA, Tree
from server.events import START, Event, Head, clips_of, following
from server.ledger import Entry, LedgerReader
from server.population_ledger import BEGUN, CHARGED, charges_of
from server.run import MECHANISM
from server.run_folder import RunFolder
from server.store import Store, event_table, open_store_read_only

TOLERANCE = 0.02
"""How far the two accountants may be apart."""

_INDEPENDENT = 200.0  # largest ε for which the second accountants' tables stay small
_STEPS = ("reserved", "uploaded", "released")


@dataclass(frozen=True)
class Check:
    """One thing that was verified: whether it holds, and what was found, in words."""

    check: str
    ok: bool
    found: str


@dataclass(frozen=True)
class Log:
    """The events of a chain that holds, and where it ends."""

    events: list[Event]
    heads: list[Head]

    @property
    def head(self) -> Head:
        return self.heads[-1] if self.heads else START


def read_log(store: Store) -> Log:
    """The whole log, with each link of its chain checked. Raises :class:`RunError`, which names the first bad event."""
    with store.transaction() as connection:
        rows = connection.execute(select(event_table).order_by(event_table.c.id)).all()
    head, heads, events = START, list[Head](), list[Event]()
    for row in rows:
        try:
            head = following(head, row.time, row.kind, row.round, row.fields)
            fields = json.loads(row.fields)
        except ValueError as error:
            raise RunError(f"Expected the event log to be whole: {error}.") from None
        if (row.id, row.digest) != (head.events, head.digest):
            raise RunError(
                f"Expected the event log to be whole: its place {head.events} holds an event {row.id} whose digest "
                "does not follow from what is before it. It, or one before it, was changed, removed or moved."
            )
        heads.append(head)
        events.append(Event(row.id, row.time, row.kind, row.round, fields))
    return Log(events, heads)


def entries_of(events: Iterable[Event]) -> list[Entry]:
    """The attempts that the events tell of, ordered by round and attempt. Raises :class:`RunError`."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for event in events:
        if event.kind in _STEPS:
            key = (int(event.round or 0), int(event.fields["attempt"]))
            if event.kind == "reserved":
                found[key] = {"noise_multiplier": event.fields["noise_multiplier"], "rate": event.fields["rate"]}
            elif key not in found:
                raise RunError(f"Expected round {key[0]} to be reserved in attempt {key[1]} before it is {event.kind}.")
            found[key][f"{event.kind}_at"] = event.time
    nothing = {"uploaded_at": None, "released_at": None}
    return [Entry(*key, **nothing | found[key]) for key in sorted(found)]


def recompute(mechanism: Mapping[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """Both figures of a run, by the second accountants, from its mechanism and its attempts.

    Charged as the ledger does: released attempts and the newest one of each round; for ε_server, κ of all attempts.
    Raises :class:`FedtopkError` where they are no possible ones.
    """
    statement = {"unit": "user", "mechanism": mechanism["mechanism"], "devices": mechanism["devices"]}
    if mechanism["mechanism"] == "none":
        return statement
    encoding, rate, delta = Encoding(**mechanism["encoding"]), mechanism["rate"], mechanism["delta"]
    tree = None
    if mechanism["mechanism"] == "tree":
        own = mechanism["tree"]
        tree = Tree(encoding, tuple(own["coefficients"]), own["separation"], own["variance"])
    noise_multiplier = (tree or encoding).noise_multiplier
    if any(entry.rate != rate or not _near(entry.noise_multiplier, noise_multiplier) for entry in entries):
        raise RunError("Expected every attempt to have the rate and the noise of the run's mechanism.")
    newest = {entry.round: entry.attempt for entry in entries}
    releases = sum(entry.released_at is not None or entry.attempt == newest[entry.round] for entry in entries)
    if tree is not None:
        if releases != len(newest):
            raise RunError("Expected every round to be released once: noise of different rounds is correlated.")
        left = spendable_delta(delta, encoding, releases, releases * BAND_BETA)
        return statement | {
            "delta": delta,
            "noise_multiplier": noise_multiplier,
            "releases": releases,
            "epsilon_model": _correlated_epsilon(tree, sorted(newest), left),
            "epsilon_server": NOT_OFFERED,
            "adjacency": ADJACENCY,
            "observer": OBSERVER,
        }
    multiplier, left = effective_multiplier(encoding), spendable_delta(delta, encoding, releases)
    if "histogram" in mechanism:
        multiplier = min(multiplier, effective_multiplier(Encoding(**mechanism["histogram"])))
    uploads = contributions(rate, len(entries))
    model = epsilon_model(multiplier, rate, releases, left)
    server = epsilon_server(multiplier, encoding.honest, uploads, left)
    if model <= _INDEPENDENT:
        model = epsilon_model_pld(multiplier, rate, releases, left)
    if server <= _INDEPENDENT:
        server = epsilon_server_gdp(multiplier, encoding.honest, uploads, left)
    return statement | {
        "delta": delta,
        "noise_multiplier": encoding.noise_multiplier,
        "releases": releases,
        "epsilon_model": model,
        "epsilon_server": server,
        "adjacency": ADJACENCY,
        "observer": OBSERVER,
    }


def largest_movement(moves: Sequence[float], separation: int, rounds: int) -> float:
    """The largest ‖Cu‖ over all patterns u of a user's rounds, at least `separation` apart, of the first `rounds`.

    Added up number by number, whether or not columns of C overlap: in a round that several of a user's updates move,
    the norms of the moves add up. No pattern beats the dense ones, of which there is one for each first round, since
    moves are not negative. Rounds after the last, which nobody has seen, are counted in, as the run's own account does.

    Args:
        moves: by how much an update moves the release of its own round, of the next one, …
    """
    found = 0.0
    for first in range(min(separation, rounds)):
        pattern = np.zeros(rounds)
        pattern[first::separation] = 1.0
        found = max(found, float(np.linalg.norm(np.convolve(pattern, moves))))
    return found


def _correlated_epsilon(tree: Tree, rounds: list[int], delta: float) -> float:
    """ε_model of correlated noise, by opacus's dual, or the run's own accountant where that one ends."""
    if not rounds:
        return 0.0
    moves = [math.sqrt(square) for square in tree.squares]
    multiplier = tree.effective_multiplier * tree.sensitivity
    multiplier /= largest_movement(moves, tree.separation, rounds[-1])
    epsilon = epsilon_server(multiplier, 1.0, 1, delta)
    return epsilon_server_gdp(multiplier, 1.0, 1, delta) if epsilon <= _INDEPENDENT else epsilon


def compare(claimed: Mapping[str, Any], found: Mapping[str, Any]) -> list[Check]:
    """Whether claimed figures are those that were recomputed."""
    checks = []
    for name in ("mechanism", "unit", "releases", "delta", "noise_multiplier", "epsilon_model", "epsilon_server"):
        if name not in found and name not in claimed:
            continue
        claim, recomputed = claimed.get(name), found.get(name)
        if name.startswith("epsilon"):
            ok = claim == recomputed or (_numbers(claim, recomputed) and abs(claim - recomputed) <= TOLERANCE)  # type: ignore[operator]
        elif isinstance(recomputed, float):
            ok = _numbers(claim, recomputed) and _near(claim, recomputed)  # type: ignore[arg-type]
        else:
            ok = claim == recomputed
        checks.append(Check(name, ok, f"claimed {_short(claim)}, recomputed {_short(recomputed)}"))
    return checks


def mechanism_of(events: Iterable[Event]) -> dict[str, Any]:
    """The run's mechanism, by its event. Raises :class:`RunError`."""
    for event in events:
        if event.kind == MECHANISM:
            return event.fields
    raise RunError(f"Expected the event log to hold the run's {MECHANISM}.")


def verify_folder(path: Path) -> tuple[list[Check], dict[str, Any]]:
    """Verify a run folder, or a population's ledger: what was checked, and the figures that were recomputed.

    Raises :class:`RunError` where there is none.
    """
    with open_store_read_only(path) as store:
        try:
            log = read_log(store)
            chain = Check("event log", True, f"{log.head.events} events, up to {log.head.digest}")
            if log.events and log.events[0].kind == BEGUN:
                checks, figures = _verify_population(log)
            else:
                checks, figures = _verify_run(RunFolder(path), log, LedgerReader(store).entries())
        except (FedtopkError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            words = str(error) if isinstance(error, FedtopkError) else f"no such event can be: {error!r}"
            return [Check("event log", False, words)], {}
    return [chain, *checks], figures


def _verify_run(folder: RunFolder, log: Log, table: list[Entry]) -> tuple[list[Check], dict[str, Any]]:
    mechanism, entries = mechanism_of(log.events), entries_of(log.events)
    figures = recompute(mechanism, entries)
    same = entries == table
    checks = [Check("privacy ledger", same, "as the events say" if same else "its table is not what the events say")]
    checks.append(_settings_check(folder, log))
    clips = clips_of(log.events)
    if "adaptive_clip" in mechanism:
        checks.append(_clip_check(mechanism, log, clips))
    if "histogram" in mechanism:
        checks.append(_histogram_check(mechanism, log))
    try:
        report = json.loads(folder.report_file.read_text(encoding="utf-8"))
        head, claimed = Head(**report["log"]), report["privacy"]
    except FileNotFoundError:
        return [
            *checks,
            Check("report", False, "no report.json: nothing is claimed, or shows where the log ends"),
        ], figures
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [*checks, Check("report", False, f"report.json cannot be read: {error!r}")], figures
    checks.append(covers(log, head, "report.json"))
    if clips and report["clip"]["by_round"] != clips:
        checks.append(Check("clip by round", False, "the report's are not those of the events"))
    return [*checks, *compare(claimed, figures)], figures


def _clip_check(mechanism: Mapping[str, Any], log: Log, clips: Sequence[Sequence[float]]) -> Check:
    """Whether each round's C follows from what the round before released, under noise that is enough for it."""
    adaptive, first = AdaptiveClip(**mechanism["adaptive_clip"]), Encoding(**mechanism["encoding"])
    due, wrong = {1 if "histogram" in mechanism else 0: adaptive.first}, []
    for event in log.events:
        if event.kind == "round" and "clip" in event.fields:
            round_, clip, share = int(event.round or 0), event.fields["clip"], event.fields["share_within"]
            # What was due is not known where a crash came between a release and its event.
            follows = _near(clip, due.get(round_ - 1, clip))
            if not follows or at(first, clip).sensitivity > first.sensitivity:
                wrong.append(round_)
            due[round_] = adaptive.following(clip, share)
    words = f"C followed the {adaptive.quantile:g} quantile for {len(clips)} rounds"
    if clips:
        words += f", from {clips[0][1]:.4g} to {clips[-1][1]:.4g}"
    return Check("clip", not wrong, f"C of round {wrong[0]} is not what the one before released" if wrong else words)


def _histogram_check(mechanism: Mapping[str, Any], log: Log) -> Check:
    """Whether the first round alone released a histogram, under the run's own noise."""
    counted = {event.round or 0 for event in log.events if event.kind == "round" and event.fields.get("histogram")}
    own, others = Encoding(**mechanism["histogram"]), Encoding(**mechanism["encoding"])
    ok = counted <= {1} and (not others.variance or _near(own.noise_multiplier, others.noise_multiplier))
    words = f"rounds that released a histogram: {sorted(counted)}, noise multiplier {own.noise_multiplier:.4g}"
    return Check("histogram", ok, words)


def covers(log: Log, head: Head, what: str) -> Check:
    """Whether the log begins with all that `what` was written of, and nothing was released after it."""
    if head not in log.heads:
        return Check("log's end", False, f"{what} was written of {head.events} events that are not those of this log")
    later = [event for event in log.events[head.events :] if event.kind in _STEPS]
    words = f"{what} covers {head.events} of {log.head.events} events"
    return Check("log's end", not later, words + (f"; {len(later)} steps of the ledger came after it" if later else ""))


def _settings_check(folder: RunFolder, log: Log) -> Check:
    try:
        digest = hashlib.sha256(folder.settings_file.read_bytes()).hexdigest()
    except OSError as error:
        return Check("settings", False, f"settings.toml cannot be read: {error.strerror}")
    begun = log.events[0].fields.get("settings")
    return Check(
        "settings", begun == digest, "as begun" if begun == digest else "not those that the run was begun with"
    )


def _verify_population(log: Log) -> tuple[list[Check], dict[str, Any]]:
    charges = [event for event in log.events if event.kind == CHARGED]
    if not charges:
        return [], {"runs": 0}
    claimed = charges[-1].fields["total"]
    total = sum(charges_of(charges).values(), Spending())
    found, left = total.statement(float(claimed["delta"])), total.left(float(claimed["delta"]))
    if float(found["epsilon_model"]) <= _INDEPENDENT and total.history:
        found["epsilon_model"] = epsilon_model_pld(1.0, 1.0, 0, left, total.history)
    if found["epsilon_server"] != NOT_OFFERED and 0 < found["epsilon_server"] <= _INDEPENDENT:
        found["epsilon_server"] = epsilon_server_gdp(total.server**-0.5, 1.0, 1, left)
    figures = {name for name in claimed if name.startswith("epsilon") and claimed[name] != NOT_OFFERED}
    claimed = {name: float(value) if name in figures else value for name, value in claimed.items()}
    open_runs = {event.fields["run"]: not event.fields["settled"] for event in charges}
    words = f"{len(open_runs)} runs, {sum(open_runs.values())} of them charged with the most that they may spend"
    return [Check("runs", True, words), *compare(claimed, found)], found


def report_of(checks: list[Check], figures: dict[str, Any]) -> dict[str, Any]:
    """``{"ok", "checks": [{"check", "ok", "found"}], "privacy"}``: the answer of the command."""
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks], "privacy": figures}


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
