"""DIAG linear transformers against a token-by-token simulation in numpy, and their readings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import Evidence
from constructions.core.symmetry import transform
from constructions.family import verify
from constructions.gradient_descent.construction import GradientDescent
from constructions.noisy_regression import paper as claims
from constructions.noisy_regression.construction import NoisyRegression
from synthetic.theory.ridge import ridge


def simulate(layers, x, y, q):
    """Tokens of one context after every layer, straight from the update of one token."""
    inputs, labels = np.concatenate([x, q]), np.concatenate([y, np.zeros(len(q))])
    history, n = [(inputs, labels)], len(x)
    for w_xx, w_xy, w_yx, w_yy in layers:
        new_inputs, new_labels = inputs.copy(), labels.copy()
        for j in range(len(inputs)):
            for i in range(n):
                score = inputs[i] @ inputs[j]
                new_inputs[j] += w_xx * score * inputs[i] + w_xy * labels[i] * labels[j] * inputs[i]
                new_labels[j] += w_yx * score * labels[i] + w_yy * labels[i] ** 2 * labels[j]
        inputs, labels = new_inputs, new_labels
        history.append((inputs, labels))
    return history


@pytest.mark.parametrize("seed", range(2))
def test_every_token_of_every_layer(seed, x64):
    rng = np.random.default_rng(seed)
    dim, context, queries, depth = (int(rng.integers(1, k)) for k in (7, 10, 4, 5))
    layers = rng.normal(size=(depth, 4)) / (10 * context)
    c = NoisyRegression(dim_x=dim, num_examples=context, layers=layers, max_noise=1.0)
    x, y, q = (
        rng.normal(size=(3, n, k)) for n, k in ((context, dim), (context, 1), (queries, dim))
    )
    model = c.compile().model
    read = jax.jit(c.read)(model, x, y, q)
    trace = jax.jit(c.trace)(x, y, q)
    prediction = jax.jit(c.predict)(model, x, y, q)
    for b in range(3):
        history = simulate(layers, x[b], y[b, :, 0], q[b])
        inputs, labels = (np.stack(part) for part in zip(*history, strict=True))
        for name, wanted in (("inputs", inputs), ("outputs", labels[..., None])):
            bar = 1e-12 * np.sqrt(np.mean(wanted**2))
            assert np.abs(read[name][b] - wanted).max() < bar, name
            assert np.abs(trace[name][b] - wanted).max() < bar, name
        assert np.allclose(prediction[b, :, 0], -labels[-1, context:], rtol=1e-12, atol=1e-13)
        # what the readings say of the labels' power and of the way down
        power = (labels[:-1, :context] ** 2).sum(1)
        assert np.allclose(trace["rescaling"][b], 1 + layers[:, 3] * power)
        best, *_ = np.linalg.lstsq(x[b], y[b, :, 0])
        down = (
            x[b].T
            @ x[b]
            @ (np.asarray(trace["label_scale"][b])[:, None] * best - trace["weight"][b]).T
        )
        assert np.allclose(trace["gradient"][b], down.T, atol=1e-11)
        residual = y[b, :, 0] - x[b] @ best
        assert np.allclose(trace["residual_power"][b], residual @ residual, atol=1e-10)


def test_gd_plus_plus_is_the_special_case(x64):
    sizes = {"dim_x": 4, "num_examples": 7}
    gd = GradientDescent(**sizes, steps=3, step_size=[0.7, 0.5, 0.4], curvature=[0.02, 0.01, 0.03])
    layers = [
        (-gamma, 0.0, -eta / 7, 0.0)
        for eta, gamma in zip(gd.step_sizes, gd.curvatures, strict=True)
    ]
    c = NoisyRegression(**sizes, layers=layers, max_noise=1.0)
    inputs = c.sample(jax.random.key(0), 8)
    ours, theirs = (f.predict(f.compile().model, *inputs) for f in (c, gd))
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    assert [r.heads for r in c.readings] == [1, 1, 1]
    assert [r.step_size for r in c.readings] == pytest.approx(list(gd.step_sizes / 7))
    assert [r.curvature for r in c.readings] == pytest.approx(list(gd.curvatures))
    assert c.compile().model.config.max_heads == 1


def test_momentum_makes_the_next_step_grow_with_the_residual(x64):
    """-w_yx (1 + w_xy rho): the second step, from a first layer that has momentum alone."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 9, 3)), rng.normal(size=3)
    noise = rng.normal(size=9)
    noise -= x[0] @ np.linalg.lstsq(x[0], noise)[0]
    y = (x[0] @ w + noise)[None, :, None]
    c = NoisyRegression(dim_x=3, num_examples=9, layers=[(0, 1e-7, 0, 0), (0, 0, -1e-2, 0)])
    q = rng.normal(size=(1, 2, 3))
    (found,) = np.asarray(c.predict(c.compile().model, x, y, q))[..., 0]
    one = NoisyRegression(dim_x=3, num_examples=9, layers=[(0, 0, -1e-2, 0)])
    (plain,) = np.asarray(one.predict(one.compile().model, x, y, q))[..., 0]
    # to first order in w_xy: u = w_xy alpha, alpha^1 = alpha + w_xy (w* . alpha + rho) alpha
    gram, alpha = x[0].T @ x[0], x[0].T @ y[0, :, 0]
    best = np.linalg.solve(gram, alpha)
    grows = (noise @ noise) * alpha + (best @ alpha) * alpha
    assert np.allclose((found - plain) / 1e-7, q[0] @ grows * 1e-2, rtol=1e-4)


def test_heads_are_the_rank_of_the_layer():
    one = np.outer([0.3, -0.2], [0.5, 0.1])
    layers = [(one[0, 0], one[0, 1], one[1, 0], one[1, 1]), (0.1, 0.2, 0.3, 0.4), (0, 0, 0, 0)]
    c = NoisyRegression(layers=layers, max_noise=1.0)
    assert [r.heads for r in c.readings] == [1, 2, 0]


def test_certificate_at_large_weights():
    layers = np.random.default_rng(0).normal(size=(3, 4)) / 20
    certificate = verify(NoisyRegression(dim_x=3, num_examples=5, layers=layers, max_noise=2.0))
    assert certificate.passed, certificate.to_json()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": []}, "layers is"),
        ({"layers": [(1, 2, 3)]}, "layers is"),
        ({"layers": "no"}, "layers is 'no'"),
        ({"layers": [(1, 2, 3, float("nan"))]}, "must be finite"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"max_noise": -1.0}, "max_noise"),
        ({"max_noise": 1.0, "noise_levels": (1.0,)}, "max_noise or noise_levels"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        NoisyRegression(**({"layers": [(0, 0, -0.1, 0)]} | bad))


def test_labels_have_one_column():
    c = NoisyRegression(dim_x=2, layers=[(0, 0, -0.1, 0)])
    with pytest.raises(ValueError, match="y has shape"):
        c.predict(c.compile().model, np.ones((1, 3, 2)), np.ones((1, 3, 2)), np.ones((1, 1, 2)))
    assert jnp.shape(c.predict(c.compile().model, *c.sample(jax.random.key(0), 2))) == (2, 1, 1)


def test_statistics_of_the_claims():
    levels = (0.5, 2.0)
    c = NoisyRegression(dim_x=3, num_examples=8, layers=[(0, 0, -0.1, 0)], noise_levels=levels)
    examples, model = c.task.sample(jax.random.key(0), 2**14), c.compile().model
    noise = examples.target.noise

    def evidence(prediction):
        e = Evidence(c, model, model, examples, jax.random.key(1))
        e.__dict__["prediction"] = prediction
        return e

    oracle = ridge(*examples.inputs, noise**2)
    linear = ridge(*examples.inputs, 3.0)
    # the definition of the adjusted loss, whose standard error bounds what may differ
    difference = np.asarray(c.task.loss(linear, examples) - c.task.loss(oracle, examples))
    error = difference.std() / np.sqrt(len(difference))
    assert abs(claims.adjusted_loss(evidence(linear)) - difference.mean()) < 4 * error
    constant = ridge(*examples.inputs, c.task.mean_square_noise)
    np.testing.assert_allclose(claims.against_constant_ridge(evidence(constant)), 1, rtol=1e-5)
    assert claims.adjusted_loss(evidence(oracle)) == pytest.approx(0, abs=1e-10)
    # what is linear in the labels shrinks alike at all levels, the oracle does not
    assert abs(claims.shrinkage(evidence(linear))) < 0.01
    assert claims.shrinkage(evidence(oracle)) > 0.2


def test_the_four_numbers_are_read_off_a_model(x64):
    """Whatever its basis, by the numbers that it was built of; all but the last layer's of x."""
    sizes = {"dim_x": 3, "num_examples": 7, "max_noise": 1.0}
    wanted = np.random.default_rng(0).uniform(-1, 1, (3, 4)) * 0.05
    built = NoisyRegression(**sizes, layers=tuple(map(tuple, wanted.tolist())))
    claimed = NoisyRegression(**sizes, layers=tuple(map(tuple, (2 * wanted).tolist())))
    model = transform(built.reference, jax.random.key(1), built.gauge())
    examples = built.task.sample(jax.random.key(2), 2)
    e = Evidence(claimed, model, claimed.reference, examples, jax.random.key(3))
    found = claims.numbers(e)
    np.testing.assert_allclose(found[:-1], wanted[:-1], atol=1e-12)
    np.testing.assert_allclose(found[-1, 2:], wanted[-1, 2:], atol=1e-12)
    for which in range(4):
        assert claims.number_error(e, which) == pytest.approx(0.5, abs=1e-9)
