"""Every primitive against numpy, on random inputs, in weights and slot by slot."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import primitives as p
from constructions.core.compile import compile_program
from constructions.core.embedding import Tokens, make_stream
from constructions.core.evaluate import evaluate
from constructions.core.program import Layer, Program
from constructions.core.slots import Slots, constant

DIM, WORDS, LENGTH, SHARPNESS = 3, 4, 9, 40.0
MIX = np.arange(2 * DIM).reshape(2, DIM) - 2.0


def run(values: dict[str, np.ndarray], parts: Any) -> dict[str, np.ndarray]:
    """Slots by name after the layers `parts(slots)`, whose inputs hold these values.

    Compiled and evaluated; both must agree.
    """
    slots = Slots()
    for name, value in values.items():
        slots.add(name, value.shape[-1], accumulates=True)
    program = Program(slots, parts(slots))
    tokens = [Tokens("token", {name: jnp.asarray(value) for name, value in values.items()})]
    model = compile_program(program, "float64")
    stream = make_stream(program, model, tokens)
    dense = np.asarray(jax.jit(model)(stream.values, stream.groups))
    found = {slot.name: dense[..., slot.columns] for slot in slots}
    for name, value in jax.jit(lambda v: evaluate(program, v))(stream.values).items():
        np.testing.assert_allclose(found[name], value, atol=1e-12)
    return found


def test_functions_of_one_token(x64: None) -> None:
    draw = np.random.default_rng(0)
    x, b = draw.normal(size=(2, 5, 7, DIM))
    x[0, :3] = 0.0  # the corners too
    x[0, 3] = [0.25, -0.5, 0.75]

    def parts(slots: Slots) -> list[Layer]:
        outs = {name: slots.add(name, DIM, born=n + 1) for n, name in enumerate(wanted)}
        u, v = slots["x"], slots["b"]
        return [
            Layer(mlp=p.relu(u, {outs["relu"]: 1.0})),
            Layer(mlp=p.clip(u, -0.5, 0.75, {outs["clip"]: 2.0})),
            Layer(mlp=p.soft_threshold(u, 0.25, {outs["soft"]: 1.0})),
            Layer(mlp=p.sign(u, {outs["sign"]: 1.0})),
            Layer(mlp=p.product(u, v + 1.0, {outs["product"]: 1.0})),
            Layer(mlp=p.soft_threshold(u - v, 0.5, {slots.add("mixed", 2, born=6): MIX})),
            Layer(mlp=p.clip(u, -0.25, 0.25, {u: -1.0})),
        ]

    wanted = {
        "relu": np.maximum(x, 0),
        "clip": 2 * np.clip(x, -0.5, 0.75),
        "soft": np.sign(x) * np.maximum(np.abs(x) - 0.25, 0),
        "sign": np.sign(x),
        "product": x * (b + 1),
    }
    found = run({"x": x, "b": b}, parts)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-15, err_msg=name)
    d = x - b
    mixed = (np.sign(d) * np.maximum(np.abs(d) - 0.5, 0)) @ MIX.T
    np.testing.assert_allclose(found["mixed"], mixed, atol=1e-14)
    np.testing.assert_allclose(found["x"], wanted["soft"], atol=1e-15)  # in place
    np.testing.assert_array_equal(found["x"] == 0, np.abs(x) <= 0.25)


def test_functions_of_a_sequence(x64: None) -> None:
    draw = np.random.default_rng(1)
    word = draw.integers(0, WORDS, (6, LENGTH))
    one_hot, score = np.eye(WORDS)[word], draw.permuted(np.arange(6.0 * LENGTH)).reshape(6, LENGTH)
    position = np.broadcast_to(np.arange(LENGTH, dtype=float)[:, None], (6, LENGTH, 1))
    value = draw.normal(size=(6, LENGTH, DIM))

    def parts(slots: Slots) -> list[Layer]:
        w, v, s = slots["word"], slots["value"], slots["score"]
        before, third = slots.add("before", WORDS, born=1), slots.add("third", DIM, born=1)
        often, earlier = slots.add("often", 1, born=1), slots.add("earlier", 1, born=1)
        best, after = slots.add("best", DIM, born=2), slots.add("after", DIM, born=2)
        first = [
            p.previous(w, {before: 1.0}),
            p.previous(v, {third: 1.0}, offset=3),
            p.count(w, w, {often: 1.0}),
            p.count(constant(1.0), constant(1.0), {earlier: 0.5}, window=(None, -1)),
        ]
        second = [
            p.argmax(s, v, {best: 1.0}, sharpness=SHARPNESS, window=(None, 0)),
            p.after_last(w, before, slots["position"], v, {after: 1.0},
                         length=LENGTH, sharpness=SHARPNESS),
        ]  # fmt: skip
        return [Layer(first), Layer(second)]

    inputs = {"word": one_hot, "score": score[..., None], "position": position, "value": value}
    found = run(inputs, parts)
    for n, words in enumerate(word):
        for i in range(LENGTH):
            last = [j for j in range(i) if words[j] == words[i]]
            after = value[n, last[-1] + 1 if last else i]
            np.testing.assert_allclose(found["after"][n, i], after, atol=1e-14)
            best = value[n, np.argmax(score[n, : i + 1])]
            np.testing.assert_allclose(found["best"][n, i], best, atol=1e-14)
            assert found["often"][n, i] == np.sum(words == words[i])
            assert found["earlier"][n, i] == i / 2
            third = value[n, i - 3] if i > 2 else np.zeros(DIM)
            np.testing.assert_array_equal(found["third"][n, i], third)


def test_the_error_of_a_softmax_is_what_is_said(x64: None) -> None:
    """With scores one apart and little sharpness, the weight that goes elsewhere."""
    score = np.arange(5.0)[None, :, None]
    value = np.eye(5)[None]

    def parts(slots: Slots) -> list[Layer]:
        best = slots.add("best", 5, born=1)
        return [Layer([p.argmax(slots["score"], slots["value"], {best: 1.0}, sharpness=3.0)])]

    elsewhere = 1 - run({"score": score, "value": value}, parts)["best"][0, 0, -1]
    assert np.exp(-3.0) / 2 < elsewhere < 4 * np.exp(-3.0)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda u: p.clip(u, 0.5, 1.0, {u: 1}), "low is 0.5, must be a finite number of at m"),
        (lambda u: p.clip(u, -1, -0.5, {u: 1}), "high is -0.5, must be a finite num"),
        (lambda u: p.soft_threshold(u, np.nan, {u: 1}), "threshold is nan, must be a finite"),
        (lambda u: p.soft_threshold(u, 1, {u: np.eye(3)}), "soft threshold writes into"),
        (lambda u: p.product(u, u[:1], {u: 1}), "product: hidden has 2 rows, gate 1"),
        (lambda u: p.previous(u, {u: 1}, offset=0), "offset is 0, must be an integer of at l"),
        (lambda u: p.argmax(u, u, {u: 1}, sharpness=1), "argmax: query has 1 rows and key 2"),
        (lambda u: p.argmax(u[:1], u, {u: 1}, sharpness=0), "sharpness is 0, must be above 0"),
        (lambda u: p.after_last(u, u, u[:1], u, {u: 1}, length=0, sharpness=1), "length is 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(Slots().add("u", 2))
