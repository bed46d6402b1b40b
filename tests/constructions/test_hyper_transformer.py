"""Classifiers that attention writes, against autodiff, class means and nearest prototypes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from constructions.claims import predict
from constructions.family import verify
from constructions.hyper_transformer.gradient import HyperGradient
from constructions.hyper_transformer.measurements import measure
from constructions.hyper_transformer.paper import centred
from constructions.hyper_transformer.prototypes import HyperPrototypes, Memory
from constructions.runs import fit_family
from probes.ledger import ledger

GRADIENT = HyperGradient(dim=3, classes=4, shots=2, step_size=1.7)
PROTOTYPES = HyperPrototypes(dim=3, classes=4, shots=2)
GUESSING = HyperPrototypes(
    dim=3, classes=4, shots=1, unlabelled=5, sharpness=3.0, scale=0.8, shrinkage=1.0
)


def episode(key, count, classes=4, dim=3, batch=3):
    """Examples of all classes, of some more than of others, and queries."""
    rng = np.random.default_rng(key)
    support, queries = (
        2 * rng.standard_normal((batch, count, dim)),
        rng.standard_normal((batch, 5, dim)),
    )
    labels = rng.integers(0, classes, (batch, count))
    labels[:, :classes] = rng.permutation(classes)
    return jnp.asarray(support), jnp.asarray(labels, jnp.int32), jnp.asarray(queries)


@partial(jax.jit, static_argnums=0)
def read(c, model, *inputs):
    return c.read(model, *inputs)


def with_constant(a):
    return jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_are_those_of_sgd_on_cross_entropy(steps, x64):
    c = replace(GRADIENT, steps=steps)
    support, labels, queries = episode(0, c.task.labelled)
    model = c.compile().model

    def loss(weight, e, y):
        return optax.softmax_cross_entropy_with_integer_labels(e @ weight.T, y).mean()

    @jax.jit
    @jax.vmap
    def descend(e, y):
        weight = jnp.zeros((4, 4))
        for _ in range(steps):
            weight -= 1.7 * jax.grad(loss)(weight, e, y)
        return weight

    weight = np.asarray(descend(with_constant(support), labels))
    assert np.abs(weight[:, :, -1]).max() > 0.1  # the bias counts where numbers are unequal
    found = read(c, model, support, labels, queries)["weight"][:, -1]
    assert np.abs(found - weight).max() < 1e-12
    logits = predict(c, model, support, labels, queries)
    wanted = np.einsum("bcd,bqd->bqc", weight, with_constant(queries))
    assert np.abs(logits - wanted).max() < 1e-12


def test_examples_without_labels_are_not_attended_to(x64):
    support, labels, queries = episode(1, 8)
    for c in (GRADIENT, replace(PROTOTYPES, sharpness=2.0)):  # blunt, so that it would show
        more = jnp.concatenate([support, 7 * support[:, :2]], 1)
        model = c.compile().model
        plain = predict(c, model, support, labels, queries)
        np.testing.assert_allclose(predict(c, model, more, labels, queries), plain, atol=1e-12)


def test_names_of_classes_and_order_of_examples_do_not_matter(x64):
    support, labels, queries = episode(2, 8)
    names, order = np.array([2, 0, 3, 1]), np.random.default_rng(0).permutation(8)
    for c in (GRADIENT, GUESSING):
        model = c.compile().model
        plain = predict(c, model, support, labels, queries)
        renamed = predict(c, model, support, jnp.asarray(names)[labels], queries)
        np.testing.assert_allclose(renamed[..., names], plain, atol=1e-11)
        shuffled = predict(c, model, support[:, order], labels[:, order], queries)
        np.testing.assert_allclose(shuffled, plain, atol=1e-11)


def test_one_step_adds_up_over_examples_and_two_do_not(x64):
    support, labels, queries = episode(3, 6)
    for steps, additive in ((1, True), (2, False)):
        c = replace(GRADIENT, steps=steps)
        model = c.compile().model
        assert c.context_size(support, labels, queries) == 6
        whole = predict(c, model, support, labels, queries)
        parts = [predict(c, model, *c.subset([i], support, labels, queries)) for i in range(6)]
        gap = float(jnp.abs(sum(parts) - whole).max())
        assert gap < 1e-12 if additive else gap > 1e-2
        assert not predict(c, model, *c.subset([], support, labels, queries)).any()


def test_left_out_examples_are_gone_whether_labelled_or_not(x64):
    c = GUESSING
    support, labels, queries = c.sample(jax.random.key(4), 3)
    kept = c.subset([0, 2, 3, 5, 8], support, labels, queries)
    np.testing.assert_array_equal(kept[0], support[:, [0, 2, 3, 5, 8]])
    np.testing.assert_array_equal(kept[1], labels[:, [0, 2, 3]])
    for chosen in ([0, 2, 3, 5, 8], [4, 6], []):  # nothing labelled, nothing at all
        inputs = c.subset(chosen, support, labels, queries)
        found = predict(c, c.compile().model, *inputs)
        wanted = jax.jit(c.trace)(*inputs)["prediction"]
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_what_a_classifier_does_not_see(x64):
    inputs = GRADIENT.sample(jax.random.key(5), 4)
    models = GRADIENT.near_misses()
    names = "1/C left out", "softmax for linear"
    near = {name: predict(GRADIENT, models[name].model, *inputs) for name in names}
    plain = predict(GRADIENT, GRADIENT.compile().model, *inputs)
    # 1/C moves all logits of a query alike
    assert jnp.abs(near["1/C left out"] - plain).max() > 0.1
    np.testing.assert_allclose(centred(near["1/C left out"]), plain, atol=1e-12)
    # with equally many examples of every class a softmax changes their scale
    ratio = centred(near["softmax for linear"]) / plain
    np.testing.assert_allclose(ratio, ratio.ravel()[0], rtol=1e-9)


def means(support, labels, classes=4):
    """Class means, `[batch, class, dim]`, one by one."""
    e, y = np.asarray(support), np.asarray(labels)
    return np.array(
        [[e[b][y[b] == c].mean(0) for c in range(classes)] for b in range(len(e))]
    )  # fmt: skip


@pytest.mark.parametrize("sharpness", [2.0, 10.0, 40.0])
def test_distance_from_class_means_is_within_its_bound(sharpness, x64):
    c = replace(PROTOTYPES, sharpness=sharpness)
    support, labels, queries = episode(6, 40, batch=20)
    model = c.compile().model
    mean = means(support, labels)
    found = np.asarray(read(c, model, support, labels, queries)["weight"])
    error = np.linalg.norm(found - mean, axis=-1)
    leak = np.asarray(c.leak(labels))
    y = np.asarray(labels)[..., None] == np.arange(4)
    others = np.einsum("bnc,bnd->bcd", ~y, support) / (~y).sum(1)[..., None]
    np.testing.assert_allclose(error, leak * np.linalg.norm(others - mean, axis=-1), atol=1e-13)
    diameter = np.linalg.norm(mean[:, :, None] - mean[:, None], axis=-1).max((1, 2))
    bound = leak * diameter[:, None]
    assert (error <= bound + 1e-13).all()
    if sharpness <= 10:  # above, both are rounding
        assert np.quantile(error / bound, 0.9) > 0.3
        assert leak.max() < 40 * np.exp(-sharpness)
    # C - 1 to 1 for equal numbers of examples
    even = np.tile(np.arange(4), (1, 10))
    wanted = 3 / (np.exp(sharpness) + 3)
    np.testing.assert_allclose(c.leak(even), wanted, rtol=1e-12)
    assert wanted <= 3 * np.exp(-sharpness) * (1 + 1e-15)


def test_without_shrinkage_the_nearest_prototype_wins(x64):
    c = replace(PROTOTYPES, shrinkage=1.0)
    support, labels, queries = episode(7, 30)
    logits = predict(c, c.compile().model, support, labels, queries)
    distance = np.linalg.norm(
        np.asarray(queries)[:, :, None] - means(support, labels)[:, None], axis=-1
    )
    np.testing.assert_array_equal(logits.argmax(-1), distance.argmin(-1))


def test_prototypes_are_the_exact_posterior(x64):
    c = HyperPrototypes(dim=3, classes=4, shots=3, spread=0.8, noise=1.4)
    inputs = c.sample(jax.random.key(8), 10)
    found = jax.nn.softmax(predict(c, c.compile().model, *inputs))
    assert jnp.abs(found - jax.nn.softmax(c.task.posterior(*inputs))).max() < 1e-12


def test_guesses_come_from_like_features(x64):
    support, labels, queries = GUESSING.sample(jax.random.key(9), 2)
    found = read(GUESSING, GUESSING.compile().model, support, labels, queries)
    e, y = np.asarray(support), np.asarray(labels)
    for b in range(2):
        for u in range(5):
            weights = np.exp(0.5 * e[b, :4] @ e[b, 4 + u])
            guess = [weights[y[b] == c].sum() / weights.sum() for c in range(4)]
            np.testing.assert_allclose(found["label"][b, u], guess, rtol=1e-12)
        soft = np.concatenate([np.eye(4)[y[b]], found["label"][b]])
        a = np.exp(3 * soft) / np.exp(3 * soft).sum(0)
        np.testing.assert_allclose(found["weight"][b], a.T @ e[b], atol=1e-12)


def test_examples_without_labels_help_and_the_guesses_are_why():
    rows = {row.name: row for row in measure(tasks=300)}
    for unlabelled, least in ((20, 0.05), (100, 0.12)):
        gain = rows[f"gain from {unlabelled} more"]
        assert gain.measured > max(5 * gain.error, least)
        ablated = rows[f"the same without guesses, {unlabelled} more"]
        assert ablated.measured < 2 * ablated.error
        accuracy = rows["accuracy of labelled examples"].measured + gain.measured
        assert abs(accuracy - rows[f"accuracy with {unlabelled} more"].measured) < 0.03
    assert {row.verdict for row in rows.values()} == {"remark", "holds"}


def tasks():
    """Three tasks of different sizes; class 3 comes first in the second, 0 in the first alone."""
    support, _, queries = episode(10, 18)
    labels = jnp.array([[0, 1, 0, 2, 1, 0, 2, 2, 3, 3, 1, 3, 2, 2, 1, 1, 2, 3]] * 3)
    return support, labels, queries, (slice(0, 5), slice(6, 12), slice(12, 18))


def test_nothing_is_forgotten(x64):
    support, labels, queries, parts = tasks()
    c, memory = PROTOTYPES, None
    model = c.compile().model
    kept = np.concatenate([np.arange(18)[part] for part in parts])
    for part in parts:
        memory = c.update(model, support[:, part], labels[:, part], memory)
    assert isinstance(memory, Memory)
    wanted = means(support[:, kept], labels[:, kept])
    assert np.abs(np.asarray(memory.mean) - wanted).max() < 1e-12
    np.testing.assert_array_equal(memory.count[0], np.bincount(labels[0, kept], minlength=4))
    at_once = c.predict(model, support[:, kept], labels[:, kept], queries)
    from_memory = c.predict(model, support[:, :0], labels[:, :0], queries, memory)
    assert jnp.abs(at_once - from_memory).max() < 1e-12
    # the algorithm says the same, with the last task still in the context
    memory = None
    for part in parts[:2]:
        memory = c.update(model, support[:, part], labels[:, part], memory)
    inputs = support[:, parts[2]], labels[:, parts[2]], queries
    assert memory is not None
    assert jnp.abs(jax.jit(c.trace)(*inputs, *memory)["prediction"] - at_once).max() < 1e-12
    assert jnp.abs(c.predict(model, *inputs, memory) - at_once).max() < 1e-12


@pytest.mark.parametrize("c", [PROTOTYPES, GUESSING], ids=["prototypes", "guesses"])
def test_derivatives_along_a_line_are_those_of_differences(c, x64):
    support, labels, queries = episode(5, 8, batch=1)
    labels = labels if c is PROTOTYPES else labels[:, :4]
    along, model = jnp.cos(jnp.arange(support.size).reshape(support.shape)), c.compile().model

    def logits(t):
        return c.apply(model, support + t * along, labels, queries)

    slope, h = jax.jit(jax.jacfwd(logits)), 1e-5
    ends = jax.jit(jax.vmap(logits))(jnp.array([-h, h]))
    np.testing.assert_allclose(slope(0.0), (ends[1] - ends[0]) / (2 * h), rtol=1e-6, atol=1e-7)
    curved = jax.jit(jax.hessian(logits))(0.0)
    np.testing.assert_allclose(curved, (slope(h) - slope(-h)) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x64", [True, False])
def test_classes_that_a_task_does_not_show_keep_their_bits(x64):
    with jax.enable_x64(x64):
        support, labels, _, parts = tasks()
        c, model = PROTOTYPES, PROTOTYPES.compile().model
        first = c.update(model, support[:, parts[0]], labels[:, parts[0]])
        assert not first.mean[:, 3].any() and not first.count[:, 3].any()
        later = c.update(model, support[:, parts[1]], labels[:, parts[1]], first)
        np.testing.assert_array_equal(later.mean[:, 0], first.mean[:, 0])
        assert jnp.abs(later.mean[:, 1] - first.mean[:, 1]).max() > 0.1


SUPPORT, LABELS, QUERIES = jnp.ones((2, 8, 3)), jnp.tile(jnp.arange(4), (2, 2)), jnp.ones((2, 1, 3))
INPUTS = {
    "support has shape": (SUPPORT[..., :2], LABELS, QUERIES),
    "queries has shape": (SUPPORT, LABELS, QUERIES[:1]),
    "labels has shape": (SUPPORT, jnp.tile(LABELS, (1, 2)), QUERIES),
    "labels are float32, must be integers": (SUPPORT, LABELS.astype(jnp.float32), QUERIES),
    "labels holds 4, must be 0 to 3": (SUPPORT, LABELS.at[1, 3].set(4), QUERIES),
    "labels holds -1, must be 0 to 3": (SUPPORT, LABELS.at[0, 0].set(-1), QUERIES),
    "support holds NaN": (SUPPORT.at[0, 0, 0].set(jnp.nan), LABELS, QUERIES),
    "queries holds NaN": (SUPPORT, LABELS, QUERIES.at[0, 0, 0].set(jnp.inf)),
}


@pytest.mark.parametrize("message", INPUTS)
def test_inputs_that_are_refused(message):
    for c in (GRADIENT, PROTOTYPES):
        with pytest.raises(ValueError, match=message):
            c.predict(c.compile().model, *INPUTS[message])


def test_a_class_without_examples_has_no_prototype():
    model = PROTOTYPES.compile().model
    labels = LABELS.at[1].set(jnp.array([0, 1, 3, 0, 1, 3, 0, 1]))
    with pytest.raises(ValueError, match="labels of episode 1 have no example of class 2"):
        PROTOTYPES.predict(model, SUPPORT, labels, QUERIES)
    memory = Memory(jnp.zeros((2, 4, 3)), jnp.array([[0, 0, 0, 0], [0, 0, 5, 0]]))
    assert PROTOTYPES.predict(model, SUPPORT, labels, QUERIES, memory).shape == (2, 1, 4)
    GRADIENT.predict(GRADIENT.compile().model, SUPPORT, labels, QUERIES)  # needs none


def test_memories_that_are_refused():
    model = PROTOTYPES.compile().model
    memory = Memory(jnp.zeros((2, 4, 2)), jnp.ones((2, 4), int))
    with pytest.raises(ValueError, match=r"memory.mean has shape \(2, 4, 2\), must be \(2, 4, 3\)"):
        PROTOTYPES.update(model, SUPPORT, LABELS, memory)
    with pytest.raises(ValueError, match=r"memory.count has shape \(4,\), must be \(2, 4\)"):
        PROTOTYPES.update(model, SUPPORT, LABELS, Memory(jnp.zeros((2, 4, 3)), jnp.ones(4)))
    with pytest.raises(ValueError, match="labels has shape"):
        PROTOTYPES.update(model, SUPPORT, LABELS[:, :4])


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (HyperGradient, {"dim": 0}, "dim is 0"),
        (HyperGradient, {"classes": 1}, "classes is 1, must be an integer of at least 2"),
        (HyperGradient, {"steps": 0}, "steps is 0"),
        (HyperGradient, {"steps": 2}, "step_size is None, must be given for steps=2"),
        (HyperGradient, {"step_size": float("nan")}, "step_size is nan"),
        (HyperPrototypes, {"sharpness": 0.0}, "sharpness is 0.0, must be above 0"),
        (HyperPrototypes, {"scale": -1.0}, "scale is -1.0, must be above 0"),
        (HyperPrototypes, {"unlabelled": 3}, "scale is None, must be given for unlabelled=3"),
    ],
)
def test_settings_that_are_refused(family, settings, message):
    with pytest.raises(ValueError, match=message):
        family(**settings)


def test_several_steps_are_certified():
    assert verify(replace(GRADIENT, steps=3), batch=8).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "refuted"),
    [
        ("hyper-gradient", ["a class a token"]),
        ("hyper-prototypes", []),
        ("hyper-semi-supervised", []),
    ],
)
def test_trained_counterparts_hold_the_claims(name, refuted):
    run = fit_family(name, {}, quick=True, seeds=range(3))
    rows = ledger(run.construction, run.models, batch=2**13)
    assert [row.claim.name for row in rows if row.verdict == "refuted"] == refuted
    assert not [row.claim.name for row in rows if row.verdict == "void"]
