"""What TinT does not see, what its parts do, and how good its differences are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tint_oracle import (
    FROZEN,
    RATE,
    TEXTS,
    TIME,
    TRAINED,
    VALUE_ONLY,
    flat,
    names,
    parameters,
    reference,
    simulate,
    small,
    updated,
)

from constructions.core.evaluate import evaluate
from constructions.interchange.decoder import logits
from constructions.tint.algorithm import MODES, Backward
from constructions.tint.construction import Tint
from constructions.tint.layout import contents


@pytest.fixture(scope="module")
def simulators():
    """One for each mode: each is traced once."""
    with jax.enable_x64(True):
        return {mode: Tint(small(), mode, learning_rate=RATE, stack=2) for mode in MODES}


@pytest.mark.parametrize(
    "mode",
    [
        "paper",
        "exact",
        "finite-difference",
    ],
)
def test_tokens_behind_the_last_target_do_not_count(x64, simulators, mode):
    """Position 2 is the last that is trained on, token 3 its target."""
    other = TEXTS.copy()
    other[:, 4:] = (other[:, 4:] + 1 + np.arange(2)) % 5
    first, second = (simulate(simulators[mode], t) for t in (TEXTS, other))
    for name, found in updated(first).items():
        assert (found == updated(second)[name]).all(), name
    assert np.abs(first.logits_after[:, 4:] - second.logits_after[:, 4:]).max() > 0.1
    assert (first.logits_after[:, :4] == second.logits_after[:, :4]).all()
    other[:, 3] = (other[:, 3] + 1) % 5
    change = flat(updated(first), small()) - flat(
        updated(simulate(simulators[mode], other)), small()
    )
    assert (np.linalg.norm(change, axis=1) > 1e-2).all()


def test_switching_one_position_off(x64, simulators):
    """What it adds is the gradient of that one term of the loss; of the last, nothing."""
    given, every = np.repeat(TEXTS[:1], TIME + 1, 0), np.ones((TIME + 1, TIME), bool)
    every[np.arange(TIME), np.arange(TIME)] = False
    found = np.concatenate(
        [
            flat(updated(simulate(simulators["exact"], given[part], every[part])), small())
            for part in (slice(0, 4), slice(3, 7))
        ]
    )[[0, 1, 2, 3, 5, 6, 7]]
    alone = reference(small(), given[:TIME], np.eye(TIME), rate=RATE)
    expected = flat(alone.updated, small())
    np.testing.assert_allclose(found[-1] - found[:-1], expected, atol=1e-13)
    assert (found[-1] == found[-2]).all()
    assert (np.linalg.norm(expected[:-1], axis=1) > 1e-2).all()


def test_masks_of_numbers(x64, simulators):
    first = simulate(simulators["exact"])
    second = simulate(simulators["exact"], masks=TRAINED.astype("int32"))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first, second))


def test_short_texts(x64):
    """One token has no successor."""
    tint = Tint(small(), learning_rate=RATE)
    found = simulate(tint, TEXTS[:, :1], np.ones((4, 1), bool))
    expected = logits(small(), jnp.asarray(TEXTS[:, :1]))
    np.testing.assert_allclose(found.logits_before, expected, atol=1e-13)
    np.testing.assert_allclose(found.logits_after, expected, atol=1e-13)
    assert (flat(updated(found), small()) == 0).all()


@pytest.mark.parametrize(
    "mode",
    [
        Backward("value-only"),
        Backward(gains=False),
        {"attention": "value-only", "gains": False, "norm": "finite-difference", "step": 1e-7},
    ],
    ids=str,
)
def test_mixes(x64, mode):
    tint = Tint(small(), mode, learning_rate=RATE)
    value_only = tint.backward.attention == "value-only"
    frozen = (VALUE_ONLY if value_only else FROZEN) + (() if tint.backward.gains else ("gain",))
    found = updated(simulate(tint))
    expected = reference(small(), TEXTS, TRAINED, rate=RATE, frozen=frozen, value_only=value_only)
    bar = 1e-10 if tint.backward.norm == "exact" else 1e-6
    compare(found, expected.updated, bar, frozen)


def compare(found, expected, bar, frozen):
    """Each parameter of each sequence by itself."""
    start = names(parameters(small()))
    for name in start:
        change, right = found[name] - start[name], expected[name] - start[name]
        if name.split("/")[-1] in frozen:
            assert (change == 0).all(), name
        elif "key_bias" not in name:
            error = np.linalg.norm((change - right).reshape(4, -1), axis=1)
            assert (error <= bar * np.linalg.norm(right.reshape(4, -1), axis=1)).all(), name


@pytest.mark.parametrize(
    ("part", "slope"), [("norm", 1), ("activation", 1), ("attention", 2), ("central norm", 2)]
)
def test_order_of_differences(x64, simulators, part, slope):
    """Of one part; the others are exact."""
    exact = updated(simulate(simulators["exact"]))
    steps = (1e-3, 1e-4) if slope == 1 else (3e-3, 1e-3)
    errors = []
    for step in steps:
        way = {"central norm": {"norm": "central"}}.get(part, {part: "finite-difference"})
        mode = Backward(**way, step=step, central=10 * step)
        found = updated(simulate(Tint(small(), mode, learning_rate=RATE)))
        compare(found, exact, 5e-3, FROZEN)
        errors.append(np.linalg.norm(flat(found, small()) - flat(exact, small())))
    assert abs(np.diff(np.log(errors)) / np.diff(np.log(steps)) - slope) < 0.02, errors


def test_error_of_the_difference_of_a_norm(x64):
    """Of (LN(x + e g) - LN(x)) / e: e / s^2 (n (3 a^2 - b) / 2 - a u), with n = LN(x), u the
    centred g, a = <n, u> / D, b = |u|^2 / D and s^2 the variance and what is added to it."""
    step = 1e-4
    tint = Tint(small(), Backward(norm="finite-difference", step=step), learning_rate=RATE)
    values = contents(tint.layout, tint.weights, jnp.asarray(TEXTS), jnp.asarray(TRAINED))
    out = jax.jit(lambda values: evaluate(tint.program, values, tint.layout.kinds(TIME)))(values)
    for norm in (1, 2):
        x, g, plain, after = (
            np.asarray(out[f"pass 0, layer {norm}: {name}"][:, -TIME:][:, :3])
            for name in ("before", "d normal", "normal", "normal, moved")
        )
        s = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        n, u = (x - x.mean(-1, keepdims=True)) / s, g - g.mean(-1, keepdims=True)
        a, b = (n * u).mean(-1, keepdims=True), (u * u).mean(-1, keepdims=True)
        error = (after - plain) / step - (u - a * n) / s
        expected = step / s**2 * (n * (3 * a**2 - b) / 2 - a * u)
        assert np.linalg.norm(error - expected) < 1e-2 * np.linalg.norm(expected)
