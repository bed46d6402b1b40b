"""Certificates that cannot be had for nothing: mistakes in the protocol, batch sizes, promises."""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.certificate import LARGEST_TOLERANCE
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots, constant
from constructions.family import Construction, Place, Tokens, assert_exact, verify
from constructions.gradient_descent.construction import GradientDescent
from constructions.separate_tokens.construction import SeparateTokens
from probes.cli import main
from synthetic.tasks.task import Batch


@dataclass(frozen=True)
class Numbers:
    """Tokens of one number each."""

    length: int

    def sample(self, key, batch):
        x = jax.random.normal(key, (batch, self.length, 1))
        return Batch((x,), x)

    def loss(self, prediction, batch):
        return jnp.square(prediction - batch.target).mean((1, 2))


@dataclass(frozen=True)
class Multiple(Construction):
    """Every number times `factor`; the algorithm says that it is times `claimed`."""

    factor: float = 2.0
    claimed: float = 2.0
    length: int = 3

    @property
    def program(self):
        slots = Slots()
        x, out = slots.add("x", 1), slots.add("out", 1, born=1)
        one = constant(1.0)
        return Program(slots, [Layer([Head(one, one, x, {out: self.factor}, window=(0, 0))])])

    @property
    def task(self):
        return Numbers(self.length)

    def trace(self, x):
        return {"x": x, "prediction": self.claimed * x}

    def embed(self, x):
        return [Tokens("token", {"x": x})]

    def places(self, depth, x):
        tokens = range(x.shape[1])
        return {"x": Place.of("x", tokens, depth), "prediction": Place.of("out", tokens, depth)}


def check(construction, **options):
    return verify(construction, **{"dtypes": ("float64",), "batch": 4} | options)


def but(**methods):
    """A `Multiple` of which these methods or attributes are others."""
    return dataclass(frozen=True)(type("Other", (Multiple,), methods))()


def renamed(name, other):
    """A function like `Multiple.trace` or `Multiple.places` that gives another name."""

    def change(found):
        return {other if n == name else n: v for n, v in found.items()}

    return change


TRACE, PLACES = Multiple.trace, Multiple.places
MISTAKES = {
    "no prediction": (
        {"trace": lambda self, x: {"x": x}},
        r"Other\.trace has no 'prediction', only 'x'",
    ),
    "misspelt in the trace": (
        {"trace": lambda self, x: renamed("x", "y")(TRACE(self, x))},
        r"Other\.places: 'x' is no value of the trace, which has 'prediction', 'y'",
    ),
    "misspelt place": (
        {"places": lambda self, d, x: renamed("x", "y")(PLACES(self, d, x))},
        r"Other\.places: 'y' is no value of the trace, which has 'prediction', 'x'",
    ),
    "misspelt prediction": (
        {"places": lambda self, d, x: renamed("prediction", "predicton")(PLACES(self, d, x))},
        r"Other\.places has no 'prediction', only 'x', 'predicton'",
    ),
    "no place": (
        {"trace": lambda self, x: TRACE(self, x) | {"twice": 2 * x}},
        r"Other\.trace: 'twice' has no place in the stream, which holds 'prediction', 'x'",
    ),
    "unplaced, but placed": (
        {"unplaced": ("x",)},
        r"Other\.unplaced: 'x' is a value that the model holds",
    ),
    "unplaced prediction": ({"unplaced": ("prediction",)}, r"'prediction' is a value that"),
    "misspelt unplaced": ({"unplaced": ("z",)}, r"Other\.unplaced: 'z' is no value of the trace"),
    "unplaced as a string": ({"unplaced": "x"}, r"unplaced is 'x', must be a tuple"),
    "no names": ({"trace": lambda self, x: 2 * x}, r"Other\.trace gives a .*must give"),
    "empty": (
        {"trace": lambda self, x: TRACE(self, x) | {"x": x[:, :0]}},
        r"Other\.trace: 'x' is empty, of shape \(4, 0, 1\)",
    ),
    "NaN tolerance": ({"tolerance": lambda self, d: math.nan}, r"tolerance\('float64'\) is nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors_in_one_line(name):
    methods, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as raised:
        check(but(**methods))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (
            lambda x: ((x,), x),
            r"Task\.sample gives a tuple, must give synthetic\.tasks\.task\.Batch",
        ),
        (
            lambda x: Batch(x, x),
            r"Task\.sample: inputs is a .*, must be a tuple of arrays",
        ),
    ],
)
def test_what_a_task_gives(drawn, message):
    @dataclass(frozen=True)
    class Task(Numbers):
        def sample(self, key, batch):
            return drawn(jax.random.normal(key, (batch, self.length, 1)))

    construction = but(task=Task(3))
    for use in (check, lambda c: c.fit(steps=1, batch=2)):
        with pytest.raises(ValueError, match=message):
            use(construction)


def test_settings_must_be_hashable():
    @dataclass(frozen=True)
    class Weighted(Multiple):
        weights: list = field(default_factory=lambda: [0.5, 0.5])

    for use in (check, Construction.compile, lambda c: c.fit(steps=1)):
        with pytest.raises(ValueError, match=r"Weighted\.weights is \[0\.5, 0\.5\], of type list"):
            use(Weighted())
    with pytest.raises(ValueError, match="type ndarray"):
        check(replace(Multiple(), factor=np.ones(2)))


@pytest.mark.parametrize(
    "bad", [{"batch": 0}, {"batch": True}, {"dtypes": ()}, {"dtypes": ("float16",)}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is "):
        verify(Multiple(), **bad)


def test_what_was_compared_is_said():
    certificate = check(Multiple())
    assert certificate.passed and certificate.compared == ("prediction", "x")
    assert certificate.batches == (4, 1, 7)
    traced = {"trace": lambda self, x: TRACE(self, x) | {"twice": 2 * x}}
    less = check(but(**traced, unplaced=("twice",)))
    assert (less.compared, less.unplaced) == (("prediction", "x"), ("twice",))
    assert less.to_json()["unplaced"] == ["twice"]


def by_batch(x):
    """1 for each input, where it should be for each token."""
    return sum(jnp.ones_like(x) for _ in range(min(len(x), 2))) / 2


@pytest.mark.parametrize("side", ["trace", "embed"])
def test_what_depends_on_the_batch_size_is_found(side):
    """The number of inputs in the place of another size: right for 4 and 7, wrong for 1."""
    if side == "trace":
        wrong = {"trace": lambda self, x: {"x": x, "prediction": 2 * x * by_batch(x)}}
    else:
        embed = Multiple.embed
        wrong = {"embed": lambda self, x: embed(self, x * by_batch(x))}
    certificate = check(but(**wrong))
    (error,) = certificate.errors
    assert certificate.verdict == "failed" and error.batch == 1
    assert check(Multiple(), batch=1).batches == (1, 7)


def test_read_and_apply_are_both_compared():
    """Probes read the one, users the other."""
    wrong = but(
        places=lambda self, d, x: PLACES(self, d, x) | {"prediction": PLACES(self, d, x)["x"]},
        apply=lambda self, m, x: self.trace(x)["prediction"],
    )
    assert check(wrong).verdict == "failed"


def test_the_error_is_that_of_numpy():
    certificate = check(Multiple(factor=2.5))
    draws = [(0, 4, 4), (1, 4, 1), (7, 7, 7)]
    key = jax.random.key(0)
    with jax.enable_x64(True):
        x = [
            np.asarray(Numbers(3).sample(jax.random.fold_in(key, n) if n else key, b).inputs[0][:k])
            for n, b, k in draws
        ]
    every = np.concatenate(x)
    (error,) = certificate.errors
    assert error.max_abs_error == pytest.approx(0.5 * np.abs(every).max())
    assert error.max_rel_error == pytest.approx(
        0.5 * np.abs(every).max() / (2 * np.sqrt((every**2).mean()))
    )


@pytest.mark.parametrize("claimed", [1e200, 1e-200, -1e300])
def test_numbers_whose_squares_are_none_are_compared(claimed):
    """A root mean square that over- or underflows must not turn an error into none."""
    assert check(Multiple(factor=0.0, claimed=claimed)).verdict == "failed"
    assert check(Multiple(factor=claimed, claimed=claimed)).passed


def test_an_algorithm_that_is_not_finite_certifies_nothing():
    certificate = check(Multiple(factor=math.nan, claimed=math.nan))
    assert certificate.verdict == "not certified" and not certificate.passed
    # 4 + 1 + 7 inputs of 3 tokens
    assert "own 'prediction' is not finite at 36 of 36 entries" in certificate.errors[0].reason
    large = check(Multiple(claimed=1e39), dtypes=("float32",))
    assert "'prediction' reaches" in large.errors[0].reason and not large.passed


def test_a_tolerance_is_a_promise():
    def tolerance(self, dtype):
        return {"float64": 1e-13, "float32": 2.5}[dtype]

    loose = but(tolerance=tolerance, conditions=lambda self, d: "condition 7e7")
    certificate = check(loose, dtypes=("float64", "float32"))
    assert [e.verdict for e in certificate.errors] == ["passed", "not certified"]
    assert certificate.verdict == "passed"
    reason = certificate.errors[1].reason
    assert reason == "the error may reach 2.5, more than 0.01: condition 7e7"
    assert reason in str(certificate) and "not certified" in repr(certificate)
    entry = certificate.to_json()["dtypes"]["float32"]
    assert (entry["verdict"], entry["passed"], entry["reason"]) == ("not certified", False, reason)
    alone = check(loose, dtypes=("float32",))
    assert alone.verdict == "not certified" and not alone.passed
    # what is wrong in one dtype is wrong
    wrong = replace(loose, factor=3.0)
    assert check(wrong, dtypes=("float64", "float32")).verdict == "failed"


def test_the_command_says_what_is_not_certified(capsys, monkeypatch, tmp_path):
    where = "constructions.gradient_descent.construction.GradientDescent.tolerance"
    both = ["verify", "gradient-descent", "--set", "dim_x=2", "--set", "num_examples=3"]
    monkeypatch.setattr(where, lambda self, dtype: {"float64": 1e-13, "float32": 0.5}[dtype])
    assert main(both) == 0
    out = capsys.readouterr().out
    assert "not certified in float32: the error may reach 0.5, more than 0.01" in out
    assert main([*both, "--dtype", "float32"]) == 1


def test_leaks_are_no_tolerance():
    c = SeparateTokens(2, 1, 3, score_scale=5.0)
    assert c.tolerance("float64") > LARGEST_TOLERANCE
    reason = c.conditions("float64")
    assert "score_scale is 5, with a leak of" in reason
    enough = float(reason.split("at least ")[1].split(" is")[0])
    assert replace(c, score_scale=enough).tolerance("float64") <= LARGEST_TOLERANCE
    assert replace(c, score_scale=enough - 1).tolerance("float64") > LARGEST_TOLERANCE


def test_certificates_programs_and_fits_are_read_at_a_glance():
    certificate = check(Multiple())
    assert len(str(certificate).splitlines()) <= 8
    assert len(repr(certificate)) < 100
    program = GradientDescent(dim_x=2, num_examples=3).program
    for text in (str(program), repr(program), repr(program.layers[0].heads[0])):
        assert "object at" not in text
    assert "linear head 'head': x, y -> y" in str(program)


def test_initial_weights_of_a_fit():
    fits = [
        Multiple().fit(steps=6, batch=2, chunk=1, learning_rate=1e-30, init_std=std)
        for std in (None, 0.02, 0.5)
    ]
    default, same, larger = (jax.tree.leaves(jax.tree.map(np.asarray, f.model)) for f in fits)
    assert all((a == b).all() for a, b in zip(default, same, strict=True))
    drawn = [(a, b) for a, b in zip(same, larger, strict=True) if not np.allclose(a, b, atol=1e-20)]
    assert drawn
    for a, b in drawn:
        np.testing.assert_allclose(b, 25 * a, rtol=1e-3, atol=1e-20)
    lines = repr(fits[0]).splitlines()
    assert len(lines) == 5 and "6 steps" in lines[0]
    assert lines[-1].split() == ["6", f"{fits[0].history[-1]['loss']:.4g}"]
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="init_std is"):
            Multiple().fit(init_std=bad)
    with pytest.raises(ValueError, match=r"GradientDescent\.counterpart draws its own"):
        GradientDescent(dim_x=2, num_examples=3).fit(init_std=0.1)


def test_assert_exact_shows_the_certificate_that_failed():
    c = GradientDescent(dim_x=2, num_examples=3)
    assert assert_exact(c, batch=8, dtypes="float64").passed
    other = replace(c, step_size=1.1 * c.step_size)
    with pytest.raises(AssertionError, match="GradientDescent.*: failed\n  float64 failed: "):
        assert_exact(c, batch=8, dtypes="float64", model=lambda dtype: other.compile(dtype).model)
