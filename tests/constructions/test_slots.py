"""Slots and expressions: arithmetic on names, and the layout of the stream."""

import numpy as np
import pytest

from constructions.core.slots import Slot, Slots, concatenate, constant


@pytest.fixture
def slots():
    result = Slots()
    result.add("a", 3)
    result.add("b", 2)
    return result


def test_arithmetic_is_that_of_affine_maps(slots):
    rng = np.random.default_rng(0)
    a, b = slots["a"], slots["b"]
    m, n = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    h = rng.normal(size=5)
    x, y = h[:3], h[3:]
    cases = [
        (a, x),
        (-a, -x),
        (m @ a, m @ x),
        (m @ a - b, m @ x - y),
        (b - m @ a, y - m @ x),
        (2.0 * b * 3, 6 * y),
        (np.float64(2.0) * b, 2 * y),
        (b + 1.5, y + 1.5),
        (1.5 - b, 1.5 - y),
        (b + np.array([1.0, 2.0]), y + [1, 2]),
        (n @ (m @ a + b - 0.5), n @ (m @ x + y - 0.5)),
        (a[1:], x[1:]),
        ((m @ a + b)[:1], (m @ x + y)[:1]),
        (b + b - b, y),
        (concatenate(a, m @ a + b, constant(3.0)), np.concatenate([x, m @ x + y, [3]])),
        (n @ concatenate(a, b)[2:4], n @ h[2:4]),
        (constant(1.0, 2.0), np.array([1.0, 2.0])),
    ]
    for expr, expected in cases:
        found = expr.matrix(7) @ np.concatenate([h, [9.0, 9.0]]) + expr.constant
        np.testing.assert_allclose(found, expected, atol=1e-13)
        assert expr.size == len(expected)


def test_arithmetic_that_does_not_fit_is_named(slots):
    a, b = slots["a"], slots["b"]
    with pytest.raises(ValueError, match=r"shape \(2, 2\) cannot act on slot 'a'"):
        np.eye(2) @ a
    with pytest.raises(ValueError, match="cannot add slot 'a'"):
        a + b
    with pytest.raises(ValueError, match="use matrix @ slot"):
        np.eye(3) * a
    with pytest.raises(TypeError, match="iterated"):
        list(a)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({}, {}, False),
        ({"dies": 2}, {"born": 2}, True),
        ({"dies": 2}, {"born": 1}, False),
        ({"dies": 2}, {"born": 3}, True),
        ({"born": 2, "dies": 2}, {"born": 2, "dies": 2}, False),
        ({"born": 2, "dies": 2}, {"born": 2}, False),
        ({"token_groups": "u"}, {"token_groups": "v"}, True),
        ({"token_groups": "u"}, {"token_groups": ("u", "v")}, False),
        ({"token_groups": "u"}, {}, False),
        ({"token_groups": "u", "dies": 1}, {"born": 1}, True),
    ],
)
def test_columns_are_shared_only_by_values_that_no_token_needs_together(first, second, shared):
    for one, two in ((first, second), (second, first)):
        slots = Slots()
        a, b = slots.add("a", 2, **one), slots.add("b", 2, **two)
        assert (a.start == b.start) == shared
        assert a.lives_with(b) == b.lives_with(a) != shared
        assert slots.width == (2 if shared else 4)


def test_first_gap_that_is_wide_enough_is_taken():
    slots = Slots()
    slots.add("a", 2, dies=1)
    slots.add("b", 1)
    slots.add("c", 3, dies=1)
    slots.add("d", 1)
    assert slots.add("e", 3, born=1).start == 3
    assert slots.add("f", 2, born=1).start == 0
    assert slots.add("g", 1, born=1).start == 7
    assert slots.width == 8


def test_random_layouts_never_overlap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        slots = Slots()
        for n in range(12):
            born = int(rng.integers(0, 5))
            dies = None if rng.random() < 0.3 else born + int(rng.integers(0, 4))
            tokens = [None, "u", "v", ("u", "v")][rng.integers(4)]
            slots.add(str(n), int(rng.integers(1, 4)), born=born, dies=dies, token_groups=tokens)
        for a in slots:
            for b in slots:
                apart = a.columns.stop <= b.start or b.columns.stop <= a.start
                assert a is b or apart or not a.lives_with(b)


def test_bad_slots_are_named(slots):
    with pytest.raises(ValueError, match="'a' is declared twice"):
        slots.add("a", 1)
    with pytest.raises(ValueError, match="size of slot 'c' is 0"):
        slots.add("c", 0)
    with pytest.raises(ValueError, match="slot 'c' is born at layer 3 and dies at layer 2"):
        slots.add("c", 1, born=3, dies=2)
    with pytest.raises(ValueError, match="born at layer -1"):
        slots.add("c", 1, born=-1)
    assert [s.name for s in slots] == ["a", "b"]


def test_membership_is_by_layout(slots):
    assert slots["a"] in slots
    assert Slot("a", 3, 1) not in slots
    assert "a" not in slots
