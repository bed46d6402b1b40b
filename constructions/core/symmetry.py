r"""The group that acts on the weights and leaves the function unchanged.

Write A = P W_V and B = scale W_K^T W_Q for the products of one head, both `[width, width]`. An
attention layer depends on its heads through these products alone, whatever the mixer, so that

    W_K -> R W_K,  W_Q -> R^-T W_Q;     W_V -> R W_V,  P -> P R^-1;     permuting, splitting heads

change nothing. Linear and centred attention also allow A -> s A, B -> B / s for s != 0, negative s
included; linear attention, antisymmetric parts of A x B in the Gram indices; and the ends of a
model, whatever they do not read. `constructions.core.canonical` has what is left: the invariants.

The functions are for use as a library: a statistic that claims to be invariant is tested with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.core.canonical import fitting
from constructions.core.config import HeadsConfig
from constructions.core.embedding import Gauge
from constructions.core.transformer import Transformer
from constructions.core.weights import Part

Arrays = dict[str, Any]

Edit = Callable[[HeadsConfig, Arrays, Array], tuple[HeadsConfig, Arrays]]


def transform(model: Transformer, key: Array, gauge: Gauge | None = None) -> Transformer:
    """A random element of all of the group below that the model's mixers allow."""
    keys = iter(jax.random.split(key, 7))
    mixers = {heads.mixer for layer in model.config.layers() for heads in layer.heads}
    if mixers <= {"linear"}:
        model = add_gram_pair(model, next(keys))
    if mixers <= {"linear", "centred"}:
        model = rescale_heads(model, next(keys))
    for act in (split_heads, permute_heads, change_key_basis, change_value_basis):
        model = act(model, next(keys))
    return model if gauge is None else fill_inert(model, gauge, next(keys))


def change_key_basis(model: Transformer, key: Array) -> Transformer:
    """W_K -> R W_K, W_Q -> R^-T W_Q with a random R of GL(key_dim) for every head; any mixer.

    R is orthogonal for mesa heads, whose regularisation sees lengths.
    """

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        least = 1.0 if heads.mixer == "mesa" else 0.5
        r, inverse = _bases(key, w["key"].shape[:2], heads.key_dim, w["key"].dtype, least)
        new = {"key": r @ w["key"], "query": jnp.swapaxes(inverse, -1, -2) @ w["query"]}
        if heads.bias:
            new["key_bias"] = _apply(r, w["key_bias"])
            new["query_bias"] = _apply(jnp.swapaxes(inverse, -1, -2), w["query_bias"])
        return heads, w | new

    return _map_heads(model, edit, key)


def change_value_basis(model: Transformer, key: Array) -> Transformer:
    """W_V -> R W_V, P -> P R^-1 with a random R of GL(value_dim) for every head; any mixer."""

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        r, inverse = _bases(key, w["value"].shape[:2], heads.value_dim, w["value"].dtype)
        new = {"value": r @ w["value"], "output": w["output"] @ inverse}
        if heads.bias:
            new["value_bias"] = _apply(r, w["value_bias"])
        return heads, w | new

    return _map_heads(model, edit, key)


def permute_heads(model: Transformer, key: Array) -> Transformer:
    """Heads of equal shape in another order, masks and scales included; any mixer."""

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        repeats = len(w["scale"])
        order = jax.vmap(lambda k: jax.random.permutation(k, heads.heads))(
            jax.random.split(key, repeats)
        )
        return heads, _each_head(w, jax.vmap(lambda a, i: a[i]), order)

    return _map_heads(model, edit, key)


def split_heads(model: Transformer, key: Array) -> Transformer:
    """Every head becomes two, with outputs u P and (1 - u) P; any mixer."""

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        u = jax.random.normal(key, w["scale"].shape, w["scale"].dtype)[..., None, None]
        new = _each_head(w, lambda a: jnp.concatenate([a, a], axis=1))
        new["output"] = jnp.concatenate([u * w["output"], (1 - u) * w["output"]], axis=1)
        return replace(heads, heads=2 * heads.heads), new

    return _map_heads(model, edit, key)


def rescale_heads(model: Transformer, key: Array) -> Transformer:
    """P -> s P, W_K -> W_K / s with a random s of either sign for every head.

    TypeError if the model has softmax heads, for which this is no symmetry.
    """

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        _allow(heads, ("linear", "centred"), "rescaling a head")
        sign, size = jax.random.split(key)
        shape, dtype = w["scale"].shape, w["scale"].dtype
        s = jax.random.rademacher(sign, shape, dtype)
        s = s * jax.random.uniform(size, shape, dtype, minval=0.5, maxval=2.0)
        new = {"output": w["output"] * s[..., None, None], "key": w["key"] / s[..., None, None]}
        if heads.bias:
            new["key_bias"] = w["key_bias"] / s[..., None]
        return heads, w | new

    return _map_heads(model, edit, key)


def add_gram_pair(model: Transformer, key: Array) -> Transformer:
    """Two more heads, wired as the first one, that cancel because the Gram matrix is symmetric.

    They have A B = p v^T (x) k q^T and -p k^T (x) v q^T: sum_j (v.h_j)(k.h_j) either way. TypeError
    if the model has other than linear heads.
    """

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        _allow(heads, ("linear",), "symmetry of the Gram matrix")
        repeats, _, _, width = w["key"].shape
        p, v, k, q = jax.random.normal(key, (4, repeats, width), w["key"].dtype)

        def pair(name: str, one: Array, two: Array) -> Array:
            own = jnp.zeros((repeats, 2, *w[name].shape[2:]), one.dtype)
            vectors = jnp.stack([one, two], axis=1)
            return own.at[..., 0].set(vectors) if name == "output" else own.at[:, :, 0].set(vectors)

        added = {"query": pair("query", q, q), "key": pair("key", k, v)}
        added |= {"value": pair("value", v, k), "output": pair("output", p, -p)}
        new = {}
        for name, a in w.items():
            copies = jnp.repeat(a[:, :1], 2, axis=1) if name != "output_bias" else a
            more = added.get(name, jnp.zeros_like(copies) if name.endswith("_bias") else copies)
            new[name] = a if name == "output_bias" else jnp.concatenate([a, more], axis=1)
        return replace(heads, heads=heads.heads + 2), new

    return _map_heads(model, edit, key)


def fill_inert(model: Transformer, gauge: Gauge, key: Array) -> Transformer:
    """Random weights where the gauge makes them inert.

    The last layer's P -> P + (I - read^+ read) R, and in a model of one layer
    W_Q -> W_Q + R (I - query query^+); any mixer. What is read, for inputs in the gauge's domain,
    does not change.

    Raises:
        TypeError: the last layer has an mlp or a norm, through which everything is read.
        ValueError: the last layer is applied more than once.
    """
    config = model.config
    segment, layer = config.segments[-1], config.segments[-1].pattern[-1]
    if layer.mlp or layer.norm or layer.mlp_norm or config.final_norm:
        raise TypeError("the last layer has an mlp or a norm, so none of its weights are inert")
    if segment.tied and segment.repeats > 1:
        raise ValueError(f"the last layer is applied {segment.repeats} times, must be once")
    read, query = fitting(gauge, config.width)
    outside = np.eye(config.width) - np.linalg.pinv(read) @ read
    idle = np.eye(config.width) - query @ np.linalg.pinv(query)
    keys = iter(jax.random.split(key, (len(layer.heads), 2)))

    def fill(part: Part) -> Arrays:
        w = part.weights
        where = len(config.segments) - 1, len(segment.pattern) - 1
        if part.kind != "heads" or (part.segment, part.position) != where:
            return w
        (one, two), p, q = next(keys), w["output"], w["query"]
        noise = jax.random.normal(one, p.shape[1:], p.dtype)
        new = {"output": p.at[-1].add(jnp.asarray(outside, p.dtype) @ noise)}
        if config.depth == 1:
            noise = jax.random.normal(two, q.shape[1:], q.dtype)
            new["query"] = q.at[-1].add(noise @ jnp.asarray(idle, q.dtype))
        return w | new

    return model.map_parts(fill)


def _allow(heads: HeadsConfig, mixers: tuple[str, ...], what: str) -> None:
    if heads.mixer not in mixers:
        raise TypeError(f"{what} needs heads with mixer {' or '.join(mixers)}, got {heads.mixer}")


def _bases(
    key: Array, batch: tuple[int, ...], size: int, dtype: Any, least: float = 0.5
) -> tuple[Array, Array]:
    """Random matrices `[*batch, size, size]`, singular values in [least, 1/least], and inverses.

    R = H diag(d) H' with reflections H = 1 - 2 v v^T / |v|^2, so that R^-1 = H' diag(1/d) H.
    """
    directions, middle = jax.random.split(key)
    v = jax.random.normal(directions, (2, *batch, size), dtype)
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    left, right = jnp.eye(size, dtype=dtype) - 2 * v[..., :, None] * v[..., None, :]
    d = jax.random.uniform(middle, (*batch, 1, size), dtype, minval=least, maxval=1 / least)
    return (left * d) @ right, (right / d) @ left


def _apply(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("rnij,rnj->rni", matrix, vector, precision="highest")


def _each_head(w: Arrays, change: Callable[..., Array], *more: Array) -> Arrays:
    """`change(array, *more)` for all arrays with a head axis."""
    return {n: a if n == "output_bias" else change(a, *more) for n, a in w.items()}


def _map_heads(model: Transformer, edit: Edit, key: Array) -> Transformer:
    """Edit every row of equal heads; arrays are `[repeat, head, ...]`."""
    arrays, config = model.arrays(), model.config
    rows = sum(len(layer.heads) for segment in config.segments for layer in segment.pattern)
    keys = iter(jax.random.split(key, max(rows, 1)))
    segments = []
    for segment, weights in zip(config.segments, arrays["segments"].values(), strict=True):
        pattern = []
        for layer, own in zip(segment.pattern, weights["layers"].values(), strict=True):
            groups = []
            for number, heads in enumerate(layer.heads):
                with jax.default_matmul_precision("highest"):
                    new, own["heads"][number] = edit(heads, own["heads"][number], next(keys))
                groups.append(new)
            pattern.append(replace(layer, heads=tuple(groups)))
        segments.append(replace(segment, pattern=tuple(pattern)))
    return Transformer(replace(config, segments=tuple(segments)), arrays)
