"""Secure aggregation over Messages: what plain aggregation releases, to the bit, or nothing."""

import itertools
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from in_process_grid import InProcessGrid, Lost
from running import TINY

from client.coins import Coins
from client.device import participate
from common.errors import AggregationError
from common.item_slice import cut, slice_of
from common.messages import run_digest
from common.model import initialise
from common.offer import Offer
from common.privacy.encoding import Encoding, add_residues
from common.settings import Settings, load_settings
from server.cohort import release
from server.nodes import Nodes
from server.sampling import draw_roster
from server.secure_sum import SecureSum, Trust
from simulations.client_app import client_app
from simulations.datasets import load
from simulations.identities import simulated_authority, simulated_publisher
from simulations.population import Population
from simulations.simulate import load_split

N = 10
RUN_ID = 7
STAGES = ("query.advertise", "query.share", "train.upload", "query.agree", "query.unmask")
SMALL = TINY | {
    "data.users": N,
    "training.cohort_rate": 1.0,
    "aggregation.kind": "secure",
    "aggregation.dropout_fraction": 0.2,
}


def settings_with(**changes: object) -> Settings:
    """Dots in names of changes are written as two underscores."""
    tree = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return load_settings(None, [f"{key}={value}".replace("True", "true") for key, value in tree.items()])


SETTINGS = settings_with()


def offer_of(settings: Settings = SETTINGS, round_: int = 3, attempt: int = 1) -> Offer:
    items = len(load(settings.data, seed=settings.training.seed).catalogue)
    item_slice = slice_of(settings, items, round_)
    parameters = cut(initialise(settings, items, torch.Generator().manual_seed(1)), item_slice)
    dimension = sum(value.numel() for value in parameters.values())
    encoding = Encoding.choose(dimension, 1.0, 1.0, cohort=N, honest=0.7, bits=settings.aggregation.bits)
    return Offer(round_, attempt, parameters, encoding, settings, item_slice)


def trust_of(settings: Settings) -> Trust:
    seed = settings.training.seed
    return Trust(simulated_authority(seed), simulated_publisher(seed), load_split(settings).train.catalogue.digest)


def secure(lost: Lost, settings: Settings = SETTINGS) -> tuple[SecureSum, InProcessGrid, list[dict[str, object]]]:
    """A cohort whose devices are found before anything is lost."""
    found: list[str] = []
    grid = InProcessGrid(client_app, N, settings.flat(), lambda kind, node: bool(found) and lost(kind, node), RUN_ID)
    events: list[dict[str, object]] = []
    cohort = SecureSum(
        Nodes(grid, 10.0, {}),
        settings,
        run_digest(settings, RUN_ID),
        trust_of(settings),
        lambda kind, round_=None, **fields: events.append({"kind": kind, "round": round_, **fields}),
    )
    cohort.find(N, N)
    cohort._stock.clear()  # so that the keys are asked for in the round, and can be lost
    found.append("all")
    return cohort, grid, events


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(SETTINGS, load_split(SETTINGS).train)


@pytest.fixture(scope="module")
def encoded(population: Population) -> dict[tuple[int, int], np.ndarray]:
    """What each device encodes in a roster of n, by (n, device)."""
    offer = offer_of()
    return {(n, device): own_part(offer, population, n, device) for n in (N - 2, N - 1, N) for device in range(N)}


def own_part(offer: Offer, population: Population, roster: int, device: int) -> np.ndarray:
    """What a device encodes in its first round."""
    window, user = population.windows(offer.round, np.array([device])), torch.zeros(TINY["model.user_width"])
    return participate(offer, roster, device, window, user).residues


def plain(offer: Offer, encoded: dict[tuple[int, int], np.ndarray], roster: int, survivors: set[int]) -> np.ndarray:
    residues = np.zeros(offer.encoding.padded, np.uint32)
    for device in survivors:
        add_residues(residues, encoded[roster, device], offer.encoding.bits)
    return release(residues, len(survivors), roster, offer)


def patterns() -> Iterator[dict[str, set[int]]]:
    """0, 10 and 20 % of the devices fall out at each stage, other devices at every stage: 81 patterns, among which any
    four stages have all their combinations (an orthogonal array of strength 4)."""
    for counts in itertools.product((0, 1, 2), repeat=len(STAGES)):
        if sum(counts) % 3:
            continue
        yield {
            stage: {2 * at, 2 * at + 1} - set(range(2 * at + count, 2 * at + 2))
            for at, (stage, count) in enumerate(zip(STAGES, counts, strict=True))
        }


def test_secure_is_plain_to_the_bit_for_every_pattern_of_dropouts(encoded: dict[tuple[int, int], np.ndarray]) -> None:
    released = 0
    for gone in patterns():
        offer = offer_of()
        cohort, _, _ = secure(lambda kind, node, gone=gone: node in gone[kind])
        everyone = set(range(N)) - gone["query.advertise"]
        survivors = everyone - gone["query.share"] - gone["train.upload"]
        helpers = survivors - gone["query.agree"] - gone["query.unmask"]
        n = len(everyone)
        possible = len(survivors) >= n - int(0.2 * n) and len(helpers) >= (n + int(0.1 * n)) // 2 + 1
        try:
            total = cohort.sum_updates(offer, np.arange(N))
        except AggregationError:
            total = None
        if total is None:
            assert not possible, gone
            continue
        assert len(survivors) >= n - int(0.2 * n), gone
        assert total.survivors == len(survivors)
        np.testing.assert_array_equal(total.total, plain(offer, encoded, n, survivors))
        released += 1
    assert released > 16


SLICED = {"objective__slice_items": 20, "model__input_rows": 16}


@pytest.mark.parametrize(
    "change", [{"aggregation__bits": 32}, {"aggregation__bits": 20}, {"aggregation__hybrid": True}, SLICED]
)
def test_other_widths_the_hybrid_channel_and_slices(change: dict[str, object], population: Population) -> None:
    settings = settings_with(**change)
    offer = offer_of(settings)
    cohort, _, _ = secure(lambda kind, node: (kind, node) == ("train.upload", 4), settings)
    encoded = {(N, device): own_part(offer, population, N, device) for device in range(N)}
    total = cohort.sum_updates(offer, np.arange(N)).total
    np.testing.assert_array_equal(total, plain(offer, encoded, N, set(range(N)) - {4}))


def test_a_device_brings_its_next_keys_with_its_last_answer() -> None:
    cohort, grid, events = secure(lambda kind, node: False)
    cohort.sum_updates(offer_of(round_=1), np.arange(N))
    first = len(grid.seen)
    cohort.sum_updates(offer_of(round_=2), np.arange(N))
    assert "query.advertise" not in {kind for kind, _ in grid.seen[first:]}
    stages = [event["stage"] for event in events if event["kind"] == "stage" and event["round"] == 2]
    assert stages == ["share", "upload", "agree", "unmask"]


def test_the_sum_is_that_of_the_devices_whose_own_coin_fell(population: Population) -> None:
    settings = settings_with(training__coins="device", training__cohort_rate=0.6)
    offer, run = offer_of(settings), run_digest(settings, RUN_ID)
    heads = {device for device in range(N) if Coins({}, run).flip(offer.round, settings, device)}
    cohort, grid, _ = secure(lambda kind, node: False, settings)
    before = len(grid.seen)
    total = cohort.sum_updates(offer, draw_roster(settings, offer.round, N))
    asked = {stage: [node for kind, node in grid.seen[before:] if kind == stage] for stage in STAGES}
    assert 3 < len(heads) < N and len(heads) == total.roster == total.survivors
    assert asked == {stage: sorted(heads) for stage in STAGES} | {"query.advertise": list(range(N))}
    encoded = {(len(heads), device): own_part(offer, population, len(heads), device) for device in heads}
    np.testing.assert_array_equal(total.total, plain(offer, encoded, len(heads), heads))


def test_a_failed_attempt_is_followed_by_one_with_fresh_keys(encoded: dict[tuple[int, int], np.ndarray]) -> None:
    failing = [True]
    cohort, _, _ = secure(lambda kind, node: failing[0] and kind == "query.unmask" and node < 6)
    with pytest.raises(AggregationError, match="nothing was released"):
        cohort.sum_updates(offer_of(attempt=1), np.arange(N))
    failing[0] = False
    offer = offer_of(attempt=2)
    total = cohort.sum_updates(offer, np.arange(N))
    # User embeddings were committed at the first upload, so only the second attempt's own numbers are compared.
    assert total.survivors == N and np.isfinite(total.total).all()


def test_nothing_is_uploaded_where_too_few_share() -> None:
    cohort, grid, _ = secure(lambda kind, node: kind == "query.share" and node < 3)
    with pytest.raises(AggregationError, match="nothing was uploaded"):
        cohort.sum_updates(offer_of(), np.arange(N))
    assert "train.upload" not in {kind for kind, _ in grid.seen}


def test_without_members_noise_alone_is_released() -> None:
    cohort, grid, _ = secure(lambda kind, node: False)
    before = len(grid.seen)
    offer = offer_of()
    total = cohort.sum_updates(offer, np.array([], np.int64))
    assert len(grid.seen) == before
    np.testing.assert_array_equal(total.total, release(np.zeros(offer.encoding.padded, np.uint32), 0, 0, offer))


def test_a_refusal_reaches_the_server_in_words() -> None:
    cohort, _, _ = secure(lambda kind, node: False)
    cohort.sum_updates(offer_of(round_=5), np.arange(N))
    with pytest.raises(AggregationError, match=r"expected round 4, attempt 1 to come after round 5, attempt 1"):
        cohort.sum_updates(offer_of(round_=4), np.arange(N))


def test_what_does_not_train_starts_without_torch() -> None:
    code = (
        "import sys; from simulations.client_app import client_app; "
        "from in_process_grid import InProcessGrid; from common.settings import load_settings; "
        "from flwr.app import Message, RecordDict; "
        "grid = InProcessGrid(client_app, 1, load_settings().flat(), lambda *_: False); "
        "replies = grid.pull_messages(grid.push_messages([Message(RecordDict(), 100, 'query.advertise')])); "
        "assert replies[0].has_content(), replies[0].error; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="tests/integration", timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr
