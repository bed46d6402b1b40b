"""Grafting: planted skills are found, movement and chance find nothing, and bases matter."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.compile import compile_program, config_of
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.core.symmetry import change_key_basis
from constructions.core.transformer import randomise
from constructions.gradient_descent.construction import GradientDescent
from constructions.runs import fit_family, initial_models, load_run
from probes.grafting import (
    GRAFT,
    MaskSettings,
    gains,
    graft,
    learn_mask,
    overlap,
    random_mask,
    top_movement,
)
from probes.subject import ParameterVector

ONE = GradientDescent(dim_x=5, num_examples=10)
KEY = jax.random.key(0)


def wide(program: Program) -> Any:
    """One layer with four square matrices a head."""
    shape = config_of(program)
    return compile_program(program, config=shape.with_heads(shape.width, shape.width))


BUILT = wide(ONE.program)
FLAT = ParameterVector(ONE, BUILT)
SKILL = FLAT.theta != 0
OUTPUT = next(part for name, part in FLAT.parts.items() if name.endswith("output"))
#: What is written to the columns of x, which nobody reads.
INERT = jnp.zeros(FLAT.theta.size, bool).at[OUTPUT.start : OUTPUT.start + 30].set(True)
BEFORE = jnp.zeros(FLAT.theta.size)


def objective(size: int, theta: Any, key: Any) -> Any:
    return FLAT.loss(theta, ONE.task.sample(key, size))


LEARN, MEASURE = partial(objective, 256), partial(objective, 4096)
loss_of = jax.jit(MEASURE)


def moved() -> Any:
    """The construction with noise everywhere, and the inert entries moved most."""
    noise, far = jax.random.split(KEY)
    after = FLAT.theta + 0.02 * jax.random.normal(noise, FLAT.theta.shape)
    return jnp.where(INERT, 3 + jax.random.uniform(far, after.shape), after)


def fall(after: Any, key: Any = KEY) -> Any:
    return loss_of(BEFORE, key) - loss_of(after, key)


@pytest.mark.parametrize("penalty", [1e-3, 3e-3, 1e-2])
def test_planted_skill(penalty: float) -> None:
    after = moved()
    assert (FLAT.theta.size, int(SKILL.sum()), int(INERT.sum())) == (144, 12, 30)
    assert loss_of(after, KEY) == loss_of(jnp.where(INERT, 0, after), KEY)  # inert indeed
    mask = learn_mask(LEARN, BEFORE, after, fall(after), KEY, MaskSettings(penalty))
    assert overlap(SKILL, mask) == 1 and overlap(mask, SKILL) == 1  # precision and recall
    top = top_movement(BEFORE, after, 12)
    assert int(top.sum()) == 12 and overlap(top, SKILL) == 0
    chance = [random_mask(BEFORE, after, 12, key) for key in jax.random.split(KEY, 5)]
    found = gains(MEASURE, BEFORE, after, jnp.stack([mask, top, *chance]), jax.random.key(1))
    # the noise that the mask leaves behind did harm
    assert 1 < found[0] < 1.05
    assert np.abs(found[1:]).max() < 1e-3
    # every weight of a product is needed
    without = jnp.stack([mask.at[i].set(False) for i in np.flatnonzero(mask)])
    assert gains(MEASURE, BEFORE, after, without, KEY).max() < 0.9


def test_no_skill_is_refused() -> None:
    """Random weights, and a fit that went nowhere."""
    random = FLAT.vector(randomise(BUILT, jax.random.key(3), 0.2))
    drop = fall(random)
    assert drop < 1e-3
    with pytest.raises(ValueError, match="must be above 0"):
        learn_mask(LEARN, BEFORE, random, -abs(drop), KEY)
    with pytest.raises(ValueError, match="must be above 0"):
        learn_mask(LEARN, BEFORE, BEFORE, fall(BEFORE), KEY)


def test_masks_depend_on_the_basis() -> None:
    """A near-miss: the same two functions, and another mask. Masks compare in one lineage only."""
    turned = FLAT.vector(change_key_basis(BUILT, jax.random.key(5)))
    batch = ONE.task.sample(KEY, 64)
    predict = jax.jit(FLAT.predict)
    ours, theirs = (predict(t, *batch.inputs) for t in (FLAT.theta, turned))
    assert np.allclose(ours, theirs, atol=1e-5)
    assert int((turned != 0).sum()) == 62
    masks = [learn_mask(LEARN, BEFORE, t, fall(t), KEY) for t in (FLAT.theta, turned)]
    sizes = [int(mask.sum()) for mask in masks]
    assert sizes[0] == 12 and sizes[1] > 40
    assert overlap(masks[0], masks[1]) < 0.3


def two_tasks(shared: bool) -> tuple[ParameterVector, Any]:
    """Two outputs, each by a head of its own, or both by one; and where the weights end."""
    construction = GradientDescent(dim_x=5, dim_y=2, num_examples=10)
    slots = Slots()
    x, y = slots.add("x", 5), slots.add("y", 2, accumulates=True)
    first, second = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    parts = [first + second, 0 * first] if shared else [first, second]
    rate = float(construction.step_sizes[0]) / 10
    heads = [
        Head(query=x, key=x, value=-part @ y, write={y: rate * part}, keys="context")
        for part in parts
    ]
    flat = ParameterVector(
        construction, wide(Program(slots, [Layer(heads)], 1, ("context", "query")))
    )
    return flat, flat.theta + 0.02 * jax.random.normal(KEY, flat.theta.shape)


@pytest.mark.parametrize(("shared", "wanted"), [(False, 0.0), (True, 10 / 12)])
def test_two_tasks(shared: bool, wanted: float) -> None:
    """Tasks in heads of their own overlap nowhere; in one head they have its queries and keys."""
    flat, after = two_tasks(shared)
    before = jnp.zeros_like(after)

    def loss(outputs: slice, size: int, theta: Any, key: Any) -> Any:
        batch = flat.construction.task.sample(key, size)
        gap = flat.predict(theta, *batch.inputs) - batch.target
        return jnp.square(gap[..., outputs]).mean()

    masks = []
    for output in (slice(0, 1), slice(1, 2)):
        measure = jax.jit(partial(loss, output, 4096))
        drop = measure(before, KEY) - measure(after, KEY)
        masks.append(learn_mask(partial(loss, output, 256), before, after, drop, KEY))
    assert [int(mask.sum()) for mask in masks] == [12, 12]
    assert overlap(masks[0], masks[1]) == pytest.approx(wanted, abs=1e-6)
    every = jnp.stack([*masks, masks[0] | masks[1]])
    own = gains(partial(loss, slice(0, 1), 4096), before, after, every, KEY)
    both = gains(partial(loss, slice(0, 2), 4096), before, after, every, KEY)
    assert own[0] == pytest.approx(1, abs=0.05) and abs(own[1]) < 1e-3
    assert both[2] == pytest.approx(1, abs=0.05) and (both[:2] < 0.6).all()


def test_helpers() -> None:
    before, after = jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.asarray([1.0, 5.0, 2.0, 4.5])
    some = jnp.asarray([False, True, False, True])
    assert np.allclose(graft(before, after, some), [1, 5, 3, 4.5])
    assert np.allclose(graft(before, after, jnp.full(4, 0.5)), (before + after) / 2)
    assert np.array_equal(top_movement(before, after, 2), [False, True, True, False])
    draws = np.stack([random_mask(before, after, 2, k) for k in jax.random.split(KEY, 40)])
    assert (draws.sum(1) == 2).all() and not draws[:, 0].any()  # the first did not move
    assert (draws[:, 1:].mean(0) > 0.4).all()
    assert overlap(some, jnp.asarray([True, True, True, True])) == 0.5
    assert overlap(jnp.asarray([True, True, True, True]), some) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": -1.0}, "penalty is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskSettings(**settings)


def test_tool(tmp_path: Any) -> None:
    settings = {"dim_x": 2, "num_examples": 4}
    fitted = {"steps": 200, "batch": 64, "learning_rate": 0.02}
    path = tmp_path / "run"
    fit_family("gradient-descent", settings, path, seeds=[3, 5], **fitted)
    run = load_run(path)
    found = GRAFT(run, 0)
    arrays = len(FLAT.parts)
    assert found.rows[:: arrays + 1] == ["seed 3", "seed 5"]
    values = np.array(found.values, float).reshape(2, arrays + 1, -1)
    for whole, parts in zip(values[:, 0], values[:, 1:], strict=True):
        assert parts[:, 0].sum() == whole[0] and parts[:, 1].sum() == whole[1]
        assert parts[:, 2].sum() == pytest.approx(1)
        assert whole[3] > 0.5 and whole[5] < whole[3]
        assert (parts[:, -1] < whole[3]).any()
    # the other way round the fit makes it worse
    back = replace(run, models=tuple(initial_models(run)))
    with pytest.raises(ValueError, match="seed 3: .*improved by more than chance"):
        GRAFT(back, 0)
