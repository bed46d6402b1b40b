"""The ledger: its verdicts, and the matrix of claims against near-misses."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import Claim, Evidence
from constructions.core.compile import compile_program, config_of
from constructions.core.config import MlpConfig, NormConfig
from constructions.core.symmetry import transform
from constructions.core.transformer import Transformer
from constructions.gradient_descent.construction import GradientDescent
from probes.ledger import CONSTRUCTION, RANDOM, decide, ledger
from probes.probe import compiled_like
from probes.statistics import lacks, value_of
from synthetic.tasks.task import Batch


def claim(threshold=0.1, direction="<=", catches=("off",)):
    return Claim("c", "s", "excess_loss", threshold, direction, "paper", catches)


@pytest.mark.parametrize(
    ("values", "trained", "verdict", "reason"),
    [
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}, [0.05, 0.1], "holds", ""),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}, [], "holds", "no trained model was given"),
        (
            {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2},
            [0.05, 0.11],
            "refuted",
            "1 of 2 trained models fail",
        ),
        (
            {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2},
            [float("nan")],
            "refuted",
            "1 of 1 trained models fail",
        ),
        ({CONSTRUCTION: 0.2, RANDOM: 1.0, "off": 0.2}, [0.0], "void", "the construction itself"),
        ({CONSTRUCTION: float("nan"), RANDOM: 1.0, "off": 0.2}, [0.0], "void", "the construction"),
        ({CONSTRUCTION: 0.0, RANDOM: 0.1, "off": 0.2}, [0.0], "void", "not caught: random init"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.05}, [0.0], "void", "not caught: off"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0}, [0.0], "void", "not caught: off"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2, "other": 0.0}, [0.0], "holds", ""),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": float("nan")}, [0.0], "holds", ""),
    ],
)
def test_verdicts(values, trained, verdict, reason):
    row = decide(claim(), values, trained)
    assert row.verdict == verdict
    assert row.reason.startswith(reason)


def test_direction():
    values = {CONSTRUCTION: 1.0, RANDOM: 0.0, "off": 0.5}
    assert decide(claim(0.9, ">="), values, [0.95]).verdict == "holds"
    assert decide(claim(0.9, ">="), values, [0.85]).verdict == "refuted"
    with pytest.raises(ValueError, match="direction is '<'"):
        claim(direction="<")


def test_interval_is_students():
    values = {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}
    trained = [0.01, 0.02, 0.03, 0.04, 0.05]
    row = decide(claim(), values, trained)
    # t_{0.975, 4} = 2.776445
    half = 2.776445 * np.std(trained, ddof=1) / np.sqrt(5)
    assert row.interval is not None
    np.testing.assert_allclose(row.interval, (0.03 - half, 0.03 + half), rtol=1e-6)
    assert decide(claim(), values, [0.01]).interval is None
    assert row.to_json()["values"] == values


def small():
    """One step at its best step size, small enough for a test."""
    return GradientDescent(dim_x=4, num_examples=6, steps=1)


@pytest.fixture(scope="module")
def rows():
    """The ledger of a construction, with itself in other bases as the trained models."""
    construction = small()
    shape = config_of(construction.program)
    wide = compile_program(construction.program, config=shape.with_heads(5, 5))
    keys = jax.random.split(jax.random.key(3), 2)
    twins = [transform(wide, key, construction.gauge()) for key in keys]
    return {row.claim.name: row for row in ledger(construction, twins, batch=2**12)}


def test_the_construction_in_another_basis_satisfies_every_claim(rows):
    assert {name: (row.verdict, row.reason) for name, row in rows.items()} == {
        name: ("holds", "") for name in rows
    }


def test_every_near_miss_fails_the_claims_that_must_catch_it(rows):
    caught = {}
    for row in rows.values():
        for name in row.claim.catches:
            assert not row.claim.holds(row.values[name]), (row.claim.name, name)
            caught.setdefault(name, []).append(row.claim.name)
    assert set(caught) == set(small().near_misses())
    # these tell "equal predictions", "equal weights" and "every subset" apart
    telling = {"clipped stream": ["equal predictions"], "step on the mean": ["every subset"]}
    assert {name: caught.pop(name) for name in telling} == telling
    assert all(len(claims) >= 3 for claims in caught.values()), caught
    apart = {"step on the mean": "equal predictions", "clipped stream": "equal weights"}
    apart["query among the keys, W_0 != 0"] = "every subset"
    assert all(rows[claim].claim.holds(rows[claim].values[n]) for n, claim in apart.items())


def test_a_cosine_cannot_see_a_scale(rows):
    row = rows["aligned sensitivities"]
    assert row.claim.holds(row.values["step size + 10 %"])
    assert rows["equal step size"].values["step size + 10 %"] == pytest.approx(0.1, abs=1e-4)
    assert rows["equal weights"].values["step size - 10 %"] == pytest.approx(0.1, abs=1e-4)


def test_a_step_size_off_by_ten_percent_costs_what_the_law_says(rows):
    from synthetic.theory.one_layer import excess_law

    expected = excess_law(small().task).coefficient * 0.1**2
    assert rows["optimal loss"].values["step size + 10 %"] == pytest.approx(expected, rel=1e-3)
    assert rows["equal loss"].values["step size + 10 %"] == pytest.approx(expected, rel=0.5)


ABOUT_WEIGHTS = {"optimal loss", "equal step size", "equal weights", "interpolation", "roll-out"}


def few(*names):
    """Some of the claims on one step: every one costs a compilation."""
    return [c for c in small().claims if c.name in names]


def verdicts(found):
    return {row.claim.name: row.verdict for row in found}


def test_masks_that_differ_without_effect_satisfy_every_claim(rows):
    """From W_0 = 0 the query, as a key, adds nothing: the same function, and no distance."""
    construction = small()
    shape = config_of(construction.program)
    program = construction._program("linear", keys=None)
    model = compile_program(program, config=shape.with_heads(5, 5))
    twin = transform(model, jax.random.key(4), construction.gauge())
    assert verdicts(ledger(construction, [model, twin], batch=2**12)) == dict.fromkeys(
        rows, "holds"
    )


def test_masks_that_differ_with_effect_are_refuted_as_functions_not_as_weights():
    """What a mask lets in counts in the distance of weights, and makes closed forms another's."""
    construction = small()
    arrays = compile_program(construction._program("linear", keys=None)).arrays()
    own = arrays["segments"][0]["layers"][0]["heads"][0]
    own["value"] = own["value"].at[..., 0].add(0.5)  # reads x of the query as well
    model = Transformer(compile_program(construction._program("linear", keys=None)).config, arrays)
    found = {r.claim.name: r for r in ledger(construction, [model], batch=2**12)}
    for name in ("optimal loss", "equal step size", "roll-out"):
        assert found[name].verdict == "not applicable"
        assert "its heads see other tokens than the construction's" in found[name].reason
    assert found["equal weights"].verdict == found["equal predictions"].verdict == "refuted"


def language_model_like():
    """Softmax heads, an MLP and norms, as wide as the tokens: no linear attention at all."""
    shape = config_of(small().program)
    (segment,) = shape.segments
    (layer,) = segment.pattern
    heads = tuple(replace(h, mixer="softmax", bias=True) for h in layer.heads)
    norm = NormConfig("layer", affine=True)
    layer = replace(layer, heads=heads, mlp=MlpConfig(8, "gelu"), norm=norm, mlp_norm=norm)
    config = replace(shape, segments=(replace(segment, pattern=(layer,)),))
    wiring = compile_program(small().program).arrays()["segments"][0]["layers"][0]["heads"][0]

    def fill(name, shape) -> Any:
        if isinstance(shape, dict):
            return {n: fill(n, s) for n, s in shape.items()}
        if name in ("scale", "window") or name.endswith("groups"):
            return wiring[name]
        return 0.1 * jax.random.normal(jax.random.key(len(name)), shape)

    return Transformer(config, fill("", config.shapes()))


def test_claims_on_weights_are_not_applicable_to_other_models():
    found = ledger(small(), [language_model_like()], batch=2**12)
    assert {n for n, v in verdicts(found).items() if v == "not applicable"} == ABOUT_WEIGHTS
    assert {n for n, v in verdicts(found).items() if v == "refuted"} == {
        r.claim.name for r in found
    } - ABOUT_WEIGHTS
    for row in found:
        (value,) = row.trained
        assert np.isnan(value) == (row.claim.name in ABOUT_WEIGHTS)
        assert (row.to_json()["trained"] == [None]) == np.isnan(value)
        if row.claim.name in ("optimal loss", "equal weights"):
            assert "layer 1 has softmax heads" in row.reason
    with_itself = [compiled_like(small(), small().counterpart().init(jax.random.key(0)))]
    (row,) = ledger(
        small(), [*with_itself, language_model_like()], batch=2**12, claims=few("equal weights")
    )
    assert row.verdict == "not applicable" and row.reason.startswith("1 of 2 trained models: ")
    assert row.trained[0] < 1e-5


def step_by_hand(x, y, x_query):
    """One gradient step in plain numpy, which JAX cannot trace."""
    x, y, x_query = (np.asarray(a, float) for a in (x, y, x_query))
    weight = float(small().step_sizes[0]) / small().num_examples * np.einsum("bno,bni->boi", y, x)
    return np.einsum("boi,bqi->bqo", weight, x_query)


def test_a_function_may_stand_for_a_trained_model():
    names = ("equal predictions", "equal weights", "aligned sensitivities", "every subset")
    found = verdicts(ledger(small(), [step_by_hand], batch=2**12, claims=few(*names)))
    assert found == {
        "equal predictions": "holds",
        "every subset": "holds",
        "equal weights": "not applicable",
        "aligned sensitivities": "holds",  # by finite differences
    }
    traced = lambda *inputs: -small().trace(*inputs)["prediction"]  # noqa: E731
    rows = ledger(small(), [traced], batch=2**12, claims=few(*names))
    assert verdicts(rows)["aligned sensitivities"] == "refuted"
    row = next(r for r in rows if r.claim.name == "aligned sensitivities")
    assert row.trained[0] == pytest.approx(-1, abs=1e-5)
    for row in rows:
        hinted = row.verdict == "refuted"
        assert ("trained 0: nearly minus" in row.note and "sign" in row.note) == hinted


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"predictions of trained 0 have shape \(16, 4\), must be"):
        ledger(small(), [lambda x, y, q: q[:, 0]], batch=16)
    with pytest.raises(ValueError, match="trained 0 is a str, must be a Transformer or a function"):
        ledger(small(), ["model"], batch=16)


def test_a_claim_about_another_setting_is_not_applicable():
    """Any other step size leaves more than the least loss; that is no fault of the statistic."""
    construction = replace(small(), step_size=0.6 * float(small().step_sizes[0]))
    (row,) = ledger(construction, batch=2**12, claims=few("optimal loss"))
    assert row.verdict == "not applicable"
    assert row.reason == (
        f"step_size is {construction.step_size:.4g}, the claim is about the best one, "
        f"{small().step_size:.4g}"
    )
    assert row.to_json()["claim"]["needs"] == ["best_step_size", "masks_alike"]
    (row,) = ledger(
        replace(small(), step_size=1.001 * float(small().step_sizes[0])),
        batch=2**12,
        claims=few("optimal loss"),
    )
    assert row.verdict == "holds"


@pytest.mark.parametrize(
    "settings", [{"steps": 2, "step_size": 2.0}, {"init_weight": np.ones((1, 4))}]
)
def test_any_number_of_steps_from_anywhere_claims_something(settings):
    construction = replace(small(), **settings)
    twin = construction.compile().model
    found = {row.claim.name: row for row in ledger(construction, [twin], batch=2**12)}
    assert {r.verdict for r in found.values()} == {"holds"} and len(found) == 4
    for name, row in found.items():
        for caught in row.claim.catches:
            assert not row.claim.holds(row.values[caught]), (name, caught)


def test_nothing_claimed_is_said():
    @dataclass(frozen=True)
    class Silent(GradientDescent):
        claims: ClassVar[tuple[Claim, ...]] = ()  # pyright: ignore

    with pytest.warns(UserWarning, match="Silent claims nothing at these settings"):
        assert ledger(Silent(dim_x=4, num_examples=6)) == []


def test_errors_in_a_statistic_are_raised():
    def mistaken(e: Evidence) -> float:
        return len(e.size)  # pyright: ignore

    own = replace(few("equal loss")[0], statistic=mistaken, name="mine")
    with pytest.raises(TypeError, match="has no len") as caught:
        ledger(small(), batch=16, claims=[own])
    assert "in the statistic of the claim 'mine'" in caught.value.__notes__
    many = replace(own, statistic=lambda e: e.prediction)
    with pytest.raises(ValueError, match=r"'mine': its statistic gives an array of shape \(16, 1"):
        ledger(small(), batch=16, claims=[many])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statistic": "prediction_distanc"}, "statistic is 'prediction_distanc', must be a func"),
        ({"statistic": 3}, "statistic is 3, must be a function of the evidence or one of"),
        (
            {"catches": ("no-momentum",)},
            "'c': catches has 'no-momentum', must name near-misses: 's",
        ),
        ({"catches": "wrong N"}, "catches is 'wrong N', must be a tuple of names"),
    ],
)
def test_misspelt_claims_are_refused_before_anything_is_measured(changes, message, monkeypatch):
    monkeypatch.setattr(GradientDescent, "task", None)  # nothing is drawn
    bad = claim(catches=("wrong N",))
    for name, value in changes.items():
        object.__setattr__(bad, name, value)
    monkeypatch.setattr(GradientDescent, "near_misses", lambda _: near)
    with pytest.raises(ValueError, match=message):
        ledger(cheap, claims=[bad])


cheap = GradientDescent(2, 1, 2, step_size=1.0)
near = cheap.near_misses()


def test_near_misses_that_are_none_are_refused(monkeypatch):
    for misses, message in (
        ({"off": near["wrong N"].model}, "near-miss 'off' is a Transformer, must be NearMiss"),
        ({RANDOM: near["wrong N"]}, "near-miss 'random init': the name is taken"),
    ):
        monkeypatch.setattr(GradientDescent, "near_misses", lambda _, m=misses: m)
        with pytest.raises(ValueError, match=message):
            ledger(cheap, claims=[claim(catches=())])
    with pytest.raises(ValueError, match="construction is a str, must be a Construction"):
        replace(near["wrong N"], construction="gd")
    with pytest.raises(ValueError, match="claim 'c' is there twice"):
        monkeypatch.setattr(GradientDescent, "near_misses", lambda _: near)
        ledger(cheap, claims=[claim(catches=())] * 2)


class Guess:
    """Four outcomes at three places, of which the loss looks at the first two."""

    def __init__(self, outcome):
        self.outcome = outcome

    def sample(self, key, batch):
        raise NotImplementedError

    def loss(self, prediction, batch):
        logs = (
            jnp.log(prediction)
            if self.outcome == "probabilities"
            else jax.nn.log_softmax(prediction)
        )
        return -jnp.take_along_axis(logs, batch.target[..., None], -1)[:, :2, 0].mean(1)


def evidence_of(outcome, found, expected):
    examples = Batch((), jnp.zeros((2, 3), int))
    memo = {("expected", id(examples)): (examples, expected)}
    construction, reference = SimpleNamespace(task=Guess(outcome)), near["wrong N"].model
    return Evidence(construction, lambda: found, reference, examples, jax.random.key(0), memo)


@pytest.mark.parametrize("outcome", ["logits", "probabilities"])
def test_distributions(outcome):
    """Against the sums of their definitions; what is common to all logits changes nothing."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 2, 3, 4))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (ours, theirs))
    given = (ours, theirs) if outcome == "logits" else (p, q)
    e = evidence_of(outcome, *map(jnp.asarray, given))
    kl = (q * np.log(q / p)).sum(-1)[:, :2].mean()
    own = replace(claim(), statistic="divergence")
    assert value_of(own, e) == pytest.approx(kl, rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1))[:, :2].mean()
    assert value_of(replace(own, statistic="same_outcome"), e) == pytest.approx(same)
    if outcome == "logits":
        shifted = theirs + 10 * rng.normal(size=(2, 3, 1))
        e = evidence_of(outcome, jnp.asarray(shifted), jnp.asarray(theirs))
        for statistic in ("divergence", "prediction_distance"):
            assert value_of(replace(own, statistic=statistic), e) < 1e-5
    values = evidence_of("values", *map(jnp.asarray, given))
    assert lacks(own, values) == "Guess: its predictions are no distributions"


def test_statistics_that_are_not_defined_are_nan():
    construction = small()
    near = construction.near_misses()["centred attention"].model
    key = jax.random.key(0)
    evidence = Evidence(
        construction,
        near,
        construction.compile().model,
        construction.task.sample(key, 16),
        key,
    )
    weights = next(c for c in construction.claims if c.statistic == "weight_distance")
    assert lacks(weights, evidence)
    assert not weights.holds(float("nan"))
    loss = replace(weights, statistic=lambda e: jnp.asarray(e.size))
    assert value_of(loss, evidence) == 16
