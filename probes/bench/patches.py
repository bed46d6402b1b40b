"""Runs of a model with one part replaced, gradients, searches and probes: what methods are made of.

One compiled program serves all parts of a model, and all models of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from constructions.core.transformer import Edit, Transformer
from probes.bench.truth import MLP, READ_OUT
from synthetic.compilation import compile_once

#: Model, stream, groups, the tokens that are read, and the matrix that reads them.
Arguments = tuple[Any, Any, Any, Any, Any]

#: Sites that one compiled call patches, or searches.
CHUNK = 16
#: Points of the line from base to source at which integrated gradients takes gradients.
POINTS = 6
#: Steps of Adam of the alignment search, and their size.
STEPS, STEP_SIZE = 80, 0.03


@compile_once
def run_sites(model: Transformer, stream: Array, groups: Array) -> tuple[Array, dict[str, Array]]:
    """The output, and the sites "residual", "head_output" and "attention"."""
    return model.run(stream, groups, sites=("residual", "head_output", "attention"))


def read_out(output: Array, tokens: Array, matrix: Array) -> Array:
    """The prediction, `[batch, token, entry]`."""
    return output[:, tokens] @ matrix


@compile_once(often=True)
def patch_heads(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array, value: Array
) -> Array:
    """Predictions with one head's output from `value`, `[layer * head, batch, ...]`."""
    depth, _, _, heads, _ = value.shape

    def one(number: Array) -> Array:
        layer = jnp.arange(depth).reshape(-1, 1, 1, 1, 1) == number // heads
        head = jnp.arange(heads).reshape(1, 1, 1, -1, 1) == number % heads
        output, _ = model.run(stream, groups, edits={"head_output": Edit(layer & head, value)})
        return read_out(output, tokens, matrix)

    return jax.lax.map(one, jnp.arange(depth * heads))


def swapped(here: Array, there: Array, layer: Array, mask: Array, projector: Array) -> Edit:
    """The stream after so many layers with the part in a subspace from another input."""
    value = here[layer] + (there[layer] - here[layer]) @ projector
    at = jnp.arange(len(here)).reshape(-1, 1, 1, 1) == layer
    return Edit(at & mask[None, None, :, None], value[None])


@compile_once(often=True)
def _patch_sites(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array,
    here: Array, there: Array, layers: Array, masks: Array, projectors: Array,
) -> Array:  # fmt: skip
    """Predictions with one site's subspace from the source, `[site, batch, ...]`."""

    def one(site: Any) -> Array:
        edit = swapped(here, there, *site)
        return read_out(model.run(stream, groups, edits={"residual": edit})[0], tokens, matrix)

    return jax.lax.map(one, (layers, masks, projectors))


def patch_sites(
    arguments: Arguments,
    residual: tuple[Any, Any],
    sites: Sequence[tuple[int, np.ndarray]],
    bases: list[np.ndarray],
) -> np.ndarray:
    """Predictions with the part of the stream in `span(basis)` of a site from the source.

    Args:
        arguments: model, stream, groups, tokens that are read and the matrix that reads them.
        residual: the stream on the base inputs and on the sources.
        sites: (layers applied, positions of tokens) of each.
        bases: of each, `[width, size]`.
    """
    here, there = map(jnp.asarray, residual)
    width, tokens = here.shape[-1], here.shape[2]
    found = []
    for first in range(0, max(len(bases), 1), CHUNK):
        layers, masks = np.zeros(CHUNK, int), np.zeros((CHUNK, tokens), bool)
        projectors = np.zeros((CHUNK, width, width))
        for n, (layer, chosen) in enumerate(sites[first : first + CHUNK]):
            u = bases[first + n]
            layers[n], masks[n, chosen], projectors[n] = layer, True, u @ u.T
        where = jnp.asarray(layers), jnp.asarray(masks), jnp.asarray(projectors)
        found.append(np.asarray(_patch_sites(*arguments, here, there, *where)))
    return np.concatenate(found)[: len(bases)]


def _received(
    model: Transformer, stream: Array, groups: Array, residual: Array, heads: Array, end: Any,
    added: Array,
) -> Array:  # fmt: skip
    """The output where one receiver alone reads the stream with something added.

    The receiver is (layer, head), or `MLP` or `READ_OUT` in the head's place. A first run gives
    what it makes of `added`, a second one has this in the place of what it made.
    """
    (layer, head), depth = end, len(heads)
    here = (jnp.arange(depth + 1) == layer).reshape(-1, 1, 1, 1)
    last = (jnp.arange(depth + 1) == depth).reshape(-1, 1, 1, 1)
    middle = residual[layer] + heads[layer].sum(2) + added
    mlps = any(shape.mlp is not None for shape in model.config.layers())
    sites = ("head_output", "mlp_hidden") if mlps else ("head_output",)
    first = {"residual": Edit(here & (head >= 0), (residual[layer] + added)[None])}
    if mlps:
        first["middle"] = Edit(here[:-1] & (head == MLP), middle[None])
    _, made = model.run(stream, groups, sites=sites, edits=first)
    one = here[:-1, ..., None] & (jnp.arange(heads.shape[3]) == head).reshape(1, 1, 1, -1, 1)
    second = {
        "head_output": Edit(one, made["head_output"]),
        "residual": Edit(last & (head == READ_OUT), (residual[-1] + added)[None]),
    }
    if mlps:
        second["mlp_hidden"] = Edit(here[:-1] & (head == MLP), made["mlp_hidden"])
    return model.run(stream, groups, edits=second)[0]


@compile_once(often=True)
def _patch_paths(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array,
    residual: Array, heads: Array, edges: Array,
) -> Array:  # fmt: skip
    output = read_out(model.run(stream, groups)[0], tokens, matrix)

    def one(edge: Array) -> Array:
        value = heads[edge[0]][:, :, edge[1]]
        added = jnp.roll(value, -1, 0) - value
        found = _received(model, stream, groups, residual, heads, (edge[2], edge[3]), added)
        return read_out(found, tokens, matrix) - output

    return jax.lax.map(one, edges)


def patch_paths(arguments: Arguments, edges: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969), of one edge at a time.

    One receiver reads what one head wrote on the next example; all else reads its own. The changes
    of the prediction, `[edge, batch, token, entry]`.

    Args:
        arguments: model, stream, groups, tokens that are read and the matrix that reads them.
        edges: (layer, head, layer of the receiver, its head or `MLP` or `READ_OUT`), ...
    """
    sites = run_sites(*arguments[:3])[1]
    found = []
    for first in range(0, max(len(edges), 1), 4 * CHUNK):
        some = np.zeros((4 * CHUNK, 4), int)
        for n, edge in enumerate(edges[first : first + 4 * CHUNK]):
            some[n] = edge[:4]
        given = sites["residual"], sites["head_output"], jnp.asarray(some)
        found.append(np.asarray(_patch_paths(*arguments, *given)))
    return np.concatenate(found)[: len(edges)]


@compile_once
def receiver_gradients(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array,
    residual: Array, heads: Array, way: Array, ends: Array,
) -> Array:  # fmt: skip
    """Gradients of <p, way> / |way|^2 in what single receivers read, `[receiver, batch, ...]`."""
    gap = jnp.sum(way**2)

    def one(end: Array) -> Array:
        def along(added: Array) -> Array:
            found = _received(model, stream, groups, residual, heads, (end[0], end[1]), added)
            return jnp.sum(read_out(found, tokens, matrix) * way) / gap

        return jax.grad(along)(jnp.zeros_like(stream))

    return jax.lax.map(one, ends)


@compile_once(static_argnames=("site",), often=True)
def gradients(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array,
    here: Array, there: Array, way: Array, *, site: str,
) -> Array:  # fmt: skip
    """Gradients of <p, way> / |way|^2 at the base, and their mean on the line to the source.

    `[2, layer, batch, ...]`; the line moves one layer's values at a time.
    """
    gap = jnp.sum(way**2)

    def at(layer: Array, share: Array) -> Array:
        mask = (jnp.arange(len(here)) == layer).reshape(-1, *[1] * (here.ndim - 1))

        def along(value: Array) -> Array:
            output, _ = model.run(stream, groups, edits={site: Edit(mask, value[None])})
            return jnp.sum(read_out(output, tokens, matrix) * way) / gap

        return jax.grad(along)(here[layer] + share * (there[layer] - here[layer]))

    def one(layer: Array) -> Array:
        shares = jnp.concatenate([jnp.zeros(1), (jnp.arange(POINTS) + 0.5) / POINTS])
        found = jax.lax.map(lambda share: at(layer, share), shares)
        return jnp.stack([found[0], found[1:].mean(0)])

    return jnp.swapaxes(jax.lax.map(one, jnp.arange(len(here))), 0, 1)


@compile_once(often=True)
def align(
    model: Transformer, stream: Array, groups: Array, tokens: Array, matrix: Array,
    here: Array, there: Array, layers: Array, masks: Array, sizes: Array, targets: Array,
    start: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Learnt bases `[site, width, size]`, columns beyond a site's size 0, and held-out scores."""
    half = stream.shape[0] // 2
    parts = (slice(0, half), slice(half, None))
    before = read_out(model.run(stream, groups)[0], tokens, matrix)

    def basis(free: Array, size: Array) -> Array:
        return jnp.linalg.qr(free)[0] * (jnp.arange(free.shape[1]) < size)

    def error(free: Array, site: Any, part: slice) -> Array:
        layer, mask, size, target = site
        u = basis(free, size)
        edit = swapped(here[:, part], there[:, part], layer, mask, u @ u.T)
        output, _ = model.run(stream[part], groups, edits={"residual": edit})
        total = jnp.sum((target[part] - before[part]) ** 2)
        return jnp.sum((read_out(output, tokens, matrix) - target[part]) ** 2) / total

    adam = optax.adam(STEP_SIZE)

    def search(free: Array, *site: Array) -> tuple[Array, Array]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            free, state = carry
            change, state = adam.update(jax.grad(error)(free, site, parts[0]), state)
            return (free + change, state), None

        (free, _), _ = jax.lax.scan(step, (free, adam.init(free)), length=STEPS)
        return basis(free, site[2]), 1 - error(free, site, parts[1])

    return jax.vmap(search)(start, layers, masks, sizes, targets)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe: held-out R^2, that of its control task, and the subspace that it reads."""

    score: float
    control: float
    basis: np.ndarray

    @property
    def selectivity(self) -> float:
        """How much better than on targets that belong to other examples."""
        return max(0.0, self.score - max(0.0, self.control))


def fit_probe(features: np.ndarray, targets: np.ndarray, seed: int) -> Probe:
    """Ridge regression from features `[batch, token, feature]` to targets `[batch, token, entry]`.

    Three fifths of the examples fit it, one chooses its regularisation, the last one scores it. It
    is `probes.regression.ridge_probe` without a compiled program for every shape.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(features))
    cuts = np.split(order, [3 * len(order) // 5, 4 * len(order) // 5])
    scores, basis = [], np.zeros((features.shape[-1], 0))
    for y in (targets, targets[random.permutation(len(targets))]):
        x1, x2, x3 = (features[c].reshape(-1, features.shape[-1]) for c in cuts)
        y1, y2, y3 = (y[c].reshape(-1, y.shape[-1]) for c in cuts)
        mean, centre = x1.mean(0), y1.mean(0)
        # one scale for all columns: the probe is then the same in every basis of the stream
        scale = float(np.sqrt(((x1 - mean) ** 2).sum(1).mean()))
        scale = scale if scale > 1e-9 else np.inf  # rounding is no feature
        x1, x2, x3 = ((x - mean) / scale for x in (x1, x2, x3))
        d, v = np.linalg.eigh(x1.T @ x1 / len(x1))
        product = v.T @ x1.T @ (y1 - centre) / len(x1)
        fits = [v @ (product / (d + lam)[:, None]) for lam in 10.0 ** np.arange(-10.0, 1)]
        weight = min(fits, key=lambda w: float(np.sum((y2 - centre - x2 @ w) ** 2)))
        total = float(np.sum((y3 - centre) ** 2))
        rest = float(np.sum((y3 - centre - x3 @ weight) ** 2))
        scores.append(1 - rest / total if total > 0 else 0.0)
        if not basis.shape[1]:
            u, s, _ = np.linalg.svd(weight, full_matrices=False)
            basis = u[:, s > 1e-6 * max(s.max(), 1e-30)]
    return Probe(scores[0], scores[1], basis)


def applied_parts(model: Transformer) -> list[tuple[int, Any, dict[str, np.ndarray]]]:
    """(layer from 0, part, weights) of every part, each layer being applied once."""
    starts, found = [0], []
    for segment in model.config.segments:
        starts.append(starts[-1] + segment.repeats * len(segment.pattern))
    for part in model.parts():
        size = len(model.config.segments[part.segment].pattern)
        weights = {name: np.asarray(a) for name, a in part.weights.items()}
        for repeat in range(len(next(iter(weights.values())))):
            own = {name: a[repeat] for name, a in weights.items()}
            found.append((starts[part.segment] + repeat * size + part.position, part, own))
    return found
