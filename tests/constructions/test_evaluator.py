"""The slot-wise back end against the compiled model and against loops over named slots."""

import tracemalloc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from flax import nnx

from constructions.core.checks import ProgramError, check
from constructions.core.compile import compile_program
from constructions.core.evaluate import evaluate
from constructions.core.inventory import counts
from constructions.core.program import CAUSAL, SELF, Head, Layer, Mlp, Norm, Program, erase
from constructions.core.slots import Slots, concatenate, constant


def embed(program, batch=2, tokens=5, seed=0, groups=None):
    """Random values of the embedding's slots, the stream that holds them, token groups."""
    rng = np.random.default_rng(seed)
    if groups is None:
        groups = rng.permutation(np.arange(tokens) % len(program.token_groups))
    tokens, names = len(groups), np.asarray(program.token_groups)[groups]
    stream, values = np.zeros((batch, tokens, program.slots.width)), {}
    for slot in program.slots:
        if slot.born:
            continue
        value = rng.normal(size=(batch, tokens, slot.size))
        owned = np.array([slot.token_groups is None or name in slot.token_groups for name in names])
        value *= owned[:, None]
        stream[..., slot.columns] += value
        values[slot.name] = value
    return stream, values, groups


def assert_all_agree(program, seed=0, groups=None):
    """Compiled model, evaluator (static, traced, stream, values) and interpreter."""
    stream, values, groups = embed(program, seed=seed, groups=groups)
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
        owned = np.array([slot.token_groups is None or name in slot.token_groups for name in names])
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
    w = slots.add("w", 2, token_groups="prefix")
    d = slots.add("d", 2, token_groups="data")
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
    mlp = Mlp(2.0 * a + 0.1, {total: 1.0}, gate=a + total, activation="tanh", token_groups="data")
    last = Head(one, one, a[:2] * 2.0, {late: 1.0}, window=SELF)
    layers = [
        Layer(heads),
        Layer(mlp=mlp, norm=Norm(a, total, token_groups="prefix")),
        Layer([last, erase(a)]),
    ]
    return Program(slots, layers, token_groups=("data", "prefix"))


def cells_program():
    """Three kinds of tokens, and heads that have a short way: slices, sums, copies, factors."""
    slots, rng = Slots(), np.random.default_rng(5)
    shared = slots.add("shared", 2)
    x = slots.add("x", 6, token_groups="data", accumulates=True)
    row = slots.add("row", 7, token_groups="left")
    delta = slots.add("delta", 7, token_groups="left", born=1, accumulates=True)
    one = slots.add("one", 3, token_groups="left")
    gain = slots.add("gain", 4, token_groups="right", dies=2)
    total = slots.add("total", 2, born=1, accumulates=True)
    both = slots.add("both", 6, token_groups=("data", "right"), born=1, accumulates=True)
    out = slots.add("out", 6, token_groups="data", born=2, accumulates=True)
    late = slots.add("late", 3, token_groups="right", born=3)
    assert (x.start, row.start, gain.start, late.start) == (2, 2, 2, 2)
    assert row.start < both.start < row.start + row.size  # cut in other places at other tokens
    ones = constant(1.0)
    affine = concatenate(x, ones)
    data: dict[str, Any] = {"queries": "data", "keys": "data"}
    left: dict[str, Any] = {"queries": "data", "keys": "left"}
    slices = [slice(0, 2), slice(2, 4), slice(4, 6)]
    first = [
        Head(affine, row, one, {both[:3]: 0.3}, **left),
        Head(affine, 0.5 * row, one, {both[3:]: 0.3, x[1:4]: -1.0}, **left),
        Head(one, x[:3], affine, {delta: -0.1}, queries="left", keys="data"),
        Head(ones, ones, x, {both: 0.1}, queries="right", keys="data"),
        Head(ones, x[2:3], x, {both: 0.2}, **data),
        Head(x[2:3], ones, shared, {both[2:4]: 0.2}, queries="data"),
        Head(ones, ones, ones, {both[:1]: 0.01}, queries="data", window=CAUSAL),
        Head(ones, ones, ones, {both[1:2]: 0.01}, queries="right", keys="data"),
        *[Head(ones, ones, shared, {total: 1.0}, "softmax")] * 2,
        Head(ones, ones, shared, {total: 1.0}, window=(-1, -1)),
        Head(ones, ones, 2.0 * gain, {total[:1]: np.ones((1, 4))}, keys="right"),
    ]
    second = [
        *(
            Head(x[c], x[c], both[c], {out[c]: 1.0}, "softmax", window=CAUSAL, **data)
            for c in slices
        ),
        *(Head(x[c], both[c], x[c], {out[c]: -2.0}, "transposed_softmax", **data) for c in slices),
        Head(x, both, x, {out: 1.0}, "transposed_softmax", window=(0, None), scale=0.5, **data),
        *(Head(x, both, x[c], {out[:2]: 0.1}, window=CAUSAL, **data) for c in slices[::2]),
        *(Head(x, both, x[c], {out[:2]: 0.1}, window=CAUSAL, **data) for c in slices[:2]),
        Head(ones, x[:1], x, {out: 1.0}, "transposed_softmax", **data),
        Head(x, x, x, {out: 1.0}, "softmax", factor=(x[:4], 0.1 + 2.0 * both[2:]), **data),
        Head(x, x, both, {out: 0.1}, factor=(ones, x[:1]), window=CAUSAL, **data),
        Head(ones, ones, both[1:], {out[:5]: 1.0}, "softmax", window=(1, 1), factor=(x, x), **data),
        Head(gain, gain, both[1:4], {both[3:]: 1.0}, "softmax", queries="right", keys="right"),
        Head(affine, row + delta, one + 0.1, {out[3:]: rng.normal(size=(3, 3))}, **left),
        Head(x, row[:6] + delta[1:], one, {out[:3]: 1.0}, "transposed_softmax", **left),
        erase(gain),
    ]
    third = Layer(
        [Head(ones, ones, both[::2], {late: 1.0}, queries="right", keys="right", window=SELF)],
        Mlp(concatenate(x[:2], 2.0 * out[1:3]), {out[2:]: 1.0}, both[1:5], "gelu", "data"),
        Norm(x, out, token_groups="data"),
    )
    layers = [Layer(first), Layer(second), third]
    return Program(slots, layers, token_groups=("data", "left", "right"))


def looped_program(loops, repeats):
    slots = Slots()
    x = slots.add("x", 2)
    y = slots.add("y", 2, accumulates=True)
    step = Layer([Head(x, x, x - y, {y: 0.1}, window=CAUSAL)])
    return Program(slots, [step] * repeats, loops)


@pytest.mark.parametrize(
    "program",
    [
        rich_program(),
        looped_program(1, 1),
        looped_program(3, 1),
        looped_program(2, 3),
        cells_program(),
    ],
    ids=["rich", "one layer", "looped", "looped run", "cells"],
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


@pytest.mark.parametrize(
    "groups",
    [[1, 1, 1, 2, 2, 0, 0, 0, 0], [0, 1, 0, 2, 1, 0, 2], [0, 0, 0, 2]],
    ids=["one after the other", "mixed", "one kind absent"],
)
def test_wherever_the_tokens_of_a_kind_stand(x64, groups):
    assert_all_agree(cells_program(), groups=np.array(groups))


def test_what_all_examples_share_may_have_one_example(x64):
    program = cells_program()
    groups = np.array([1, 1, 0, 0, 2])
    _, values, _ = embed(program, groups=groups)
    own = {"x", "gain"}
    one = {name: v if name in own else v[:1] for name, v in values.items()}
    many = {name: np.broadcast_to(v, values[name].shape) for name, v in one.items()}
    run = jax.jit(lambda v: evaluate(program, v, groups))
    found, wanted = run(one), run(many)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)


def operations(program, values, groups=None):
    """Text of all that the evaluator computes."""
    return str(jax.make_jaxpr(lambda v: evaluate(program, v, groups))(values))


def attention_program(mixer, window=(None, None), heads=4):
    slots = Slots()
    q, k, v = (slots.add(name, 2 * heads) for name in "qkv")
    out = slots.add("out", 2 * heads, born=1, accumulates=True)
    parts = [slice(2 * n, 2 * n + 2) for n in range(heads)]
    layer = Layer(
        [Head(q[c], k[c], 3.0 * v[c], {out[c]: 1.0}, mixer, window=window) for c in parts]
    )
    return Program(slots, [layer]), {name: np.ones((1, 5, 2 * heads)) for name in "qkv"}


@pytest.mark.parametrize("mixer", ["linear", "softmax", "transposed_softmax"])
def test_slices_cost_no_product_and_a_full_mask_nothing(mixer):
    text = operations(*attention_program(mixer))
    assert text.count("dot_general") == 2  # scores and their mean of the values, all heads at once
    assert "select_n" not in text
    assert "scatter" not in text
    assert "gather" not in text
    assert "select_n" in operations(*attention_program(mixer, CAUSAL))


def test_copies_and_sums_have_no_scores():
    slots, one = Slots(), constant(1.0)
    a, b = slots.add("a", 2), slots.add("b", 1)
    c = slots.add("c", 2, born=1, accumulates=True)
    heads = [Head(one, one, a, {c: 2.0}), Head(one, b, a, {c: 1.0}), Head(b, one, a, {c: 1.0})]
    values = {"a": np.ones((1, 50, 2)), "b": np.ones((1, 50, 1))}
    assert "50,50" not in operations(Program(slots, [Layer(heads)]), values)


def test_a_slot_takes_memory_only_where_it_lives(x64):
    slots, one = Slots(), constant(1.0)
    a = slots.add("a", 7, token_groups="few")
    wide = slots.add("wide", 7, token_groups="few", born=1, dies=9)
    b = slots.add("b", 3, token_groups="many")
    c = slots.add("c", 3, token_groups="few", born=2)
    where: dict[str, Any] = {"queries": "few", "keys": "few"}
    layers = [
        Layer([Head(one, one, a, {wide: 1.0}, window=SELF, **where)]),
        Layer([Head(wide[:3], b, b, {c: 1.0}, queries="few", keys="many")]),
    ]
    program = Program(slots, layers, token_groups=("few", "many"))
    groups = np.repeat([0, 1], [4, 40])
    values = {"a": np.ones((1, 44, 7)), "b": np.ones((1, 44, 3))}
    text = operations(program, values, groups)
    assert text.count("1,44,7]") == 2  # the value that is given and the one that is returned
    assert "1,40,7]" in text  # zeros of the latter


def test_wide_slots_take_no_memory_until_they_are_filled():
    tracemalloc.start()
    slots, size, heads, depth = Slots(), 768, 12, 4
    x = slots.add("x", size, accumulates=True)
    w = slots.add("w", 4 * size)
    tape = [slots.add(f"tape {n}", size, born=n + 1) for n in range(depth)]
    parts = [slice(64 * n, 64 * n + 64) for n in range(heads)]
    layers = [
        Layer([
            *(Head(x[c], x[c], w[768:1536][c], {to[c]: 1.0}, "softmax") for c in parts),
            Head(x, w[:size] - 0.5 * x, concatenate(x, constant(1.0))[1:], {x: -0.1}),
        ])
        for to in tape
    ]  # fmt: skip
    program = Program(slots, layers)
    check(program)
    found = counts(program)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21  # one dense square would be 4.5 MiB
    assert found.width == (1 + 4 + depth) * size
    assert found.stored == depth * (4 * size + 5 * size)
    assert found.heads == depth * (heads + 1)


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


def test_token_groups_that_the_inputs_lack(x64):
    """A norm, an MLP and a head at tokens of a kind of which there are none do nothing."""
    slots = Slots()
    x, y = slots.add("x", 2, accumulates=True), slots.add("y", 2, accumulates=True)
    head = Head(query=x, key=x, value=x, write={y: np.eye(2)}, queries=("b",))
    mlp = Mlp(np.eye(2) @ x + np.ones(2), {y: np.eye(2)}, activation="relu", token_groups=("b",))
    layers = [Layer([head], mlp, Norm(x, x, token_groups=("b",)))]
    program = Program(slots, layers, token_groups=("a", "b"))
    stream = jax.random.normal(jax.random.key(0), (3, 4, 4))
    model = compile_program(program)
    for groups in (np.zeros(4, int), np.array([0, 1, 0, 1]), np.ones(4, int)):
        found = evaluate(program, stream, groups)
        expected = model(stream, jnp.asarray(groups))
        np.testing.assert_allclose(found["x"], expected[..., :2], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found["y"], expected[..., 2:], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(evaluate(program, stream, np.zeros(4, int))["x"], stream[..., :2])
