"""The grid of modifications: a permutation test against scipy's, false positives, every shape."""

from math import comb

import jax
import numpy as np
import pytest
from scipy import stats

from constructions.core.transformer import randomise
from constructions.gradient_descent.construction import GradientDescent
from constructions.gradient_descent.modifications import (
    GRID,
    Modified,
    false_positives,
    holm,
    modified,
    permutation_test,
)
from probes.sweep import Sweep
from probes.sweep.work import layout


def difference(a, b, axis=-1):
    return np.mean(a, axis) - np.mean(b, axis)


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6)])
def test_permutation_test_is_scipys(sizes):
    rng = np.random.default_rng(0)
    for shift in (0.0, 2.0):
        first, second = rng.exponential(size=sizes[0]) + shift, rng.exponential(size=sizes[1])
        wanted = stats.permutation_test(
            (first, second), lambda a, b, axis: np.abs(difference(a, b, axis)),
            alternative="greater", n_resamples=np.inf, vectorized=True,
        )  # fmt: skip
        assert permutation_test(first, second) == pytest.approx(wanted.pvalue, abs=1e-12)


def test_false_positives_come_at_the_nominal_rate_whatever_the_distribution():
    rng = np.random.default_rng(1)
    for draw in (
        rng.standard_normal,
        rng.standard_cauchy,
        rng.standard_exponential,
    ):
        p = permutation_test(draw((4000, 5)), draw((4000, 5)))
        for splits in (12, 24, 50):  # of 252, two at a time
            level = splits / comb(10, 5)
            error = np.sqrt(level * (1 - level) / 4000)
            assert abs((p <= level + 1e-12).mean() - level) < 3 * error
    values = rng.standard_cauchy(4000)
    assert abs(false_positives(values, 5, 0.05, 0).mean() - 12 / 252) < 2 * np.sqrt(0.05 / 400)


def test_a_difference_is_found():
    rng = np.random.default_rng(2)
    p = permutation_test(rng.standard_normal((50, 5)) + 9, rng.standard_normal((50, 5)))
    assert (p == 2 / 252).all()


def test_holms_rule_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": True, "c": False, "b": False}
    assert holm({"a": 0.01, "b": 0.04, "c": 0.02}) == {"a": True, "c": True, "b": True}


def test_every_shape_of_the_grid_predicts_and_only_that_which_is_said_changes():
    c = GradientDescent(dim_x=2, dim_y=1, num_examples=3)
    inputs = c.sample(jax.random.key(0), 2)
    base = modified(c.in_trained_shape().config, {}).config
    assert base == c.in_trained_shape().config
    seen = {base}
    for name, changes in GRID.items():
        model = modified(base, changes)
        assert (model.config == base) == (name == "none")
        assert name == "none" or model.config not in seen
        seen.add(model.config)
        random = randomise(model, jax.random.key(1), 0.2)
        shape = jax.eval_shape(c.apply, random, *inputs).shape
        assert shape == (2, 1, 1)


def test_too_many_values_are_refused():
    with pytest.raises(ValueError, match="there are 11 and 10 values"):
        permutation_test(np.zeros(11), np.zeros(10))


def test_the_grid_is_a_sweep_of_constructions_with_the_claims_of_the_step():
    name = "constructions.gradient_descent.modifications:Modified"
    blocks = layout(Sweep(name, {"modification": [*GRID]}, seeds=range(5)))
    assert [p.values["modification"] for block in blocks for p in block] == [*GRID]
    plain, other = Modified(), Modified(modification="two layers, tied")
    assert plain.claims == other.claims == GradientDescent(3, 1, 6).claims
    assert other.counterpart().untrained(jax.random.key(0)).config.depth == 2
    assert plain.counterpart().untrained(jax.random.key(0)).config == plain.trained_shape


def test_other_modifications_are_refused():
    with pytest.raises(ValueError, match="modification is 'more', must be one of"):
        Modified(modification="more")
    with pytest.raises(ValueError, match="steps is 2, must be 1"):
        Modified(steps=2, step_size=1.0).counterpart()
