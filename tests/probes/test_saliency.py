"""Maps as certificates: a sum over examples, whose wrong labels can be certified, and brackets."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.random import default_rng

from constructions.family import Construction
from constructions.gradient_descent.construction import GradientDescent
from constructions.inside_outside.construction import InsideOutside
from probes.context import Saliency, saliency
from synthetic.grammar.grammar import Grammar


@dataclass(frozen=True)
class Labels:
    """A task that predicts logits."""

    outcome: str = "logits"

    def sample(self, key: Any, batch: int) -> Any:
        raise NotImplementedError

    def loss(self, prediction: Any, batch: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Construction):
    """A classifier in context: logits are sums of evidence `[batch, example, label]`."""

    task: Any = Labels()
    program: Any = None

    def trace(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def embed(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def places(self, depth: int, *inputs: Any) -> Any:
        raise NotImplementedError

    def context_size(self, *inputs: Any) -> int:
        return inputs[0].shape[1]

    def subset(self, kept: Any, *inputs: Any) -> tuple[Any, ...]:
        """Examples with no evidence, behind, change no sum."""
        (evidence,) = inputs
        left = np.zeros_like(evidence)
        left[:, : len(kept)] = evidence[:, np.asarray(kept, int)]
        return (left,)

    def outside_context(self, prediction: Any, kept: Any, *inputs: Any) -> Any:
        return prediction[:, None]

    def apply(self, model: Any, *inputs: Any) -> Any:
        return inputs[0].sum(1)


def classifier(count: int, seed: int = 0) -> np.ndarray:
    """Three classes, 30 examples, each speaks for its own label by its likeness to the query."""
    rng = default_rng(seed)
    means = rng.normal(size=(count, 3, 8))
    label = rng.integers(3, size=(count, 30))
    x = np.take_along_axis(means, label[..., None], 1) + rng.normal(size=(count, 30, 8))
    query = means[:, 0] + rng.normal(size=(count, 8))
    likeness = np.einsum("bnd,bd->bn", x, query)
    return likeness[..., None] * (label[..., None] == np.arange(3)) / 10


def test_wrong_labels_are_certified_where_examples_are_summed() -> None:
    evidence = classifier(32)
    found = saliency(Sum(), None, (evidence,), labels=3)
    right, wrong = found.completeness.mean(), found.soundness.min(1).mean()
    assert right > 0.95 and wrong < 0.4
    control = saliency(Sum(), None, (evidence,), labels=3, shuffle=jax.random.key(0))
    assert control.soundness.min(1).mean() > wrong + 0.3
    assert control.completeness.mean() < right - 0.02


def test_maps_are_the_evidence(x64: None) -> None:
    """In logits the drop without an example is its evidence; so is the order, label by label."""
    evidence = classifier(4)
    found = saliency(Sum(), None, (evidence,), labels=3)
    whole = jax.nn.log_softmax(evidence.sum(1))
    for n in range(4):
        for k, label in enumerate(found.labels[n]):
            assert np.isclose(found.probability[n, k], jnp.exp(whole[n, label]), rtol=1e-12)
            without = jax.nn.log_softmax(evidence[n].sum(0) - evidence[n])[:, label]
            assert np.allclose(found.maps[n, k], whole[n, label] - without, atol=1e-12)
            order = np.argsort(-found.maps[n, k], kind="stable")
            walk = np.cumsum(np.concatenate([np.zeros((1, 3)), evidence[n][order]]), 0)
            path = jax.nn.softmax(walk)[::3, label]
            assert np.allclose(found.path[n, k], path, atol=1e-12)


def test_formulas() -> None:
    """Completeness of the first label, soundness of the others, from a path that is given."""
    path = np.array([[[0.2, 0.4, 0.8], [0.3, 0.5, 0.1]]])
    found = Saliency(np.array([[0, 1]]), np.array([[0.8, 0.1]]), np.zeros((1, 2, 2)), path)
    assert np.allclose(found.auc, [[0.45, 0.35]])
    assert np.allclose(found.completeness, 0.45 / 0.8)
    assert np.allclose(found.soundness, 0.1 / 0.35)
    low = Saliency(np.array([[0, 1]]), np.array([[0.8, 0.2]]), np.zeros((1, 2, 2)), path / 10)
    assert np.allclose(low.completeness, 0.1 / 0.8) and np.allclose(low.soundness, 1)


def test_the_matching_bracket_has_rank_one() -> None:
    """The hidden bracket closes one that is three words away; between them is another pair."""
    grammar = Grammar.from_text(
        "S -> A X [0.4]\nS -> B Y [0.4]\nS -> 'x' [0.2]\nX -> S C [1.0]\nY -> S D [1.0]\n"
        "A -> '(' [1.0]\nB -> '[' [1.0]\nC -> ')' [1.0]\nD -> ']' [1.0]"
    )
    c = InsideOutside(grammar, 5)
    tokens, lengths = grammar.encode([["(", "[", "x", "]", ")"], ["[", "(", "x", ")", "]"]])
    mask = np.arange(5) == np.array([[4], [4]])
    found = saliency(c, c.compile().model, (tokens, lengths, mask), labels=1)
    assert (found.maps[:, 0].argmax(1) == 0).all()
    assert (found.maps[:, 0, 0] > found.maps[:, 0, 1:].max(1) + 0.1).all()


def test_refused() -> None:
    c = GradientDescent(3, 1, 4)
    inputs = c.sample(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="RegressionTask predicts numbers"):
        saliency(c, c.compile().model, inputs)
