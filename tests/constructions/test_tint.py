"""TinT against autograd of the auxiliary model and optax's SGD, parameter by parameter."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tint_oracle import (
    FROZEN,
    MASKS,
    PAPER_FROZEN,
    POSITIONS,
    TOKENS,
    WORDS,
    moved,
    names,
    parameters,
    reference,
)

from constructions.interchange.decoder import TrainedAuxiliary, decoder, logits
from constructions.tint.construction import Tint


class Case(NamedTuple):
    auxiliary: str
    mode: str
    dtype: str = "float64"
    steps: int = 1
    rate: float = 0.1
    layers: int = 2
    stack: int = 1
    shards: int = 1
    embeddings: bool = False

    @property
    def frozen(self):
        if self.mode == "paper":
            return PAPER_FROZEN
        return () if self.embeddings else FROZEN


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


# A large rate in float32 makes changes that its weights can hold; one step is linear in it.
CASES = [
    Case("random gelu", "exact", stack=2, shards=4),
    Case("random gelu", "exact", "float32", rate=100.0, layers=1, shards=2),
    slow(Case("random gelu", "exact", "float32", rate=100.0, shards=2)),
    Case("trained relu", "exact", steps=2, rate=0.3, layers=1, embeddings=True),
    slow(Case("trained relu", "exact", steps=2, rate=0.3, embeddings=True)),
    slow(Case("trained gelu", "exact", steps=4, layers=1, stack=3)),
    Case("random relu", "exact", "float32", steps=3, layers=1, stack=3),
    Case("trained gelu", "paper"),
    slow(Case("random relu", "paper", steps=2, layers=1)),
    slow(Case("random relu", "paper", "float32", rate=100.0, stack=3)),
    slow(Case("trained relu", "paper", "float32", rate=10.0)),
    Case("trained gelu", "finite-difference"),
    slow(Case("random gelu", "finite-difference", "float32", rate=100.0)),
    slow(Case("trained gelu", "finite-difference", "float32", rate=10.0)),
]


@lru_cache
def auxiliary(kind, dtype, layers):
    """The same numbers in both dtypes: random ones, or fitted to text."""
    origin, activation = kind.split()
    size = {"layers": layers, "heads": 2, "width": 6, "activation": activation}
    with jax.enable_x64(dtype == "float64"):
        if origin == "trained":
            return TrainedAuxiliary("toy", **size, length=POSITIONS, steps=200, batch=32).model
        return moved(decoder(WORDS, **size, positions=POSITIONS, hidden=12, eps=1e-3))


@lru_cache
def wanted(kind, layers, **settings):
    model = auxiliary(kind, "float64", layers)
    return reference(model, TOKENS, MASKS, **settings)


class Result(NamedTuple):
    case: Case
    start: dict[str, np.ndarray]
    outcome: Any
    updated: dict[str, np.ndarray]
    reference: Any


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def result(request):
    case = request.param
    model = auxiliary(case.auxiliary, case.dtype, case.layers)
    settings = {name: getattr(case, name) for name in ("steps", "stack", "shards", "embeddings")}
    with jax.enable_x64(case.dtype == "float64"):
        tint = Tint(model, case.mode, learning_rate=case.rate, **settings)
        outcome = jax.device_get(tint.run(None, jnp.asarray(TOKENS), jnp.asarray(MASKS)))
    expected = wanted(
        case.auxiliary,
        case.layers,
        steps=case.steps,
        rate=case.rate,
        frozen=case.frozen,
        value_only=case.mode == "paper",
    )
    updated = names(nnx.to_pure_dict(outcome.updated))
    return Result(case, names(parameters(model)), outcome, updated, expected)


def changes(result):
    """(parameter, sequence, change, change of the reference, what rounding may add to it)."""
    for name, start in result.start.items():
        start = start.astype("float64")
        for n, (mine, theirs) in enumerate(
            zip(result.updated[name], result.reference.updated[name], strict=True)
        ):
            # a sum of weight and change is rounded to the dtype at every step
            size = np.maximum(np.abs(start), np.abs(theirs)).astype(result.case.dtype)
            rounding = result.case.steps * np.linalg.norm(np.spacing(size).astype("float64"))
            yield name, n, mine - start, theirs - start, rounding


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_forward(result):
    bar = {"float64": 1e-12, "float32": 1e-6}[result.case.dtype]
    for found, expected in zip(result.outcome.logits_before, result.reference.before, strict=True):
        assert found.dtype == result.case.dtype
        assert relative(found, expected) <= bar


def bar_of(case):
    if case.mode == "exact":
        return {"float64": 1e-10, "float32": 1e-5}[case.dtype]
    if case.mode == "paper":
        return {"float64": 1e-3, "float32": 2e-2}[case.dtype]
    return 5e-3


def test_update(result):
    """Every parameter of every sequence by itself: error and direction."""
    bar, seen = bar_of(result.case), 0
    for name, n, found, expected, rounding in changes(result):
        if "key_bias" in name or not np.any(expected):
            continue
        error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
        cosine = (found * expected).sum() / (np.linalg.norm(found) * size)
        assert error <= bar * size + rounding, (name, n, error / size)
        assert cosine >= 0.9999 - rounding / size, (name, n, cosine)
        seen += 1
    # four of the five sequences train something
    trained = [name for name in result.start if name.split("/")[-1] not in result.case.frozen]
    assert seen == 4 * len([name for name in trained if "key_bias" not in name]), seen


def test_the_bias_of_keys_has_no_gradient(result):
    """It moves all scores of a query alike: what is found is rounding."""
    moved = {(name, n): np.linalg.norm(found) for name, n, found, *_ in changes(result)}
    bar = {"float64": 1e-12, "float32": 1e-6}[result.case.dtype]
    bar = 1e-4 if result.case.mode == "finite-difference" else bar
    for (name, n), size in moved.items():
        if "key_bias" in name:
            whole = np.sqrt(sum(other**2 for (_, m), other in moved.items() if m == n))
            assert size <= bar * whole


def test_what_is_frozen_keeps_its_bits(result):
    frozen = [name for name in result.start if name.split("/")[-1] in result.case.frozen]
    for name in frozen:
        for found in result.updated[name]:
            assert (found == result.start[name]).all(), name


def test_an_empty_mask_changes_nothing(result):
    empty = [n for n, mask in enumerate(MASKS) if not mask[:-1].any()]
    assert len(empty) == 1
    for name, found in result.updated.items():
        assert np.abs(found[empty[0]] - result.start[name]).max() == 0, name


def test_logits_after(result):
    case = result.case
    exact = {"float64": 1e-12, "float32": 1e-5}[case.dtype]
    if case.mode != "exact" and case.rate > 1:
        pytest.skip("so large a step shows small differences of the update large")
    bar = exact if case.mode == "exact" else 5e-3
    for n, expected in enumerate(result.reference.after):
        assert relative(result.outcome.logits_after[n], expected) <= bar, n
        change = relative(result.reference.before[n], expected)
        assert change > 1e-2 or not MASKS[n, :-1].any()


def test_updated_is_a_batch_of_the_models_parameters(result):
    """nnx.update takes one of them; the model then says what was said after the training."""
    case, after = result.case, result.outcome.updated
    model = auxiliary(case.auxiliary, case.dtype, case.layers)
    with jax.enable_x64(case.dtype == "float64"):
        copy, state = nnx.clone(model), nnx.state(model, nnx.Param)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        nnx.update(copy, jax.tree.map(lambda a: jnp.asarray(a[1]), after))
        says = np.asarray(logits(copy, jnp.asarray(TOKENS[1:2]))[0])
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert new.shape == (len(TOKENS), *old.shape)
        assert new.dtype == old.dtype
    bar = {"float64": 1e-12, "float32": 1e-5}[case.dtype]
    assert relative(result.outcome.logits_after[1], says) <= bar
