"""`fedtopk bench secagg`: what one attempt at secure aggregation costs a device and the server, in time and bytes.

Every device of an attempt exists: it makes its keys, shares its secrets, masks an update and helps to unmask the sum,
all through messages of bytes, one device after another in one thread. Some fall out between their shares and their
uploads, which costs the server most. The sum that comes out must be the plain one to the last bit.

A device's cost is the median over a sample, stage by stage; the others take the neighbours' certificates as checked,
to save time. The server's cost is all that it does. Times are CPU time of the one thread, so that neither other
programs nor the progress bar count, and the garbage collector is off: it would trace thousands of devices that are not
in the server's memory in reality. What a process does once is left out: see :mod:`common.secagg.shamir` (tables).
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from common.errors import AggregationError, SettingsError
from common.privacy.encoding import WIDTHS, Encoding, add_residues, encode
from common.privacy.randomness import seeded_stream, system_stream
from common.privacy.rotation import random_signs
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.graph import neighbours
from common.secagg.keys import SEED_BYTES
from common.secagg.member import Advertised, Agreed, Shared, Uploaded
from common.secagg.packing import packed_bytes
from common.secagg.roster import View
from common.secagg.terms import Terms
from simulations.bench.legacy import compare_masks
from simulations.bench.machine import machine
from simulations.bench.meter import Meter
from simulations.identities import simulated_authority, simulated_identity

_RUN = bytes(32)
_NOW = 0.0
_SEED = 0
_SAMPLE = 9  # devices that are timed
_REPEATS = 9  # of what is timed by itself
DEVICE_STAGES = ("advertise", "share", "receive", "mask", "agree", "unmask")
SERVER_STAGES = ("admit", "roster", "share", "upload", "agree", "unmask")


@dataclass(frozen=True)
class Case:
    """One row. Raises :class:`SettingsError` where more devices drop out than the protocol is to bear.

    Attributes:
        n: devices.
        dimension: d, numbers of an update.
        dropout: share of the devices that drop out.
        bits: width of a residue; 0 for the narrowest.
        corrupt, allowed: γ and δ.
    """

    n: int
    dimension: int
    dropout: float
    bits: int
    corrupt: float
    allowed: float

    def __post_init__(self) -> None:
        if self.dropout > self.allowed:
            raise SettingsError(f"Expected dropout={self.dropout} to be at most allowed-dropout={self.allowed}.")
        if self.bits not in (0, *WIDTHS):
            raise SettingsError(f"Expected bits={self.bits} to be 0, 16, 20 or 32.")
        if self.corrupt + self.allowed >= 1:
            raise SettingsError(f"Expected corrupt={self.corrupt} and allowed-dropout={self.allowed} to sum to < 1.")

    @property
    def terms(self) -> Terms:
        """Of an attempt with noise of one sensitivity."""
        honest = 1 - self.corrupt - self.allowed
        encoding = Encoding.choose(self.dimension, 1.0, 1.0, self.n, honest, self.bits)
        return Terms(1, 1, self.n, self.corrupt, self.allowed, False, encoding, bytes(32))

    @property
    def steps(self) -> int:
        """How many messages come from devices: two of each, and three more of those that stay."""
        return 5 * self.n - 3 * len(self.dropped)

    @property
    def dropped(self) -> set[int]:
        """Positions that drop out."""
        count = int(self.dropout * self.n + 1e-9)
        return set(np.random.default_rng(_SEED).permutation(self.n)[:count].tolist())


def bench_secagg(cases: Sequence[Case], on_step: Callable[[], None]) -> dict[str, Any]:
    """``{"machine", "rows", "flower_legacy"}``; `on_step` is called :attr:`Case.steps` times a case.

    Raises:
        AggregationError: a sum that is not the plain one, or no (k, t) for a case.
        PrivacyError: no encoding of a case's width.
    """
    where, first = machine("numpy", "cryptography", "flwr"), cases[0]
    gc.disable()
    try:
        rows = [measure(case, on_step) for case in cases]
        legacy = compare_masks(first.dimension, first.terms.encoding.bits, _REPEATS)
    finally:
        gc.enable()
    return {"machine": where, "rows": rows, "flower_legacy": legacy}


def results_table(results: dict[str, Any]) -> Table:
    """The rows for people."""
    legacy = results["flower_legacy"]
    table = Table(
        title="Secure aggregation, CPU time of one core",
        caption=f"One mask of 10^6 numbers: {legacy['ours_mask_ms_per_million']} ms, Flower's legacy "
        f"{legacy['mask_ms_per_million']} ms, {legacy['ratio']} times as much.",
    )
    columns = {
        "n": "n",
        "d": "d",
        "k": "k",
        "t": "t",
        "device_ms": "device ms",
        "encode_ms": "encode ms",
        "server_s": "server s",
        "upload_ratio": "upload / float32",
        "overhead_up_bytes": "bytes up",
        "overhead_down_bytes": "bytes down",
    }
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(*(str(row[name]) for name in columns))
    return table


class _Checked(Advertisement):
    """An advertisement that a device need not check."""

    def check(self, run: bytes, authority: bytes, now: float) -> None:
        pass


class _Attempt:
    """One attempt of a case, and what its devices and the server spent on it, by stage.

    Raises:
        AggregationError: a sum that is not the plain one.
    """

    def __init__(self, case: Case, on_step: Callable[[], None]) -> None:
        self.terms = terms = case.terms
        self.alive = [position for position in range(terms.n) if position not in case.dropped]
        self.sample = {self.alive[index] for index in np.linspace(0, len(self.alive) - 1, _SAMPLE).astype(int)}
        self.device, self.server, self._untimed = (Meter(time.thread_time) for _ in range(3))
        self.up, self.down = [0] * terms.n, [0] * terms.n  # bytes by position, without the masked update and the model
        self.upload_bytes = 0
        self._on_step = on_step
        self._identities = [simulated_identity(_SEED, number) for number in range(terms.n)]
        self._expected = np.zeros(terms.encoding.padded, np.uint32)
        shared = self._share(self._advertise())
        uploaded = {position: self._upload(position, shared.pop(position)) for position in self.alive}
        with self.server("agree"):
            survivors = self._aggregate.fix_survivors()
        agreed = {position: self._agree(position, uploaded.pop(position), survivors) for position in self.alive}
        for position in self.alive:
            self._unmask(position, agreed.pop(position))
        with self.server("unmask"):
            total = self._aggregate.total()
        if not np.array_equal(total, self._expected):
            raise AggregationError(f"Expected the sum of {len(self.alive)} masked updates to be the plain sum.")

    def _advertise(self) -> list[Advertised]:
        authority, advertised, roster = simulated_authority(_SEED), [], []
        for position, identity in enumerate(self._identities):
            with self._timed(position, "advertise"):
                state = member.advertise(identity, _RUN, os.urandom)
            with self.server("admit"):
                advertisement = Advertisement.parse(state.message, self.terms.hybrid)
                advertisement.check(_RUN, authority, _NOW)
            advertised.append(state)
            roster.append(advertisement)
            self._count(position, up=state.message)
        with self.server("roster"):
            self._aggregate = Aggregate(_RUN, self.terms, roster, os.urandom(SEED_BYTES))
        return advertised

    def _share(self, advertised: list[Advertised]) -> dict[int, Shared]:
        first = View.parse(self._aggregate.view(0), _accept)
        graph = neighbours(first.root, self.terms.n, self.terms.degree.neighbours).tolist()
        checked = [_Checked.parse(state.message, self.terms.hybrid) for state in advertised]
        shared = {}
        for position, (identity, state) in enumerate(zip(self._identities, advertised, strict=True)):
            with self.server("roster"):
                content = self._aggregate.view(position)
            theirs = [checked[place] for place in graph[position]]
            view = replace(
                first, position=position, own=checked[position], neighbours=graph[position], advertisements=theirs
            )
            with self._timed(position, "share"):
                if position in self.sample:
                    view = View.parse(content, _accept)
                shared[position], message = member.share(state, identity, view, _NOW, os.urandom)
            with self.server("share"):
                self._aggregate.take_shares(position, message)
            self._count(position, up=message, down=content)
        for position in set(range(self.terms.n)).difference(self.alive):
            with self.server("share"):
                self._aggregate.inbox(position)  # nobody knows yet that no answer will come
        return shared

    def _upload(self, position: int, state: Shared) -> Uploaded:
        with self.server("share"):
            inbox = self._aggregate.inbox(position)
        with self._timed(position, "receive"):
            uploaded, masks = member.receive(state, inbox)
        encoding = self.terms.encoding
        residues = np.random.default_rng(position).integers(0, 1 << encoding.bits, encoding.padded, np.uint32)
        add_residues(self._expected, residues, encoding.bits)
        with self._timed(position, "mask"):
            message = member.upload(uploaded, masks, residues)
        with self.server("upload"):
            self._aggregate.take_upload(position, message)
        self.upload_bytes = len(message)
        self._count(position, up=message[packed_bytes(encoding.padded, encoding.bits) :], down=inbox)
        return uploaded

    def _agree(self, position: int, state: Uploaded, survivors: bytes) -> Agreed:
        with self._timed(position, "agree"):
            agreed, signature = member.agree(state, self._identities[position], survivors)
        with self.server("agree"):
            self._aggregate.take_agreement(position, signature)
        self._count(position, up=signature, down=survivors)
        return agreed

    def _unmask(self, position: int, state: Agreed) -> None:
        with self.server("agree"):
            signatures = self._aggregate.signatures(position)
        with self._timed(position, "unmask"):
            message = member.unmask(state, signatures)
        with self.server("unmask"):
            self._aggregate.take_unmasking(position, message)
        self._count(position, up=message, down=signatures)

    def _timed(self, position: int, stage: str) -> AbstractContextManager[None]:
        return self.device(stage) if position in self.sample else self._untimed(stage)

    def _count(self, position: int, *, up: bytes, down: bytes = b"") -> None:
        self.up[position] += len(up)
        self.down[position] += len(down)
        self._on_step()


def measure(case: Case, on_step: Callable[[], None]) -> dict[str, Any]:
    """A row: the documented figures, and the stages of `device_ms` and `server_s`. Raises as :func:`bench_secagg`."""
    attempt = _Attempt(case, on_step)
    terms = attempt.terms
    device = {stage: round(1e3 * median(attempt.device.seconds[stage]), 3) for stage in DEVICE_STAGES}
    server = {stage: round(sum(attempt.server.seconds[stage]), 4) for stage in SERVER_STAGES}
    return {
        "n": terms.n,
        "d": case.dimension,
        "k": terms.degree.neighbours,
        "t": terms.degree.threshold,
        "dropout": case.dropout,
        "bits": terms.encoding.bits,
        "device_ms": round(sum(device.values()), 2),
        "encode_ms": round(_encode_ms(terms), 2),
        "server_s": round(sum(server.values()), 3),
        "upload_ratio": round(attempt.upload_bytes / (4 * case.dimension), 5),
        "overhead_up_bytes": max(attempt.up),
        "overhead_down_bytes": max(attempt.down),
        "device_stages_ms": device,
        "server_stages_s": server,
    }


def _encode_ms(terms: Terms) -> float:
    """Clipping, rotation, rounding and noise of one update; the table of the noise is there already."""
    encoding, meter = terms.encoding, Meter(time.thread_time)
    signs = random_signs(encoding.dimension, seeded_stream(_SEED, "rotation"))
    update = np.random.default_rng(_SEED).standard_normal(encoding.dimension, np.float32)
    for _ in range(1 + _REPEATS):
        with meter("encode"):
            encode(update, encoding, terms.n, signs, system_stream(), system_stream())
    return 1e3 * median(meter.seconds["encode"][1:])


def _accept(terms: Terms) -> None:
    """A policy that accepts all terms."""
