"""What TinT simulates, as plain array code: a decoder, trained on its own input by autograd.

    theta_0 = the auxiliary model's,  theta_(s+1) = theta_s - eta grad L(theta_s),
    L(theta) = - sum_t m_t log p_theta(x_(t+1) | x_1 .. x_t)

for every sequence on its own, then the logits of theta_S on the same sequence. "Value-only"
attention counts its weights a_ij as constants where it is differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from constructions.tint.auxiliary import DecoderShape

Weights = Mapping[str, Array]  # as `from_arrays` gives them


def from_arrays(arrays: Any) -> dict[str, Array]:
    """The weights of a decoder by their names here, from `Transformer.arrays()`.

    Returns:
        query, key, value, output, hidden, back: [W b], `[layer, rows, columns + 1]`;
        gain, offset: of the norms, `[2 layers + 1, width]`;
        embedding `[words, width]`; position `[positions, width]`.
    """
    layer = arrays["segments"][0]["layers"][0]
    heads, mlp = layer["heads"][0], layer["mlp"]
    count, width = heads["output_bias"].shape

    def augmented(w: Array, b: Array) -> Array:
        w = w.reshape(count, -1, w.shape[-1])
        return jnp.concatenate([w, b.reshape(count, -1, 1)], -1)

    out = jnp.moveaxis(heads["output"], 1, 2).reshape(count, width, -1)
    norms = [layer["norm"], layer["mlp_norm"]]
    found = {
        name: augmented(heads[name], heads[f"{name}_bias"]) for name in ("query", "key", "value")
    }
    return found | {
        "output": augmented(out, heads["output_bias"]),
        "hidden": augmented(mlp["hidden"], mlp["hidden_bias"]),
        "back": augmented(mlp["output"], mlp["output_bias"]),
        **{
            name: jnp.concatenate(
                [
                    jnp.stack([norm[name] for norm in norms], 1).reshape(-1, width),
                    arrays["final_norm"][name][None],
                ]
            )
            for name in ("gain", "offset")
        },
        "embedding": arrays["tokens"]["embedding"],
        "position": arrays["tokens"]["position"],
    }


def to_arrays(weights: Weights, arrays: Any) -> Any:
    """The inverse of `from_arrays`, for weights with any leading axes; wiring as in `arrays`.

    Wiring gets the leading axes as well, so that every leaf has them.
    """
    layer = arrays["segments"][0]["layers"][0]
    old, lead = layer["heads"][0], weights["embedding"].shape[:-2]
    count, heads, rows, width = old["query"].shape

    def wide(a: Array) -> Array:
        return jnp.broadcast_to(a, (*lead, *a.shape))

    def matrix(name: str) -> Array:
        return weights[name][..., :-1]

    def bias(name: str) -> Array:
        return weights[name][..., -1]

    new = {name: wide(old[name]) for name in old}
    for name in ("query", "key", "value"):
        new[name] = matrix(name).reshape(*lead, count, heads, rows, width)
        new[f"{name}_bias"] = bias(name).reshape(*lead, count, heads, rows)
    out = matrix("output").reshape(*lead, count, width, heads, rows)
    new["output_bias"] = bias("output")
    new["output"] = jnp.moveaxis(out, -2, -3)
    norms = {n: weights[n][..., :-1, :].reshape(*lead, count, 2, width) for n in ("gain", "offset")}
    found = {
        "heads": {0: new},
        "norm": {n: a[..., 0, :] for n, a in norms.items()},
        "mlp_norm": {n: a[..., 1, :] for n, a in norms.items()},
        "mlp": {
            "hidden": matrix("hidden"),
            "hidden_bias": bias("hidden"),
            "output": matrix("back"),
            "output_bias": bias("back"),
        },
    }
    return {
        "segments": {0: {"layers": {0: found}}},
        "final_norm": {n: weights[n][..., -1, :] for n in ("gain", "offset")},
        "tokens": {n: weights[n] for n in ("embedding", "position")},
    }


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

    x = w["embedding"][tokens] + w["position"][:time]
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
    rate: float,
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
