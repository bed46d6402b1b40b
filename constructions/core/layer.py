"""One layer of the transformer, as functions of its weights; see `constructions.core.transformer`.

A token mixer turns scores between tokens into the weights of an average. It maps scores `[...,
query, key]` and a mask of the same shape (True where a query may look) to attention weights a_ij;
the head's output is sum_j a_ij v_j. A query that may look nowhere gets zero. A mesa head is a
linear one whose queries were multiplied by the inverse Gram matrix of the keys so far,
`constructions.mesa_layer`. A transposed mixer normalises over queries and so needs all of them. New
mixers are added to `MIXERS` under their field's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from constructions.core.config import Config, HeadsConfig, LayerConfig, MlpConfig, NormConfig

__all__ = ["MIXERS", "TRANSPOSED", "centred", "linear", "softmax", "transposed_softmax"]

Scores = Float[Array, "*batch query key"]
Mask = Bool[Array, "*#batch query key"]


def linear(scores: Scores, mask: Mask) -> Scores:
    """a_ij = s_ij: linear attention, softmax attention without the softmax."""
    return jnp.where(mask, scores, 0)


def centred(scores: Scores, mask: Mask) -> Scores:
    """a_ij = s_ij - mean_j s_ij: what two softmax heads with scores +-eps s give to first order.

    von Oswald et al. 2022 (arXiv 2212.07677), appendix A.9.
    """
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean = jnp.where(mask, scores, 0).sum(-1, keepdims=True) / count
    return jnp.where(mask, scores - mean, 0)


def softmax(scores: Scores, mask: Mask) -> Scores:
    """a_ij = exp(s_ij) / sum_j exp(s_ij) over the keys in the mask."""
    # jax.nn.softmax(where=mask) returns NaN for a query without keys
    fixed = jax.lax.stop_gradient(scores)
    highest = jnp.max(fixed, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - shift, 0)), 0)
    # 1 in the place of an empty sum, not a tiny number: derivatives divide by its square
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def transposed_softmax(scores: Scores, mask: Mask) -> Scores:
    """a_ij = exp(s_ij) / sum_i exp(s_ij) over the queries that may look at key j.

    With the roles of queries and keys of a softmax head exchanged it has that head's weights,
    transposed: as the backward pass of attention needs them.
    """
    swapped = softmax(jnp.swapaxes(scores, -1, -2), jnp.swapaxes(mask, -1, -2))
    return jnp.swapaxes(swapped, -1, -2)


MIXERS: dict[str, Callable[[Scores, Mask], Scores]] = {
    "linear": linear,
    "centred": centred,
    "softmax": softmax,
    "mesa": linear,
    "transposed_softmax": transposed_softmax,
}

#: Mixers that normalise over queries: all of them are computed, whichever are read.
TRANSPOSED = ("transposed_softmax",)


def gelu_derivative(u: Array) -> Array:
    """d gelu(u) / du of u (1 + tanh w(u)) / 2 with w(u) = sqrt(2 / pi) (u + 0.044715 u^3)."""
    slope = math.sqrt(2 / math.pi)
    t = jnp.tanh(slope * (u + 0.044715 * u**3))
    return (1 + t) / 2 + u * (1 - t**2) * slope * (1 + 3 * 0.044715 * u**2) / 2


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda u: u,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "tanh": jnp.tanh,
    "square": jnp.square,
    "relu_derivative": lambda u: (u > 0).astype(u.dtype),
    "gelu_derivative": gelu_derivative,
}


class Edit(NamedTuple):
    """Replace a site's value by `value` where `where`; both broadcast to [layer, batch, ...]."""

    where: Array
    value: Array


class Tap:
    """Edits, then records, the values of one layer that somebody asked for."""

    def __init__(self, sites: tuple[str, ...], edits: Mapping[str, Edit]) -> None:
        self.sites, self.edits, self.found = sites, edits, {}

    def wants(self, site: str) -> bool:
        """Whether somebody reads or edits the site."""
        return site in self.sites or site in self.edits

    def __call__(self, site: str, value: Array, axis: int | None = None, size: int = 0) -> Array:
        """`value` after edits; `axis` is padded to `size` in what is recorded."""
        if not self.wants(site):
            return value
        kept = value.shape[axis] if axis is not None else 0
        if axis is not None:
            pad = [(0, 0)] * value.ndim
            pad[axis] = (0, size - kept)
            value = jnp.pad(value, pad)
        if site in self.edits:
            value = jnp.where(self.edits[site].where, self.edits[site].value, value)
        if site in self.sites:
            self.found[site] = value
        return value if axis is None else jax.lax.slice_in_dim(value, 0, kept, axis=axis)


def run_layer(
    layer: LayerConfig,
    config: Config,
    weights: Any,
    stream: Array,
    groups: Array,
    read: slice | None,
    tap: Tap,
) -> Array:
    """The stream after a layer, `[batch, read or token, width]`."""
    if read is not None and any(heads.mixer in TRANSPOSED for heads in layer.heads):
        return run_layer(layer, config, weights, stream, groups, None, tap)[:, read]
    stream = tap("residual", stream)
    stream, x = _apply_norm(layer.norm, config, weights.get("norm", {}), stream, groups)
    chosen = slice(None) if read is None else read
    stream, queries = stream[:, chosen], x[:, chosen]
    if layer.heads:
        stream = stream + _heads(layer, config, weights["heads"], queries, x, groups, chosen, tap)
    elif "attention" in tap.sites or "head_output" in tap.sites:
        b, q, t, h, w = len(x), queries.shape[1], x.shape[1], config.max_heads, config.width
        tap("attention", jnp.zeros((b, h, q, t), x.dtype))
        tap("head_output", jnp.zeros((b, q, h, w), x.dtype))
    stream = tap("middle", stream)
    if layer.mlp is None:
        tap("mlp_hidden", jnp.zeros((*stream.shape[:2], config.max_hidden), x.dtype))
        return stream
    groups = groups[..., chosen]
    stream, x = _apply_norm(layer.mlp_norm, config, weights.get("mlp_norm", {}), stream, groups)
    update = _mlp(layer.mlp, config, weights["mlp"], x, tap)
    return stream + _only(layer.mlp.tokens, config, groups, update)


def _heads(
    layer: LayerConfig,
    config: Config,
    weights: Any,
    queries: Array,
    x: Array,
    groups: Array,
    chosen: slice,
    tap: Tap,
) -> Array:
    """sum_n P^n a^n W_V^n x for the tokens in `queries`."""
    einsum = partial(jnp.einsum, precision=config.precision)
    attention: list[Any] = []
    for number, heads in enumerate(layer.heads):
        w = weights[number]
        if heads.mixer == "mesa":  # its weights between tokens are formed only where wanted
            wanted = tap.wants("attention")
            attention.append(_mesa_weights(einsum, w, x, groups, chosen) if wanted else None)
            continue
        q = _affine(einsum, "bth,nkh->btnk", queries, w["query"], w.get("query_bias"))
        if _absorbs(heads, queries, x):
            q = einsum("bqnk,nkh->bqnh", q, w["key"])
            scores = einsum("bqnh,bth->bnqt", q, x)
        else:
            k = _affine(einsum, "bth,nkh->btnk", x, w["key"], w.get("key_bias"))
            scores = einsum("bqnk,btnk->bnqt", q, k)
        scores = scores * w["scale"][:, None, None]
        weights_between = MIXERS[heads.mixer](scores, _mask(w, groups, chosen))
        attention.append(weights_between * _factor(einsum, heads, w, queries, x))
    sizes = [heads.heads for heads in layer.heads]
    if tap.wants("attention"):
        joined = tap("attention", jnp.concatenate(attention, 1), axis=1, size=config.max_heads)
        attention = _split(joined, sizes, axis=1)
    mixed = []
    for number, (heads, a) in enumerate(zip(layer.heads, attention, strict=True)):
        w = weights[number]
        if a is None:
            mixed.append(_regress(einsum, w, x, groups)[:, chosen])
        elif _absorbs(heads, queries, x):
            mixed.append(einsum("bqnh,nvh->bqnv", einsum("bnqt,bth->bqnh", a, x), w["value"]))
        else:
            v = _affine(einsum, "bth,nvh->btnv", x, w["value"], w.get("value_bias"))
            mixed.append(einsum("bnqt,btnv->bqnv", a, v))
    outputs = [weights[number]["output"] for number in range(len(mixed))]
    if tap.wants("head_output"):
        each = [einsum("bqnv,nhv->bqnh", m, p) for m, p in zip(mixed, outputs, strict=True)]
        joined = tap("head_output", jnp.concatenate(each, 2), axis=2, size=config.max_heads)
        update = joined.sum(2)
    else:
        each = [einsum("bqnv,nhv->bqh", m, p) for m, p in zip(mixed, outputs, strict=True)]
        update = jnp.stack(each).sum(0) if len(each) > 1 else each[0]
    biases = [w["output_bias"] for w in weights.values() if "output_bias" in w]
    return update + sum(biases) if biases else update


def _factor(
    einsum: Any, heads: HeadsConfig, w: Mapping[str, Array], queries: Array, x: Array
) -> Array | int:
    """What the weights of attention are multiplied by, `[batch, head, query, key]`."""
    if not heads.factor_dim:
        return 1
    left = _affine(einsum, "bth,nfh->btnf", queries, w["factor_query"], w.get("factor_query_bias"))
    right = _affine(einsum, "bth,nfh->btnf", x, w["factor_key"], w.get("factor_key_bias"))
    return einsum("bqnf,btnf->bnqt", left, right)


def _absorbs(heads: HeadsConfig, queries: Array, x: Array) -> bool:
    """Whether it is cheaper to take W_K^T W_Q x_i and sum_j a_ij x_j first.

    Products are associative: keys and values need not be projected where few tokens are read.
    """
    q, t, width, rows = queries.shape[1], *x.shape[1:], heads.key_dim + heads.value_dim
    # multiplications a head, W_Q and P left aside as they are the same
    projected = t * width * rows + q * t * rows
    absorbed = q * width * rows + 2 * q * t * width
    return not heads.bias and heads.mixer != "mesa" and absorbed < projected


def _regress(einsum: Any, w: Mapping[str, Array], x: Array, groups: Array) -> Array:
    """sum_j a_ij v_j of mesa heads at all tokens, `[batch, token, head, row]`."""
    from constructions.mesa_layer import mesa  # a dozen modules, of which no other mixer has need

    query, key, ridge, gates = _systems(einsum, w, x, groups)
    value = _affine(einsum, "bth,nvh->btnv", x, w["value"], w.get("value_bias"))
    mixed = mesa(query, key, value, ridge, **gates)
    acts = jnp.moveaxis(w["query_groups"][:, groups], 0, -1)
    return jnp.where(acts[..., None], mixed, 0) * w["scale"][:, None]


def _mesa_weights(
    einsum: Any, w: Mapping[str, Array], x: Array, groups: Array, chosen: slice
) -> Array:
    """a_ij of mesa heads, `[batch, head, read, token]`."""
    from constructions.mesa_layer import mesa_attention

    query, key, ridge, gates = _systems(einsum, w, x, groups)
    weights = mesa_attention(query, key, ridge, **gates)[:, :, chosen]
    return MIXERS["mesa"](weights * w["scale"][:, None, None], _mask(w, groups, chosen))


def _systems(
    einsum: Any, w: Mapping[str, Array], x: Array, groups: Array
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Queries, keys, regularisation and gates of mesa heads, as `mesa` takes them.

    A token that a head does not attend to has key 0, and a forget gate of 1.
    """
    query, key = (
        _affine(einsum, "bth,nkh->btnk", x, w[name], w.get(f"{name}_bias"))
        for name in ("query", "key")
    )
    visible = jnp.moveaxis(w["key_groups"][:, groups], 0, -1)  # [(batch,) token, head]
    key, ridge = jnp.where(visible[..., None], key, 0), jnp.exp(w["log_regularization"])
    if "input_gate" not in w:
        return query, key, ridge, {}
    enters, keeps = (
        jax.nn.sigmoid(_affine(einsum, "bth,nh->btn", x, w[name], w[f"{name}_bias"]))
        for name in ("input_gate", "forget_gate")
    )
    keeps = jnp.maximum(keeps, jnp.finfo(keeps.dtype).tiny)  # the sigmoid may round to 0
    return query, key, ridge, {"input_gate": enters, "forget_gate": jnp.where(visible, keeps, 1)}


def _mask(w: Mapping[str, Array], groups: Array, chosen: slice) -> Array:
    """Which keys a query sees, `[(batch,) head, query, key]`; sinks at any offset."""
    tokens = jnp.arange(groups.shape[-1])
    offset = tokens[None, :] - tokens[chosen, None]
    low, high = w["window"][:, 0, None, None], w["window"][:, 1, None, None]
    near = (low <= offset) & (offset <= high)
    acts = jnp.moveaxis(w["query_groups"][:, groups[..., chosen]], 0, -2)
    visible, sinks = (jnp.moveaxis(w[g][:, groups], 0, -2) for g in ("key_groups", "sink_groups"))
    return acts[..., :, None] & (near & visible[..., None, :] | sinks[..., None, :])


def _mlp(mlp: MlpConfig, config: Config, w: Mapping[str, Array], x: Array, tap: Tap) -> Array:
    einsum = partial(jnp.einsum, precision=config.precision)
    u = _affine(einsum, "bth,uh->btu", x, w["hidden"], w.get("hidden_bias"))
    u = ACTIVATIONS[mlp.activation](u)
    if mlp.gated:
        u = u * _affine(einsum, "bth,uh->btu", x, w["gate"], w.get("gate_bias"))
    u = tap("mlp_hidden", u, axis=2, size=config.max_hidden)
    return _affine(einsum, "btu,hu->bth", u, w["output"], w.get("output_bias"))


def _affine(einsum: Any, equation: str, x: Array, w: Array, bias: Array | None) -> Array:
    out = einsum(equation, x, w)
    return out if bias is None else out + bias


def _split(joined: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
    return jnp.split(joined, ends, axis=axis)


def _apply_norm(
    norm: NormConfig | None, config: Config, w: Mapping[str, Array], stream: Array, groups: Array
) -> tuple[Array, Array]:
    """(the stream, what the next part of the layer reads)."""
    if norm is None:
        return stream, stream
    if norm.read is None or norm.write is None:
        return stream, normalise(norm, w, stream)
    normed = normalise(norm, w, stream[..., slice(*norm.read)])
    normed = _only(norm.tokens, config, groups, normed)
    stream = stream.at[..., slice(*norm.write)].add(normed)
    return stream, stream


def _only(tokens: tuple[str, ...] | None, config: Config, groups: Array, update: Array) -> Array:
    """`update` at tokens of these kinds, 0 elsewhere."""
    if tokens is None:
        return update
    acts = jnp.asarray([group in tokens for group in config.token_groups])
    return jnp.where(acts[groups][..., None], update, 0)


def normalise(norm: NormConfig, w: Mapping[str, Array], v: Array) -> Array:
    """`v` with mean 0 ("layer") and root mean square 1, times a gain, plus an offset."""
    if norm.kind == "layer":
        v = v - v.mean(-1, keepdims=True)
    v = v * jax.lax.rsqrt(jnp.square(v).mean(-1, keepdims=True) + norm.eps)
    return v * w.get("gain", 1) + w.get("offset", 0)
