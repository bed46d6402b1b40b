r"""What can be done to the weights without changing the function, and what is left.

Write A = P W_V and B = scale W_K^T W_Q for the products of one head, both `[width, width]`. An
attention layer depends on its heads through these products alone, whatever the mixer, so that

    W_K -> R W_K,  W_Q -> R^-T W_Q;     W_V -> R W_V,  P -> P R^-1;     permuting, splitting heads

change nothing. Linear and centred attention also allow A -> s A, B -> B / s for s != 0, negative s
included. A layer of linear heads is

    h_i  <-  h_i + sum_n A^n G_i^n B^n h_i,      G_i^n = sum_j h_j h_j^T over the keys j of token i,

and since G is symmetric and heads with the same mask share it, the layer depends on

    T_{o,a,b,c} = Sym_ab sum_n A^n_{oa} B^n_{bc}

only, whatever the window: two layers with equal T are the same function. Finally the last layer
acts through what is read of it, and the only layer through what the queries may be (`Gauge`).
Raw weights are therefore never compared; `canonical_distance` compares T.

In a causal or context-only mask T is also all that can be known of a layer. Where each token sees
only itself, G_i h_i is cubic in h_i and further parts of T drop out; T is then still invariant, but
two equal functions may differ in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from constructions.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.family import Gauge
from constructions.transformer import Transformer

Arrays = dict[str, Any]


class HeadProducts(NamedTuple):
    """What every head does, for all layers applied; layers with fewer heads are padded with zeros.

    Attributes:
        output_value: A = P W_V.
        key_query: B = scale W_K^T W_Q.
        wiring: window (2 entries), then query groups, then key groups.
    """

    output_value: Float[Array, "layer head out width"]
    key_query: Float[Array, "layer head width values"]
    wiring: Int[Array, "layer head entries"]


def head_products(model: Transformer) -> HeadProducts:
    """The products P W_V and scale W_K^T W_Q of every head of every layer applied; any mixer.

    For softmax heads these two, up to the order of the heads, are what the weights determine
    (biases left aside). A looped model shows its stored layers once per application.
    """
    parts, stored = [], stored_arrays(model)["segments"].values()
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
        wiring = [w["window"], w["query_groups"], w["key_groups"]]
        wiring = jnp.concatenate([part.astype(jnp.int32) for part in wiring], axis=-1)
        found.append(HeadProducts(a, b * w["scale"][..., None, None], wiring))
    square, entries = (config.width, config.width), 2 + 2 * len(config.token_groups)
    spare = config.max_heads - sum(len(p.output_value[0]) for p in found)
    if spare or not found:
        nothing = jnp.zeros((stacked, spare, *square))
        dtype = found[0].output_value.dtype if found else nothing.dtype
        nothing = nothing.astype(dtype)
        found.append(HeadProducts(nothing, nothing, jnp.zeros((stacked, spare, entries), int)))
    return HeadProducts(*(jnp.concatenate(part, axis=1) for part in zip(*found, strict=True)))


# --- the canonical form ---------------------------------------------------------------------------


def layer_tensors(model: Transformer, gauge: Gauge) -> tuple[Float[Array, "out a b values"], ...]:
    """`canonical` without the check that the heads of a layer are wired alike, for use in `jit`."""
    _check_linear(model.config)
    products, last = _contract(head_products(model), gauge)
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
    _check_linear(model.config)
    _check_one_wiring(model)
    return layer_tensors(model, gauge)


def canonical_distance(
    model: Transformer, reference: Transformer, gauge: Gauge
) -> Float[Array, ""]:
    """||T - T*|| / ||T*||, the norm taken over all layers together; pure, differentiable.

    Sums run over heads with equal masks only; tensors of different masks count as orthogonal, so
    that a model that attends to other tokens than its reference is far from it.

    Raises:
        TypeError: either model is more than linear attention.
        ValueError: depths, widths or token groups differ.
    """
    difference, scale = _squared_norms(model, reference, gauge)
    return _root(difference.sum()) / _root(scale.sum())


def canonical_distances(
    model: Transformer, reference: Transformer, gauge: Gauge
) -> Float[Array, " layer"]:
    """||T_l - T*_l|| / ||T*_l|| of every layer; see `canonical_distance`."""
    difference, scale = _squared_norms(model, reference, gauge)
    return _root(difference) / _root(scale)


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
    _check_linear(config)
    _check_one_wiring(like)
    read, query = (np.linalg.pinv(m) for m in _fitting(gauge, width))
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
        own |= {"window": every[..., :2], "query_groups": every[..., 2 : 2 + kinds].astype(bool)}
        own |= {"key_groups": every[..., 2 + kinds :].astype(bool)}
        layer = LayerConfig((HeadsConfig("linear", heads, width, 1),))
        arrays[len(segments)] = {"layers": {0: {"heads": {0: own}}}}
        segments.append(SegmentConfig((layer,), repeats))
    return Transformer(replace(config, segments=tuple(segments)), {"segments": arrays})


def _tensor(a: Array, b: Array) -> Array:
    """Sym_ab A_oa B_bc for every head, `[head, o, a, b, c]`."""
    t = a[:, :, :, None, None] * b[:, None, None, :, :]
    return (t + jnp.swapaxes(t, 2, 3)) / 2


def _layers(products: HeadProducts) -> Iterator[HeadProducts]:
    for layer in range(len(products.wiring)):
        yield HeadProducts(*(part[layer] for part in products))


def _contract(products: HeadProducts, gauge: Gauge) -> tuple[HeadProducts, HeadProducts]:
    """All layers but the last, and the last one as the gauge sees it."""
    read, query = _fitting(gauge, products.key_query.shape[-1])
    a, b, wiring = (part[-1] for part in products)
    a = jnp.einsum("ro,noa->nra", jnp.asarray(read, a.dtype), a, precision="highest")
    if len(products.wiring) == 1:
        b = jnp.einsum("nbc,cv->nbv", b, jnp.asarray(query, b.dtype), precision="highest")
    return HeadProducts(*(part[:-1] for part in products)), HeadProducts(a, b, wiring)


def _fitting(gauge: Gauge, width: int) -> tuple[np.ndarray, np.ndarray]:
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
        _check_linear(config)
    for name in ("depth", "width", "token_groups"):
        one, other = getattr(model.config, name), getattr(reference.config, name)
        if one != other:
            raise ValueError(f"{name} of the model is {one}, of the reference {other}")
    trained, built = head_products(model), head_products(reference)
    minus = built._replace(output_value=-built.output_value)
    both = HeadProducts(*(jnp.concatenate(p, axis=1) for p in zip(trained, minus, strict=True)))
    return _norms(both, gauge), _norms(built, gauge)


def _norms(products: HeadProducts, gauge: Gauge) -> Float[Array, " layer"]:
    inner, last = _contract(products, gauge)
    end = _norm(last)[None]
    if not len(inner.wiring):
        return end
    # one layer at a time: T has width^4 entries
    return jnp.concatenate([jax.lax.map(_norm, inner), end])


def _norm(layer: HeadProducts) -> Float[Array, ""]:
    """Sum over masks of ||sum of the tensors of heads with that mask||^2.

    Masks may be traced, so heads are not sorted into classes: every head stands for its class, and
    a class of m heads is counted m times with weight 1 / m.
    """
    alike = (layer.wiring[:, None] == layer.wiring[None]).all(-1).astype(layer.key_query.dtype)
    each = _tensor(layer.output_value, layer.key_query)
    classes = jnp.einsum("mn,noabc->moabc", alike, each, precision="highest")
    return (jnp.square(classes).sum((1, 2, 3, 4)) / alike.sum(1)).sum()


def _root(square: Array) -> Array:
    """Square root with derivative 0, not NaN, at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _check_linear(config: Config) -> None:
    for number, layer in enumerate(config.layers(), start=1):
        found = [f"{h.mixer} heads" for h in layer.heads if h.mixer != "linear"]
        found += ["biases" for h in layer.heads if h.bias]
        found += ["an mlp"] * (layer.mlp is not None)
        found += ["a norm"] * (layer.norm is not None or layer.mlp_norm is not None)
        if found:
            raise TypeError(
                f"the canonical form is that of linear attention alone; layer {number} has "
                f"{found[0]}"
            )
    if config.final_norm is not None:
        raise TypeError(
            "the canonical form is that of linear attention alone; the model has a final norm"
        )


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


# --- the group ------------------------------------------------------------------------------------

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
    """W_K -> R W_K, W_Q -> R^-T W_Q with a random R of GL(key_dim) for every head; any mixer."""

    def edit(heads: HeadsConfig, w: Arrays, key: Array) -> tuple[HeadsConfig, Arrays]:
        r, inverse = _bases(key, w["key"].shape[:2], heads.key_dim, w["key"].dtype)
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
    read, query = _fitting(gauge, config.width)
    outside = np.eye(config.width) - np.linalg.pinv(read) @ read
    idle = np.eye(config.width) - query @ np.linalg.pinv(query)
    arrays = stored_arrays(model)
    groups = arrays["segments"][len(config.segments) - 1]["layers"][len(segment.pattern) - 1]
    for w in groups["heads"].values():
        key, one, two = jax.random.split(key, 3)
        p, q = w["output"], w["query"]
        noise = jax.random.normal(one, p.shape[1:], p.dtype)
        w["output"] = p.at[-1].add(jnp.asarray(outside, p.dtype) @ noise)
        if config.depth == 1:
            noise = jax.random.normal(two, q.shape[1:], q.dtype)
            w["query"] = q.at[-1].add(noise @ jnp.asarray(idle, q.dtype))
    return Transformer(config, arrays)


def _allow(heads: HeadsConfig, mixers: tuple[str, ...], what: str) -> None:
    if heads.mixer not in mixers:
        raise TypeError(f"{what} needs heads with mixer {' or '.join(mixers)}, got {heads.mixer}")


def _bases(key: Array, batch: tuple[int, ...], size: int, dtype: Any) -> tuple[Array, Array]:
    """Random matrices `[*batch, size, size]` with singular values in [1/2, 2], and inverses.

    R = H diag(d) H' with reflections H = 1 - 2 v v^T / |v|^2, so that R^-1 = H' diag(1/d) H.
    """
    directions, middle = jax.random.split(key)
    v = jax.random.normal(directions, (2, *batch, size), dtype)
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    left, right = jnp.eye(size, dtype=dtype) - 2 * v[..., :, None] * v[..., None, :]
    d = jax.random.uniform(middle, (*batch, 1, size), dtype, minval=0.5, maxval=2.0)
    return (left * d) @ right, (right / d) @ left


def _apply(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("rnij,rnj->rni", matrix, vector, precision="highest")


def _each_head(w: Arrays, change: Callable[..., Array], *more: Array) -> Arrays:
    """`change(array, *more)` for all arrays with a head axis."""
    return {n: a if n == "output_bias" else change(a, *more) for n, a in w.items()}


def _map_heads(model: Transformer, edit: Edit, key: Array) -> Transformer:
    """Edit every row of equal heads; arrays are `[repeat, head, ...]`."""
    arrays, config = stored_arrays(model), model.config
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


def stored_arrays(model: Transformer) -> Arrays:
    """The model's arrays, nested as `Config.shapes`, parts without arrays included."""

    def complete(shapes: Any, arrays: Any) -> Any:
        if not isinstance(shapes, dict):
            return arrays
        return {name: complete(shape, arrays.get(name, {})) for name, shape in shapes.items()}

    return complete(model.config.shapes(), nnx.to_pure_dict(nnx.state(model)))
