"""What one masked upload tells: nothing. Its bytes are uniform, and the items behind it are at chance.

All randomness is seeded, so that a test that passes once always does: p is the chance that honest masks would look
less uniform than these.
"""

from collections.abc import Callable
from functools import cache, reduce

import numpy as np
import pytest
from decoders import meet
from numpy.typing import NDArray
from protocol import Play
from scipy.stats import chisquare, hypergeom, norm

from common.privacy.encoding import Encoding, decode, encode
from common.privacy.randomness import seeded_stream
from common.privacy.rotation import random_signs
from common.secagg.keys import mask_key, own_key, private_key, public_key
from common.secagg.masks import Lanes, add_masks
from common.secagg.member import TAG_BYTES, sign_of
from common.secagg.packing import pack, unpack

ITEMS, WIDTH, READ = 256, 64, 20
"""Rows of the item table, numbers in each, and how many of them one device's history touches."""

N = 10
WIDTHS = (16, 20, 32)
P = 1e-4

SIGNS = random_signs(ITEMS * WIDTH, seeded_stream(0, "signs"))


def encoding_of(bits: int) -> Encoding:
    """Without noise, at a scale that uses most of a residue."""
    return Encoding(ITEMS * WIDTH, 1.0, 2.0 ** min(bits + 2, 30), bits, 0.0, 0.8)


def history(device: int) -> NDArray[np.int64]:
    """The items that a device has seen."""
    return np.sort(np.random.default_rng([1, device]).choice(ITEMS, READ, replace=False))


def update(device: int) -> NDArray[np.float64]:
    """(d,) of norm 1: not zero in the rows of the device's items alone, as gradients of an item table are."""
    rows = np.zeros((ITEMS, WIDTH))
    rows[history(device)] = np.random.default_rng([2, device]).normal(size=(READ, WIDTH))
    return rows.ravel() / np.linalg.norm(rows)


def residues(device: int, bits: int) -> NDArray[np.uint32]:
    """What the device would send without a mask."""
    streams = seeded_stream(0, "rounding", device), seeded_stream(0, "noise", device)
    return encode(update(device), encoding_of(bits), N, SIGNS, *streams)


@cache
def played(bits: int) -> Play:
    """All have uploaded."""
    play = meet(N, seed=bits, encoding=encoding_of(bits))
    play.share()
    play.upload(np.stack([residues(device, bits) for device in range(N)]))
    return play


def masked(play: Play, position: int) -> Lanes:
    """(2^m,) what the server receives of one device."""
    encoding = play.terms.encoding
    return unpack(play.uploads[position][:-TAG_BYTES], encoding.padded, encoding.bits)


def without_own_mask(play: Play, position: int) -> Lanes:
    """What the server has of a survivor after the unmasking."""
    total = masked(play, position).copy()
    add_masks(total, [(own_key(play.shared[position].own_seed, play.shared[position].context), -1)])
    return _reduced(total, play)


def without_common_masks(play: Play, position: int) -> Lanes:
    """What the server has of an upload that comes after its device was taken for silent."""
    state, total = play.shared[position], masked(play, position).copy()
    own = private_key(state.mask_seed)
    keys = {other: public_key(play.shared[other].mask_seed) for other in state.neighbours}
    add_masks(
        total,
        [
            (mask_key(own, key, state.context, position, other), -sign_of(position, other))
            for other, key in keys.items()
        ],
    )
    return _reduced(total, play)


def of_a_part(play: Play, position: int) -> Lanes:
    """The sum of all survivors but one, without their own masks."""
    total = np.zeros_like(masked(play, position))
    for other in range(N):
        if other != position:
            total += without_own_mask(play, other)
    return _reduced(total, play)


def _reduced(total: Lanes, play: Play) -> Lanes:
    total &= (1 << play.terms.encoding.bits) - 1
    return total


def worst(lanes: Lanes, bits: int) -> float:
    """The smaller p of two tests for uniform lanes, corrected for their number: chi² on bytes, and of each bit."""
    content = np.frombuffer(pack(lanes, bits), np.uint8)
    of_bytes = chisquare(np.bincount(content, minlength=256)).pvalue
    ones = np.array([np.count_nonzero(lanes >> plane & 1) for plane in range(bits)])
    of_bits = 2 * norm.sf(np.abs(ones - len(lanes) / 2) / np.sqrt(len(lanes) / 4)).min()
    return float(min(of_bytes, bits * of_bits))


KNOWN: list[Callable[[Play, int], Lanes]] = [masked, without_own_mask, without_common_masks, of_a_part]


@pytest.mark.parametrize("what", KNOWN)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_single_upload_is_uniform_under_either_mask(bits: int, what: Callable[[Play, int], Lanes]) -> None:
    assert worst(what(played(bits), 3), bits) > P


@pytest.mark.parametrize("bits", WIDTHS)
def test_without_masks_it_would_not_be(bits: int) -> None:
    lanes = residues(3, bits).astype(masked(played(bits), 3).dtype)
    assert worst(lanes, bits) < 1e-30


@pytest.mark.parametrize("bits", WIDTHS)
def test_two_uploads_of_the_same_update_have_nothing_in_common(bits: int) -> None:
    """A later attempt has other masks: their difference is uniform too."""
    again = meet(N, seed=99, encoding=encoding_of(bits), attempt=2)
    again.share()
    again.upload(np.stack([residues(device, bits) for device in range(N)]))
    assert worst(_reduced(masked(played(bits), 3) - masked(again, 3), again), bits) > P


# The items of a history, from the rows of the table that an update changes.


def strongest(total: NDArray[np.generic], bits: int) -> NDArray[np.float64]:
    """(items,) norms of the rows that are decoded."""
    rows = decode(total.astype(np.uint32), encoding_of(bits), SIGNS).reshape(ITEMS, WIDTH)
    lengths: NDArray[np.float64] = np.linalg.norm(rows, axis=1)
    return lengths


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_update_without_its_mask_gives_the_whole_history_away(bits: int) -> None:
    for device in range(N):
        assert np.flatnonzero(strongest(residues(device, bits), bits) > 0.01).tolist() == history(device).tolist()


@pytest.mark.parametrize("what", KNOWN)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_masked_update_gives_the_history_away_at_chance(bits: int, what: Callable[[Play, int], Lanes]) -> None:
    """The items with the strongest rows, against as many drawn blindly: neither more nor fewer are right."""
    found = 0
    for device in range(N):
        top = np.argsort(strongest(what(played(bits), device), bits))[-READ:]
        found += len(set(top.tolist()) & set(history(device).tolist()))
    one = hypergeom.pmf(np.arange(READ + 1), ITEMS, READ, READ)
    chance = reduce(np.convolve, [one] * N)
    assert min(chance[: found + 1].sum(), chance[found:].sum()) > P / 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_sum_is_what_comes_out(bits: int) -> None:
    play = played(bits)
    if not play.aggregate.survivors:
        play.agree()
        play.unmask()
    found = decode(play.aggregate.total(), encoding_of(bits), SIGNS)
    np.testing.assert_allclose(found, sum(update(device) for device in range(N)), atol=1e-4)
