"""`fedtopk bench device`: what a round, a recommendation and a new interaction cost one device, in time and memory.

The device is in a process of its own, as its agent is (:mod:`client.agent`): a history and a model in a store on disk,
opened anew for every message, and Flower's ClientApp over it. This process plays the server and the cohort's other
devices, which do all that a device does but to mask: what they upload is nothing to this one. The cohort grows by one
from round to round. Cohorts that fall by coins are of another size in most rounds too, and the table of the noise
belongs to a size. The first round, with all that a process does once, does not count.

=================  ====================================================================================================
`update_ms`        CPU time of the device's process, which has one thread for numbers; medians
  `adapt`          :func:`client.local_update.compute_update` with, less without, the steps of the user embedding
  `gradient`       the rest of it; the window from the open store, the round's negatives, the update as a vector
  `encode`         clip, rotation with its signs, and rounding
  `noise`          the device's share of the noise, with the table of a variance that it has not met before
  `protocol`       the stages of :mod:`simulations.bench.secagg`, nobody dropping out
  `total`          a whole round, the five messages from the opening of the store to the answer. Not the sum of the
                   others: it also holds what none of them does, above all opening the store, every row of which is
                   checked, five times, and checking, parsing, digesting and storing the model. Flower's SuperNode,
                   a process of its own, and its transport are left out.
`messages_ms`      `total` by message
`recommend_ms`     CPU time of preparing the user, the states caught up already, and recommending ten items
`add_event_ms`     wall time until one interaction is durable, the disk's part included; `add_event_cpu_ms`: CPU time
`…_ms_long`        the same after a history ten times as long
`peak_rss_mib`     the most memory resident in a process that runs `fedtopk recommend` once, torch included
`update_peak_…`    the same of the device's process in all those rounds
=================  ====================================================================================================
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Group
from rich.table import Table

from client.agent import Agent
from client.device_contents import Event
from client.device_store import DeviceStore
from client.guard import Policy
from client.local_update import compute_update
from client.recommend import received
from client.store_key import KeyFile
from client.stored_device import ENROLMENT, IDENTITY_KEY, INVITATION, StoredDevice
from common.enrolment import Enrolment
from common.errors import AggregationError
from common.messages import Action, body_of, content_of, read_arrays
from common.offer import read_offer
from common.privacy.encoding import encode
from common.privacy.randomness import system_stream
from common.privacy.skellam import skellam
from common.secagg.terms import Terms
from common.settings import Settings
from simulations.bench.device_rounds import RUN_ID, SEED, Rounds, Workload, invitation
from simulations.bench.machine import machine
from simulations.bench.meter import Meter, peak_mib, peak_rss_mib
from simulations.bench.secagg import Case, measure
from simulations.identities import simulated_identity
from simulations.processes import start_worker

_NODE = 1
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_ADDED = 30  # interactions that are timed
_LONGER = 10
_SLATE = 10

_RECOMMEND = """
import sys
from pathlib import Path
from client.recommend import recommend

recommend(Path(sys.argv[1]), key_file=Path(sys.argv[2]), format="json")
print(Path("/proc/self/status").read_text())
"""


def bench_device(workload: Workload, on_step: Callable[[], None]) -> dict[str, Any]:
    """``{"machine", "workload", …}`` and the figures of the table above; `on_step` is called :attr:`Workload.steps`
    times.

    Raises:
        AggregationError: the device refused a message, or there is no (k, t) for a cohort.
    """
    where = machine("torch", "numpy", "cryptography", "flwr")
    with tempfile.TemporaryDirectory(prefix="fedtopk-bench-") as name, _one_blas_thread():
        device = _make_device(Path(name), workload)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker) as process:

            def run(task: Callable[..., Any], *arguments: Any) -> Any:
                return process.submit(task, *arguments).result()

            rounds = Rounds(workload, lambda *message: run(device.answer, *message))
            played = []
            for number in range(1 + workload.repeats):
                played.append(rounds.play(number))
                on_step()
            peak = round(run(peak_rss_mib), 1)
            parts = run(device.parts, rounds.terms(0).to_bytes(), workload.repeats)
            recommend_ms = run(device.recommend_ms, workload.repeats)
            recommender = _recommender_mib(device)
            added = run(device.add_event_ms)
            run(device.lengthen, _LONGER * workload.events)
            added_long = run(device.add_event_ms)
            on_step()
        protocol = _protocol_ms(rounds.case(0))
        on_step()
    messages = {action: [seconds[action] for seconds in played[1:]] for action in played[0]}
    total = median(sum(seconds.values()) for seconds in played[1:])
    return {
        "machine": where,
        "workload": {
            "items": workload.items,
            "events": workload.events,
            "devices": [workload.devices + 1, workload.devices + workload.repeats],
            "parameters": rounds.case(0).dimension,
            "bits": rounds.terms(0).encoding.bits,
        },
        "update_ms": parts | {"protocol": round(sum(protocol.values()), 2), "total": round(1e3 * total, 2)},
        "messages_ms": {name.partition(".")[2]: round(1e3 * median(each), 2) for name, each in messages.items()},
        "protocol_ms": protocol,
        "recommend_ms": recommend_ms,
        "add_event_ms": added["wall"],
        "add_event_cpu_ms": added["cpu"],
        "add_event_ms_long": added_long["wall"],
        "add_event_cpu_ms_long": added_long["cpu"],
        "update_peak_rss_mib": peak,
        "peak_rss_mib": recommender,
    }


def results_table(results: dict[str, Any]) -> Group:
    """The figures for people."""
    workload, update = results["workload"], results["update_ms"]
    table = Table(
        title=f"One device: {workload['items']} items, {workload['events']} interactions, "
        f"{workload['parameters']} parameters, cohorts of {workload['devices'][0]} to {workload['devices'][1]}",
    )
    table.add_column("")
    table.add_column("ms", justify="right")
    for part, figure in update.items():
        table.add_row("a round in all" if part == "total" else f"  of a round: {part}", str(figure))
    table.add_row("ten recommendations", str(results["recommend_ms"]))
    table.add_row("a new interaction, wall", str(results["add_event_ms"]))
    table.add_row(f"  after {_LONGER} times as many", str(results["add_event_ms_long"]))
    return Group(
        table,
        f"Peak memory: {results['update_peak_rss_mib']} MiB in rounds, {results['peak_rss_mib']} MiB to recommend.",
    )


@dataclass(frozen=True)
class _Device:
    """The device; every method opens its store, in whatever process it is called."""

    folder: Path
    key: Path
    settings: Settings

    def opened(self) -> DeviceStore:
        return DeviceStore.open(self.folder, KeyFile(self.key))

    def answer(self, action: Action, body: bytes, model: bytes, signature: bytes) -> tuple[bytes, float]:
        """The body of its answer, and the CPU seconds until it was there. Raises :class:`AggregationError`."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, _NODE, 1
        content = content_of(body, model=model, signature=signature)
        message = Message(content, dst_node_id=_NODE, message_type=action)
        context = Context(RUN_ID, _NODE, {}, RecordDict(), self.settings.flat())
        meter = Meter(time.process_time)
        agent = Agent(self.folder, KeyFile(self.key), str, lambda line: None, BytesIO())
        with meter(action):
            reply = agent.reply(message, context)
        if reply.has_error():
            raise AggregationError(f"Expected an answer to {action}: {reply.error.reason}")
        return body_of(reply), meter.seconds[action][0]

    def parts(self, terms: bytes, repeats: int) -> dict[str, float]:
        """What `update_ms` holds of the update itself, and not of the protocol."""
        meter, agreed = Meter(time.process_time), Terms.parse(terms)
        still = self.settings.model_copy(
            update={"training": self.settings.training.model_copy(update={"user_steps": 0})}
        )
        encoding, share = agreed.encoding, agreed.encoding.share(agreed.n)
        with self.opened() as store:
            device, model, stored = StoredDevice(store, self.settings), store.load_model(), store.load_user()
            assert model is not None and stored is not None  # the device took part
            user = torch.from_numpy(stored).unsqueeze(0)
            for again in range(1 + repeats):
                offer = read_offer(agreed, read_arrays(model.content), self.settings, len(device.catalogue))
                with meter("input"):
                    window, candidates = device.window(offer.round), offer.candidates
                work = (offer.parameters, window, user, candidates, offer.warm, offer.item_slice)
                with meter("update"):
                    update = compute_update(self.settings, *work)
                with meter("still"):
                    compute_update(still, *work)
                with meter("vector"):
                    vector = update.gradients.weighted_sum(torch.ones(1)).numpy()
                with meter("encode"):
                    silent = replace(encoding, variance=0.0)
                    encode(vector, silent, agreed.n, offer.signs, system_stream(), system_stream())
                with meter("noise"):
                    skellam(share + 1 + again, encoding.padded, system_stream())
        adapt = [whole - rest for whole, rest in zip(meter.seconds["update"], meter.seconds["still"], strict=True)]
        return {
            "adapt": round(1e3 * max(0.0, median(adapt[1:])), 3),
            "gradient": round(meter.ms("input") + meter.ms("still") + meter.ms("vector"), 3),
            "encode": meter.ms("encode"),
            "noise": meter.ms("noise"),
        }

    def recommend_ms(self, repeats: int) -> float:
        meter = Meter(time.process_time)
        with self.opened() as store:
            recommender = received(store).recommender
            for _ in range(1 + repeats):
                with meter("recommend"):
                    recommender.recommend(recommender.prepare(store), _SLATE)
        return meter.ms("recommend")

    def add_event_ms(self) -> dict[str, float]:
        """In wall and in CPU time."""
        meter, wall = Meter(time.process_time), []
        with self.opened() as store:
            for _ in range(1 + _ADDED):
                begin = time.perf_counter()
                with meter("add"):
                    store.add_events([Event("0", 5.0, 0)])
                wall.append(time.perf_counter() - begin)
        return {"wall": round(1e3 * median(wall[1:]), 3), "cpu": meter.ms("add")}

    def lengthen(self, events: int) -> None:
        """Add to the history until it has so many."""
        with self.opened() as store:
            store.add_events(Event("0", 5.0, 0) for _ in range(events - store.event_count))


def _make_device(folder: Path, workload: Workload) -> _Device:
    """A device with a history, which was enrolled, has joined, and has not taken part yet."""
    identity, generator = simulated_identity(SEED, workload.devices // 2), np.random.default_rng(SEED)
    certificate = identity.certificate.to_bytes().hex()
    history = generator.integers(0, workload.items, workload.events).tolist()
    ratings = (generator.integers(1, 11, workload.events) / 2).tolist()
    device = _Device(folder / "device", folder / "device.key", workload.settings)
    with DeviceStore.create(device.folder, KeyFile(device.key)) as store, store.transaction():
        store.records[IDENTITY_KEY] = identity.key.private_bytes_raw()
        store.records[ENROLMENT] = Enrolment(certificate, "", identity.authority.hex(), "").to_json().encode()
        store.records[INVITATION] = invitation(workload).to_json().encode()
        store.save_policy(Policy.of(workload.settings))
        store.add_events(Event(str(item), ratings[at], at) for at, item in enumerate(history))
    return device


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """For processes that are started meanwhile: the BLAS's idle threads spin, for as long as there are other cores."""
    before = os.environ.get(_BLAS_THREADS)
    os.environ[_BLAS_THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[_BLAS_THREADS]
        if before is not None:
            os.environ[_BLAS_THREADS] = before


def _protocol_ms(case: Case) -> dict[str, float]:
    """By stage, with no collection of garbage among the thousands of objects of a whole cohort."""
    gc.disable()
    try:
        stages: dict[str, float] = measure(case, lambda: None)["device_stages_ms"]
    finally:
        gc.enable()
    return stages


def _recommender_mib(device: _Device) -> float:
    """Of a process that recommends once."""
    words = [sys.executable, "-c", _RECOMMEND, str(device.folder), str(device.key)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return round(peak_mib(done.stdout), 1)
