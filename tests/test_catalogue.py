"""What every family must offer, checked for all of them alike."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from constructions import CATALOGUE
from constructions.catalogue import resolve
from constructions.claims import Evidence, is_function
from constructions.core.evaluate import evaluate
from constructions.core.inventory import counts
from constructions.core.transformer import Transformer
from constructions.family import verify
from probes.ledger import ledger
from probes.statistics import STATISTICS, lacks
from synthetic.tasks.task import Task

# Counterparts that take less time to compile and to fit; the constructions are the examples.
SMALLER = {"inside-outside": {"layers": 2, "heads": 2, "width": 32}}
# Of dozens of layers a few steps tell.
SHORTER = {"tint": {"steps": 30, "batch": 8, "chunk": 10}}
#: Near-misses that are transformers, and run another algorithm; functions all do.
OTHER_ALGORITHMS = {
    "mesa-ridge": {"one law in the weights", "one gradient step"},
    "mesa-polynomial": {"one law in the weights"},
    "noisy-regression": {"GD++ part"},
    "hedge": {"one step size"},
}
#: Claims on predictions that no other algorithm is known to fail, and why they stay.
WITHOUT_RIVAL = {
    ("kernel-descent", "published loss"): "least squares on the waves has less loss and passes",
    ("kernel-descent", "as good as one step"): "to one side: least squares on the waves passes",
    (
        "kernel-descent",
        "published difference of predictions",
    ): "least squares passes",
}


@pytest.fixture(scope="module", params=sorted(CATALOGUE))
def construction(request):
    family = CATALOGUE[request.param]
    assert family.name == request.param
    return family(**family.example() | SMALLER.get(family.name, {}))


def test_certificate(construction):
    certificate = verify(construction, batch=16)
    assert certificate.passed, certificate.to_json()
    assert {error.dtype for error in certificate.errors} == {"float64", "float32"}


def test_claims_that_are_known_without_the_construction_are_its_own(construction):
    for family in CATALOGUE.values():
        if family.claims and isinstance(construction, family.constructor):
            assert resolve(family.claims) == construction.claims


def test_trace_and_model_name_the_same_values(construction):
    inputs = construction.sample(jax.random.key(0), 3)
    model = construction.compile().model
    trace = jax.eval_shape(construction.trace, *inputs)
    read = jax.eval_shape(construction.read, model, *inputs)
    assert "prediction" in trace
    assert set(read) <= set(trace)
    for name, value in read.items():
        assert value.shape == trace[name].shape, name
    prediction = jax.eval_shape(construction.apply, model, *inputs)
    assert prediction.shape == trace["prediction"].shape


def test_predict_checks_its_inputs_and_takes_an_empty_batch(construction):
    inputs, compiled = construction.sample(jax.random.key(0), 2), construction.compile()
    for wrong, given in (
        ("object", np.asarray(inputs[0]).astype(object)),
        ("complex", np.asarray(inputs[0]).astype(complex)),
        ("<U", np.asarray(inputs[0]).astype(str)),
        ("None", None),
    ):
        with pytest.raises(ValueError, match=wrong):
            construction.predict(compiled.model, given, *inputs[1:])
    for nothing in (None, compiled):
        with pytest.raises(ValueError, match="model is .* must be a Transformer"):
            construction.predict(nothing, *inputs)
    with pytest.raises(ValueError, match="expected .* got"):
        construction.predict(compiled.model, *inputs[:-1])
    found, none = (
        jax.eval_shape(construction.predict, compiled.model, *(a[:n] for a in inputs))
        for n in (2, 0)
    )
    assert none.shape == (0, *found.shape[1:]) and none.dtype == found.dtype


def test_task_scores_the_trace(construction):
    assert isinstance(construction.task, Task)
    batch = construction.task.sample(jax.random.key(1), 5)
    prediction = jax.jit(construction.trace)(*batch.inputs)["prediction"]
    loss = construction.task.loss(prediction, batch)
    assert loss.shape == (5,)
    assert np.isfinite(loss).all()


def test_slot_by_slot_equals_dense(construction, x64):
    inputs = construction.sample(jax.random.key(2), 2)
    model = construction.compile().model
    stream, groups, _ = construction.stream(model, *inputs)
    kinds = np.asarray(groups)
    values = jax.jit(lambda s: evaluate(construction.program, s, kinds))(stream)
    out = jax.jit(lambda m, s, g: m(s, g))(model, stream, groups)
    for slot in construction.program.slots:
        if slot.name in values:
            names = construction.program.token_groups
            owners = [slot.token_groups is None or name in slot.token_groups for name in names]
            owned = np.broadcast_to(np.asarray(owners)[kinds], out.shape[:2])
            found, expected = values[slot.name][owned], out[owned][:, slot.columns]
            np.testing.assert_allclose(found, expected, atol=1e-12)
    stored = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert counts(construction.program).dense == sum(a.size for a in stored)


def test_counterpart_is_of_the_same_class(construction):
    counterpart = construction.counterpart()
    model = counterpart.init(jax.random.key(0))
    assert type(model) is Transformer
    inputs = construction.sample(jax.random.key(1), 2)
    models = model, construction.compile().model
    predicted = [jax.eval_shape(construction.apply, m, *inputs) for m in models]
    assert predicted[0].shape == predicted[1].shape
    if counterpart.metrics is not None:
        measured = jax.eval_shape(counterpart.metrics, model)
        assert measured and all(value.shape == () for value in measured.values())


@pytest.mark.parametrize(
    "construction",
    [pytest.param(n, marks=pytest.mark.slow) if n in SHORTER else n for n in sorted(CATALOGUE)],
    indirect=True,
)
def test_counterpart_learns(construction, request):
    settings = SHORTER.get(request.node.callspec.params["construction"], {})
    result = construction.fit(**{"steps": 240, "batch": 64, "chunk": 120} | settings)
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0]


def test_claims_can_fail(construction, request):
    """Each by a control, one of them another algorithm, unless a claim asks for weights."""
    claims, near_misses = construction.claims, construction.near_misses()
    assert len({claim.name for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.catches, f"{claim.name} has no near-miss that it must catch"
        assert set(claim.catches) <= set(near_misses)
        assert callable(claim.statistic) or claim.statistic in STATISTICS
        assert claim.source
    family, key = request.node.callspec.params["construction"], jax.random.key(3)
    rivals = {name for name, (model, _) in near_misses.items() if is_function(model)}
    rivals |= OTHER_ALGORITHMS.get(family, set())
    assert rivals <= set(near_misses)
    examples = construction.task.sample(key, 2)
    black_box = lambda *inputs: construction.trace(*inputs)["prediction"]  # noqa: E731
    evidence = Evidence(construction, black_box, construction.reference, examples, key)
    assert {name for name in WITHOUT_RIVAL if name[0] == family} == {
        (family, claim.name)
        for claim in claims
        if not rivals & {*claim.catches} and not lacks(claim, evidence)
    }
    inputs = examples.inputs
    expected = jax.eval_shape(construction.trace, *inputs)["prediction"].shape
    for name, (model, base) in near_misses.items():
        if is_function(model):
            assert np.shape(model(*inputs)) == expected, name
        else:
            assert jax.eval_shape(partial(base.apply, model), *inputs).shape == expected, name
    for row in ledger(construction, batch=min(2**13, construction.examples // 8)):
        assert row.verdict == "holds", f"{row.claim.name}: {row.reason}"
