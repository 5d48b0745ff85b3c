"""The randomised Hadamard transform: orthogonal, linear, inverse to itself, and the one of scipy."""

from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from common.privacy.randomness import seeded_stream
from common.privacy.rotation import padded, random_signs, rotate, unrotate

DIMENSIONS = st.integers(1, 5000)


def vector(dimension: int, *labels: int | str) -> np.ndarray:
    return seeded_stream(0, *labels).uniform(dimension) - 0.5


@pytest.mark.parametrize(("dimension", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1 << 20, 1 << 20)])
def test_padded(dimension: int, size: int) -> None:
    assert padded(dimension) == size


@pytest.mark.parametrize("power", range(12))
def test_it_is_the_hadamard_matrix_of_scipy(power: int) -> None:
    size = 1 << power
    signs, x = random_signs(size, seeded_stream(0, "signs")), vector(size)
    expected = hadamard(size) @ (signs * x) / np.sqrt(size)
    np.testing.assert_allclose(rotate(x, signs), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotate(x.astype(np.float32), signs), expected, rtol=0, atol=1e-5)


@given(DIMENSIONS, st.integers(0))
def test_it_keeps_inner_products_and_has_an_inverse(dimension: int, seed: int) -> None:
    signs = random_signs(dimension, seeded_stream(seed, "signs"))
    x, y = vector(dimension, seed, "x"), vector(dimension, seed, "y")
    assert np.dot(rotate(x, signs), rotate(y, signs)) == pytest.approx(np.dot(x, y), abs=1e-11)
    np.testing.assert_allclose(unrotate(rotate(x, signs), signs, dimension), x, rtol=0, atol=1e-13)


@given(DIMENSIONS, st.floats(-8, 8), st.floats(-8, 8))
def test_it_is_linear(dimension: int, a: float, b: float) -> None:
    signs = random_signs(dimension, seeded_stream(1, "signs"))
    x, y = vector(dimension, "x"), vector(dimension, "y")
    both = rotate(a * x + b * y, signs)
    np.testing.assert_allclose(both, a * rotate(x, signs) + b * rotate(y, signs), rtol=0, atol=1e-11)


def test_it_spreads_one_coordinate_evenly_over_all() -> None:
    signs = random_signs(1000, seeded_stream(2, "signs"))
    np.testing.assert_allclose(np.abs(rotate(np.eye(1000)[17], signs)), 1024**-0.5, rtol=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_it_keeps_the_type_and_is_deterministic(kind: type) -> None:
    signs = random_signs(3000, seeded_stream(3))
    x: np.ndarray = vector(3000).astype(kind)
    y = rotate(x, signs)
    assert y.dtype == kind
    assert unrotate(y, signs, 3000).dtype == kind
    assert np.array_equal(y, rotate(x.copy(), signs))


def test_it_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    signs, x = random_signs(2**18, seeded_stream(5)), vector(2**18).astype(np.float32)
    rotated = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        with get_context("spawn").Pool(1) as pool:
            rotated.append(pool.apply(rotate, (x, signs)))
    assert np.array_equal(rotated[0], rotated[1])


def test_signs_are_fair_and_follow_from_the_stream() -> None:
    signs = random_signs(50_000, seeded_stream(4))
    assert signs.shape == (65_536,)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.sum()) < 4 * 256
    assert np.array_equal(signs, random_signs(50_000, seeded_stream(4)))
    assert random_signs(5, seeded_stream(4)).shape == (8,)
