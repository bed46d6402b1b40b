import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.core.transformer import Edit, randomise
from constructions.family import Construction, Stream
from constructions.gradient_descent.construction import GradientDescent
from probes import interchange as module
from probes.interchange import exchange, interchange, interchange_agreement, sweep
from probes.patching import attribution, path_patch
from probes.subject import Edited, read_sites, where

pytestmark = pytest.mark.usefixtures("x64")


def gd(**settings):
    settings = {"dim_x": 3, "dim_y": 2, "num_examples": 6, "steps": 4, "step_size": 1.3} | settings
    return GradientDescent(**settings)


def pair(c, batch=5, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return c.sample(keys[0], batch), c.sample(keys[1], batch)


def predict(c, model, inputs):
    return jax.jit(c.apply)(model, *inputs)


def descend(x, y, steps, rate, weight):
    """Plain gradient descent on one context: numpy, one example, one step at a time."""
    for _ in range(steps):
        error = weight @ x.T - y.T
        weight = weight - rate / len(x) * error @ x
    return weight


def test_context_patched_after_layer_l_continues_from_the_sources_residuals():
    """Behind the patch the model descends on the source's residual problem, from W_l of base."""
    c = gd(init_weight=np.arange(6.0).reshape(2, 3) / 5)
    model, (base, source) = c.compile().model, pair(gd())
    initial = c.initial
    for layer in range(c.steps + 1):
        mask = where(model.config, 7, "residual", layer=layer, token=slice(0, 6))
        found = interchange(c, model, base, source, where=mask)
        for b in range(5):
            xb, yb, qb = (np.asarray(a[b]) for a in base)
            xs, ys, _ = (np.asarray(a[b]) for a in source)
            base_weight = descend(xb, yb, layer, c.step_size, initial)
            source_weight = descend(xs, ys, layer, c.step_size, initial)
            end = descend(xs, ys, c.steps, c.step_size, initial)
            expected = qb @ (base_weight + end - source_weight).T
            np.testing.assert_allclose(found[b], expected, atol=1e-12)


def test_everything_and_nothing_patched():
    c = gd()
    model, (base, source) = randomise(c.compile().model, jax.random.key(3), 0.4), pair(gd())
    everything = where(model.config, 7, "residual", layer=0)
    nothing = where(model.config, 7, "residual", layer=[])
    for mask, inputs in ((everything, source), (nothing, base)):
        found = interchange(c, model, base, source, where=mask)
        np.testing.assert_allclose(found, predict(c, model, inputs), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    "site, over", [("residual", "token"), ("head_output", ("head", "token")), ("attention", "key")]
)
def test_sweep_is_one_patch_at_a_time(site, over):
    c = gd(steps=2)
    model, (base, source) = randomise(c.compile().model, jax.random.key(3), 0.5), pair(c)
    found = sweep(c, model, base, source, site=site, over=over, chunk=4)
    start, end = predict(c, model, base), predict(c, model, source)
    way = np.asarray(end - start).ravel()
    assert found.axes[0] == "layer"
    for index in np.ndindex(found.effect.shape):
        mask = where(model.config, 7, site, **dict(zip(found.axes, index, strict=True)))
        patched = interchange(c, model, base, source, site=site, where=mask)
        movement = np.asarray(patched - start).ravel()
        effect = movement @ way / (way @ way)
        np.testing.assert_allclose(found.effect[index], effect, atol=1e-12)
        rest = np.linalg.norm(movement - effect * way) / np.linalg.norm(way)
        np.testing.assert_allclose(found.off_axis[index], rest, atol=1e-12)


def test_the_output_token_carries_everything_in_the_end():
    c = gd()
    found = sweep(c, c.compile().model, *pair(c))
    assert found.effect.shape == (5, 7)
    np.testing.assert_allclose(found.effect[-1], [0] * 6 + [1], atol=1e-12)
    np.testing.assert_allclose(found.off_axis[-1], 0, atol=1e-12)


def test_a_sweep_of_192_runs_is_traced_and_compiled_once(monkeypatch):
    c = gd(steps=11, num_examples=15)
    traces = []

    def counted(self, model, *inputs):
        traces.append(1)
        return original(self, model, *inputs)

    original = GradientDescent.apply
    monkeypatch.setattr(GradientDescent, "apply", counted)
    before = module._sweep._cache_size()
    compiled = c.compile().model
    for seed in range(3):
        model = randomise(compiled, jax.random.key(seed), 0.1)
        found = sweep(c, model, *pair(c, seed=seed))
        assert found.effect.size == 192
        assert len(traces) == 3  # base, source and the patched run, once each
    assert module._sweep._cache_size() == before + 1


def test_a_dead_head_has_no_effect():
    c = TwoHeads()
    model, (base, source) = randomise(c.compile().model, jax.random.key(0), 0.5), pair(c)
    output = model.segments[0].layers[0].heads[0].output
    output[...] = output[...].at[:, 1].set(0)
    found = sweep(c, model, base, source, site="head_output", over="head")
    # up to rounding: a patched run sums its heads in another order than a plain one
    np.testing.assert_allclose(found.effect[:, 1], 0, atol=1e-14)
    assert np.all(np.abs(found.effect[:, 0]) > 1e-3)
    paths = path_patch(c, model, base, source)
    np.testing.assert_allclose(paths[:, 1], 0, atol=1e-14)


def test_exchanging_a_variable_of_the_algorithm():
    """The query's estimate alone carries what came before; inputs and residuals what comes."""
    c = gd()
    model, (base, source) = c.compile().model, pair(c)
    source = (base[0], source[1], base[2])  # same x, so that only the y columns differ
    effects = exchange(c, model, base, source, "residual")
    estimate = exchange(c, model, base, source, "estimate")
    assert list(effects) == list(range(5))
    np.testing.assert_allclose(effects[0], 1, atol=1e-12)
    for layer in effects:
        np.testing.assert_allclose(effects[layer] + estimate[layer], 1, atol=1e-12)
    inputs = exchange(c, model, base, source, "inputs")
    np.testing.assert_allclose(list(inputs.values()), 0, atol=1e-14)
    with pytest.raises(ValueError, match="'weight' has no place"):
        exchange(c, model, base, source, "weight")


def test_agreement_tells_models_apart():
    c = gd()
    model, inputs = c.compile().model, pair(c, batch=32)
    same = interchange_agreement(c, model, model, *inputs)
    assert same.correlation == pytest.approx(1)
    assert same.relative_error == 0
    assert same.prediction_error.max() == 0
    # ten per cent off in the step size: hardly seen by the correlation, by the errors it is
    off = gd(step_size=1.17).compile().model
    near = interchange_agreement(c, off, model, *inputs)
    assert near.correlation > 0.9
    assert near.relative_error > 0.002
    assert near.prediction_error.max() > 0.02
    other = interchange_agreement(c, randomise(model, jax.random.key(1), 0.02), model, *inputs)
    assert other.relative_error > 0.3
    np.testing.assert_allclose(near.model.effect, sweep(c, off, *inputs).effect, atol=1e-12)
    with pytest.raises(ValueError, match="in reference"):
        interchange_agreement(c, gd(steps=3).compile().model, model, *inputs)


def test_attribution_is_exact_where_linear_and_first_order_elsewhere():
    c = gd()
    model, (base, far) = c.compile().model, pair(c)
    exact, estimate = (f(c, model, base, far) for f in (sweep, attribution))
    np.testing.assert_allclose(estimate.effect[-1], exact.effect[-1], atol=1e-12)
    assert np.abs(estimate.effect - exact.effect).max() > 1e-2
    errors = []
    for step in (1e-3, 1e-4):
        near = tuple(b + step * (s - b) for b, s in zip(base, far, strict=True))
        exact, estimate = (f(c, model, base, near) for f in (sweep, attribution))
        errors.append(np.abs(estimate.effect - exact.effect).max())
    assert errors[1] < 0.11 * errors[0] and errors[1] < 1e-3


def test_attribution_keeps_the_order_of_axes():
    c = TwoHeads()
    model, (base, far) = randomise(c.compile().model, jax.random.key(0), 0.5), pair(c)
    near = tuple(b + 1e-6 * (s - b) for b, s in zip(base, far, strict=True))
    for over in (("token", "head"), ("head", "token")):
        exact, estimate = (
            f(c, model, base, near, site="head_output", over=over) for f in (sweep, attribution)
        )
        assert exact.effect.shape == estimate.effect.shape
        np.testing.assert_allclose(estimate.effect, exact.effect, atol=1e-4)


def test_paths_by_running_the_layers_one_by_one():
    """Brute force: layers as separate models, the path followed by hand."""
    c = TwoHeads()
    model, (base, source) = randomise(c.compile().model, jax.random.key(5), 0.5), pair(c)
    found = path_patch(c, model, base, source, chunk=5)
    start, end = predict(c, model, base), predict(c, model, source)
    way = end - start
    clean = read_sites(c, model, base, ("residual", "head_output"))
    dirty = read_sites(c, model, source, ("head_output",))
    heads = clean["head_output"]
    depth = len(heads)
    assert found.shape == (depth, 2, depth + 1)

    arrays = model.segments[0].layers[0].heads[0]
    w = {
        name: np.asarray(getattr(arrays, name)[...]) for name in ("query", "key", "value", "output")
    }

    def layer(number, stream):
        """What the heads of one layer add to a stream; the formula, in numpy."""
        q, k, v = (
            np.einsum("bth,nkh->bntk", stream, w[s][number]) for s in ("query", "key", "value")
        )
        a = np.exp(np.einsum("bnqk,bntk->bnqt", q, k))
        a /= a.sum(-1, keepdims=True)
        return np.einsum("bnqt,bntv,nhv->bqh", a, v, w["output"][number])

    for sender, head, receiver in np.ndindex(found.shape):
        change = (dirty["head_output"] - heads)[sender, :, :, head]
        if receiver <= sender:
            expected = 0.0
        elif receiver == depth:
            expected = jnp.sum(c.readout(change) * way) / jnp.sum(way**2)
        else:
            stream = clean["residual"][receiver]
            stream = stream + layer(receiver, stream + change)
            for number in range(receiver + 1, depth):
                stream = stream + layer(number, stream)
            expected = jnp.sum((c.readout(stream) - start) * way) / jnp.sum(way**2)
        np.testing.assert_allclose(found[sender, head, receiver], expected, atol=1e-12)


def test_edited_models_are_models():
    c = gd()
    model, (base, _) = c.compile().model, pair(c)
    mask = where(model.config, 7, "head_output", layer=[2, 3])
    edited = Edited(model, {"head_output": Edit(jnp.asarray(mask), jnp.zeros((1,) * 5))})
    expected = c.trace(*base)["estimate"][:, 2]
    np.testing.assert_allclose(predict(c, edited, base), expected, atol=1e-12)
    found = jax.jit(c.read)(edited, *base)["estimate"]
    np.testing.assert_allclose(found[:, 4], expected, atol=1e-12)
    np.testing.assert_allclose(found[:, :3], c.trace(*base)["estimate"][:, :3], atol=1e-12)
    with pytest.raises(ValueError, match="'head_output' is edited already"):
        Edited(edited, {"head_output": edited.edits["head_output"]})


def test_bad_arguments():
    c = gd()
    model, (base, source) = c.compile().model, pair(c)
    with pytest.raises(ValueError, match="must be equal"):
        sweep(c, model, base, pair(c, batch=4)[1])
    with pytest.raises(ValueError, match="unknown site 'scores'"):
        sweep(c, model, base, source, site="scores")
    with pytest.raises(ValueError, match="over is 'head'"):
        sweep(c, model, base, source, over="head")
    with pytest.raises(ValueError, match="same predictions"):
        sweep(c, model, base, base)


class TwoHeads(Construction):
    """Three layers of two equal softmax heads over a stream of four columns."""

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 1

    @property
    def program(self):
        slots = Slots()
        x = slots.add("x", 4, accumulates=True)
        head = Head(query=x, key=x, value=x, write={x: 1.0}, mixer="softmax")
        return Program(slots, [Layer([head, head])] * 3)

    @property
    def task(self):
        raise NotImplementedError

    def sample(self, key, batch):
        return (jax.random.normal(key, (batch, 3, 4)),)

    def trace(self, *inputs):
        return {}

    def embed(self, *inputs):
        raise NotImplementedError

    def stream(self, model, *inputs):
        return Stream(inputs[0], jnp.zeros(3, int), slice(2, 3))

    def places(self, depth, *inputs):
        return {}

    def readout(self, stream):
        return stream[:, 2, :2]

    def apply(self, model, *inputs):
        stream, groups, read = self.stream(model, *inputs)
        return model(stream, groups, read=read)[:, 0, :2]


def test_functions_have_no_sites():
    c = gd()
    base, source = pair(c)
    model, function = c.compile().model, lambda x, y, query: query[..., :2]
    for call in (
        lambda: interchange(c, function, base, source, where=True),
        lambda: sweep(c, function, base, source),
        lambda: interchange_agreement(c, function, model, base, source),
        lambda: exchange(c, function, base, source, "residual"),
        lambda: attribution(c, function, base, source),
        lambda: path_patch(c, function, base, source),
    ):
        with pytest.raises(ValueError, match="model is a function, must be a Transformer"):
            call()
