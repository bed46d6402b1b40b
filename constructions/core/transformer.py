"""The one transformer: compiled constructions and trained models are instances of this class.

It maps a residual stream to itself; what surrounds it (embedding, readout) belongs to a family.
With h the stream, one layer computes

    x      =  norm(h)                                              (or h itself)
    a^n    =  mixer(scale_n (W_Q^n x)(W_K^n x)^T, mask_n)          for every head n
    h      <- h + sum_n P^n a^n W_V^n x
    h      <- h + W_out (act(W_hidden x') * W_gate x'),  x' = norm(h)

Head n lets token i look at token j if low_n <= j - i <= high_n and both tokens are of kinds that it
acts on. The values named in `SITES` can be read and replaced, at all layers, by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from constructions.core.config import WIRING, Config, SegmentConfig
from constructions.core.layer import Edit, Tap, normalise, run_layer
from constructions.core.weights import (
    LayerWeights,
    Part,
    Stored,
    Weights,
    check_indices,
    or_nan,
    parts_of,
    take_rows,
)

Stream = Float[Array, "batch token width"]
Groups = Int[Array, "*batch token"]

#: name -> (equation, axes after [layer, batch]); heads and hidden units are padded with zeros to
#: the widest layer. "residual" has depth + 1 entries, every other site has depth of them.
SITES: dict[str, tuple[str, str]] = {
    "residual": ("h^l, the stream before layer l; the last entry is the output", "token width"),
    "attention": ("a^{l,n}_ij, after mask and mixer", "head query key"),
    "head_output": ("P^n sum_j a^{l,n}_ij W_V^n x_j", "token head width"),
    "middle": ("h^l + sum_n head_output, the stream between heads and MLP", "token width"),
    "mlp_hidden": ("act(W_hidden x') * W_gate x'", "token hidden"),
}


class Transformer(nnx.Module):
    """Maps a residual stream `[batch, token, width]` to itself; see the module's equations.

    `arrays` is nested as `config.shapes()` and holds an array of that shape at every leaf.
    """

    def __init__(self, config: Config, arrays: Mapping[str, Any]) -> None:
        _check_shapes(config.shapes(), arrays)
        self.config = config
        self.segments = nnx.List([Stored(s) for s in arrays["segments"].values()])
        if config.final_norm is not None:
            self.final_norm = Stored(arrays["final_norm"])
        if config.tokens is not None:
            self.tokens = Stored(arrays["tokens"])

    def __call__(
        self, stream: Stream, groups: Groups | None = None, *, read: slice | None = None
    ) -> Float[Array, "batch read width"]:
        """Run the model.

        Args:
            stream: `[batch, token, width]`.
            groups: kind of every token, an index into `config.token_groups`, `[token]` or
                `[batch, token]`; may be left out where there is one kind only. Under `jit` a token
                of a kind that does not exist is NaN.
            read: tokens that are wanted. The last layer computes only those.
        """
        return self._run(stream, groups, read)[0]

    def embed(self, tokens: Any) -> Stream:
        """The stream of a language model's tokens: a row of the embedding, and one for the place.

        Args:
            tokens: `[batch, token]`, integers from 0 to the embedding's rows - 1. Under `jit`,
                where they cannot be looked at, others give NaN.

        Raises:
            ValueError: the model has no tables, or fewer positions than there are tokens; the
                tokens are not of that shape and kind, or one is out of range.
        """
        if self.config.tokens is None:
            raise ValueError("the model has no embedding: its config has no tokens")
        tables = nnx.to_pure_dict(nnx.state(self.tokens))
        tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, must be [batch, token] "
                "integers"
            )
        check_indices("tokens", tokens, self.config.tokens.embedding, "a row of the embedding")
        stream = take_rows(tables["embedding"], tokens)
        if not self.config.tokens.positions:
            return stream
        if tokens.shape[1] > self.config.tokens.positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens, but the model has {self.config.tokens.positions} "
                "positions"
            )
        return stream + tables["position"][: tokens.shape[1]]

    def word_scores(self, stream: Stream) -> Float[Array, "batch token word"]:
        """Products of a language model's final stream with its readout (the embedding, if tied).

        ValueError where the model has no tables.
        """
        if self.config.tokens is None:
            raise ValueError("the model has no readout: its config has no tokens")
        tables = nnx.to_pure_dict(nnx.state(self.tokens))
        readout = tables["embedding" if self.config.tokens.tied else "readout"]
        return jnp.einsum("bth,wh->btw", stream, readout, precision=self.config.precision)

    def word_probabilities(self, stream: Stream) -> Float[Array, "batch token word"]:
        """Scores of every word at every token of a language model, from its final stream."""
        scores = self.word_scores(stream)
        soft = self.config.tokens is not None and self.config.tokens.probabilities == "softmax"
        return jax.nn.softmax(scores) if soft else shares(scores)

    def arrays(self) -> dict[str, Any]:
        """The model's arrays, nested as `config.shapes()`; a new dictionary of the same arrays."""

        def complete(shapes: Any, arrays: Any) -> Any:
            if not isinstance(shapes, dict):
                return arrays
            return {name: complete(shape, arrays.get(name, {})) for name, shape in shapes.items()}

        return complete(self.config.shapes(), nnx.to_pure_dict(nnx.state(self)))

    def parts(self) -> Iterator[Part]:
        """Heads, MLPs and norms of every stored layer, in their order."""
        yield from parts_of(self.config, self.arrays())

    def map_parts(self, edit: Callable[[Part], Mapping[str, Array]]) -> Transformer:
        """The model with `edit(part)` as the weights of every part; this one stays as it is.

        Args:
            edit: gives the weights by the same names and of the same shapes.
        """
        arrays = self.arrays()
        for part in parts_of(self.config, arrays):
            layer = arrays["segments"][part.segment]["layers"][part.position]
            if part.kind == "heads":
                layer["heads"][part.row] = dict(edit(part))
            else:
                layer[part.kind] = dict(edit(part))
        return Transformer(self.config, arrays)

    def layer(self, number: int) -> LayerWeights:
        """The weights of an applied layer by name: `model.layer(3).head(0).query`, `[row, width]`.

        ValueError for a number that is not in 1..depth.
        """
        segment, position, repeat = self.config.stored(number)
        heads: list[Weights] = []
        others: dict[str, Weights | None] = {"mlp": None, "norm": None, "mlp_norm": None}
        for part in self.parts():
            if (part.segment, part.position) != (segment, position):
                continue
            own = {name: a[repeat] for name, a in part.weights.items()}
            if part.kind != "heads":
                others[part.kind] = Weights(f"layer {number}, {part.kind}", own)
                continue
            for n in range(part.config.heads):  # type: ignore[union-attr]
                where = f"layer {number}, head {len(heads)}"
                one = {m: a if m == "output_bias" else a[n] for m, a in own.items()}
                heads.append(Weights(where, one))
        return LayerWeights(tuple(heads), **others)

    def with_head(self, number: int, head: int, **weights: Array) -> Transformer:
        """The model with these weights of one head in the place of its own.

        Args:
            number, head: the applied layer, from 1, and its head, from 0. Where a layer is stored
                once for several applications, all of them change.
            weights: such as `query`, `[row, width]`.

        Raises:
            ValueError: there is no such head, or a weight has another name or shape.
        """
        own, found = self.layer(number).head(head), {}
        for name, new in weights.items():
            if name not in dir(own):
                raise ValueError(f"{name}: a head of layer {number} has {dir(own)}")
            if jnp.shape(new) != getattr(own, name).shape:
                wanted = getattr(own, name).shape
                raise ValueError(f"{name} has shape {jnp.shape(new)}, must be {wanted}")
            found[name] = jnp.asarray(new)
        segment, position, repeat = self.config.stored(number)

        def edit(part: Part) -> Mapping[str, Array]:
            if part.kind != "heads" or (part.segment, part.position) != (segment, position):
                return part.weights
            rows = self.config.segments[segment].pattern[position].heads
            n = head - sum(row.heads for row in rows[: part.row])
            if not 0 <= n < rows[part.row].heads:
                return part.weights
            return part.weights | {
                name: part.weights[name]
                .at[(repeat,) if name == "output_bias" else (repeat, n)]
                .set(a)
                for name, a in found.items()
            }

        return self.map_parts(edit)

    def run(
        self,
        stream: Stream,
        groups: Groups | None = None,
        *,
        sites: Sequence[str] = (),
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Stream, dict[str, Array]]:
        """Run the model, return its output and the values of `sites`, with `edits` applied.

        An edited value is what is read and what everything behind it sees. Edits are arrays, so
        one compiled function serves every choice of layer, token and head. ValueError for an
        unknown site.
        """
        return self._run(stream, groups, None, tuple(sites), edits)

    def _run(
        self,
        stream: Array,
        groups: Array | None,
        read: slice | None = None,
        sites: tuple[str, ...] = (),
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        if stream.ndim != 3 or stream.shape[-1] != self.config.width:
            raise ValueError(
                f"stream has shape {stream.shape}, must be [batch, token, {self.config.width}]"
            )
        if groups is None:
            if len(self.config.token_groups) > 1:
                raise ValueError(f"groups must say which of {self.config.token_groups} tokens are")
            groups = jnp.zeros(stream.shape[1], int)
        kinds = len(self.config.token_groups)
        check_indices("groups", groups, kinds, f"one of {self.config.token_groups}")
        if isinstance(groups, Tracer):
            stream = or_nan(stream, groups, kinds)
        edits = _check_sites(self.config, sites, edits or {})
        # a scan carries one dtype: the wider of the stream's and the weights'
        weights = jax.tree.leaves(nnx.state(self, nnx.Param))
        stream = stream.astype(jnp.result_type(stream, *weights))
        captured: list[dict[str, Array]] = []
        start = 0
        for segment, module in zip(self.config.segments, self.segments, strict=True):
            stop = start + segment.repeats * len(segment.pattern)
            run = _SegmentRun(self.config, segment, groups, sites)
            # layers that hold no arrays (a norm without gains) leave no trace in the state
            state = nnx.to_pure_dict(nnx.state(module)).get("layers", {})
            weights = {p: state.get(p, {}) for p in range(len(segment.pattern))}
            inside = {site: Edit(*(a[start:stop] for a in edit)) for site, edit in edits.items()}
            stream, values = run(
                stream, weights, inside, read if stop == self.config.depth else None
            )
            captured.append(values)
            start = stop
        values = {site: jnp.concatenate([c[site] for c in captured]) for site in sites}
        if "residual" in edits:
            stream = jnp.where(edits["residual"].where[-1], edits["residual"].value[-1], stream)
        if "residual" in values:
            values["residual"] = jnp.concatenate([values["residual"], stream[None]])
        if self.config.final_norm is not None:
            gains = nnx.to_pure_dict(nnx.state(self.final_norm))
            stream = normalise(self.config.final_norm, gains, stream)
        return stream, values


class _SegmentRun(NamedTuple):
    """Runs one segment: a scan over the repeats of its pattern."""

    config: Config
    segment: SegmentConfig
    groups: Array
    sites: tuple[str, ...]

    def __call__(
        self, stream: Array, weights: Any, edits: Mapping[str, Edit], read: slice | None
    ) -> tuple[Array, dict[str, Array]]:
        repeats, size = self.segment.repeats, len(self.segment.pattern)
        edits = jax.tree.map(lambda a: a.reshape(repeats, size, *a.shape[1:]), edits)
        shared = jax.tree.map(lambda a: a[0], weights) if self.segment.tied else None
        own = None if self.segment.tied else weights
        # the last repeat stands alone where it computes fewer tokens than the others
        scanned = 0 if repeats == 1 else repeats if read is None else repeats - 1
        captured = []
        if scanned:
            stream, values = jax.lax.scan(
                lambda h, x: self.repeat(h, x[0] if shared is None else shared, x[1], None),
                stream,
                jax.tree.map(lambda a: a[:scanned], (own, edits)),
                length=scanned,
            )
            captured.append(values)
        if scanned < repeats:
            last = jax.tree.map(lambda a: a[-1], (own, edits))
            weights = last[0] if shared is None else shared
            stream, values = self.repeat(stream, weights, last[1], read)
            captured.append({site: v[None] for site, v in values.items()})
        values = {s: jnp.concatenate([c[s] for c in captured]) for s in self.sites}
        return stream, {s: v.reshape(repeats * size, *v.shape[2:]) for s, v in values.items()}

    def repeat(
        self, stream: Array, weights: Any, edits: Any, read: slice | None
    ) -> tuple[Array, dict[str, Array]]:
        """The pattern once; captured values are `[pattern, ...]`."""
        taps = []
        for p, layer in enumerate(self.segment.pattern):
            tap = Tap(self.sites, jax.tree.map(lambda a, p=p: a[p], edits))
            end = read if p == len(self.segment.pattern) - 1 else None
            stream = run_layer(layer, self.config, weights[p], stream, self.groups, end, tap)
            if self.config.clip is not None:
                stream = jnp.clip(stream, -self.config.clip, self.config.clip)
            taps.append(tap.found)
        return stream, {site: jnp.stack([found[site] for found in taps]) for site in self.sites}


def shares(scores: Float[Array, "*batch word"]) -> Float[Array, "*batch word"]:
    """Scores over their sum, negative ones as 0; all 0 where none is positive."""
    scores = jnp.maximum(scores, 0)
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)


def _check_shapes(shapes: Any, arrays: Any, path: str = "") -> None:
    if isinstance(shapes, tuple):
        if tuple(jnp.shape(arrays)) != shapes:
            raise ValueError(f"array '{path}' has shape {jnp.shape(arrays)}, must be {shapes}")
        return
    if set(shapes) != set(arrays):
        raise ValueError(f"arrays '{path}' are named {sorted(arrays)}, must be {sorted(shapes)}")
    for name in shapes:
        _check_shapes(shapes[name], arrays[name], f"{path}.{name}".lstrip("."))


def _check_sites(
    config: Config, sites: Sequence[str], edits: Mapping[str, Edit]
) -> dict[str, Edit]:
    """Edits with their layer axis written out; ValueError for names or shapes that do not fit."""
    for name in (*sites, *edits):
        if name not in SITES:
            raise ValueError(f"unknown site '{name}', must be one of {sorted(SITES)}")
    full = {}
    for name, edit in edits.items():
        layers = config.depth + (name == "residual")
        rank = 2 + len(SITES[name][1].split())
        for part, array in edit._asdict().items():
            if jnp.ndim(array) != rank or jnp.shape(array)[0] not in (1, layers):
                raise ValueError(
                    f"{part} of the edit of '{name}' has shape {jnp.shape(array)}, must be "
                    f"[{layers} or 1, batch, {SITES[name][1]}] with axes of size 1 where it repeats"
                )
        full[name] = Edit(*(jnp.broadcast_to(a, (layers, *jnp.shape(a)[1:])) for a in edit))
    return full


#: Forget gates begin at sigmoid(4) = .982 where their input is small: a memory of some 55 tokens.
#: At 0 they would be a half, and nothing further back could be learnt from.
FORGET_BIAS = 4.0


def randomise(model: Transformer, key: Array, std: float | Array) -> Transformer:
    """A model of the same class and wiring whose weights are drawn from N(0, std^2).

    Biases and offsets are 0, gains are 1, but biases of forget gates are `FORGET_BIAS`. `std` may
    be traced; `model` stays as it is.
    """

    def draw(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path[-1].key
        if name in WIRING:
            return leaf
        if name == "gain":
            return jnp.ones_like(leaf)
        if name == "forget_gate_bias":
            return jnp.full_like(leaf, FORGET_BIAS)
        if name == "offset" or name.endswith("_bias"):
            return jnp.zeros_like(leaf)
        # one stream of numbers for each array, whatever else the model has
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return std * jax.random.normal(own, leaf.shape, leaf.dtype)

    arrays = jax.tree_util.tree_map_with_path(draw, model.arrays())
    return Transformer(model.config, arrays)


def cast(model: Transformer, dtype: Any) -> Transformer:
    """The same model with its weights in another floating point type; all else is left as it is."""

    def one(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(one, state))
