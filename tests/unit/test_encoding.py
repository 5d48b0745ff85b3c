"""The encoding: what is chosen, what one device sends, what is released, and how far one user can move it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.clipping import clip_factor
from common.privacy.encoding import (
    CENTRAL_BETA,
    CENTRAL_SLACK,
    WIDTHS,
    Encoding,
    add_residues,
    decode,
    encode,
    release_central,
    top_up_noise,
)
from common.privacy.randomness import seeded_stream
from common.privacy.rotation import random_signs, rotate
from common.privacy.rounding import stochastic_round
from common.privacy.skellam import DELTA_LOSS

Vector = NDArray[np.float64]


def signs_of(encoding: Encoding, seed: int = 0) -> NDArray[np.float32]:
    return random_signs(encoding.dimension, seeded_stream(seed, "signs"))


def vector(dimension: int, norm: float, *labels: int | str) -> Vector:
    x = seeded_stream(0, "vector", *labels).uniform(dimension) - 0.5
    return x * (norm / np.linalg.norm(x))


def send(update: Vector, encoding: Encoding, n: int, *labels: int | str) -> NDArray[np.uint32]:
    streams = (seeded_stream(0, "rounding", *labels), seeded_stream(0, "noise", *labels))
    return encode(update, encoding, n, signs_of(encoding), *streams)


# --- clipping ---------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e300), st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_and_leaves_smaller_ones(norm: float, clip: float) -> None:
    factor = float(clip_factor(norm, clip))
    assert 0 < factor <= 1
    assert factor * norm <= clip * (1 + 1e-15)
    assert norm > clip or factor == 1


def test_clipping_of_several_norms() -> None:
    assert clip_factor(np.array([0.0, 1.0, 2.0, 8.0]), 2.0).tolist() == [1.0, 1.0, 1.0, 0.25]
    assert clip_factor([[5.0, 1e9]], math.inf).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("norm", "clip"), [(math.nan, 1.0), (math.inf, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_clipping_refuses(norm: float, clip: float) -> None:
    with pytest.raises(PrivacyError, match="Expected"):
        clip_factor([0.5, norm], clip)


# --- the choice of scale and width ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "z", "cohort", "bits", "scale"),
    [
        (2**17, 1.69, 61, 16, 1305),
        (2**20, 0.57, 604, 16, 3640),
        (2**20, 1.9, 604, 16, 2686),
        (2**20, 3.0, 20_000, 20, 3640),
    ],
)
def test_the_scale_and_width_of_known_cases(dimension: int, z: float, cohort: int, bits: int, scale: float) -> None:
    encoding = Encoding.choose(dimension, 0.5, z, cohort, 0.8)
    assert encoding.bits == bits
    assert encoding.scale * 0.5 == pytest.approx(scale, rel=1e-3)


@given(
    st.integers(100, 2**22),
    st.floats(1e-3, 1e3),
    st.floats(0.05, 20),
    st.floats(0.1, 1e6),
    st.floats(0.1, 1.0),
    st.sampled_from([0, *WIDTHS]),
    st.booleans(),
)
@settings(deadline=None)
def test_a_chosen_encoding_fits_its_width(
    dimension: int, clip: float, z: float, cohort: float, honest: float, bits: int, central: bool
) -> None:
    try:
        chosen = Encoding.choose(dimension, clip, z, cohort, honest, bits, central=central)
    except PrivacyError:
        assert bits
        return
    assert chosen.bits == bits or not bits
    assert chosen.noise_multiplier == pytest.approx(z, rel=1e-12)
    height = cohort * chosen.scale * clip / math.sqrt(chosen.padded)
    assert height + 6 * z * chosen.sensitivity < 2 ** (chosen.bits - 1)
    assert chosen.sensitivity <= 1.1001 * chosen.scale * clip


@pytest.mark.parametrize("dimension", [10, 1000, 2**17])
@pytest.mark.parametrize("cohort", [1, 100, 10_000])
def test_without_noise_the_rounding_error_is_small(dimension: int, cohort: int) -> None:
    encoding = Encoding.choose(dimension, 2.0, 0.0, cohort, 0.8)
    assert (encoding.variance, encoding.bits) == (0.0, 32)
    assert math.sqrt(encoding.padded) / (encoding.scale * 2.0) < 1e-4 * max(1, cohort / 1000)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PrivacyError, match="16 bits"):
        Encoding.choose(2**20, 1.0, 1.0, 1e6, 0.8, bits=16)
    with pytest.raises(PrivacyError, match="noise_multiplier=-1"):
        Encoding.choose(16, 1.0, -1.0, 10, 0.8)
    with pytest.raises(PrivacyError, match="cohort=0"):
        Encoding.choose(16, 1.0, 1.0, 0, 0.8)
    for clip in (0.0, math.inf):
        with pytest.raises(PrivacyError, match="clip_norm="):
            Encoding.choose(16, clip, 1.0, 10, 0.8)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": 0},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"scale": 0.0},
        {"scale": 1e12},
        {"bits": 33},
        {"variance": -1.0},
        {"variance": math.nan},
        {"honest": 0.0},
        {"honest": 1.1},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match=f"{next(iter(change))}="):
        dataclasses.replace(Encoding(16, 1.0, 100.0, 16, 1.0, 0.8), **change)  # type: ignore[arg-type]


def test_the_central_kind_bounds_the_norm_more_carefully() -> None:
    device = Encoding(2**12, 1.0, 300.0, 16, 1.0, 0.8)
    central = dataclasses.replace(device, central=True)
    assert 300 < device.sensitivity < central.sensitivity <= 300 * (1 + CENTRAL_SLACK) + 64
    assert device.delta_loss < 1e-19
    assert central.delta_loss == CENTRAL_BETA + DELTA_LOSS


# --- noise shares -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(0, 49), st.integers(0, 49))
def test_the_honest_part_is_at_least_its_share(n: int, corrupt: int, dropped: int) -> None:
    """With ⌊γn⌋ devices against it and ⌊δn⌋ gone, the rest add V·honest; γ and δ are hundredths here."""
    encoding = Encoding(16, 1.0, 100.0, 16, 1e4, 1 - corrupt / 100 - dropped / 100)
    left = n - corrupt * n // 100 - dropped * n // 100
    assert left * encoding.share(n) >= encoding.variance * encoding.honest * (1 - 1e-12)


def test_shares_of_impossible_rosters_are_refused() -> None:
    encoding = Encoding(16, 1.0, 100.0, 16, 1e4, 0.8)
    with pytest.raises(PrivacyError, match="size=0"):
        encoding.share(0)
    for n, survivors in ((3, 4), (3, -1), (0, 1)):
        with pytest.raises(PrivacyError, match=f"survivors={survivors}"):
            encoding.top_up(n, survivors)


# --- one device, and sums ---------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.floats(0, 10), st.integers(0, 100))
@settings(deadline=None)
def test_decoding_an_encoded_update_gives_the_clipped_update(dimension: int, norm: float, seed: int) -> None:
    encoding = Encoding.choose(dimension, 2.0, 0.0, 10, 0.8)
    update = vector(dimension, norm, seed)
    residues = send(update, encoding, 10, seed)
    assert residues.dtype == np.uint32
    assert residues.shape == (encoding.padded,)
    expected = update * min(1.0, 2.0 / max(norm, 1e-9))
    np.testing.assert_allclose(decode(residues, encoding, signs_of(encoding)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [12, 16, 20, 32])
def test_residues_are_below_two_to_the_bits_and_decode_wherever_they_wrap(bits: int) -> None:
    encoding = Encoding(1000, 1.0, 1000.0, bits, 400.0, 0.8)
    residues, update = send(vector(1000, 1.0), encoding, 3), vector(1000, 1.0)
    assert residues.max() < 2**bits
    decoded = decode(residues, encoding, signs_of(encoding))
    assert np.linalg.norm(decoded - update) < 32 * 25 / 1000
    assert np.array_equal(decode(residues.astype(np.int64) - (5 << bits), encoding, signs_of(encoding)), decoded)


@given(st.integers(1, 12), st.sampled_from([0, *WIDTHS]))
@settings(deadline=None, max_examples=30)
def test_the_sum_of_encodings_decodes_to_the_sum(n: int, bits: int) -> None:
    encoding = Encoding.choose(500, 1.0, 0.0, n, 0.8, bits)
    updates = [vector(500, 1.0, i) for i in range(n)]
    total = np.zeros(encoding.padded, np.uint32)
    for i, update in enumerate(updates):
        add_residues(total, send(update, encoding, n, i), encoding.bits)
        assert int(total.max()) < 2**encoding.bits
    tolerance = n * (1e-5 + 6 / encoding.scale)
    np.testing.assert_allclose(decode(total, encoding, signs_of(encoding)), np.sum(updates, axis=0), atol=tolerance)


@given(st.integers(2, 32), st.integers(0), st.integers(1, 6))
def test_adding_residues_wraps(bits: int, seed: int, terms: int) -> None:
    values = [(seeded_stream(seed, i).words(8) % np.uint64(2**bits)).astype(np.uint32) for i in range(terms)]
    total = np.zeros(8, np.uint32)
    for value in values:
        add_residues(total, value, bits)
    assert total.tolist() == [sum(int(value[i]) for value in values) % 2**bits for i in range(8)]


def test_float32_and_float64_updates_differ_by_one_unit_at_most() -> None:
    encoding = Encoding.choose(2**15, 1.0, 1.0, 100, 0.8)
    update = vector(2**15, 0.9)
    one, other = send(update, encoding, 100), send(update.astype(np.float32).astype(np.float64), encoding, 100)
    apart = (one.astype(np.int64) - other.astype(np.int64) + 2**15) % 2**16 - 2**15
    assert np.abs(apart).max() <= 1
    assert np.count_nonzero(apart) <= 1e-4 * len(apart)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    encoding = Encoding.choose(100, 1.0, 1.0, 10, 0.8, central=True)
    update = vector(100, 1.0)
    update[3] = value
    with pytest.raises(PrivacyError, match=f"got {value}"):
        send(update, encoding, 10)
    with pytest.raises(PrivacyError, match=f"got {value}"):
        release_central(update, encoding, signs_of(encoding), seeded_stream(0))


def test_wrong_shapes_are_refused() -> None:
    encoding = Encoding.choose(100, 1.0, 1.0, 10, 0.8)
    with pytest.raises(PrivacyError, match="update of shape"):
        send(vector(101, 1.0), encoding, 10)
    with pytest.raises(PrivacyError, match="signs of shape"):
        encode(vector(100, 1.0), encoding, 10, np.ones(64, np.float32), seeded_stream(0), seeded_stream(1))


def test_huge_updates_are_clipped() -> None:
    encoding = Encoding.choose(100, 1.0, 0.0, 10, 0.8)
    decoded = decode(send(vector(100, 1e100), encoding, 10), encoding, signs_of(encoding))
    np.testing.assert_allclose(decoded, vector(100, 1.0), atol=1e-6)


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "survivors"), [(0, 0), (1, 1), (1, 0), (2, 1), (7, 7), (20, 17)])
def test_the_released_variance_is_the_same_for_every_cohort(n: int, survivors: int) -> None:
    encoding = Encoding.choose(2**15, 1.0, 1.0, 10, 0.8)
    total = top_up_noise(encoding, n, survivors, seeded_stream(3, "top-up", n, survivors))
    for i in range(survivors):
        add_residues(total, send(np.zeros(2**15), encoding, n, n, i), encoding.bits)
    released = decode(total, encoding, signs_of(encoding)) * encoding.scale
    assert np.mean(released**2) == pytest.approx(encoding.variance, rel=4 * math.sqrt(2 / 2**15))


@given(st.integers(1, 2000), st.floats(0.5, 500), st.integers(0))
@settings(deadline=None, max_examples=60)
def test_central_sensitivity(dimension: int, scale: float, seed: int) -> None:
    """Rounded with the same w, sums with and without a user are at most Δ₂ apart (but for probability 1e-20)."""
    encoding = Encoding(dimension, 1.0, scale, 32, 1.0, 1.0, central=True)
    signs = signs_of(encoding, seed)
    total, user = vector(dimension, 50.0, seed, "total"), vector(dimension, 1 + CENTRAL_SLACK / 2, seed, "user")
    without = stochastic_round(rotate(total, signs) * scale, seeded_stream(seed, "w"))
    with_user = stochastic_round(rotate(total + user, signs) * scale, seeded_stream(seed, "w"))
    assert int(np.sum((with_user - without) ** 2)) <= encoding.squared_bound


def test_a_central_release_is_the_sum_plus_noise_of_the_target_variance() -> None:
    encoding = Encoding.choose(2**15, 1.0, 1.0, 10, 0.8, central=True)
    total = vector(2**15, 7.0)
    released = release_central(total, encoding, signs_of(encoding), seeded_stream(4))
    error = (released - total) * encoding.scale
    assert np.mean(error**2) == pytest.approx(encoding.variance + 1 / 6, rel=4 * math.sqrt(2 / 2**15))
    assert abs(np.dot(error, total)) / 7.0 < 4 * math.sqrt(encoding.variance)


def test_a_central_release_without_noise_is_the_sum() -> None:
    encoding = Encoding.choose(1000, 1.0, 0.0, 10, 0.8, central=True)
    total = vector(1000, 7.0)
    released = release_central(total, encoding, signs_of(encoding), seeded_stream(5))
    np.testing.assert_allclose(released, total, atol=1e-7)


def test_a_central_release_needs_a_central_encoding() -> None:
    encoding = Encoding.choose(100, 1.0, 1.0, 10, 0.8)
    with pytest.raises(PrivacyError, match="central=True"):
        release_central(vector(100, 1.0), encoding, signs_of(encoding), seeded_stream(0))
