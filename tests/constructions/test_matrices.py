"""Sums of blocks against the dense matrices that they stand for."""

from typing import Any

import numpy as np
import pytest

from constructions.core.matrices import Matrix, stack
from constructions.core.program import Head
from constructions.core.slots import Slots, concatenate, constant


def random_matrix(rng, rows, columns):
    """A `Matrix` from some arithmetic, and the dense one."""
    m: Any = Matrix.identity(columns, float(rng.integers(-2, 3)))
    dense = m.blocks[0].content * np.eye(columns) if m.blocks else np.zeros((columns, columns))
    while True:
        kind = rng.integers(5)
        if kind == 0:
            start, stop = sorted(rng.integers(0, len(dense) + 1, 2).tolist())
            m, dense = stack([m[start:stop], m]), np.concatenate([dense[start:stop], dense])
        elif kind == 1:
            w = rng.integers(-1, 2, (int(rng.integers(1, 6)), len(dense))).astype(float)
            m, dense = w @ m, w @ dense
        elif kind == 2:
            m, dense = m * -2.0, dense * -2.0
        elif kind == 3:
            other = np.eye(len(dense), columns, int(rng.integers(-1, 2)))
            m, dense = m + Matrix.of(other), dense + other
        else:
            m, dense = m + -0.5 * m[:], dense - 0.5 * dense
        if len(dense) >= rows:
            return m[:rows], dense[:rows]


def test_arithmetic_is_that_of_dense_matrices():
    rng = np.random.default_rng(0)
    for _ in range(300):
        m, dense = random_matrix(rng, int(rng.integers(1, 12)), int(rng.integers(1, 6)))
        np.testing.assert_array_equal(np.asarray(m), dense)
        assert m.shape == dense.shape
        assert m.nonzeros == np.count_nonzero(dense)
        assert m.any() == dense.any()
        np.testing.assert_array_equal(np.asarray(m[::2]), dense[::2])
        np.testing.assert_array_equal(np.asarray(m[-2:]), dense[-2:])
        into = np.ones(dense.shape)
        m.add_to(into)
        np.testing.assert_array_equal(into, 1 + dense)
        larger = np.zeros((len(dense) + 3, dense.shape[1]))
        larger[2 : 2 + len(dense)] = dense
        np.testing.assert_array_equal(np.asarray(m.placed(len(larger), 2)), larger)


def test_slices_of_the_identity_are_found_and_joined():
    slots = Slots()
    x, y = slots.add("x", 9), slots.add("y", 4)
    whole = [
        (concatenate(x[:2], x[2:9]), {x: [(0, 0, 9, 1.0)]}),
        (-0.5 * x[3:7] + y, {x: [(0, 3, 4, -0.5)], y: [(0, 0, 4, 1.0)]}),
        (np.eye(9)[2:5] @ x, {x: [(0, 2, 3, 1.0)]}),
        (2 * x[:4] - 2 * x[:4] + y, {x: [], y: [(0, 0, 4, 1.0)]}),
        (concatenate(y, constant(1.0), y), {y: [(0, 0, 4, 1.0), (5, 0, 4, 1.0)]}),
    ]
    for expr, wanted in whole:
        found = {
            slot: [(b.row, b.column, b.shape[0], b.content) for b in m.blocks]
            for slot, m in expr.terms.items()
        }
        assert found == wanted


def test_dense_matrices_are_copied():
    dense = np.arange(4.0).reshape(2, 2)
    m = Matrix.of(dense)
    dense[:] = 9
    np.testing.assert_array_equal(np.asarray(m), [[0, 1], [2, 3]])


def test_equal_is_what_is_written_alike():
    dense = np.arange(6.0).reshape(2, 3)
    assert Matrix.of(dense).equals(Matrix.of(dense))
    for other in (Matrix.of(2 * dense), Matrix((2, 3)), Matrix.of(dense[:, :2])):
        assert not Matrix.of(dense).equals(other)
    assert Matrix.identity(3).equals(Matrix.of(np.eye(3)))
    assert not Matrix.identity(3).equals(Matrix.identity(3, 2.0))
    assert not Matrix.identity(3)[:2].equals(Matrix.identity(3)[1:])


def test_a_slice_of_a_slot_can_be_written():
    slots = Slots()
    x, y = slots.add("x", 5), slots.add("y", 3)
    one, m = constant(1.0), np.arange(6.0).reshape(2, 3)
    head = Head(one, one, y, {x[1:3]: m, x[2:5]: 2.0, y: -1.0})
    wanted = np.zeros((5, 3))
    wanted[1:3] += m
    wanted[2:5] += 2 * np.eye(3)
    np.testing.assert_array_equal(np.asarray(head.write[x]), wanted)
    np.testing.assert_array_equal(np.asarray(head.write[y]), -np.eye(3))
    for place in (2.0 * x, x[:2] + 1.0, x[:3] + y, np.ones((3, 5)) @ x, constant(1.0), x[::2]):
        with pytest.raises(TypeError, match="must write into slots or slices"):
            Head(one, one, y, {place: np.ones((place.size, 3))})
    with pytest.raises(ValueError, match=r"expression of x with a matrix of shape \(3, 3\)"):
        Head(one, one, y, {x[1:3]: np.ones((3, 3))})
    with pytest.raises(ValueError, match="writes 3 rows into expression of x, which has 2"):
        Head(one, one, y, {x[1:3]: 1.0})
