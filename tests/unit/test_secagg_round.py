"""A whole attempt: the masked sum is the plain one for every pattern of dropouts, or nothing comes out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import begin, plain_sum, residues_of

from common.errors import AggregationError
from common.secagg.advertisement import advertisement_bytes
from common.secagg.masks import add_masks, in_lanes
from common.secagg.packing import unpack

WIDTHS = (16, 20, 32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_masked_sum_is_the_plain_sum_or_nothing_is_released(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 14), "n")
    absent = {
        stage: data.draw(st.sets(st.integers(0, n - 1), max_size=max(1, n // 3)), stage)
        for stage in ("advertise", "share", "upload", "agree", "unmask")
    }
    if len(absent["advertise"]) == n:
        return
    dropout = data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.34]), "δ")
    bits, hybrid = data.draw(st.sampled_from(WIDTHS), "bits"), data.draw(st.booleans(), "hybrid") and n < 5
    play = begin(
        n, absent["advertise"], bits=bits, hybrid=hybrid, dropout=dropout, dimension=data.draw(st.integers(1, 9))
    )
    residues = residues_of(play, 1)
    survived = [device for device in play.device_at if device not in absent["share"] | absent["upload"]]
    unmasking = [device for device in survived if device not in absent["agree"] | absent["unmask"]]
    degree = play.terms.degree
    try:
        play.share(absent["share"])
        play.upload(residues, absent["upload"])
        play.agree(absent["agree"])
        play.unmask(absent["unmask"])
        total = play.aggregate.total()
    except AggregationError:
        # Only where dropouts exceed what the terms allow for.
        enough = len(survived) >= play.terms.least_survivors and len(unmasking) >= degree.threshold
        assert not enough, (absent, play.terms)
        return
    assert len(survived) >= play.terms.least_survivors
    np.testing.assert_array_equal(total, plain_sum(play, residues))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_sparse_graph_with_dropouts_at_every_stage(bits: int) -> None:
    play = begin(100, absent={3}, bits=bits, dropout=0.2, dimension=33)
    assert play.terms.degree.neighbours < play.terms.n - 1
    residues = residues_of(play, 2)
    play.share(absent=range(10, 16))
    play.upload(residues, absent=range(20, 26))
    play.agree(absent=range(30, 34))
    play.unmask(absent=range(40, 44))
    assert len(play.aggregate.survivors) == 87
    np.testing.assert_array_equal(play.aggregate.total(), plain_sum(play, residues))


def test_a_dropped_upload_that_comes_late_is_not_in_the_sum() -> None:
    play = begin(10, dropout=0.2)
    residues = residues_of(play, 3)
    play.share()
    play.upload(residues, absent={4})
    play.agree()
    with pytest.raises(AggregationError, match="before the survivors are fixed"):
        play.upload(residues, absent=set(range(10)) - {4})
    play.unmask()
    np.testing.assert_array_equal(play.aggregate.total(), plain_sum(play, residues))


def test_below_the_threshold_nothing_is_released() -> None:
    play = begin(10, dropout=0.2)
    play.share()
    play.upload(residues_of(play, 4))
    play.agree()
    play.unmask(absent=range(5))
    with pytest.raises(AggregationError, match="nothing was released"):
        play.aggregate.total()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 64), max_size=4), st.sampled_from(WIDTHS))
def test_shards_unmask_as_the_whole(cuts: list[int], bits: int) -> None:
    generator = np.random.default_rng(0)
    keys = [(generator.bytes(32), sign) for sign in (1, -1, 1)]
    whole = in_lanes(generator.integers(0, 2**bits, 64, dtype=np.uint32), bits)
    edges = sorted({0, 64, *cuts})
    shards = [whole[low:high].copy() for low, high in itertools.pairwise(edges)]
    add_masks(whole, keys)
    for low, shard in zip(edges, shards, strict=False):
        add_masks(shard, keys, start=low)
    np.testing.assert_array_equal(np.concatenate(shards), whole)


def test_what_the_messages_weigh() -> None:
    play = begin(100, dimension=2**10)
    play.share()
    play.upload(residues_of(play, 5))
    play.agree()
    position = 7
    signature, tag, count = 64, 16, play.terms.degree.neighbours
    assert advertisement_bytes(hybrid=False) == 268
    assert len(play.uploads[position]) == 2 * play.terms.encoding.padded + tag
    up = 268 + count * (80 + 32) + tag + signature + 32 + count * 32
    down = sum(len(message) for message in (play.aggregate.view(position), play.aggregate.inbox(position)))
    assert up <= 20_000 and down + len(play.aggregate.signatures(position)) + 13 <= 128_000
    assert unpack(play.uploads[position][:-tag], play.terms.encoding.padded, 16).dtype == np.uint16
