"""How far a simulated step is from gradient descent, and how much it lowers the loss on text.

Every number is of one sequence. `update_error` compares the change of the weights that the
simulator writes, divided by the learning rate, with minus the gradient of the summed loss, which it
equals for one exact step. The loss after the step does not measure this: a wrong direction may
lower it more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.core.transformer import Transformer
from constructions.interchange.decoder import CHANGED, DecoderShape, Weights
from constructions.tint import algorithm
from constructions.tint.algorithm import MODES, Backward
from constructions.tint.construction import Tint, simulate
from synthetic.tasks.task import Batch

Changes = Mapping[str, Array | np.ndarray]  # by the names of `weights`, `[batch, layer, ...]`

#: One approximation at a time, none, and all that the paper makes.
ABLATION = {
    "none": Backward(),
    "value-only attention": Backward(attention="value-only"),
    "attention by differences": Backward(attention="finite-difference"),
    "norms by differences": Backward(norm="finite-difference"),
    "norms by central differences": Backward(norm="central"),
    "activation by differences": Backward(activation="finite-difference"),
    "gains not trained": Backward(gains=False),
    "all (paper)": MODES["paper"],
}


class Mean(NamedTuple):
    """A mean over sequences and its standard error."""

    mean: float
    error: float


def mean(values: Any) -> Mean:
    """Mean and standard error, s / sqrt n, of independent values."""
    each = np.asarray(values, np.float64).ravel()
    return Mean(float(each.mean()), float(each.std(ddof=1) / np.sqrt(each.size)))


# What a step is worth


class Adaptation(NamedTuple):
    """Losses of the words that are not trained on, in nats a word, `[sequence]` each.

    Attributes:
        before: of the auxiliary model as it is.
        descent: after gradient descent by autograd, on the weights that the simulator trains.
        simulated: as the simulator predicts them.
    """

    before: np.ndarray
    descent: np.ndarray
    simulated: np.ndarray

    def summary(self) -> dict[str, Mean]:
        """Means, and means of differences between losses of one sequence."""
        return {
            "before": mean(self.before),
            "descent less before": mean(self.descent - self.before),
            "simulated less before": mean(self.simulated - self.before),
            "simulated less descent": mean(self.simulated - self.descent),
        }


def adaptation(c: Tint, batch: Batch, weights: Weights | None = None) -> Adaptation:
    """What `c.steps` steps change on a batch of an `AdaptationTask`, simulated and by autograd.

    Dynamic evaluation (Krause et al. 2018, arXiv 1709.07432) at the simulator's learning rate, with
    the true gradient whatever the mode. All masks of one shape share a compiled program.

    Args:
        c: the simulator.
        batch: tokens and what to train on; the next words.
        weights: of the auxiliary model, in the place of those of `c` and of their shapes.
    """
    weights = c.weights if weights is None else weights
    tokens, train = batch.inputs
    found = simulate(c, weights, tokens, train)
    after = descent_logits(weights, tokens, train, c.learning_rate, c.shape, c.steps, c.trained)

    def loss(scores: Array) -> np.ndarray:
        return np.asarray(c.task.loss(jax.nn.softmax(scores), batch))

    names = ("logits_before", "logits_after")
    before, simulated = (loss(found[name]) for name in names)
    return Adaptation(before, loss(after), simulated)


@partial(jax.jit, static_argnames=("shape", "steps", "trained", "value_only"))
def descent_logits(
    weights: Weights,
    tokens: Array,
    train: Array,
    rate: float | Array,
    shape: DecoderShape,
    steps: int,
    trained: tuple[str, ...],
    value_only: bool = False,
) -> Float[Array, "batch time word"]:
    """Logits after gradient descent by autograd (`algorithm.descend`), at any rate; jitted."""

    after = algorithm.descend(
        weights,
        tokens,
        train,
        shape,
        steps=steps,
        rate=rate,
        trained=trained,
        value_only=value_only,
    )
    return jax.vmap(partial(algorithm.decode, shape=shape))(after, tokens)


# How near a step is to gradient descent


class UpdateError(NamedTuple):
    """Of a simulated update w against the gradient's g, `[sequence]` each.

    Attributes:
        cosine: <w, g> / |w| |g|; 0 where w is 0.
        relative: |w - g| / |g|.
    """

    cosine: np.ndarray
    relative: np.ndarray


def simulated_update(
    c: Tint, tokens: Array, train: Array, weights: Weights | None = None
) -> dict[str, Array]:
    """The simulator's change of all weights of blocks and norms, divided by the learning rate."""
    found = simulate(c, c.weights if weights is None else weights, tokens, train)
    return {name: found[name] for name in CHANGED}


@partial(jax.jit, static_argnames=("shape", "value_only"))
def gradient_update(
    weights: Weights,
    tokens: Array,
    train: Array,
    shape: DecoderShape,
    value_only: bool = False,
) -> dict[str, Array]:
    """Minus the gradient of the summed loss of every sequence, by autograd.

    With `value_only` attention weights are constants, so that queries and keys have gradient 0.
    """

    def one(tokens: Array, train: Array) -> dict[str, Array]:
        slope = jax.grad(algorithm.loss)(dict(weights), tokens, train, shape, value_only)
        return {name: -slope[name] for name in CHANGED}

    return jax.vmap(one)(tokens, train)


def public_update(
    weights: Weights, tokens: Array, marked: Array, shape: DecoderShape, *defects: str
) -> dict[str, Array]:
    """The update of the public code of TinT, with these of its defects, by autograd.

    It takes marks of tokens: position t is trained on where token t + 1 is marked. Its attention is
    differentiated by values alone.

    Args:
        weights: of the auxiliary model.
        tokens, marked: sequences, and which of their tokens are marked, `[sequence, time]`.
        shape: of the auxiliary model.
        defects: of "bias" (W_2 is cut into four chunks, and each of them adds the whole update of
            b_2), "last position" (its gradient is not masked, and has no target: log sum exp of its
            logits is trained on as well), "holes" (weights collect the gradients of tokens that
            are marked themselves).
    """
    return _public_update(weights, tokens, jnp.asarray(marked, bool), shape, defects)


@partial(jax.jit, static_argnames=("shape", "defects"))
def _public_update(
    weights: Weights,
    tokens: Array,
    marked: Array,
    shape: DecoderShape,
    defects: tuple[str, ...],
) -> dict[str, Array]:
    def one(tokens: Array, marked: Array) -> dict[str, Array]:
        def loss(w: Weights) -> Array:
            counted = marked if "holes" in defects else None
            scores = algorithm.decode(w, tokens, shape, True, counted)
            logs = jax.nn.log_softmax(scores[:-1])
            chosen = jnp.take_along_axis(logs, tokens[1:, None], -1)[:, 0]
            last = jax.nn.logsumexp(scores[-1]) if "last position" in defects else 0.0
            return last - jnp.where(marked[1:], chosen, 0).sum()

        slope = jax.grad(loss)(dict(weights))
        found = {name: -slope[name] for name in CHANGED}
        if "bias" in defects:
            found["back"] = found["back"].at[:, :, -1].multiply(4)
        return found

    return jax.vmap(one)(tokens, marked)


def update_error(found: Changes, wanted: Changes, names: tuple[str, ...] = CHANGED) -> UpdateError:
    """Cosine and relative error over all weights of these names together, `[sequence]` each."""
    return _compare(*(_flat([changes[name] for name in names]) for changes in (found, wanted)))


def by_matrix(found: Changes, wanted: Changes) -> dict[str, UpdateError]:
    """The same of each matrix [W b], `[layer, sequence]`; of gains and offsets `[norm, sequence]`.

    The norms of a layer stand before attention and before its MLP; the last one is the final norm.
    """

    def each(name: str) -> UpdateError:
        rows = [
            _compare(_flat([found[name][:, n]]), _flat([wanted[name][:, n]]))
            for n in range(found[name].shape[1])
        ]
        return UpdateError(np.stack([r.cosine for r in rows]), np.stack([r.relative for r in rows]))

    return {name: each(name) for name in CHANGED}


def ablation(
    auxiliary: Transformer,
    tokens: Array,
    train: Array,
    weights: Mapping[str, Weights] | None = None,
    approximations: Mapping[str, Backward] = ABLATION,
) -> dict[str, dict[str, UpdateError]]:
    """What each approximation costs, against the true gradient of all weights of blocks and norms.

    Args:
        auxiliary: gives the shapes.
        tokens, train: sequences, and where they are trained on.
        weights: several auxiliary models of these shapes, by name; None for the one given.
        approximations: backward passes, by name.

    Returns:
        for every approximation, of every model of `weights` ("auxiliary", if None).
    """
    exact = Tint(auxiliary, learning_rate=1.0)
    weights = {"auxiliary": exact.weights} if weights is None else weights
    wanted = {name: gradient_update(w, tokens, train, exact.shape) for name, w in weights.items()}
    found = {}
    for way, back in approximations.items():
        c = Tint(auxiliary, back, learning_rate=1.0)
        found[way] = {
            name: update_error(simulated_update(c, tokens, train, w), wanted[name])
            for name, w in weights.items()
        }
    return found


def _flat(arrays: list[Array | np.ndarray]) -> np.ndarray:
    """All numbers of every sequence, `[sequence, number]`."""
    parts = [np.asarray(a, np.float64) for a in arrays]
    return np.concatenate([a.reshape(len(a), -1) for a in parts], 1)


def _compare(found: np.ndarray, wanted: np.ndarray) -> UpdateError:
    """Of rows `[sequence, number]`; an update of 0 has cosine 0."""
    size, length = np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1)
    tiny = np.finfo(np.float64).tiny
    cosine = (found * wanted).sum(1) / np.maximum(size * length, tiny)
    return UpdateError(cosine, np.linalg.norm(found - wanted, axis=1) / np.maximum(length, tiny))
