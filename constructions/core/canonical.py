r"""The canonical form of linear attention: what its weights determine, and nothing else.

Write A = P W_V and B = scale W_K^T W_Q for the products of one head. A layer of linear heads is

    h_i  <-  h_i + sum_n A^n G_i^n B^n h_i,      G_i^n = sum_j h_j h_j^T over the keys j of token i,

and since G is symmetric and heads with the same mask share it, the layer depends on

    T_{o,a,b,c} = Sym_ab sum_n A^n_{oa} B^n_{bc}

only: two layers with equal T are the same function. The last layer acts through what is read of
it, and the only layer through what the queries may be (`Gauge`). Raw weights are therefore never
compared; `canonical_distance` compares T.

In a causal or context-only mask T is also all that can be known of a layer. Where each token sees
only itself, G_i h_i is cubic in h_i and further parts of T drop out; T is then still invariant, but
two equal functions may differ in it.

Masks enter kind by kind: what tokens of kind p take from keys of kind q is the sum of T over the
heads that let p see q, and this is what two models are compared in. Tokens that are read enter the
first layer as in `Gauge`, so that heads which see them as keys too (the query among the keys)
differ from heads which do not by what those keys add, and by nothing where they add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from constructions.core.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.core.embedding import Gauge
from constructions.core.transformer import Transformer
from constructions.core.weights import Part
from synthetic.compilation import compile_once


class HeadProducts(NamedTuple):
    """What every head does, for all layers applied; layers with fewer heads are padded with zeros.

    Attributes:
        output_value: A = P W_V.
        key_query: B = scale W_K^T W_Q.
        wiring: window (2 entries), then query groups, key groups, sink groups.
    """

    output_value: Float[Array, "layer head out width"]
    key_query: Float[Array, "layer head width values"]
    wiring: Int[Array, "layer head entries"]


@compile_once
def head_products(model: Transformer) -> HeadProducts:
    """The products P W_V and scale W_K^T W_Q of every head of every layer applied; any mixer.

    For softmax heads these two, up to the order of the heads, are what the weights determine
    (biases, regularisation and gates left aside). A looped model shows its stored layers once per
    application.
    """
    parts, stored = [], model.arrays()["segments"].values()
    for weights, segment in zip(stored, model.config.segments, strict=True):
        layers = [
            _layer_products(layer["heads"].values(), segment.stacked, model.config)
            for layer in weights["layers"].values()
        ]
        # [repeat, pattern, ...] -> [layer, ...], the order in which they are applied
        joined = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *layers)
        if segment.tied:
            joined = jax.tree.map(lambda a, n=segment.repeats: jnp.repeat(a, n, axis=0), joined)
        parts.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), joined))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _layer_products(groups: Any, stacked: int, config: Config) -> HeadProducts:
    found = []
    for w in groups:
        a = jnp.einsum("rnov,rnva->rnoa", w["output"], w["value"], precision="highest")
        b = jnp.einsum("rnkb,rnkc->rnbc", w["key"], w["query"], precision="highest")
        wiring = [w["window"], w["query_groups"], w["key_groups"], w["sink_groups"]]
        wiring = jnp.concatenate([part.astype(jnp.int32) for part in wiring], axis=-1)
        found.append(HeadProducts(a, b * w["scale"][..., None, None], wiring))
    square, entries = (config.width, config.width), 2 + 3 * len(config.token_groups)
    spare = config.max_heads - sum(len(p.output_value[0]) for p in found)
    if spare or not found:
        nothing = jnp.zeros((stacked, spare, *square))
        dtype = found[0].output_value.dtype if found else nothing.dtype
        nothing = nothing.astype(dtype)
        found.append(HeadProducts(nothing, nothing, jnp.zeros((stacked, spare, entries), int)))
    return HeadProducts(*(jnp.concatenate(part, axis=1) for part in zip(*found, strict=True)))


def layer_tensors(model: Transformer, gauge: Gauge) -> tuple[Float[Array, "out a b values"], ...]:
    """`canonical` without the check that the heads of a layer are wired alike, for use in `jit`."""
    check_linear(model.config)
    return _tensors(model, *fitting(gauge, model.config.width))


@compile_once
def _tensors(model: Transformer, read: ArrayLike, query: ArrayLike) -> tuple[Array, ...]:
    products, last = _contract(head_products(model), read, query)
    tensors = tuple(_tensor(p.output_value, p.key_query).sum(0) for p in _layers(products))
    return (*tensors, _tensor(last.output_value, last.key_query).sum(0))


def canonical(model: Transformer, gauge: Gauge) -> tuple[Float[Array, "out a b values"], ...]:
    """T of every layer applied (see the module's equations), `[width, width, width, width]`.

    In the last layer the first axis is contracted with `gauge.read`, so that it is `[rows, ...]`;
    in the only layer of a model the last axis is contracted with `gauge.query` as well.

    Raises:
        TypeError: the model is more than linear attention, or a layer has heads with different
            masks (`canonical_distance` takes these), or its masks are traced.
        ValueError: the gauge does not have the model's width.
    """
    check_linear(model.config)
    _check_one_wiring(model)
    return layer_tensors(model, gauge)


def canonical_distance(
    model: Transformer, reference: Transformer, gauge: Gauge
) -> Float[Array, ""]:
    """||T - T*|| / ||T*||, the norm taken over all layers together; pure, differentiable.

    The norm runs over what tokens of each kind take from keys of each kind (see the module's text),
    where heads that act on the same pairs of kinds count once. Only `gauge.kinds` count as readers
    in the last layer, and as keys of the first layer they are what `gauge.query` makes of them: a
    mask that differs without effect is no distance. Windows are compared as they stand: tensors of
    different windows are orthogonal, so that a model with another window is far from its reference.

    Raises:
        TypeError: either model is more than linear attention.
        ValueError: depths, widths or token groups differ, or the gauge names an unknown kind.
    """
    difference, scale = _squared_norms(model, reference, gauge)
    return _root(difference.sum()) / _root(scale.sum())


def from_canonical(tensors: Sequence[Array], like: Transformer, gauge: Gauge) -> Transformer:
    """A model with these canonical forms, and the masks of `like`.

    Head (o, a) of a layer has A = e_o e_a^T and B = T[o, a]: no factorisation, hence no rounding.
    Axes that the gauge has contracted come back through its pseudo-inverse.

    Args:
        tensors: one a layer, as `canonical` returns them; they need not be symmetric.
        like: where the masks come from, and the precision.
        gauge: the one that `canonical` was given.
    """
    config, width = like.config, like.config.width
    check_linear(config)
    _check_one_wiring(like)
    read, query = (np.linalg.pinv(m) for m in fitting(gauge, width))
    if len(tensors) != config.depth:
        raise ValueError(f"{len(tensors)} tensors for a model of {config.depth} layers")
    dtype = tensors[0].dtype
    eye = jnp.eye(width, dtype=dtype)
    wiring = head_products(like).wiring[:, 0]
    segments, arrays = [], {}
    bounds = [(0, config.depth - 1)] if config.depth > 1 else []
    for start, stop in [*bounds, (config.depth - 1, config.depth)]:
        out = jnp.asarray(read, dtype) if stop == config.depth else eye
        into = jnp.asarray(query, dtype) if config.depth == 1 else eye
        rows, shape = out.shape[1], (out.shape[1], width, width, into.shape[0])
        for number, tensor in enumerate(tensors[start:stop], start=start):
            if tensor.shape != shape:
                raise ValueError(f"tensor {number} has shape {tensor.shape}, must be {shape}")
        heads, repeats = rows * width, stop - start
        stacked = jnp.stack([jnp.asarray(t) for t in tensors[start:stop]])
        b = jnp.einsum("roabv,vc->roabc", stacked, into, precision="highest")
        own = {
            "query": b.reshape(repeats, heads, width, width),
            "key": jnp.broadcast_to(eye, (repeats, heads, width, width)),
            "value": jnp.tile(eye, (rows, 1))[None, :, None, :].repeat(repeats, 0),
            "output": jnp.repeat(out.T, width, axis=0)[None, :, :, None].repeat(repeats, 0),
            "scale": jnp.ones((repeats, heads), dtype),
        }
        every = jnp.broadcast_to(wiring[start:stop, None], (repeats, heads, wiring.shape[-1]))
        kinds = len(config.token_groups)
        parts = jnp.split(every, [2, 2 + kinds, 2 + 2 * kinds], axis=-1)
        own["window"] = parts[0]
        for name, part in zip(("query", "key", "sink"), parts[1:], strict=True):
            own[f"{name}_groups"] = part.astype(bool)
        layer = LayerConfig((HeadsConfig("linear", heads, width, 1),))
        arrays[len(segments)] = {"layers": {0: {"heads": {0: own}}}}
        segments.append(SegmentConfig((layer,), repeats))
    return Transformer(replace(config, segments=tuple(segments)), {"segments": arrays})


def without_inert(model: Transformer, gauge: Gauge) -> Transformer:
    """The same function of the same inputs, with every weight that has no effect set to zero.

    What a layer writes where nobody reads is left as it was initialised by training; a layer that
    is applied once more than it was trained for would read it. Errors as in `canonical`.
    """
    check_linear(model.config)
    _check_one_wiring(model)
    read, query = fitting(gauge, model.config.width)
    if model.config.segments[-1].tied and model.config.segments[-1].repeats > 1:
        # the last layer is stored once for all its applications, of which only the last is free
        return from_canonical(canonical(model, gauge), model, gauge)
    # what is read of P stays P^+ P of itself; so does, in the only layer, what enters as a query
    return _bare(model, np.linalg.pinv(read) @ read, query @ np.linalg.pinv(query))


@compile_once
def _bare(model: Transformer, kept: ArrayLike, entering: ArrayLike) -> Transformer:
    last = len(model.config.segments) - 1, len(model.config.segments[-1].pattern) - 1

    def bare(part: Part) -> dict[str, Array]:
        w = part.weights
        if part.kind != "heads" or (part.segment, part.position) != last:
            return w
        out = jnp.asarray(kept, w["output"].dtype)
        written = jnp.einsum("oi,niv->nov", out, w["output"][-1], precision="highest")
        new = {"output": w["output"].at[-1].set(written)}
        if model.config.depth == 1:
            asked = jnp.einsum(
                "nki,ic->nkc", w["query"][-1], jnp.asarray(entering, out.dtype), precision="highest"
            )
            new["query"] = w["query"].at[-1].set(asked)
        return w | new

    return model.map_parts(bare)


def _tensor(a: Array, b: Array) -> Array:
    """Sym_ab A_oa B_bc for every head, `[head, o, a, b, c]`."""
    t = a[:, :, :, None, None] * b[:, None, None, :, :]
    return (t + jnp.swapaxes(t, 2, 3)) / 2


def _layers(products: HeadProducts) -> Iterator[HeadProducts]:
    for layer in range(len(products.wiring)):
        yield HeadProducts(*(part[layer] for part in products))


def _contract(
    products: HeadProducts, read: ArrayLike, query: ArrayLike
) -> tuple[HeadProducts, HeadProducts]:
    """All layers but the last, and the last one as the gauge's two maps see it."""
    a, b, wiring = (part[-1] for part in products)
    a = jnp.einsum("ro,noa->nra", jnp.asarray(read, a.dtype), a, precision="highest")
    if len(products.wiring) == 1:
        b = jnp.einsum("nbc,cv->nbv", b, jnp.asarray(query, b.dtype), precision="highest")
    return HeadProducts(*(part[:-1] for part in products)), HeadProducts(a, b, wiring)


def fitting(gauge: Gauge, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The gauge's two maps; ValueError unless they have this width."""
    if gauge.read.shape[1] != width or gauge.query.shape[0] != width:
        raise ValueError(
            f"gauge has read {gauge.read.shape} and query {gauge.query.shape}, must be "
            f"[rows, {width}] and [{width}, values]"
        )
    return gauge.read, gauge.query


def _squared_norms(
    model: Transformer, reference: Transformer, gauge: Gauge
) -> tuple[Float[Array, " layer"], Float[Array, " layer"]]:
    """||T - T*||^2 and ||T*||^2 of every layer."""
    for config in (model.config, reference.config):
        check_linear(config)
    if apart := unlike(model.config, reference.config):
        raise ValueError(apart)
    trained, built = head_products(model), head_products(reference)
    minus = built._replace(output_value=-built.output_value)
    both = HeadProducts(*(jnp.concatenate(p, axis=1) for p in zip(trained, minus, strict=True)))
    groups = model.config.token_groups
    return _norms(both, gauge, groups), _norms(built, gauge, groups)


def _norms(products: HeadProducts, gauge: Gauge, groups: Sequence[str]) -> Float[Array, " layer"]:
    inner, last = _contract(products, *fitting(gauge, products.key_query.shape[-1]))
    depth = len(products.wiring)
    end = _norm(last, _pairs(gauge, groups, 0 if depth == 1 else depth - 1, depth))[None]
    if depth == 1:
        return end
    start = _norm(HeadProducts(*(p[0] for p in inner)), _pairs(gauge, groups, 0, depth))[None]
    if depth == 2:
        return jnp.concatenate([start, end])
    # one layer at a time: T has width^4 entries
    middle = partial(_norm, pairs=_pairs(gauge, groups, 1, depth))
    rest = jax.lax.map(middle, HeadProducts(*(p[1:] for p in inner)))
    return jnp.concatenate([start, rest, end])


class _Pair(NamedTuple):
    """Tokens of one kind with keys of another; the maps through which they enter, None for any."""

    query: int
    key: int
    into_query: np.ndarray | None
    into_key: np.ndarray | None

    def freer(self, other: _Pair) -> bool:
        """Whether the other pair's inputs are among this one's, and fewer."""
        ours, theirs = ((p.into_query is None, p.into_key is None) for p in (self, other))
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def _pairs(gauge: Gauge, groups: Sequence[str], layer: int, depth: int) -> list[_Pair]:
    """The pairs of kinds that matter in a layer, counted from 0."""
    for kind in gauge.kinds or ():
        if kind not in groups:
            raise ValueError(f"gauge has kind {kind!r}, must be one of {tuple(groups)}")
    bound = {groups.index(kind) for kind in gauge.kinds or ()} if layer == 0 else set()
    read = gauge.kinds if gauge.kinds is not None and layer == depth - 1 else groups
    query = gauge.query
    return [
        _Pair(
            groups.index(p),
            q,
            # in the only layer B already ends in the gauge's map
            query if groups.index(p) in bound and depth > 1 else None,
            query if q in bound else None,
        )
        for p in read
        for q in range(len(groups))
    ]


def _norm(layer: HeadProducts, pairs: Sequence[_Pair]) -> Float[Array, ""]:
    """||sum of the tensors of the heads that act on a pair||^2, over pairs of kinds and windows.

    Pairs and windows that the same heads act on are counted once, those with the freest inputs.
    Masks may be traced, so heads are not sorted into classes: every head stands for the class of
    those with its window, and a class that is found m times has weight 1 / m.
    """
    heads, kinds = len(layer.wiring), (layer.wiring.shape[-1] - 2) // 3
    window, rest = layer.wiring[:, :2], layer.wiring[:, 2:] != 0
    acts, sees, sinks = (rest[:, n * kinds : (n + 1) * kinds] for n in range(3))
    classes = []
    for pair in pairs:
        on = acts[:, pair.query] & (sees[:, pair.key] | sinks[:, pair.key])
        # sinks are seen at any offset
        near = jnp.where(sinks[:, pair.key, None], jnp.iinfo(window.dtype).max, window)
        alike = (near[:, None] == near[None]).all(-1)
        classes.append(alike & on[:, None] & on[None])
    found = jnp.concatenate(classes)  # [pair and head, head]
    same = (found[:, None] == found[None]).all(-1)
    kind = [(p.into_query is None, p.into_key is None) for p in pairs]
    equal = np.kron([[a == b for b in kind] for a in kind], np.ones((heads, heads), bool))
    freer = np.kron([[b.freer(a) for b in pairs] for a in pairs], np.ones((heads, heads), bool))
    counted = found.any(1) & ~(same & freer).any(1)
    weight = jnp.where(counted, 1 / (same & equal).sum(1), 0)
    total = jnp.zeros((), layer.key_query.dtype)
    for free in dict.fromkeys(kind):
        chosen = [n for n, k in enumerate(kind) if k == free]
        pair = pairs[chosen[0]]
        each = _tensor(*_entering(layer, pair.into_query, pair.into_key))
        rows = np.concatenate([np.arange(n * heads, (n + 1) * heads) for n in chosen])
        picked = found[rows].astype(each.dtype)
        sums = jnp.einsum("mn,noabc->moabc", picked, each, precision="highest")
        squares = jnp.square(sums).sum((1, 2, 3, 4))
        total += (weight[rows].astype(each.dtype) * squares).sum()
    return total


def _entering(
    layer: HeadProducts, into_query: np.ndarray | None, into_key: np.ndarray | None
) -> tuple[Array, Array]:
    """A and B of tokens and keys that enter through these maps."""
    a, b, _ = layer
    einsum = partial(jnp.einsum, precision="highest")
    if into_key is not None:
        a = einsum("noa,av->nov", a, jnp.asarray(into_key, a.dtype))
        b = einsum("nbc,bv->nvc", b, jnp.asarray(into_key, b.dtype))
    if into_query is not None:
        b = einsum("nbc,cv->nbv", b, jnp.asarray(into_query, b.dtype))
    return a, b


def _root(square: Array) -> Array:
    """Square root with derivative 0, not NaN, at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def obstacle(config: Config) -> str:
    """What a model is beyond linear attention, in one phrase; "" where it is nothing more."""
    for number, layer in enumerate(config.layers(), start=1):
        found = [f"{h.mixer} heads" for h in layer.heads if h.mixer != "linear"]
        found += ["factors" for h in layer.heads if h.factor_dim]
        found += ["biases" for h in layer.heads if h.bias]
        found += ["an mlp"] * (layer.mlp is not None)
        found += ["a norm"] * (layer.norm is not None or layer.mlp_norm is not None)
        if found:
            return f"layer {number} has {found[0]}"
    return "the model has a final norm" if config.final_norm is not None else ""


def unlike(config: Config, reference: Config) -> str:
    """In which size a model differs from its reference, in one phrase; "" where in none."""
    for name in ("depth", "width", "token_groups"):
        one, other = getattr(config, name), getattr(reference, name)
        if one != other:
            return f"{name} of the model is {one}, of the reference {other}"
    return ""


def check_linear(config: Config) -> None:
    """TypeError, naming what is in the way, unless a model is linear attention alone."""
    if found := obstacle(config):
        raise TypeError(f"the canonical form is that of linear attention alone; {found}")


def _check_one_wiring(model: Transformer) -> None:
    wiring = head_products(model).wiring
    if isinstance(wiring, Tracer):
        raise TypeError(
            "the model's masks are traced; use layer_tensors where they are known "
            "to be the same for all heads of a layer"
        )
    for number, (layer, found) in enumerate(
        zip(model.config.layers(), np.asarray(wiring), strict=True), start=1
    ):
        heads = sum(group.heads for group in layer.heads)
        if heads and (found[:heads] != found[0]).any():
            raise TypeError(f"layer {number} has heads with different masks, so it has no single T")
