"""What TinT simulates, as plain array code: a decoder, trained on its own input by autograd.

    theta_0 = the auxiliary model's,  theta_(s+1) = theta_s - eta grad L(theta_s),
    L(theta) = - sum_t m_t log p_theta(x_(t+1) | x_1 .. x_t)

for every sequence on its own, then the logits of theta_S on the same sequence. "Value-only"
attention counts its weights a_ij as constants where it is differentiated.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from constructions.indices import take_rows
from constructions.tint.auxiliary import DecoderShape
from constructions.tint.weights import Weights


def decode(
    w: Weights, tokens: Int[Array, " time"], shape: DecoderShape, value_only: bool = False
) -> Float[Array, "time word"]:
    """Logits of the decoder on one sequence."""
    times = partial(jnp.matmul, precision="highest")
    time, d = len(tokens), shape.width // shape.heads
    causal = jnp.tril(jnp.ones((time, time), bool))
    act = {"gelu": partial(jax.nn.gelu, approximate=True), "relu": jax.nn.relu}[shape.activation]

    def norm(x: Array, n: int) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + shape.eps)
        return x * w["gain"][n] + w["offset"][n]

    def linear(name: str, layer: int, x: Array) -> Array:
        return times(x, w[name][layer, :, :-1].T) + w[name][layer, :, -1]

    x = take_rows(w["embedding"], tokens) + w["position"][:time]
    for layer in range(shape.layers):
        a = norm(x, 2 * layer)
        q, k, v = (
            linear(name, layer, a).reshape(time, shape.heads, d).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = jnp.where(causal, times(q, k.swapaxes(1, 2)) / d**0.5, -jnp.inf)
        weights = jax.nn.softmax(scores)
        weights = jax.lax.stop_gradient(weights) if value_only else weights
        mixed = times(weights, v).swapaxes(0, 1).reshape(time, -1)
        x = x + linear("output", layer, mixed)
        x = x + linear("back", layer, act(linear("hidden", layer, norm(x, 2 * layer + 1))))
    return times(norm(x, 2 * shape.layers), w["embedding"].T)


def loss(
    w: Weights, tokens: Array, train: Array, shape: DecoderShape, value_only: bool = False
) -> Float[Array, ""]:
    """Summed cross-entropy of the words that follow the positions in `train`; not the last's."""
    logs = jax.nn.log_softmax(decode(w, tokens, shape, value_only))
    chosen = jnp.take_along_axis(logs[:-1], tokens[1:, None], -1)[:, 0]
    return -jnp.sum(jnp.where(train[:-1] != 0, chosen, 0))


def descend(
    w: Weights,
    tokens: Int[Array, "batch time"],
    train: Array,
    shape: DecoderShape,
    *,
    steps: int,
    rate: float | Array,
    trained: tuple[str, ...],
    value_only: bool = False,
) -> dict[str, Array]:
    """Weights of every sequence after `steps` of gradient descent, `[batch, ...]`.

    Args:
        trained: names of the weights that are; others stay as they are.
    """

    def one(tokens: Array, train: Array) -> dict[str, Array]:
        now = dict(w)
        for _ in range(steps):
            slope = jax.grad(loss)(now, tokens, train, shape, value_only)
            now |= {name: now[name] - rate * slope[name] for name in trained}
        return now

    return jax.vmap(one)(tokens, train)
