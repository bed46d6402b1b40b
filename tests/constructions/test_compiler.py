"""Programs that must be refused, each by name, and programs that must mean what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from flax import nnx

from constructions.core.checks import ProgramError, check
from constructions.core.compile import compile_program, config_of
from constructions.core.config import HeadsConfig, MlpConfig, NormConfig, SegmentConfig
from constructions.core.evaluate import evaluate
from constructions.core.inventory import counts
from constructions.core.program import CAUSAL, SELF, Head, Layer, Mlp, Norm, Program, erase
from constructions.core.slots import Slots, constant

ONE = constant(1.0)


def layout(**late):
    slots = Slots()
    slots.add("a", 2)
    slots.add("u", 2, token_groups="data")
    slots.add("v", 2, token_groups="prefix")
    slots.add("sum", 2, accumulates=True)
    slots.add("late", 2, born=2, **late)
    return slots


def program(slots, *layers, loops=1):
    return Program(slots, layers, loops, ("data", "prefix"))


def copy(source, target, **settings):
    return Head(ONE, ONE, source, {target: 1.0}, name="copy", **settings)


def refused():
    s = layout()
    a, u, v, total, late = (s[name] for name in ("a", "u", "v", "sum", "late"))
    idle = Layer([copy(a, total)])
    other = Slots()
    foreign = other.add("foreign", 2)
    short = layout(dies=2)
    fleeting = short["late"]
    tight = Slots()
    old = tight.add("old", 2, dies=2)
    kept = tight.add("kept", 2)
    new = tight.add("new", 2, born=2)
    assert old.start == new.start
    yield (
        "read first",
        program(s, Layer([copy(late, total)])),
        "layer 1, head 'copy', value: slot 'late' is read before",
    )
    yield (
        "query",
        program(s, Layer([Head(late, a, a, {total: 1})])),
        "head 'head', query: slot 'late'",
    )
    yield "key", program(s, Layer([Head(a, late, a, {total: 1})])), "head 'head', key: slot 'late'"
    yield (
        "mlp reads",
        program(s, Layer(mlp=Mlp(late, {total: 1}))),
        "layer 1, mlp 'mlp': slot 'late' is read before",
    )
    yield (
        "gate reads",
        program(s, Layer(mlp=Mlp(a, {total: 1}, gate=late))),
        "mlp 'mlp': slot 'late' is read before",
    )
    yield (
        "norm reads",
        program(s, Layer(norm=Norm(late, total))),
        "layer 1, norm: slot 'late' is read before",
    )
    yield (
        "overwrite",
        program(s, idle, Layer([copy(total, a)])),
        "layer 2, head 'copy': overwrites slot 'a', written at layer 0",
    )
    yield (
        "norm overwrites",
        program(s, Layer(norm=Norm(total, a))),
        "layer 1, norm: overwrites slot 'a'",
    )
    yield (
        "mlp overwrites",
        program(s, Layer(mlp=Mlp(total, {a: 1}))),
        "mlp 'mlp': overwrites slot 'a'",
    )
    yield (
        "twice",
        program(s, idle, Layer([copy(a, late)]), Layer([copy(a, late)])),
        "layer 3, head 'copy': overwrites slot 'late', written at layer 2",
    )
    yield (
        "too early",
        program(s, Layer([copy(a, late)])),
        "writes slot 'late' at layer 1; it is alive from 2 to the end",
    )
    yield "outside", program(s, Layer([copy(a, u)])), "head 'copy': writes outside slot 'u'"
    yield "other kind", program(s, Layer([copy(a, u, queries="prefix")])), "writes outside slot 'u'"
    yield "read elsewhere", program(s, Layer([copy(u, total)])), "slot 'u' is read at tokens"
    yield (
        "read other kind",
        program(s, Layer([copy(u, total, keys="prefix")])),
        "slot 'u' is read at tokens",
    )
    yield (
        "mlp elsewhere",
        program(s, Layer(mlp=Mlp(u, {total: 1}))),
        "mlp 'mlp': slot 'u' is read at tokens",
    )
    yield (
        "dead",
        program(short, idle, Layer([copy(a, fleeting)]), Layer([copy(fleeting, total)])),
        "layer 3, head 'copy', value: slot 'late' died at layer 2",
    )
    yield (
        "not erased",
        program(tight, Layer(), Layer([copy(kept, new)])),
        "slot 'new' takes the columns of slot 'old', which was not erased",
    )
    yield (
        "norm before erase",
        program(tight, Layer(), Layer([erase(old)], norm=Norm(kept, new))),
        "norm: slot 'new' takes the columns of slot 'old'",
    )
    yield (
        "mlp after erase",
        program(tight, Layer(), Layer([erase(old)], mlp=Mlp(old, {new: 1}))),
        "mlp 'mlp': slot 'old' is read before",
    )
    yield (
        "foreign read",
        program(s, Layer([copy(foreign, total)])),
        "slot 'foreign' is not a slot of this program",
    )
    yield (
        "foreign write",
        program(s, Layer([copy(a, foreign)])),
        "slot 'foreign' is not a slot of this program",
    )
    yield (
        "foreign mlp",
        program(s, Layer(mlp=Mlp(a, {foreign: 1}))),
        "slot 'foreign' is not a slot of this program",
    )
    yield (
        "mixer",
        program(s, Layer([copy(a, total, mixer="sigmoid")])),
        "head 'copy': unknown mixer 'sigmoid'",
    )
    yield (
        "activation",
        program(s, Layer(mlp=Mlp(a, {total: 1}, activation="sine"))),
        "unknown activation 'sine'",
    )
    yield (
        "query group",
        program(s, Layer([copy(a, total, queries="none")])),
        "unknown token group 'none'",
    )
    yield (
        "key group",
        program(s, Layer([copy(a, total, keys="none")])),
        "unknown token group 'none'",
    )
    yield "erased twice", program(s, Layer([erase(a), erase(a)])), "slot 'a' is erased twice"
    part = Layer([erase(a, queries="data"), copy(total, a)])
    yield "erased in part", program(s, part), "overwrites slot 'a'"
    named = Layer([copy(late, total)], name="first")
    yield "layer name", program(s, named), r"layer 1 \(first\), head 'copy'"
    yield (
        "second loop",
        program(s, Layer([copy(a, total)]), Layer([copy(a, late)]), loops=2),
        "layer 4, head 'copy': overwrites slot 'late'",
    )


REFUSED = {name: (p, message) for name, p, message in refused()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    bad, message = REFUSED[name]
    with pytest.raises(ProgramError, match=message):
        compile_program(bad)


def test_two_values_in_the_same_columns_in_one_layer():
    """Slots laid out by hand, since `Slots.add` keeps values born together apart."""
    slots = Slots()
    a = slots.add("a", 2)
    b = slots.add("b", 2, born=1, dies=1)
    c = dataclasses.replace(b, name="c")
    slots._slots["c"] = c
    with pytest.raises(ProgramError, match="slot 'c' takes the columns of slot 'b'"):
        check(Program(slots, [Layer([copy(a, b), copy(a, c)])]))


def test_heads_that_cannot_be_written_down():
    s = layout()
    a, total = s["a"], s["sum"]
    with pytest.raises(ValueError, match="head: query has 2 rows and key 1"):
        Head(a, ONE, a, {total: 1})
    with pytest.raises(ValueError, match=r"copy: window \(1, 0\) is empty"):
        copy(a, total, window=(1, 0))
    with pytest.raises(ValueError, match=r"slot 'sum' with a matrix of shape \(2, 3\)"):
        Head(a, a, a, {total: np.ones((2, 3))})
    with pytest.raises(ValueError, match="writes 1 rows into slot 'sum', which has 2"):
        Head(a, a, ONE, {total: 1.0})
    with pytest.raises(TypeError):
        Head(a, a, a, {"sum": 1.0})
    with pytest.raises(ValueError, match="hidden has 2 rows, gate 1"):
        Mlp(a, {total: 1.0}, gate=ONE)
    with pytest.raises(ValueError, match="sizes must be equal"):
        Norm(a, Slots().add("b", 1))
    with pytest.raises(ValueError, match="loops is 0"):
        Program(s, [Layer()], 0)
    with pytest.raises(ValueError, match="layers of a program must not be empty"):
        Program(s, [])
    with pytest.raises(ValueError, match="dtype is int32"):
        compile_program(Program(Slots(), [Layer()]), "int32")
    with pytest.raises(ValueError, match="float64, which JAX has only where x64 is on"):
        compile_program(Program(Slots(), [Layer()]), "float64")


def example(loops=1):
    s = layout(dies=None)
    a, u, total = s["a"], s["u"], s["sum"]
    heads = [
        Head(a, a + 0.5, a, {total: 0.3}, "softmax", keys="data", window=CAUSAL),
        Head(ONE, ONE, u, {total: 1.0}, keys="data"),
    ]
    return program(s, Layer(heads, mlp=Mlp(a - total, {total: 0.2})), loops=loops)


def test_head_wider_than_the_config():
    p = example()
    config = config_of(p)
    layer = config.segments[0].pattern[0]
    heads = tuple(dataclasses.replace(h, key_dim=1) for h in layer.heads)
    pattern = (dataclasses.replace(layer, heads=heads),)
    small = dataclasses.replace(config, segments=(SegmentConfig(pattern),))
    with pytest.raises(ProgramError, match=r"layer 1, head 'head' \(mixer softmax, 2 key rows"):
        compile_program(p, config=small)


def changed(config, **layer):
    segment = config.segments[0]
    pattern = tuple(dataclasses.replace(part, **layer) for part in segment.pattern)
    return dataclasses.replace(config, segments=(dataclasses.replace(segment, pattern=pattern),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, width=c.width - 1), "of width 8; the config has 1"),
        (lambda c: dataclasses.replace(c, segments=c.segments * 2), "the config has 2 of width"),
        (lambda c: dataclasses.replace(c, final_norm=NormConfig()), "config ends in"),
        (lambda c: changed(c, norm=NormConfig()), "layer 1: needs norm None"),
        (lambda c: changed(c, mlp_norm=NormConfig()), "layer 1: needs norm None"),
        (lambda c: changed(c, mlp=None), "layer 1, mlp 'mlp' does not fit"),
        (lambda c: changed(c, mlp=MlpConfig(9, "gelu")), "layer 1, mlp 'mlp' does not fit"),
        (lambda c: dataclasses.replace(c, token_groups=("prefix", "data")), "token groups"),
        (
            lambda c: dataclasses.replace(
                c, segments=(dataclasses.replace(c.segments[0], repeats=3, tied=True),)
            ),
            "runs 1 loops of 1 layers",
        ),
    ],
)
def test_configs_that_would_change_the_function(change, message):
    p = example()
    with pytest.raises(ProgramError, match=message):
        compile_program(p, config=change(config_of(p)))


def test_looped_program_needs_as_many_loops():
    p = example(loops=2)
    config = config_of(p)
    compile_program(p, config=config)
    segments = (dataclasses.replace(config.segments[0], repeats=3),)
    with pytest.raises(ProgramError, match="runs 2 loops of 1 layers"):
        compile_program(p, config=dataclasses.replace(config, segments=segments))


def run(model, stream, groups):
    return np.asarray(jax.jit(lambda m, s, g: m(s, g))(model, stream, groups))


def inputs(p, rng, batch=2, tokens=4):
    """Values of the embedding's slots and a stream that holds them."""
    groups = rng.integers(0, len(p.token_groups), (batch, tokens))
    names = np.asarray(p.token_groups)[groups]
    stream, values = np.zeros((batch, tokens, p.slots.width)), {}
    for slot in p.slots:
        if slot.born == 0:
            owned = np.isin(names, slot.token_groups or p.token_groups)[..., None]
            values[slot.name] = rng.normal(size=(batch, tokens, slot.size)) * owned
            stream[..., slot.columns] += values[slot.name]
    return stream, values, groups


def alive(p):
    """Slots whose value stands in the stream when the program ends."""
    written = {s: True for s in p.slots if s.born == 0}
    for _, layer in p.unrolled():
        for head in layer.heads:
            written.pop(head.erases, None) if head.erases else None
        for part in (*layer.heads, *([layer.mlp] if layer.mlp else [])):
            erased = getattr(part, "erases", None)
            written |= {slot: True for slot in part.write if slot != erased}
        if layer.norm:
            written[layer.norm.write] = True
    return list(written)


def assert_means(p, out, values, groups, places):
    names = np.asarray(p.token_groups)[groups]
    expected = plain_numpy.interpret(p, values, groups)
    for slot in places:
        owned = np.isin(names, slot.token_groups or p.token_groups)
        np.testing.assert_allclose(
            out(slot)[owned], expected[slot.name][owned], rtol=1e-8, atol=1e-9, err_msg=slot.name
        )


@pytest.mark.parametrize("loops", [1, 2])
def test_larger_config_same_function(x64, loops):
    p = example(loops)
    stream, values, groups = inputs(p, np.random.default_rng(0))
    config = config_of(p)
    layer = config.segments[0].pattern[0]
    heads = (
        HeadsConfig("softmax", 3, 4, 3, bias=True),
        HeadsConfig("centred", 1, 1, 1, bias=True),
        HeadsConfig("linear", 2, 2, 5, bias=True),
    )
    large = changed(config, heads=heads, mlp=MlpConfig(layer.mlp.hidden + 3, "relu", bias=True))
    large = dataclasses.replace(large, width=config.width + 4, token_groups=("data", "prefix", "x"))
    model = compile_program(p, "float64", large)
    assert model.config == large
    padded = np.concatenate([stream, np.ones((*stream.shape[:2], 4))], -1)
    out = run(model, padded, groups)
    np.testing.assert_array_equal(out[..., config.width :], 1)
    assert_means(p, lambda s: out[..., s.columns], values, groups, alive(p))
    small = run(compile_program(p, "float64"), stream, groups)
    np.testing.assert_allclose(out[..., : config.width], small, rtol=1e-12, atol=1e-12)


def test_columns_are_handed_on_by_an_erase(x64):
    slots = Slots()
    old = slots.add("old", 2, dies=2)
    kept = slots.add("kept", 2)
    new = slots.add("new", 2, born=2)
    total = slots.add("sum", 2, accumulates=True)
    assert new.start == old.start
    layers = [Layer([copy(old, total)]), Layer([erase(old), copy(old + kept, new, window=SELF)])]
    p = Program(slots, layers)
    stream, values, groups = inputs(p, np.random.default_rng(1))
    out = run(compile_program(p, "float64"), stream, groups)
    np.testing.assert_allclose(out[..., new.columns], values["old"] + values["kept"], atol=1e-14)
    summed = values["sum"] + values["old"].sum(1, keepdims=True)
    np.testing.assert_allclose(out[..., total.columns], summed, atol=1e-14)


def test_a_head_sees_what_the_norm_of_its_layer_wrote(x64):
    slots = Slots()
    a = slots.add("a", 3)
    normed = slots.add("normed", 3, born=1)
    out = slots.add("out", 3, born=1)
    p = Program(slots, [Layer([copy(normed, out, window=SELF)], norm=Norm(a, normed, eps=0.0))])
    stream, values, groups = inputs(p, np.random.default_rng(1))
    v = values["a"]
    wanted = (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True)
    found = run(compile_program(p, "float64"), stream, groups)
    np.testing.assert_allclose(found[..., out.columns], wanted, atol=1e-13)


def random_program(rng):
    """Any program at all; most are refused, those that pass the check must be right."""
    slots, groups = Slots(), ("data", "prefix")
    depth = int(rng.integers(1, 4))
    for n in range(int(rng.integers(3, 7))):
        born = int(rng.integers(0, depth + 1)) if n else 0
        dies = None if rng.random() < 0.4 else int(rng.integers(born, depth + 2))
        tokens = [None, None, "data", "prefix"][rng.integers(4)]
        slots.add(f"s{n}", int(rng.integers(1, 3)), token_groups=tokens, born=born, dies=dies,
                  accumulates=bool(rng.random() < 0.4))  # fmt: skip
    everything = list(slots)

    def expr(rows, number):
        ready = [s for s in everything if s.born < number and (s.dies or 9) >= number]
        ready = ready or everything
        picks = rng.choice(len(ready), size=int(rng.integers(1, 3)))
        e = sum(
            (rng.normal(size=(rows, ready[p].size)) @ ready[p] for p in picks),
            constant(*[0.0] * rows),
        )
        return e + rng.normal(size=rows) if rng.random() < 0.3 else e

    def write(rows, number):
        ready = [s for s in everything if s.born == number or s.accumulates] or everything
        target = ready[rng.integers(len(ready))]
        return {target: rng.normal(size=(target.size, rows))}

    layers = []
    for number in range(1, depth + 1):
        heads = []
        for _ in range(int(rng.integers(1, 4))):
            if rng.random() < 0.35:
                dying = [s for s in everything if s.dies == number] or everything
                heads.append(erase(dying[rng.integers(len(dying))]))
                continue
            k, v = int(rng.integers(1, 3)), int(rng.integers(1, 3))
            window = [(None, None), (0, 0), (None, 0), (-1, 1), (1, 1)][rng.integers(5)]
            heads.append(Head(
                expr(k, number), expr(k, number), expr(v, number), write(v, number),
                mixer=["linear", "softmax", "centred"][rng.integers(3)], window=window,
                queries=[None, *groups][rng.integers(3)], keys=[None, *groups][rng.integers(3)],
                scale=float(rng.normal()),
            ))  # fmt: skip
        mlp = (
            Mlp(
                expr(2, number),
                write(2, number),
                expr(2, number),
                token_groups=[None, *groups][rng.integers(3)],
            )
            if rng.random() < 0.2
            else None
        )
        norm = None
        if rng.random() < 0.2:
            source, target = (everything[n] for n in rng.integers(len(everything), size=2))
            tokens = [None, *groups][rng.integers(3)]
            if source.size == target.size:
                norm = Norm(source, target, token_groups=tokens)
        layers.append(Layer(heads, mlp, norm))
    return Program(slots, layers, int(rng.random() < 0.15) + 1, groups)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_mean_what_they_say(x64, seed):
    """A program that the check accepts runs as if its slots were separate variables."""
    rng = np.random.default_rng(seed)
    accepted = shared = erased = 0
    while accepted < 6:
        p = random_program(rng)
        try:
            check(p)
        except ProgramError:
            continue
        accepted += 1
        shared += p.slots.width < sum(s.size for s in p.slots)
        erased += any(h.erases is not None for layer in p.layers for h in layer.heads)
        stream, values, groups = inputs(p, rng)
        model = compile_program(p, "float64")
        out = run(model, stream, groups)
        assert_means(p, lambda s, out=out: out[..., s.columns], values, groups, alive(p))
        found = jax.jit(lambda v, g, p=p: evaluate(p, v, g))(values, groups)
        ends = [s for s in alive(p) if s.dies is None]
        assert_means(p, lambda s, f=found: np.asarray(f[s.name]), values, groups, ends)
        weights = [np.asarray(w) for w in jax.tree.leaves(nnx.state(model, nnx.Param))]
        assert counts(p).dense == sum(w.size for w in weights)
        assert counts(p).stored == sum(map(np.count_nonzero, weights))
    assert shared and erased


def test_dtype():
    p = example()
    assert compile_program(p).config == config_of(p)
    for dtype in (None, "float32", jnp.bfloat16):
        leaves = jax.tree.leaves(nnx.state(compile_program(p, dtype), nnx.Param))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype or "float32")}
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(nnx.state(compile_program(p), nnx.Param))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}
