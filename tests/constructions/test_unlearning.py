"""Unlearning by a class token, against the posterior of a task that never had the class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import Evidence, predict
from constructions.hyper_transformer.gradient import HyperGradient
from constructions.hyper_transformer.prototypes import HyperPrototypes
from constructions.hyper_transformer.unlearning import above_rest, damage, others, unlearnt

CLASSES = 4
GRADIENT = HyperGradient(dim=3, classes=CLASSES, shots=2, step_size=1.7)
PROTOTYPES = HyperPrototypes(dim=3, classes=CLASSES, shots=2)


@pytest.mark.parametrize("construction", [GRADIENT, PROTOTYPES], ids=["gradient", "prototypes"])
def test_other_logits_keep_their_bits_and_the_deleted_one_is_nothing(construction, x64):
    inputs = construction.sample(jax.random.key(0), 64)
    model = construction.compile().model
    whole = np.asarray(predict(construction, model, *inputs))
    found = np.asarray(unlearnt(construction, model, *inputs))
    for deleted in range(CLASSES):
        rest = [c for c in range(CLASSES) if c != deleted]
        np.testing.assert_array_equal(found[deleted][..., rest], whole[..., rest])
        assert not found[deleted][..., deleted].any()
        assert np.abs(whole[..., deleted]).min() > 0


def test_what_is_left_is_the_posterior_of_the_other_classes(x64):
    """Of a task with one class less, whose support never held an example of it."""
    support, labels, queries = PROTOTYPES.sample(jax.random.key(1), 16)
    found = unlearnt(PROTOTYPES, PROTOTYPES.compile().model, support, labels, queries)
    fewer = HyperPrototypes(dim=3, classes=CLASSES - 1, shots=2).task
    for deleted in range(CLASSES):
        rest = [c for c in range(CLASSES) if c != deleted]
        kept = np.asarray(labels) != deleted
        own = np.stack([a[k] for a, k in zip(np.asarray(support), kept, strict=True)])
        names = np.stack([a[k] for a, k in zip(np.asarray(labels), kept, strict=True)])
        names = jnp.asarray(names - (names > deleted), jnp.int32)
        wanted = jax.nn.softmax(fewer.posterior(jnp.asarray(own), names, queries))
        gap = np.abs(jax.nn.softmax(found[deleted][..., rest]) - wanted).max()
        assert gap < 1e-12


def test_a_token_that_nobody_sees_is_one_that_is_not_there(x64):
    inputs = GRADIENT.sample(jax.random.key(2), 8)
    model = GRADIENT.compile().model
    stream = GRADIENT.stream(model, *inputs)
    first = GRADIENT.positions(inputs[0], inputs[2])[0].start
    found = unlearnt(GRADIENT, model, *inputs)
    columns = GRADIENT.program.slots["logits"].columns
    for deleted in range(CLASSES):
        values = jnp.delete(stream.values, first + deleted, axis=1)
        out = model(values, jnp.delete(stream.groups, first + deleted))
        np.testing.assert_allclose(out[:, -5:, columns], found[deleted], atol=1e-13)


def test_equal_predictions_do_not_say_what_can_be_unlearnt(x64):
    """Tokens that hold mixtures of classes: the same function, damaged by the same deletion."""
    mixed = GRADIENT.near_misses()["classes mixed"].model
    batch = GRADIENT.task.sample(jax.random.key(3), 64)
    compiled = GRADIENT.compile().model
    evidence = [
        Evidence(GRADIENT, model, compiled, batch, jax.random.key(0)) for model in (compiled, mixed)
    ]
    np.testing.assert_allclose(evidence[1].prediction, evidence[0].prediction, atol=1e-12)
    assert damage(evidence[0]) == 0 and damage(evidence[1]) > 0.1


def test_cross_entropy_among_the_others_by_a_loop(x64):
    batch = PROTOTYPES.task.sample(jax.random.key(4), 32)
    model = PROTOTYPES.compile().model
    scaled = PROTOTYPES.near_misses()["scale + 20 %"].model
    losses = {}
    for name, one in (("exact", model), ("scaled", scaled)):
        logits, nats = np.asarray(predict(PROTOTYPES, one, *batch.inputs)), []
        for deleted in range(CLASSES):
            rest = np.delete(logits, deleted, -1)
            for row, kinds in zip(rest, np.asarray(batch.target), strict=True):
                for scores, kind in zip(row, kinds, strict=True):
                    if kind != deleted:
                        own = scores[kind - (kind > deleted)]
                        nats.append(np.log(np.exp(scores - own).sum()))
        losses[name] = np.mean(nats)
    evidence = Evidence(PROTOTYPES, scaled, model, batch, jax.random.key(0))
    assert abs(above_rest(evidence) - (losses["scaled"] / losses["exact"] - 1)) < 1e-10


def test_others_leaves_one_class_out():
    logits = jnp.arange(3.0) + jnp.zeros((3, 2, 3))
    np.testing.assert_allclose(others(logits)[:, 0], [[-0.5, 0.5], [-1, 1], [-0.5, 0.5]])


def test_examples_without_labels_are_refused():
    c = HyperPrototypes(3, 3, 1, unlabelled=2, scale=1.0, shrinkage=1.0)
    with pytest.raises(ValueError, match="unlabelled is 2"):
        unlearnt(c, c.compile().model, *c.sample(jax.random.key(0), 2))
