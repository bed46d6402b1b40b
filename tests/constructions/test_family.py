"""The protocol: a certificate that can fail, and a second family that shows nothing is special."""

import pickle
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core.compile import compile_program
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots, constant
from constructions.family import Construction, Place, Tokens, verify
from constructions.gradient_descent.construction import GradientDescent
from synthetic.guards import number
from synthetic.tasks.task import Batch

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Averages:
    """Predict the mean of the last tokens, from a stream of numbers."""

    length: int

    def sample(self, key, batch):
        x = jax.random.normal(key, (batch, self.length, 2))
        return Batch((x,), x)

    def loss(self, prediction, batch):
        return jnp.square(prediction - batch.target).mean((1, 2))


@dataclass(frozen=True)
class WeightedAverage(Construction):
    """A moving average: out_i = sum_d weights[d] x_{i-d}, one head an offset, twice."""

    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    length: int = 7

    @property
    def program(self):
        slots = Slots()
        x, once, twice = (
            slots.add("x", 2),
            slots.add("once", 2, born=1),
            slots.add("twice", 2, born=2),
        )
        one = constant(1.0)

        def average(source, target):
            return Layer([
                Head(one, one, source, {target: w}, window=(-d, -d))
                for d, w in enumerate(self.weights)
            ])  # fmt: skip

        return Program(slots, [average(x, once), average(once, twice)])

    @property
    def task(self):
        return Averages(self.length)

    def trace(self, x):
        def average(x):
            padded = jnp.pad(x, ((0, 0), (len(self.weights) - 1, 0), (0, 0)))
            n = len(self.weights) - 1
            return sum(
                w * padded[:, n - d : n - d + x.shape[1]] for d, w in enumerate(self.weights)
            )

        once = average(x)
        return {"once": once, "prediction": average(once)}

    def embed(self, x):
        return [Tokens("token", {"x": x}, read=True)]

    def places(self, depth, x):
        tokens = range(x.shape[1])
        return {"once": Place.of("once", tokens, 1), "prediction": Place.of("twice", tokens, depth)}

    def apply(self, model, x):
        stream, groups, read = self.stream(model, x)
        return model(stream, groups, read=read)[..., 4:6]


FAMILIES = [
    GradientDescent(dim_x=3, dim_y=2, num_examples=6, steps=3, step_size=0.5),
    WeightedAverage(),
]


@pytest.fixture(params=FAMILIES, ids=lambda c: type(c).__name__)
def construction(request):
    return request.param


def changed(construction, edit):
    """dtype -> the compiled model with one of its arrays edited."""

    def make(dtype):
        model = construction.compile(dtype).model
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        for path, leaf in nnx.to_flat_state(params):
            leaf[...] = edit(str(path[-1]), leaf[...])
        return nnx.merge(graph, params, rest)

    return make


def test_verify_passes(construction):
    certificate = construction.compile().certificate
    assert certificate.passed
    assert [e.dtype for e in certificate.errors] == ["float64", "float32"]
    for error in certificate.errors:
        assert 0 <= error.max_rel_error <= error.tolerance
    data = certificate.to_json()
    assert data["passed"] and data["dtypes"]["float64"]["passed"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda name, a: a * (1 + 1e-4) if name == "output" else a,
        lambda name, a: a.at[0, 0].set(0) if name == "output" else a,
        lambda name, a: a.at[0, 0].set(jnp.nan) if name == "output" else a,
        lambda name, a: a.at[0, 0].set(jnp.inf) if name == "value" else a,
    ],
    ids=["step size", "deleted head", "NaN", "inf"],
)
def test_verify_fails_on_wrong_models(construction, edit, dtype):
    certificate = verify(construction, batch=8, dtypes=(dtype,), model=changed(construction, edit))
    assert not certificate.passed
    assert not certificate.to_json()["passed"]
    inputs = construction.sample(jax.random.key(0), 2)
    assert certificate.errors[0].worst in jax.eval_shape(construction.trace, *inputs)


def test_verify_fails_where_the_trace_belongs_to_another_algorithm():
    one = GradientDescent(dim_x=3, num_examples=6, steps=2, step_size=0.5)
    other = replace(one, step_size=0.50005)
    model = lambda dtype: other.compile(dtype).model  # noqa: E731
    assert not verify(one, batch=8, model=model).passed
    assert verify(other, batch=8, model=model).passed


def test_read_finds_the_named_values(construction, x64):
    inputs = construction.sample(jax.random.key(1), 4)
    model = compile_program(construction.program)
    wanted = jax.jit(construction.trace)(*inputs)
    found = jax.jit(construction.read)(model, *inputs)
    assert set(found) == set(construction.places(model.config.depth, *inputs)) <= set(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        jax.jit(construction.apply)(model, *inputs), wanted["prediction"], rtol=1e-12, atol=1e-13
    )


def test_place_gathers_entry_by_entry():
    rng = np.random.default_rng(0)
    residual = rng.normal(size=(3, 2, 4, 5))
    layer, token, which = (rng.integers(0, n, (2, 3)) for n in (3, 4, 2))
    slots = Slots()
    names = [slots.add(name, 2).name for name in ("a", "b")]
    slots.add("c", 1)
    place = Place(np.array(names, object)[which], token, layer, scale=-2.0)
    found = place.gather(jnp.asarray(residual), slots)
    assert found.shape == (2, 2, 3, 2)
    for b, i, j, k in np.ndindex(2, 2, 3, 2):
        wanted = -2 * residual[layer[i, j], b, token[i, j], 2 * which[i, j] + k]
        np.testing.assert_allclose(found[b, i, j, k], wanted, rtol=1e-6)


@dataclass(frozen=True)
class Counting(WeightedAverage):
    """Says how often its parts are made; its counterpart goes by way of the base class's."""

    made = []  # not a setting

    @property
    def program(self):
        self.made.append("program")
        return super().program

    def counterpart(self):
        self.made.append("counterpart")
        return replace(super().counterpart(), optimum=float(jnp.float32(1) + 1))


def test_program_reference_and_counterpart_are_made_once():
    c = Counting(length=5)
    Counting.made.clear()

    @jax.jit
    def traced(x):  # what is made under a trace must not hold its tracers
        counterpart = c.counterpart()
        return c.apply(c.reference, x) + counterpart.optimum, c.apply(counterpart.init(KEY), x)

    x = jnp.ones((2, 5, 2))
    first, _ = traced(x)
    assert Counting.made == ["counterpart", "program"]
    assert c.program is c.program and c.counterpart() is c.counterpart()
    assert c.reference is c.reference is not c.compile().model
    np.testing.assert_allclose(c.apply(c.reference, x) + 2, first, rtol=1e-6)
    assert c.counterpart().optimum == 2
    assert Counting.made == ["counterpart", "program"]
    # a type of weights each, and nothing of it in what is compared, copied or saved
    weights = jax.tree.leaves(nnx.state(c.reference))[0]
    with jax.enable_x64(weights.dtype != jnp.float64):
        other = jax.tree.leaves(nnx.state(c.reference))[0]
        assert {str(weights.dtype), str(other.dtype)} == {"float32", "float64"}
    assert jax.tree.leaves(nnx.state(c.reference))[0] is weights
    fresh = pickle.loads(pickle.dumps(c))
    assert fresh == c == replace(c) and hash(fresh) == hash(c) and vars(fresh) == {
        "weights": c.weights, "length": 5
    }  # fmt: skip


def test_near_misses_and_shapes_come_with_the_base_class():
    c = FAMILIES[0]
    other = replace(c, step_size=0.25)
    by_program, by_construction = c.near_miss(other.program), c.near_miss(other)
    wide = c.near_miss(other, c.trained_shape)
    inputs = c.sample(KEY, 3)
    expected = other.predict(other.reference, *inputs)
    for miss in (by_program, by_construction, wide):
        assert miss.construction is c
        np.testing.assert_allclose(c.predict(miss.model, *inputs), expected, rtol=1e-5, atol=1e-6)
    assert by_program.model.config == by_construction.model.config == c.reference.config
    assert wide.model.config == c.in_trained_shape().config == c.counterpart().init(KEY).config
    width = c.program.slots.width
    for layer in c.trained_shape.layers():
        assert all(h.key_dim == h.value_dim == width for h in layer.heads)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {"whole": True, "least": 1}, "n is 0, must be an integer of at least 1"),
        (True, {"whole": True, "least": 1}, "n is True, must be an integer of at least 1"),
        (2.0, {"whole": True}, r"n is 2\.0, must be an integer$"),
        ("3", {}, "n is '3', must be a finite number$"),
        (None, {"above": 0}, "n is None, must be a finite number above 0"),
        (False, {}, "n is False, must be a finite number$"),
        (np.float32("nan"), {}, "must be a finite number$"),
        (10**400, {}, "0, must be a finite number$"),
        (1j, {}, "n is 1j, must be a finite number$"),
        (-np.inf, {"above": 0}, "n is -inf, must be a finite number above 0"),
        (0.0, {"above": 0}, r"n is 0\.0, must be above 0$"),
        (0.5, {"least": 1}, r"n is 0\.5, must be a finite number of at least 1"),
        (1.5, {"least": 0, "most": 1}, r"n is 1\.5, must be a finite number from 0 to 1$"),
        (2, {"above": 0, "most": 1}, "n is 2, must be above 0 and at most 1$"),
        (1.0, {"above": 0, "below": 1}, r"n is 1\.0, must be above 0 and below 1$"),
        (np.nan, {"above": 0, "below": 1}, "must be a finite number above 0 and below 1$"),
        (
            7,
            {"whole": True, "least": 0, "below": 7},
            "must be an integer of at least 0 and below 7",
        ),
    ],
)
def test_one_guard_for_numbers(value, limits, message):
    with pytest.raises(ValueError, match=message):
        number("n", value, **limits)


def test_what_the_guard_lets_through():
    assert number("n", np.int32(3), whole=True, least=3, most=3) == 3
    assert type(number("n", 3)) is float and number("n", np.float32(0.5), above=0) == 0.5
