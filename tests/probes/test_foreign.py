"""Models behind functions: the same numbers as the weights behind them, or one phrase why not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.transformer import Edit
from constructions.gradient_descent.construction import GradientDescent
from constructions.runs import Run, construct
from probes import PROBES, find
from probes.cli import main
from probes.foreign import ForeignError, Subject, foreign_run, named_model, no_edits, no_site
from probes.interchange import interchange, interchange_agreement, sweep
from probes.ledger import ledger
from probes.probe import NotApplicable
from probes.roll_out import roll_out
from probes.similarity import cosine_of, finite_differences, insensitive
from probes.subject import Edited, where

NAME = "gradient-descent"
SMALL = {"dim_x": 2, "num_examples": 3, "step_size": 2.0, "steps": 2}
#: Probes that see no weights, of in-context regression.
TAKEN = ("losses", "scale", "similarity", "roll-out", "linear", "interchange", "degrees")


def opaque(construction: Any, model: Any) -> Subject:
    """A model as functions of numpy arrays, which nobody can look into."""

    @jax.jit
    def run(edits: Any, inputs: Any) -> Any:
        stream, groups, _ = construction.stream(model, *inputs)
        values = model.run(stream, groups, sites=("residual",), edits=edits)[1]
        return construction.apply(Edited(model, edits), *inputs), values

    def edit(edits: Any, *inputs: Any) -> Any:
        return jax.tree.map(np.asarray, run(dict(edits), tuple(map(np.asarray, inputs))))

    return Subject(lambda *inputs: edit({}, *inputs)[0], lambda *inputs: edit({}, *inputs)[1], edit)


@pytest.fixture(scope="module")
def pair() -> tuple[GradientDescent, Any, Subject]:
    """A construction, a model that is none, and the same behind functions."""
    construction = construct(NAME, SMALL)
    model = construction.random_weights(0.5, construction.in_trained_shape())(jax.random.key(3))
    return construction, model, opaque(construction, model)


def drawn(construction: Any, seed: int, batch: int = 4) -> tuple[Any, ...]:
    return construction.sample(jax.random.key(seed), batch)


def test_near_misses_stand_beside_losses_at_other_scales(pair: Any) -> None:
    construction, _, subject = pair
    found = find("scale")(foreign_run(NAME, [subject], SMALL), 5).data
    name, factor = "step size + 10 %", 2.0
    larger = replace(construction, step_size=1.1 * construction.step_size)
    drawn = construction.task.scaled_inputs(factor).sample(jax.random.key(5), 1024)
    exact = larger.trace(*drawn.inputs)["prediction"]
    expected = construction.task.loss(exact, drawn).mean()
    at = found.scales.index(factor)
    np.testing.assert_allclose(found.near_misses[name][at], expected, rtol=1e-4)
    assert abs(found.construction[at] / expected - 1) > 0.05
    assert set(found.near_misses) < set(construction.near_misses())


def test_a_construction_without_loss_has_no_excess() -> None:
    construction = construct("skill-composition")
    model = construction.random_weights(0.3)(jax.random.key(0))
    run = Run("skill-composition", {}, construction, (model,), (0,), [], None)
    found = find("losses")(run, 0, batch=256)
    assert found.data.construction == 0 < found.data.trained[0]
    assert "differ by" not in found.picture().caption
    claim = replace(construction.claims[0], statistic="excess_loss", needs=(), catches=())
    (row,) = ledger(construction, (model,), batch=64, claims=[claim])
    assert row.verdict == "not applicable" and "loss is 0" in row.reason


def test_patches_and_roll_outs_are_those_of_the_weights(pair: Any) -> None:
    construction, model, subject = pair
    base, source = drawn(construction, 0), drawn(construction, 1)
    mask = where(model.config, 4, "residual", layer=1, token=[0, 3])
    one, other = (interchange(construction, m, base, source, where=mask) for m in (model, subject))
    np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-7)
    assert np.abs(one - construction.apply(model, *base)).max() > 1e-3
    one, other = (sweep(construction, m, base, source) for m in (model, subject))
    assert one.axes == other.axes == ("layer", "token") and other.effect.shape == (3, 4)
    np.testing.assert_allclose(other.effect, one.effect, atol=1e-5)
    np.testing.assert_allclose(other.off_axis, one.off_axis, atol=1e-4)
    one, other = (
        interchange_agreement(construction, m, construction.in_trained_shape(), base, source)
        for m in (model, subject)
    )
    np.testing.assert_allclose(other.correlation, one.correlation, atol=1e-4)
    np.testing.assert_allclose(other.prediction_error, one.prediction_error, atol=1e-4)
    np.testing.assert_allclose(other.reference.effect, one.reference.effect, atol=1e-5)
    for layer in (-1, 0):
        options: dict[str, Any] = {"depth": 3, "damping": 0.75, "layer": layer}
        one, other = (roll_out(construction, m, *base, **options) for m in (model, subject))
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_a_model_that_reads_out_elsewhere_is_not_rolled_out(pair: Any) -> None:
    construction, _, subject = pair
    turned = replace(subject, predict=lambda *inputs: -np.asarray(subject(*inputs)))
    with pytest.raises(ValueError, match="not read off the columns in which the construction"):
        roll_out(construction, turned, *drawn(construction, 0), depth=1)
    with pytest.raises(ValueError, match=r"layer is 2, the model applies 2"):
        roll_out(construction, subject, *drawn(construction, 0), depth=1, layer=2)


def waves(x: Any, y: Any, q: Any, xp: Any = np) -> Any:
    """Sines of the query, whose derivatives are cosines."""
    return xp.sin(3 * q) @ xp.asarray([[1.0], [2.0]], q.dtype)


@pytest.mark.parametrize(
    ("dtype", "inside", "accuracy"),
    [("float64", "float64", 1e-8), ("float32", "float32", 1e-3), ("float64", "float32", 1e-3)],
)
def test_finite_differences_are_as_exact_as_the_model_allows(
    dtype: str, inside: str, accuracy: float
) -> None:
    given = [np.random.default_rng(0).normal(size=(6, n, 2)) for n in (3, 3, 2)]

    def function(*inputs: Any) -> Any:
        return waves(*(np.asarray(a, inside) for a in inputs)).astype(dtype)

    found, steady = finite_differences(function, given)
    q = given[-1].astype(np.float32).astype(float)
    exact = 3 * np.cos(3 * q)[:, :, None] * np.array([1.0, 2.0])
    np.testing.assert_allclose(found, exact, atol=accuracy * np.abs(exact).max())
    assert steady < 10 * accuracy


def test_sensitivities_are_the_subject_s_own_or_jax_s_or_differences(pair: Any) -> None:
    construction, model, subject = pair
    reference, inputs = construction.reference, drawn(construction, 0, 64)
    expected = cosine_of(construction, model, reference, inputs)
    assert 0.01 < abs(expected) < 0.99
    traced = Subject(lambda *i: construction.apply(model, *i))
    asked = []

    def derivative(*i: Any) -> np.ndarray:
        asked.append(i)
        return np.full((len(i[0]), 1, 1, 2), [1.0, 0.0])

    for m in (subject, traced):
        assert insensitive(construction, m, inputs) == ""
        assert cosine_of(construction, m, reference, inputs) == pytest.approx(expected, abs=1e-5)
    own = replace(subject, derivative=derivative)
    assert cosine_of(construction, own, reference, inputs) != pytest.approx(expected, abs=1e-2)
    assert asked
    nothing = replace(subject, derivative=lambda *_: None)
    assert cosine_of(construction, nothing, reference, inputs) == pytest.approx(expected, abs=1e-5)
    draw = np.random.default_rng(0)
    noisy = Subject(lambda x, y, q: np.asarray(q)[:, :, :1] + draw.normal(size=(len(x), 1, 1)))
    said = insensitive(construction, noisy, inputs)
    assert said.startswith("finite differences of two steps differ by")


LACKS: list[tuple[Any, str]] = [
    (lambda s: replace(s, activations=None), "the model gives no activations: Subject(activa"),
    (lambda s: replace(s, edit=None), "nothing in the model can be edited: Subject(edit=...)"),
    (
        lambda s: replace(s, activations=lambda *i: {"stream": s.read(*i)["residual"]}),
        "the model's activations hold ['stream'], must hold 'residual'",
    ),
    (
        lambda s: replace(s, activations=lambda *i: {"residual": s.read(*i)["residual"][:, :, 1:]}),
        "'residual' of the model has shape [3, 2, 3, 3], must be [layer, batch, token, feature] "
        "with 4 tokens",
    ),
]


@pytest.mark.parametrize(("change", "said"), LACKS, ids=[said[:30] for _, said in LACKS])
def test_what_a_subject_lacks_is_said_in_one_phrase(pair: Any, change: Any, said: str) -> None:
    construction, _, subject = pair
    lesser = change(subject)
    assert no_edits(construction, lesser).startswith(said)
    assert (no_site(construction, lesser) == "") == ("edited" in said)
    run = Run(NAME, {}, construction, (lesser,), (0,), [], None)
    with pytest.raises(NotApplicable) as caught:
        find("interchange")(run)
    assert str(caught.value).startswith(said)


def test_probes_of_weights_are_left_out(pair: Any) -> None:
    construction, _, subject = pair
    run = Run(NAME, {}, construction, (subject,), (0,), [], None)
    others = set(PROBES) - {*TAKEN, "positions", "saliency"}
    assert {name for name in PROBES if not find(name).functions} == others
    for name in others:
        with pytest.raises(NotApplicable, match="a function, whose weights are not known"):
            find(name)(run)


def test_contexts_of_one_length_only_are_not_cut(pair: Any) -> None:
    construction, _, subject = pair

    def predict(x: Any, y: Any, q: Any) -> Any:
        if x.shape[1] != 3:
            raise RuntimeError("3 examples\nare wanted")
        return subject(x, y, q)

    run = Run(NAME, {}, construction, (replace(subject, predict=predict),), (0,), [], None)
    said = "fails on contexts with an example less: RuntimeError: 3 examples are wanted"
    with pytest.raises(NotApplicable, match=said):
        find("degrees")(run)


MODULE = """
import numpy as np
from probes.foreign import Subject

def rate(x, y, q):
    return 0.1 * np.einsum("bni,bno,bqi->bqo", x, y, q)

def made():
    return Subject(rate)

def scalar(x, y, q):
    return rate(x, y, q)[:, 0]

def broken(x, y, q):
    raise KeyError("layer 3")

def unmade():
    raise OSError("no checkpoint")

def infinite(x, y, q):
    return rate(x, y, q) * np.inf

number = 3
"""


def test_what_foreign_code_raises_is_one_line_with_its_cause() -> None:
    subject = Subject(lambda *_: np.ones(3)[5], lambda *_: {"residual": None.shape})  # type: ignore[attr-defined]
    for call, said in (
        (subject, "IndexError: index 5 is"),
        (subject.read, "AttributeError: 'None"),
    ):
        with pytest.raises(ForeignError, match=f"the model fails: {said}") as caught:
            call(np.ones(3))
        assert type(caught.value.__cause__).__name__ in said and "\n" not in str(caught.value)
    for call in (lambda: Subject(subject.predict).read(1), lambda: Subject(abs).run({}, 1)):
        with pytest.raises(ValueError, match="Subject"):
            call()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: Any) -> Path:
    (tmp_path / "their_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "their_model", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("absent", "their_model has no absent"),
        ("number", "model 0 is a int, must be a Subject or a function of the inputs"),
        ("scalar", "model 0: predictions have shape [3, 1], must be [3, 1, 1]"),
        ("broken", "model 0: the model fails on inputs of the family: KeyError: 'layer 3'"),
        ("unmade", "their_model:unmade: the model fails on being made: OSError: no checkpoint"),
        ("infinite", "model 0: predictions hold NaN or infinite numbers"),
    ],
)
def test_models_that_are_none_are_refused_by_the_command(
    module: Path, attribute: str, said: str, capsys: Any
) -> None:
    typed = ["compare", NAME, "--model", f"their_model:{attribute}", "--out", "report"]
    assert main([*typed, "--set", "dim_x=2", "--set", "num_examples=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not (module / "report").exists()


def test_a_probe_takes_a_model_from_the_command(module: Path, capsys: Any) -> None:
    typed = ["probe", "similarity", "--model", "their_model:rate", "--json", "found.json"]
    own = ["--family", NAME, "--set", "dim_x=2", "--set", "num_examples=3"]
    assert main([*typed, *own]) == 0
    settings = {"dim_x": 2, "num_examples": 3}
    expected = find("similarity")(foreign_run(NAME, named_model("their_model:rate"), settings))
    assert json.loads((module / "found.json").read_text())["values"] == expected.values
    capsys.readouterr()
    for options, said in (
        (["--model", "their_model:rate"], "--model their_model:rate: --family must say whose"),
        (own, "give --run, or --model and --family: one of them"),
        (["--run", "run", *own], "--set dim_x=2 cannot be given with --run"),
        (["--model", "their_model:number", *own], "model 0 is a int, must be a Subject"),
        (["--model", "their_model:rate", "--family", "nothing"], "nothing"),
    ):
        assert main(["probe", "similarity", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error


def test_functions_and_what_makes_them_are_named(module: Path) -> None:
    inputs = [np.ones((1, n, d)) for n, d in ((3, 2), (3, 1), (1, 2))]
    for attribute in ("rate", "made"):
        found = named_model(f"their_model:{attribute}")
        np.testing.assert_allclose(found(*inputs), [[[0.6]]], rtol=1e-6)
    run = foreign_run(NAME, [named_model("their_model:made"), lambda *i: jnp.zeros((3, 1, 1))],
                      SMALL)  # fmt: skip
    assert run.seeds == (0, 1) and run.recipe is None
    assert all(isinstance(model, Subject) for model in run.models)


def test_edits_are_whole_arrays(pair: Any) -> None:
    construction, _, subject = pair
    inputs = drawn(construction, 0)
    values = subject.read(*inputs)["residual"]
    seen = []

    def edit(edits: Any, *i: Any) -> Any:
        seen.append({site: (e.where.shape, e.value.shape) for site, e in edits.items()})
        return subject.edit(edits, *i)

    spied = replace(subject, edit=edit)
    interchange(construction, spied, inputs, drawn(construction, 1), where=np.ones((1, 1, 1, 1)))
    roll_out(construction, spied, *inputs, depth=1)
    whole = {"residual": (values.shape, values.shape)}
    assert [s for s in seen if s] == [whole, whole]
    assert isinstance(Edit(values, values), tuple)


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_a_probe_has_the_same_numbers_as_of_the_weights(pair: Any, name: str) -> None:
    construction, model, subject = pair
    hidden, open_ = (Run(NAME, {}, construction, (m,), (0,), [], None) for m in (subject, model))
    options = {"bare": False} if name == "roll-out" else {}
    found, expected = find(name)(hidden), find(name)(open_, 0, **options)
    assert (found.rows, found.columns) == (expected.rows, expected.columns)
    np.testing.assert_allclose(
        np.array(found.values, float), np.array(expected.values, float), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_compare_takes_a_model_from_the_command(module: Path, capsys: Any) -> None:
    options = ["--set", "dim_x=2", "--set", "num_examples=3", "--quick", "--json", "numbers.json"]
    typed = ["compare", NAME, "--model", "their_model:rate", "--out", "report", *options]
    assert main(typed) == 0
    page = (module / "report" / "report.html").read_text()
    assert "the model gives no activations" in page
    assert "the model is a function, whose weights are not known" in page
    assert "--model their_model:rate" in page
