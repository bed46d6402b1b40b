"""Families of heads: the same as their heads written out, in both back ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.compile import ProgramError, compile_program
from constructions.core.evaluate import evaluate
from constructions.core.inventory import counts
from constructions.core.program import HeadFamily, Layer, Program
from constructions.core.slots import Slots

RNG = np.random.default_rng(0)


def program(window, keys=None, queries=None, expanded=False):
    slots = Slots()
    a, b = (slots.add(name, n) for name, n in (("a", 2), ("b", 3)))
    c, d = (slots.add(name, n, born=born) for name, n, born in (("c", 4, 1), ("d", 1, 2)))
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 3, 3))
    last = rng.normal(size=(1, 4, 2))
    where = {"window": window, "keys": keys, "queries": queries}
    layers = [
        Layer([HeadFamily([(a, b, first), (b, b, second), (a, b, first)], c, **where)]),
        Layer([HeadFamily([(c, a, last)], d, **where)]),
    ]
    if expanded:
        layers = [Layer(layer.single_heads) for layer in layers]
    return Program(slots, layers, token_groups=("left", "right"))


@pytest.mark.parametrize("window", [(1, 1), (-2, -2), (None, None), (-1, 2)])
@pytest.mark.parametrize("keys, queries", [(None, None), ("left", ("right",))])
def test_scores_are_sums_of_bilinear_forms(window, keys, queries, x64):
    p = program(window, keys, queries)
    stream = jnp.asarray(RNG.normal(size=(2, 6, p.slots.width)))
    stream = stream.at[..., p.slots["c"].start :].set(0)
    groups = np.array([0, 1, 1, 0, 1, 0])
    low, high = (-9 if window[0] is None else window[0]), (9 if window[1] is None else window[1])
    wanted = np.array(stream)
    for layer in p.layers:
        (family,) = layer.heads
        before = wanted.copy()
        for i in range(6):
            for j in range(6):
                seen = keys is None or groups[j] == 0
                acts = queries is None or groups[i] == 1
                if low <= j - i <= high and seen and acts:
                    for left, right, tensor in family.terms:
                        x, y = before[:, i, left.columns], before[:, j, right.columns]
                        score = np.einsum("bx,nxy,by->bn", x, tensor, y)
                        wanted[:, i, family.write.columns] += score
    model = compile_program(p)
    np.testing.assert_allclose(model(stream, jnp.asarray(groups)), wanted, atol=1e-12)
    for kinds in (groups, jnp.asarray(groups), np.stack([groups, groups])):
        found = evaluate(p, stream, kinds)
        for slot in p.slots:
            np.testing.assert_allclose(found[slot.name], wanted[..., slot.columns], atol=1e-12)


def test_counts_are_those_of_the_heads_written_out():
    assert counts(program((1, 1))) == counts(program((1, 1), expanded=True))


def test_what_does_not_fit_is_refused():
    slots = Slots()
    a, b = slots.add("a", 2), slots.add("b", 3, born=1)
    with pytest.raises(ValueError, match=r"tensor of slot 'a' and slot 'a'.*\(3, 2, 2\)"):
        HeadFamily([(a, a, np.ones((2, 2, 2)))], b)
    unwritten = Layer([HeadFamily([(b, a, np.ones((3, 3, 2)))], b, name="f")])
    with pytest.raises(ProgramError, match="head 'f', query: slot 'b' is read before"):
        compile_program(Program(slots, [unwritten]))


def test_gradients_agree(x64):
    p = program((1, 1))
    stream = jnp.asarray(RNG.normal(size=(1, 4, p.slots.width)))
    groups, model = np.zeros(4, int), compile_program(p)
    dense = jax.grad(lambda s: model(s, jnp.asarray(groups))[..., p.slots["d"].columns].sum())
    slotwise = jax.grad(lambda s: evaluate(p, s, groups)["d"].sum())
    np.testing.assert_allclose(dense(stream), slotwise(stream), atol=1e-12)
