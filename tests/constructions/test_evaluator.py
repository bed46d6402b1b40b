"""The slot-wise back end against the compiled model and against loops over named slots."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from flax import nnx

from constructions.checks import ProgramError
from constructions.compiler import compile_program
from constructions.evaluator import counts, evaluate
from constructions.program import CAUSAL, SELF, Head, Layer, Mlp, Norm, Program, erase
from constructions.slots import Slots, concatenate, constant


def embed(program, batch=2, tokens=5, seed=0):
    """Random values of the embedding's slots, the stream that holds them, token groups."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.arange(tokens) % len(program.token_groups))
    names = np.asarray(program.token_groups)[groups]
    stream, values = np.zeros((batch, tokens, program.slots.width)), {}
    for slot in program.slots:
        if slot.born:
            continue
        value = rng.normal(size=(batch, tokens, slot.size))
        owned = np.array([slot.tokens is None or name in slot.tokens for name in names])
        value *= owned[:, None]
        stream[..., slot.columns] += value
        values[slot.name] = value
    return stream, values, groups


def assert_all_agree(program, seed=0):
    """Compiled model, evaluator (static, traced, stream, values) and interpreter."""
    stream, values, groups = embed(program, seed=seed)
    batch = np.broadcast_to(groups, stream.shape[:2])
    expected = plain_numpy.interpret(program, values, batch)
    model = compile_program(program, "float64")
    out = np.asarray(jax.jit(lambda m, s, g: m(s, g))(model, stream, groups))
    static, traced, from_stream = jax.jit(
        lambda v, s, b, g: (
            evaluate(program, v, groups),
            evaluate(program, v, b),
            evaluate(program, s, g),
        )
    )(values, stream, batch, groups)
    names = np.asarray(program.token_groups)[groups]
    assert static.keys() == traced.keys() == from_stream.keys()
    for slot in program.slots:
        if slot.dies is not None:
            continue
        owned = np.array([slot.tokens is None or name in slot.tokens for name in names])
        for found in (
            out[..., slot.columns],
            *(e[slot.name] for e in (static, traced, from_stream)),
        ):
            np.testing.assert_allclose(
                np.asarray(found)[:, owned], expected[slot.name][:, owned], rtol=1e-9, atol=1e-10
            )


def rich_program():
    rng = np.random.default_rng(3)
    slots = Slots()
    a = slots.add("a", 3, dies=3)
    w = slots.add("w", 2, tokens="prefix")
    d = slots.add("d", 2, tokens="data")
    total = slots.add("total", 3, accumulates=True)
    late = slots.add("late", 2, born=3)
    assert w.start == d.start  # disjoint tokens share columns
    assert late.start == a.start  # a is dead by then
    one = constant(1.0)
    m = rng.normal(size=(4, 3))
    heads = [
        Head(
            m @ a, rng.normal(size=(4, 3)) @ a + 0.3, a, {total: rng.normal(size=(3, 3))}, "softmax"
        ),
        Head(m @ a, rng.normal(size=(4, 3)) @ a - 1.0, a, {total: 0.5}, "softmax", scale=0.7),
        Head(
            d, w, concatenate(w, a), {total: rng.normal(size=(3, 5))}, queries="data", keys="prefix"
        ),
        Head(one, one, a[1:3], {total: rng.normal(size=(3, 2))}, "centred", window=CAUSAL),
        Head(one, one, a, {total: 1.0}, window=(1, 1)),
        Head(one, one, a, {total: 1.0}, "softmax", window=(-2, -2), keys="data"),
    ]
    mlp = Mlp(2.0 * a + 0.1, {total: 1.0}, gate=a + total, activation="tanh", tokens="data")
    last = Head(one, one, a[:2] * 2.0, {late: 1.0}, window=SELF)
    layers = [
        Layer(heads),
        Layer(mlp=mlp, norm=Norm(a, total, tokens="prefix")),
        Layer([last, erase(a)]),
    ]
    return Program(slots, layers, token_groups=("data", "prefix"))


def looped_program(loops, repeats):
    slots = Slots()
    x = slots.add("x", 2)
    y = slots.add("y", 2, accumulates=True)
    step = Layer([Head(x, x, x - y, {y: 0.1}, window=CAUSAL)])
    return Program(slots, [step] * repeats, loops)


@pytest.mark.parametrize(
    "program",
    [rich_program(), looped_program(1, 1), looped_program(3, 1), looped_program(2, 3)],
    ids=["rich", "one layer", "looped", "looped run"],
)
def test_equals_the_compiled_model_and_its_counts(x64, program):
    assert_all_agree(program)
    model = compile_program(program, "float64")
    weights = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    count = counts(program)
    assert count.dense == sum(w.size for w in weights)
    assert count.stored == sum(map(np.count_nonzero, weights))
    assert count.width == model.config.width
    assert count.layers == model.config.depth
    assert count.max_heads == model.config.max_heads
    assert count.heads == sum(len(layer.heads) for layer in program.layers)


def test_no_quadratic_array_where_a_head_has_one_offset(x64):
    slots = Slots()
    a, b = slots.add("a", 2), slots.add("b", 1, born=1)
    program = Program(slots, [Layer([Head(a, a, constant(1.0), {b: 1.0}, window=(1, 1))])])
    jaxpr = jax.make_jaxpr(lambda v: evaluate(program, v))({"a": jnp.ones((1, 50, 2))})
    assert "50,50" not in str(jaxpr)
    assert "49,49" not in str(jaxpr)


def test_depth_does_not_grow_the_computation(x64):
    texts = [
        str(jax.make_jaxpr(partial(evaluate, looped_program(1, n)))(
            {"x": jnp.ones((1, 3, 2)), "y": jnp.ones((1, 3, 2))}
        )).count("\n")
        for n in (10, 100)
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_erasing_leaves_every_digit_of_what_replaces_it(x64):
    slots = Slots()
    big = slots.add("big", 1, dies=1)
    small = slots.add("small", 1)
    new = slots.add("new", 1, born=1)
    assert new.start == big.start
    copy = Head(constant(1.0), constant(1.0), small * 1.0, {new: 1.0}, window=SELF)
    program = Program(slots, [Layer([copy, erase(big)])])
    values = {"big": np.full((1, 1, 1), 1e20), "small": np.full((1, 1, 1), 0.1)}
    assert evaluate(program, values)["new"][0, 0, 0] == 0.1


def test_bad_input_is_named(x64):
    program = rich_program()
    _, values, groups = embed(program)
    with pytest.raises(ValueError, match="groups is None"):
        evaluate(program, values)
    with pytest.raises(ValueError, match=r"values are named \['a', 'd'\]"):
        evaluate(program, {"a": values["a"], "d": values["d"]}, groups)
    with pytest.raises(ValueError, match="slot 'a' has shape"):
        evaluate(program, values | {"a": values["a"][..., :2]}, groups)
    with pytest.raises(ValueError, match="values has shape"):
        evaluate(program, np.zeros((1, 2, 3)), groups)
    slots = Slots()
    a, b = slots.add("a", 1), slots.add("b", 1, born=1)
    with pytest.raises(ProgramError, match="slot 'b' is read before"):
        evaluate(Program(slots, [Layer([Head(b, a, a, {b: 1.0})])]), {"a": np.zeros((1, 2, 1))})
