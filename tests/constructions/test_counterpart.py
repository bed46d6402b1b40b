"""The trained counterpart of gradient descent, against what theory says it must become."""

import jax
import numpy as np
import pytest

from constructions.core.canonical import canonical_distance
from constructions.gradient_descent.construction import GradientDescent
from synthetic.fitting.train import minimize


@pytest.mark.parametrize("sizes", [{"dim_x": 3, "num_examples": 5}, {"dim_x": 2, "dim_y": 2}])
def test_without_noise_training_finds_the_construction(x64, sizes):
    """L-BFGS on the exact population loss ends at the construction, to 1e-6 and better."""
    construction = GradientDescent(**sizes)
    counterpart = construction.counterpart()
    assert counterpart.exact is not None
    found = minimize(counterpart.init(jax.random.key(0)), counterpart.exact)
    assert found.loss < 1e-15
    reference = construction.compile().model
    assert canonical_distance(found.model, reference, construction.gauge()) < 1e-7
    # a step size off by a thousandth is a thousandth away
    near = GradientDescent(**sizes, step_size=1.001 * construction.step_size).compile().model
    distance = canonical_distance(near, reference, construction.gauge())
    assert distance == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.slow
def test_stochastic_training_reaches_the_optimum():
    """Within 0.1 % of the closed-form optimum and 3 % of the weights, at N = d = 10."""
    construction = GradientDescent()
    result = construction.fit(seeds=[0, 1])
    assert max(result.history[-1]["exact_excess"]) < 1e-3
    assert max(result.history[-1]["canonical_distance"]) < 0.03
    first = result.history[0]
    assert min(first["exact_excess"]) > 0.01
    assert min(first["canonical_distance"]) > 0.1


def test_exact_excess_is_what_sampling_finds(x64):
    """Mean loss of a random model less that of the optimal construction, on the same examples."""
    construction = GradientDescent(dim_x=3, num_examples=4)
    counterpart = construction.counterpart()
    model, best = counterpart.init(jax.random.key(1)), construction.compile().model
    batch = construction.task.sample(jax.random.key(2), 2**17)
    apply = jax.jit(construction.apply)
    ours, theirs = (
        np.asarray(construction.task.loss(apply(m, *batch.inputs), batch)) for m in (model, best)
    )
    expected = float(construction.population_excess(model))
    error = (ours - theirs).std() / np.sqrt(len(ours))
    assert abs((ours - theirs).mean() - expected) < 4 * error
    assert expected > 20 * error


def test_no_closed_form_no_optimum():
    one = GradientDescent(1, 1, 2, 1, 1.0)
    several = GradientDescent(steps=2, step_size=1.0)
    elsewhere = GradientDescent(dim_x=2, init_weight=[[1.0, 0.0]])
    for construction, names in (
        (one, {"exact_excess", "canonical_distance"}),
        (several, {"canonical_distance"}),
        (elsewhere, {"canonical_distance"}),
    ):
        counterpart = construction.counterpart()
        assert counterpart.metrics is not None
        assert set(counterpart.metrics(counterpart.init(jax.random.key(0)))) == names
        assert (counterpart.exact is None) == (counterpart.optimum is None) == (len(names) == 1)
