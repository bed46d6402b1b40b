"""Mesa heads with gates, as heads of the transformer: against their recurrence, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.compile import ProgramError, compile_program, untrained
from constructions.core.config import Config, HeadsConfig, LayerConfig, NormConfig, SegmentConfig
from constructions.core.program import CAUSAL, Head, Layer, Program
from constructions.core.slots import Slots
from constructions.core.symmetry import transform
from constructions.core.transformer import FORGET_BIAS, Transformer, randomise
from constructions.mesa_layer import mesa_attention

WIDTH, TIME = 5, 9
KINDS = ("word", "silent")
CONFIG = Config(
    WIDTH,
    (
        SegmentConfig(
            (LayerConfig((HeadsConfig("mesa", 2, 3, 2, gates=True),), norm=NormConfig()),)
        ),
    ),
    KINDS,
)
GATES = ("input_gate", "input_gate_bias", "forget_gate", "forget_gate_bias")


def heads_of(arrays):
    return arrays["segments"][0]["layers"][0]["heads"][0]


def model_of(config=CONFIG, keys=("word",), seed=0):
    """Random weights, gates biased and all."""
    rng = np.random.default_rng(seed)
    arrays = randomise(untrained(config, CAUSAL, keys), jax.random.key(seed), 0.7).arrays()
    w = heads_of(arrays)
    for name in ("input_gate_bias", "forget_gate_bias", "log_regularization"):
        if name in w:
            w[name] = jnp.asarray(rng.normal(size=w[name].shape))
    return Transformer(config, arrays)


def stream_of(batch=2, seed=1):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 2, (batch, TIME))
    return jnp.asarray(rng.normal(size=(batch, TIME, WIDTH))), jnp.asarray(groups)


@jax.jit
def call(model, stream, groups):
    return model(stream, groups)


@jax.jit
def run(model, stream, groups):
    return model.run(stream, groups, sites=("attention", "head_output"))


def recurrence(model, stream, groups):
    """H and G token by token, and a solve at each; heads see words only."""
    w = {name: np.asarray(a)[0] for name, a in heads_of(model.arrays()).items()}
    out = np.array(stream)
    for b, h in enumerate(np.asarray(stream)):
        x = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        for n in range(2):
            ridge = np.exp(w["log_regularization"][n]) * np.eye(3)
            gram, moment = np.zeros((3, 3)), np.zeros((2, 3))
            for t in range(TIME):
                if groups[b, t] == 0:
                    beta, gamma = (
                        1 / (1 + np.exp(-(w[g][n] @ x[t] + w[f"{g}_bias"][n])))
                        for g in ("input_gate", "forget_gate")
                    )
                    k, v = w["key"][n] @ x[t], w["value"][n] @ x[t]
                    gram = gamma * gram + beta * np.outer(k, k)
                    moment = gamma * moment + beta * np.outer(v, k)
                solved = np.linalg.solve(gram + ridge, w["query"][n] @ x[t])
                out[b, t] += w["output"][n] @ moment @ solved
    return out


def test_both_ways_to_run_follow_the_recurrence(x64):
    model, (stream, groups) = model_of(), stream_of()
    expected = recurrence(model, stream, groups)
    np.testing.assert_allclose(call(model, stream, groups), expected, rtol=1e-10, atol=1e-10)
    out, found = run(model, stream, groups)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
    seen = np.asarray(found["attention"])[0]
    assert not np.triu(seen, 1).any()
    assert not np.where(np.asarray(groups)[:, None, None, :] == 1, seen, 0).any()
    # the last layer at the tokens that are read, no others
    last = jax.jit(lambda m, s, g: m(s, g, read=slice(-2, None)))(model, stream, groups)
    np.testing.assert_allclose(last, expected[:, -2:], rtol=1e-10, atol=1e-10)


def test_gates_matter(x64):
    model, (stream, groups) = model_of(), stream_of()
    out = call(model, stream, groups)
    for name in GATES:
        arrays = model.arrays()
        heads_of(arrays)[name] = heads_of(arrays)[name] * 1.5
        assert np.abs(call(Transformer(CONFIG, arrays), stream, groups) - out).max() > 1e-3


def test_open_gates_are_none(x64):
    plain = dataclasses.replace(CONFIG.segments[0].pattern[0].heads[0], gates=False)
    layer = dataclasses.replace(CONFIG.segments[0].pattern[0], heads=(plain,))
    bare = dataclasses.replace(CONFIG, segments=(SegmentConfig((layer,)),))
    model, (stream, groups) = model_of(bare), stream_of()
    arrays = model.arrays()
    size = {name: shape for name, shape in heads_of(CONFIG.shapes()).items() if name in GATES}
    heads_of(arrays).update({n: jnp.full(s, 40.0 * n.endswith("bias")) for n, s in size.items()})
    gated = Transformer(CONFIG, arrays)
    out = call(model, stream, groups)
    np.testing.assert_allclose(call(gated, stream, groups), out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_weights_times_values_is_the_layer(x64, gated):
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, 2, TIME, 2, 3))
    ridge = np.array([0.5, 2.0])
    gates = rng.uniform(0.2, 0.9, (2, 2, TIME, 2))
    given = dict(zip(("input_gate", "forget_gate"), gates, strict=True)) if gated else {}
    beta, gamma = gates if gated else np.ones_like(gates)
    found = np.asarray(mesa_attention(q, k, ridge, **given))
    for b, h, t in np.ndindex(2, 2, TIME):
        kept = [np.prod(gamma[b, s + 1 : t + 1, h]) * beta[b, s, h] for s in range(t + 1)]
        own = k[b, : t + 1, h]
        solved = np.linalg.solve((own.T * kept) @ own + ridge[h] * np.eye(3), q[b, t, h])
        np.testing.assert_allclose(found[b, h, t, : t + 1], kept * (own @ solved), atol=1e-12)
        assert not found[b, h, t, t + 1 :].any()


def test_gradients_of_gates_equal_finite_differences(x64):
    model, (stream, groups) = model_of(), stream_of()

    @jax.jit
    def loss(gates, tapped):
        arrays = model.arrays()
        heads_of(arrays).update(gates)
        changed = Transformer(CONFIG, arrays)
        straight = jnp.sin(changed(stream, groups)).sum()
        return jnp.where(tapped, jnp.sin(run(changed, stream, groups)[0]).sum(), straight)

    gates = {name: heads_of(model.arrays())[name] for name in GATES}
    slope = jax.jit(jax.grad(loss))
    gradient, tapped = slope(gates, False), slope(gates, True)
    for name, value in gates.items():
        np.testing.assert_allclose(gradient[name], tapped[name], rtol=1e-9, atol=1e-11)
        direction = np.random.default_rng(5).normal(size=value.shape)
        ends = [loss(gates | {name: value + e * direction}, False) for e in (1e-5, -1e-5)]
        wanted = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose((gradient[name] * direction).sum(), wanted, rtol=1e-6)


@pytest.mark.parametrize("logit", [-300.0, 300.0])
def test_saturated_gates_are_finite(logit):
    stream, groups = (jnp.asarray(a) for a in stream_of())
    arrays = model_of().arrays()
    for name in GATES[1::2]:
        heads_of(arrays)[name] = jnp.full_like(heads_of(arrays)[name], logit)

    @jax.jit
    def loss(w):
        heads_of(arrays).update(w)
        return jnp.square(Transformer(CONFIG, arrays)(stream.astype(jnp.float32), groups)).sum()

    gradient = jax.jit(jax.grad(loss))({name: heads_of(arrays)[name] for name in GATES})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gates_begin_open_to_the_past():
    model = randomise(untrained(CONFIG, CAUSAL), jax.random.key(0), 0.1)
    w = heads_of(model.arrays())
    np.testing.assert_array_equal(w["forget_gate_bias"], FORGET_BIAS)
    np.testing.assert_array_equal(w["input_gate_bias"], 0)
    assert np.std(w["forget_gate"]) > 0.03 < np.std(w["input_gate"])


def test_symmetries_leave_gated_heads_as_they_are(x64):
    model, (stream, groups) = model_of(), stream_of()
    changed = transform(model, jax.random.key(2))
    assert changed.config.max_heads == 4
    np.testing.assert_allclose(
        call(changed, stream, groups), call(model, stream, groups), rtol=1e-9, atol=1e-9
    )


def test_gates_of_other_heads_are_refused():
    with pytest.raises(ValueError, match=r"^gates is True and mixer 'softmax', must be 'mesa'"):
        HeadsConfig("softmax", 1, 2, 2, gates=True)


def test_programs_have_no_gates():
    slots = Slots()
    x = slots.add("x", WIDTH, accumulates=True)
    head = Head(x, x, x, {x: 1.0}, mixer="mesa", window=CAUSAL, regularization=1.0)
    program = Program(slots, [Layer([head])])
    heads = (HeadsConfig("mesa", 1, WIDTH, WIDTH, gates=True),)
    config = Config(WIDTH, (SegmentConfig((LayerConfig(heads),)),))
    with pytest.raises(ProgramError, match="^layer 1 of the config has gates, which no program"):
        compile_program(program, config=config)


def test_json_keeps_gates_and_reads_what_was_written_before():
    data = CONFIG.to_json()
    assert Config.from_json(data) == CONFIG
    heads = data["segments"][0]["pattern"][0]["heads"][0]
    assert heads.pop("gates") is True
    read = Config.from_json(data)
    assert not read.segments[0].pattern[0].heads[0].gates
    assert "input_gate" not in heads_of(read.shapes())
