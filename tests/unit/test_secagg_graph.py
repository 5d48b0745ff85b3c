"""Neighbours: (k, t) against the published table and an exhaustive search, and the graph against its definition."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from common.errors import AggregationError
from common.privacy.randomness import Stream
from common.secagg.graph import COMPLETE, Degree, _connected, degree, neighbours, neighbours_of, sparse_degree

# (γ, δ): (k, t) by n, at σ = 40 and η = 20, of the parameter finder of Bell et al.
SIZES = (50, 100, 200, 500, 1000, 10_000)
TABLE = {
    (0.05, 0.05): [(8, 6), (16, 11), (30, 21), (44, 31), (52, 37), (62, 44)],
    (0.1, 0.1): [(16, 11), (32, 22), (56, 39), (82, 57), (96, 67), (122, 85)],
    (0.1, 0.2): [(26, 16), (52, 32), (88, 55), (152, 97), (194, 124)],
}
CASES = [(n, *fractions, *found) for fractions, row in TABLE.items() for n, found in zip(SIZES, row, strict=False)]

graphs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.binary(min_size=32, max_size=32), st.just(n), st.sampled_from([*range(0, n, 2), n - 1]))
)


def tail(population: int, marked: int, draws: int, least: int) -> Fraction:
    """P(X ≥ least), X ~ Hypergeometric(population, marked, draws)."""
    ways = [
        math.comb(marked, x) * math.comb(population - marked, draws - x)
        for x in range(max(least, 0), min(marked, draws) + 1)
    ]
    return Fraction(sum(ways), math.comb(population, draws))


def fits(n: int, corrupted: int, dropped: int, k: int, t: int, sigma: int, eta: int) -> bool:
    """The module's three conditions, word for word."""
    secure = n * tail(n - 1, corrupted, k, 2 * t - k) <= Fraction(1, 2**sigma)
    correct = n * tail(n, dropped, k, k - t + 1) <= Fraction(1, 2**eta)
    return secure and correct and cut_bound(n, corrupted + dropped, k) <= Fraction(1, 2**sigma)


def cut_bound(n: int, bad: int, k: int) -> Fraction:
    return math.comb(n, 2) * Fraction(math.comb(bad, k), math.comb(n, k))


def pieces(rows: NDArray[np.int64], alive: list[int]) -> int:
    """How many connected pieces the graph has among `alive`."""
    n, k = rows.shape
    adjacency = csr_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), rows.ravel())), shape=(n, n))
    return int(connected_components(adjacency[alive][:, alive], directed=False)[0])


@pytest.mark.parametrize(("n", "corrupt", "dropout", "k", "t"), CASES)
def test_sparse_degrees_are_those_of_the_table(n: int, corrupt: float, dropout: float, k: int, t: int) -> None:
    assert sparse_degree(n, corrupt, dropout, 40, 20) == Degree(k, t, complete=False)
    assert fits(n, round(corrupt * n), round(dropout * n), k, t, 40, 20)
    assert _connected(n, round((corrupt + dropout) * n), 40) < k  # the third condition does not bind


def test_one_entry_of_the_table_is_larger_than_it_must_be() -> None:
    """The table has (280, 179) for n = 10,000 and (.1, .2); its tails are 1 − cdf in doubles, good to 2^-53 only.

    With exact fractions (276, 176) meets every bound, and nothing below it does.
    """
    assert sparse_degree(10_000, 0.1, 0.2, 40, 20) == Degree(276, 176, complete=False)
    assert fits(10_000, 1000, 2000, 276, 176, 40, 20)
    assert not fits(10_000, 1000, 2000, 276, 175, 40, 20)
    assert not any(fits(10_000, 1000, 2000, 274, t, 40, 20) for t in range(170, 181))


@given(st.integers(3, 24), st.floats(0, 0.6), st.floats(0, 0.6), st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_sparse_degrees_are_the_smallest(n: int, corrupt: float, dropout: float, sigma: int, eta: int) -> None:
    corrupted, dropped = math.floor(corrupt * n + 1e-9), math.floor(dropout * n + 1e-9)
    every = ((k, t) for k in range(2, n, 2) for t in range(k + 1))
    expected = next((kt for kt in every if fits(n, corrupted, dropped, *kt, sigma, eta)), None)
    if expected is None:
        with pytest.raises(AggregationError, match=f"n={n} devices to bear"):
            sparse_degree(n, corrupt, dropout, sigma, eta)
    else:
        assert sparse_degree(n, corrupt, dropout, sigma, eta) == Degree(*expected, complete=False)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "threshold"),
    [(1, 0.1, 0.1, 1), (2, 0.1, 0.1, 2), (3, 0.1, 1 / 3, 2), (10, 0.1, 0.1, 6), (64, 0.1, 0.1, 36), (50, 0.2, 0.3, 31)],
)
def test_small_cohorts_are_complete(n: int, corrupt: float, dropout: float, threshold: int) -> None:
    assert degree(n, corrupt, dropout) == Degree(n - 1, threshold, complete=True)


@given(st.integers(1, COMPLETE), st.floats(0, 0.9), st.floats(0, 0.9))
def test_complete_thresholds_are_the_smallest_safe_ones(n: int, corrupt: float, dropout: float) -> None:
    corrupted, dropped = math.floor(corrupt * n + 1e-9), math.floor(dropout * n + 1e-9)
    threshold = next(t for t in range(n + 2) if 2 * t > n + corrupted)
    if threshold > n - dropped:
        with pytest.raises(AggregationError, match=f"n={n} devices to bear"):
            degree(n, corrupt, dropout)
    else:
        assert degree(n, corrupt, dropout) == Degree(n - 1, threshold, complete=True)


def test_own_signatures_count_in_the_complete_graph_only() -> None:
    assert degree(10, 0.1, 0.1).quorum == 5
    assert degree(100, 0.1, 0.1).quorum == degree(100, 0.1, 0.1).threshold == 22


def test_larger_cohorts_are_sparse() -> None:
    assert degree(COMPLETE + 1, 0.1, 0.1) == sparse_degree(COMPLETE + 1, 0.1, 0.1, 40, 20)
    assert degree(1000, 0.1, 0.1, sigma=60, eta=30).neighbours > degree(1000, 0.1, 0.1).neighbours


def test_fractions_of_a_cohort_are_not_lost_to_rounding() -> None:
    assert 1 / 49 * 49 < 1
    assert degree(49, 1 / 49, 0.0) == Degree(48, 26, complete=True)
    assert degree(49, 0.99 / 49, 0.0) == Degree(48, 25, complete=True)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout"),
    [(2, 0.1, 0.5), (10_000, 0.3, 0.4), (0, 0.1, 0.1), (5, 1.0, 0.1), (5, 0.1, -0.1)],
)
def test_impossible_cohorts_are_refused(n: int, corrupt: float, dropout: float) -> None:
    with pytest.raises(AggregationError, match=f"n={n}"):
        degree(n, corrupt, dropout)


@given(graphs)
def test_every_device_has_k_mutual_neighbours(graph: tuple[bytes, int, int]) -> None:
    root, n, k = graph
    rows = neighbours(root, n, k)
    assert rows.shape == (n, k) and rows.dtype == np.int64
    pairs = {(i, j) for i, row in enumerate(rows.tolist()) for j in row}
    assert len(pairs) == n * k
    assert all(i != j and 0 <= j < n and (j, i) in pairs for i, j in pairs)
    assert (np.diff(rows) > 0).all()
    for position in range(n):
        np.testing.assert_array_equal(neighbours_of(root, n, k, position), rows[position])


def test_neighbours_are_the_nearest_on_the_circle() -> None:
    """The key is SHA-256 of "fedtopk graph" and 32 zero bytes."""
    n, k = 101, 12
    key = bytes.fromhex("e3cfed13497e57d096ae4f4fa92164650ffa4617b51492206d32cc2d099b3d8e")
    words = Stream(key).words(n).tolist()
    circle = sorted(range(n), key=words.__getitem__)
    for place, position in enumerate(circle):
        expected = sorted(circle[(place + step) % n] for step in range(-k // 2, k // 2 + 1) if step)
        assert neighbours_of(bytes(32), n, k, position).tolist() == expected


def test_another_root_gives_another_graph() -> None:
    assert (neighbours(bytes(32), 100, 32) != neighbours(b"\1" + bytes(31), 100, 32)).any()


@given(st.integers(5, 40), st.integers(1, 5), st.data())
@settings(deadline=None)
def test_survivors_are_connected_unless_the_circle_is_cut_twice(n: int, half: int, data: st.DataObject) -> None:
    k = min(2 * half, (n - 1) // 2 * 2)
    words = Stream(bytes.fromhex("e3cfed13497e57d096ae4f4fa92164650ffa4617b51492206d32cc2d099b3d8e")).words(n).tolist()
    circle = sorted(range(n), key=words.__getitem__)
    alive = [place for place in range(n) if data.draw(st.booleans())]
    gaps = [(after - before - 1) % n for before, after in zip(alive, alive[1:] + alive[:1], strict=True)]
    cuts = sum(gap >= k // 2 for gap in gaps)
    assert pieces(neighbours(bytes(32), n, k), [circle[place] for place in alive]) == (max(cuts, 1) if alive else 0)


@pytest.mark.parametrize(("n", "bad", "k"), [(10, 5, 4), (12, 6, 4), (12, 7, 6), (9, 4, 2)])
def test_the_bound_on_a_cut_holds(n: int, bad: int, k: int) -> None:
    rows = neighbours(bytes(32), n, k)
    sets = [sorted(set(range(n)) - set(out)) for out in combinations(range(n), bad)]
    share = Fraction(sum(pieces(rows, alive) > 1 for alive in sets), len(sets))
    assert 0 < share <= cut_bound(n, bad, k)


@pytest.mark.parametrize(("n", "k"), [(10, 3), (10, 10), (10, -2), (10, 12)])
def test_impossible_graphs_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        neighbours(bytes(32), n, k)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_out_of_range_are_refused(position: int) -> None:
    with pytest.raises(ValueError, match=f"position={position}"):
        neighbours_of(bytes(32), 10, 4, position)
