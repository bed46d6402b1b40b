"""Class selectivity: planted units are found, off-axis ones are not, and what chance gives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.compile import untrained
from constructions.core.config import SegmentConfig
from constructions.core.transformer import Transformer, randomise
from constructions.inside_outside.tableau import GROUPS
from constructions.runs import Run, fit_family
from probes.selectivity import (
    SELECTIVITY,
    SelectiveTask,
    class_means,
    labelled,
    selectivity,
    selectivity_index,
    with_units,
)
from synthetic.fitting.train import fit

KEY = jax.random.key(0)


def test_index_against_loops() -> None:
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(size=(200, 6)), 0)
    activations[:, 5] = 0
    classes = rng.choice(5, p=[0.5, 0.3, 0.1, 0.06, 0.04], size=200)
    classes[:7] = -1
    found = selectivity(activations, classes, KEY, fewest=1)
    for unit in range(6):
        means = [activations[classes == c, unit].mean() for c in range(5)]
        best = int(np.argmax(means))
        rest = np.mean([m for c, m in enumerate(means) if c != best])
        index = 0 if unit == 5 else (means[best] - rest) / (means[best] + rest)
        assert found.index[unit] == pytest.approx(index, abs=1e-5)
        assert unit == 5 or found.preferred[unit] == best
    assert found.dead.tolist() == [False] * 5 + [True]
    assert found.mean == pytest.approx(found.index[:5].mean())
    assert (
        found.null.shape == (19, 6)
        and found.sizes.tolist() == np.bincount(classes[classes >= 0]).tolist()
    )


def test_a_class_with_few_examples_is_left_out() -> None:
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(size=(300, 8)), 0)
    classes = np.repeat([0, 1, 2], [145, 145, 10])
    activations[290:] += 10
    with_all = selectivity(activations, classes, KEY, fewest=1)
    without = selectivity(activations, classes, KEY)
    assert with_all.mean > 0.8 and without.mean < 0.15 and without.sizes.tolist() == [145, 145, 0]


#: Examples of each class, and the index of relu(normal) units for 10 classes, as the issue has it.
CHANCE = [(20, 0.24), (100, 0.12), (1000, 0.04)]


@pytest.mark.parametrize(("size", "expected"), CHANCE)
def test_chance(size: int, expected: float) -> None:
    rng = np.random.default_rng(size)
    activations = np.maximum(rng.normal(size=(10 * size, 200)), 0)
    classes = rng.permutation(np.repeat(np.arange(10), size))
    found = selectivity(activations, classes, KEY)
    assert found.chance == pytest.approx(expected, abs=0.02)
    # the classes say nothing here, so that the index is that of chance
    assert found.mean == pytest.approx(found.chance, abs=0.01) and found.above < 0.13


def test_chance_is_larger_where_classes_are_unequal() -> None:
    rng = np.random.default_rng(1)
    activations = np.maximum(rng.normal(size=(2000, 200)), 0)
    equal = np.repeat(np.arange(10), 200)
    unequal = np.repeat(np.arange(10), [1820] + [20] * 9)
    found = [selectivity(activations, rng.permutation(c), KEY) for c in (equal, unequal)]
    assert found[1].chance > 2 * found[0].chance
    # the null has the classes' sizes: it is right for both
    for each in found:
        assert each.mean == pytest.approx(each.chance, abs=0.01)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Ten classes, a unit for each of them and ten that have none, behind a ReLU."""
    rng = np.random.default_rng(2)
    classes = rng.integers(0, 10, 2000)
    code = np.eye(10)[classes] * 2
    signal = np.concatenate([code, np.zeros((2000, 10))], 1)
    return signal + 0.3 * rng.normal(size=signal.shape), classes


def decodable(activations: np.ndarray, classes: np.ndarray) -> float:
    """Accuracy of least squares on one-hot labels, held out."""
    x = np.concatenate([activations, np.ones((len(activations), 1))], 1)
    weights = np.linalg.lstsq(x[:1000], np.eye(10)[classes[:1000]], rcond=None)[0]
    return float(((x[1000:] @ weights).argmax(1) == classes[1000:]).mean())


def test_planted_units_are_found_and_rotated_ones_are_not() -> None:
    signal, classes = planted()
    straight = selectivity(np.maximum(signal, 0), classes, KEY)
    assert (straight.index[:10] > 0.7).all() and (straight.preferred[:10] == np.arange(10)).all()
    assert (straight.index[10:] < 0.15).all()
    assert straight.above == pytest.approx(0.5, abs=0.1)
    # in another basis the classes can be read off as well, but no unit answers to one alone
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(20, 20)))[0]
    turned = np.maximum(signal @ rotation + 1, 0)
    off_axis = selectivity(turned, classes, KEY)
    assert off_axis.index.max() < 0.5 and off_axis.mean < 0.5 * straight.index[:10].mean()
    assert decodable(turned, classes) > 0.95 and decodable(np.maximum(signal, 0), classes) > 0.95
    # near-miss: the same units, labels of other examples
    shuffled = selectivity(np.maximum(signal, 0), np.roll(classes, 1), KEY)
    assert shuffled.mean == pytest.approx(shuffled.chance, abs=0.03) and shuffled.above < 0.25


def test_refused() -> None:
    some = np.ones((40, 2))
    with pytest.raises(ValueError, match=r"activations are down to -1, must not be negative"):
        selectivity(-some, np.zeros(40, int), KEY)
    with pytest.raises(ValueError, match=r"activations has shape \(40, 2\) and classes \(3,\)"):
        selectivity(some, np.zeros(3, int), KEY)
    with pytest.raises(ValueError, match="1 classes have 20 examples, must be at least 2"):
        selectivity(some, np.zeros(40, int), KEY)
    with pytest.raises(ValueError, match="0 classes have 20 examples"):
        selectivity(some, np.full(40, -1), KEY)


def test_index_can_be_differentiated() -> None:
    def index(activations: jax.Array) -> jax.Array:
        means, sizes = class_means(activations, jnp.asarray([0, 0, 1, 1]), 3)
        return selectivity_index(means, sizes > 0).sum()

    at = jnp.asarray([[1.0], [2.0], [0.5], [0.5]])
    # (m1 - m2) / (m1 + m2), m1 = 3/2, m2 = 1/2: the derivative in m1 is 2 m2 / (m1 + m2)^2
    np.testing.assert_allclose(jax.grad(index)(at)[:, 0], [0.125, 0.125, -0.375, -0.375], atol=1e-5)
    dead = jnp.zeros((4, 1))
    assert jnp.isfinite(jax.grad(index)(dead)).all() and float(index(dead)) == 0


SMALL: dict[str, Any] = {"grammar": "toy", "max_length": 6, "layers": 1, "heads": 2, "width": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    return fit_family("inside-outside", SMALL, out, steps=3, batch=8)


def with_relu(model: Transformer) -> Transformer:
    """A random model of the same shape with ReLU units."""
    (segment,) = model.config.segments
    (layer,) = segment.pattern
    assert layer.mlp is not None
    layer = replace(layer, mlp=replace(layer.mlp, activation="relu"))
    config = replace(model.config, segments=(SegmentConfig((layer,), segment.repeats),))
    keys = [group for group in GROUPS if group != "pad"]
    return randomise(untrained(config, keys=keys), jax.random.key(0), 0.3)


def test_tool(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the model's MLPs are gelu, whose units may be negative"):
        SELECTIVITY(run, 0)
    model = with_relu(run.models[0])
    monkeypatch.setattr("probes.selectivity.random_model", lambda _: model)
    found = SELECTIVITY(replace(run, models=(model,)), 0)
    assert found.rows == ["trained, seed 0, layer 1", "random weights, layer 1"]
    assert found.columns[:2] == ["mean index", "exchanged labels"]
    assert found.values[0] == found.values[1] and "tags of words" in found.note
    # at random weights units see the word, which says its tag: well above exchanged labels
    assert found.values[0][2] > 0.05 and found.values[0][3] > 0.5


def test_tool_refuses_what_has_no_classes(run: Run) -> None:
    regression = CATALOGUE["gradient-descent"](dim_x=2, num_examples=3)
    model = regression.compile().model
    with pytest.raises(ValueError, match="the model has no MLP"):
        SELECTIVITY(replace(run, construction=regression, models=(model,)), 0)
    with pytest.raises(ValueError, match="RegressionTask is regression, which has no classes"):
        labelled(regression, KEY, 4)


def test_regulariser_moves_selectivity() -> None:
    construction = CATALOGUE["inside-outside"](**SMALL)
    initial = with_relu(construction.counterpart().init(KEY))
    count, predict = len(construction.grammar.vocabulary), with_units(construction)

    def classes(batch: Any) -> jax.Array:
        tokens, lengths, mask = batch.inputs
        there = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return jnp.where(there & ~mask, tokens, -1)

    def fitted(weight: float) -> tuple[float, float]:
        task = SelectiveTask(construction.task, classes, count, weight)
        settings: dict[str, Any] = {"steps": 60, "batch": 64, "learning_rate": 1e-2}
        model = fit(initial, task, predict=predict, **settings).model
        batch = construction.task.sample(jax.random.key(9), 256)
        words, units = jax.jit(predict)(model, *batch.inputs)
        means, sizes = class_means(units[0].reshape(-1, 32), classes(batch).reshape(-1), count)
        loss = construction.task.loss(words, batch).mean()
        return float(selectivity_index(means, sizes > 0).mean()), float(loss)

    (less, _), (more, loss) = fitted(-5.0), fitted(5.0)
    assert more > less + 0.3 and np.isfinite(loss)
    with pytest.raises(ValueError, match="gelu"):
        jax.eval_shape(predict, construction.counterpart().init(KEY), *construction.sample(KEY, 2))


def test_loss_of_the_regulariser() -> None:
    construction = CATALOGUE["inside-outside"](**SMALL)
    batch = construction.task.sample(KEY, 5)
    rng = np.random.default_rng(0)
    units = np.maximum(rng.normal(size=(2, 5, 6, 3)), 0).astype(np.float32)
    words = rng.dirichlet(np.ones(17), (5, 6)).astype(np.float32)
    task = SelectiveTask(construction.task, lambda b: b.inputs[0] % 3, 3, 0.7)
    own = [
        selectivity(u.reshape(30, 3), batch.inputs[0].reshape(-1) % 3, KEY, fewest=1) for u in units
    ]
    wanted = construction.task.loss(jnp.asarray(words), batch) - 0.7 * np.mean(
        [o.index for o in own]
    )
    found = task.loss((jnp.asarray(words), jnp.asarray(units)), batch)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
