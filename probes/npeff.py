r"""Strategies of a model, unsupervised: NPEFF of its examples' Fisher matrices.

Examples that a model treats alike are sensitive to the same directions in weight space. Their
Fisher matrices F_i = A_i^T A_i, each divided by its Frobenius norm, are written as non-negative
sums of few matrices of rank one (Matena and Raffel 2023, arXiv 2310.04649),

    min  sum_i |F_i - sum_j W_ij g_j g_j^T|^2,     W >= 0,

and no F_i is ever formed. W is multiplied by num / den, g moves along the gradient,

    num_ij = sum_c (a_ic . g_j)^2,   den = W (G G^T)^2 (squared entry by entry),
    G  <-  G - 4 rate / n [((W^T W) * G G^T) G - sum_ic W_ij (a_ic . g_j) a_ic],

first g alone, then both. Everything stays in the span of the rows a_ic, so that all of it is done
in coordinates of that span: the cost does not grow with the number of weights.

The vectors of one subspace are not unique: score which examples a component has, not its entries.
Components are of rank one, so a strategy whose examples fill d dimensions needs about d / 2 of them
before its examples come out together; with fewer, clusters depend on the start. That a component's
own examples move most along it is true of isotropic examples as well: compare what is explained
with `isotropic_rows`. `probes.merging` makes the rows; they depend on the basis of the weights, so
that components of two models are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from constructions.runs import Run
from probes.merging import Rows, counted_places, fisher_rows
from probes.probe import (
    NotApplicable,
    Probe,
    Result,
    in_its_precision,
    seed_names,
    table,
    too_many_weights,
)
from probes.subject import ParameterVector
from synthetic.guards import number
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import Batch, outcome


@dataclass(frozen=True)
class Search:
    """How components are looked for.

    Attributes:
        alone: steps of g by itself, at least 0.
        joint: steps of both, at least 1.
        rate: of the gradient, above 0; 0.3 is the published 1e-3 at 300 examples.
        restarts: random starts, at least 1; the one that leaves the least error is kept.

    Raises:
        ValueError: a number out of range.
    """

    alone: int = 100
    joint: int = 500
    rate: float = 0.3
    restarts: int = 4

    def __post_init__(self) -> None:
        for name, least in (("alone", 0), ("joint", 1), ("restarts", 1)):
            number(name, getattr(self, name), whole=True, least=least)
        number("rate", self.rate, above=0)


#: Components that `measure` looks for, examples that it looks at, and how it looks.
COMPONENTS, EXAMPLES, SEARCH = 8, 128, Search(joint=400, restarts=2)
#: Outcomes drawn of each example, where it has more; and a component's top examples.
DRAWN, TOP = 4, 8


class Components(NamedTuple):
    """sum_j W_ij g_j g_j^T of every example.

    Attributes:
        weights: W; g_j has length 1, so W_ij is the size of the component's part.
        directions: g_j.
        error: what is left of sum_i |F_i|^2, as a share of it.
    """

    weights: Float[Array, "example component"]
    directions: Float[Array, "component weight"]
    error: Float[Array, ""]


def unit_rows(rows: Rows) -> Rows:
    """Rows of F_i / |F_i|; |A^T A| = |A A^T| in the Frobenius norm.

    Raises:
        ValueError: an example has no information: all its rows are 0, or some are not finite.
    """
    gram = jnp.einsum("ncp,ndp->ncd", rows, rows, precision="highest")
    norms = jnp.sqrt(jnp.square(gram).sum((1, 2)))
    empty = int((~((norms > 0) & jnp.isfinite(norms))).sum())
    if empty:
        raise ValueError(f"rows of {empty} of {len(rows)} examples are 0 or not finite")
    return rows / jnp.sqrt(norms)[:, None, None]


def decompose(rows: Rows, components: int, key: Array, search: Search | None = None) -> Components:
    """The components of examples, from the rows of their Fisher matrices.

    Args:
        rows: A_i; normalised here.
        components: how many, at least 1. Take about the number of dimensions that you expect the
            strategies' gradients to fill together.
        key: of the starts.
        search: None for the defaults.

    Raises:
        ValueError: fewer than one component, or an example without information.
    """
    number("components", components, whole=True, least=1)
    inside, lift = coordinates(unit_rows(rows))
    search = search or Search()
    keys = jax.random.split(key, search.restarts)
    found = _search(components, search, inside, keys)
    best = jax.tree.map(lambda a: a[jnp.argmin(found.error)], found)
    return best._replace(directions=lift(best.directions))


def coordinates(
    rows: Rows,
) -> tuple[Float[Array, "example outcome dimension"], Callable[[Array], Array]]:
    """Rows in an orthonormal basis of their span, and the way back for directions in it.

    By the eigenvectors of A A^T or of A^T A, whichever is smaller, in float64; the way back takes
    `[direction, dimension]` to `[direction, weight]`.
    """
    examples, count, weights = rows.shape
    flat = np.asarray(rows, np.float64).reshape(-1, weights)
    wide = len(flat) < weights
    values, vectors = np.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)
    kept = values > 1e-12 * values[-1]
    lengths, vectors = np.sqrt(values[kept]), vectors[:, kept]
    inside = vectors * lengths if wide else flat @ vectors

    def lift(directions: Array) -> Array:
        own = np.asarray(directions, np.float64)
        back = (own / lengths) @ vectors.T @ flat if wide else own @ vectors.T
        return jnp.asarray(back, rows.dtype)

    return jnp.asarray(inside.reshape(examples, count, -1), rows.dtype), lift


@partial(jax.jit, static_argnums=(0, 1))
def _search(components: int, search: Search, rows: Array, keys: Array) -> Components:
    """What is found from every start, stacked."""
    return jax.lax.map(lambda key: _descend(components, search, rows, key), keys)


def _descend(components: int, search: Search, rows: Array, key: Array) -> Components:
    examples, _, size = rows.shape
    einsum = partial(jnp.einsum, precision="highest")

    def overlaps(directions: Array) -> Array:
        return einsum("jp,kp->jk", directions, directions)

    def parts(directions: Array) -> Array:
        return einsum("ncp,jp->ncj", rows, directions)

    def weigh(weights: Array, directions: Array) -> Array:
        wanted = jnp.square(parts(directions)).sum(1)
        held = einsum("nk,kj->nj", weights, jnp.square(overlaps(directions)))
        return weights * wanted / (held + 1e-9)

    def move(weights: Array, directions: Array) -> Array:
        inner = einsum("nj,nk->jk", weights, weights) * overlaps(directions)
        own = weights[:, None] * parts(directions)
        slope = einsum("jk,kp->jp", inner, directions) - einsum("ncj,ncp->jp", own, rows)
        return directions - 4 * search.rate / examples * slope

    def alone(_: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        return found[0], move(*found)

    def both(_: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        weights = weigh(*found)
        return weights, move(weights, found[1])

    first, second = jax.random.split(key)
    weights = jax.random.uniform(first, (examples, components), rows.dtype)
    directions = jax.random.normal(second, (components, size), rows.dtype) / np.sqrt(size)
    found = jax.lax.fori_loop(0, search.alone, alone, (weights, directions))
    weights, directions = jax.lax.fori_loop(0, search.joint, both, found)
    lengths = jnp.maximum(jnp.linalg.norm(directions, axis=1), jnp.finfo(rows.dtype).tiny)
    weights, directions = weights * jnp.square(lengths), directions / lengths[:, None]
    wanted = (weights * jnp.square(parts(directions)).sum(1)).sum()
    held = (weights * einsum("nk,kj->nj", weights, jnp.square(overlaps(directions)))).sum()
    return Components(weights, directions, 1 - (2 * wanted - held) / examples)


def top_examples(
    weights: Float[ArrayLike, "example component"], count: int = 20
) -> Int[np.ndarray, "component count"]:
    """The numbers of the examples in which each component is largest, the largest first."""
    return np.argsort(-np.asarray(weights), axis=0, kind="stable")[:count].T


def purity(
    weights: Float[ArrayLike, "example component"],
    labels: Int[ArrayLike, " example"],
    count: int = 20,
) -> Float[np.ndarray, " component"]:
    """Of each component's top examples, the share that has the label most frequent among them."""
    chosen = np.asarray(labels)[top_examples(weights, count)]
    return np.asarray([np.bincount(row).max() / len(row) for row in chosen])


def divergences(
    flat: ParameterVector,
    theta: Float[Array, " weight"],
    others: Iterable[Float[Array, " weight"]],
    batch: Batch,
) -> Float[Array, "other example"]:
    """KL(p_theta | p_other) of every example, to second order d^T F_i d / 2 with d = other - theta.

    Half the squared distance for values.
    """
    ours, counted = _outputs(flat, theta, batch)
    values = outcome(flat.construction.task) == "values"

    def apart(other: Array) -> Array:
        theirs, _ = _outputs(flat, other, batch)
        each = (
            jnp.square(ours - theirs) / 2
            if values
            else (jnp.exp(ours) * (ours - theirs)).sum(-1) * counted
        )
        return each.reshape(len(each), -1).sum(1)

    return jnp.stack([apart(other) for other in others])


@partial(jax.jit, static_argnums=0)
def _outputs(flat: ParameterVector, theta: Array, batch: Batch) -> tuple[Array, Array]:
    """Values or log probabilities, and which of them the loss looks at."""
    kind = outcome(flat.construction.task)
    predict = flat.predict if kind == "values" else flat.log_probabilities
    return predict(theta, *batch.inputs), counted_places(flat, theta, batch, kind)


def perturbation(
    flat: ParameterVector,
    theta: Float[Array, " weight"],
    batch: Batch,
    directions: Float[Array, "component weight"],
    size: float | Array,
) -> Float[Array, "component example"]:
    """How far each example's prediction moves as theta does by +-size along each direction.

    KL(p_theta | p_moved), or half the squared distance of values, the mean of both signs.
    """

    steps = [sign * size * g for g in directions for sign in (1, -1)]
    found = divergences(flat, theta, (theta + step for step in steps), batch)
    return found.reshape(len(directions), 2, -1).mean(1)


def top_ratio(
    moved: Float[ArrayLike, "component example"], top: Int[np.ndarray, "component count"]
) -> Float[np.ndarray, " component"]:
    """KL(top) / KL(all): how much more a component's own examples move along it than all do."""
    moved = np.asarray(moved, float)
    return np.take_along_axis(moved, np.asarray(top), 1).mean(1) / moved.mean(1)


def isotropic_rows(rows: Rows, key: Array) -> Rows:
    """The control without clusters: random rows with the mean Fisher matrix of these.

    a_ic = sum_kd z_ickd a_kd / sqrt(examples) with independent normal z. What components explain of
    real examples beyond what as many explain of these is what the examples have in common.
    """
    rows = unit_rows(rows)
    examples, count, weights = rows.shape
    flat = rows.reshape(-1, weights)
    mixed = jax.random.normal(key, (len(flat), len(flat)), rows.dtype)
    found = jnp.matmul(mixed, flat, precision="highest") / np.sqrt(len(flat))
    return found.reshape(examples, count, weights)


@in_its_precision
def measure(run: Run, seed: int) -> Result:
    """Components of the examples' Fisher matrices: which examples a model treats alike.

    Raises NotApplicable for models whose predictions do not depend on their weights.
    """
    flat = ParameterVector(run.construction, run.models[0])
    drawn, rows_key, starts, null = jax.random.split(jax.random.key(seed), 4)
    batch, labels, kind = _examples(run.construction.task, drawn)
    samples = DRAWN if flat.outcomes(batch) > DRAWN else 0
    names, values, notes = [], [], []
    for name, model in zip(seed_names(run), run.models, strict=True):
        theta = flat.vector(model)
        rows = fisher_rows(flat, theta, batch, samples, rows_key)
        known = np.asarray((rows != 0).any((1, 2)))
        if known.sum() < 4 * COMPONENTS:
            raise NotApplicable(
                f"{name}: {known.sum()} examples of {len(known)} have any Fisher information, "
                f"must be {4 * COMPONENTS}: the model's predictions do not depend on its weights"
            )
        rows, own = rows[known], jax.tree.map(lambda a, k=known: a[k], batch)
        inside, lift = coordinates(unit_rows(rows))
        found = decompose(inside, COMPONENTS, starts, SEARCH)
        isotropic = isotropic_rows(inside, null)
        control = decompose(isotropic, COMPONENTS, starts, SEARCH)
        size = 0.02 * jnp.linalg.norm(theta)
        moved = perturbation(flat, theta, own, lift(found.directions), size)
        ratio = top_ratio(moved, top_examples(found.weights, TOP))
        pure = np.full(COMPONENTS, np.nan)
        if labels is not None:
            pure = purity(found.weights, labels[known], TOP)
        largest = np.asarray(found.weights).argmax(1)
        for j in range(COMPONENTS):
            names.append(f"{name}, component {j + 1}")
            values.append([int((largest == j).sum()), ratio[j], pure[j]])
        notes.append(
            f"{name}: explains {1 - float(found.error):.2f} of the Fisher matrices, "
            f"{1 - float(control.error):.2f} of isotropic ones"
        )
    if labels is not None:
        chance = np.bincount(labels).max() / len(labels)
        notes.append(f"labels: {kind}, the most frequent {chance:.2f} of all")
    columns = ("examples", f"top {TOP} move more, times", f"purity of the top {TOP}")
    return table("NPEFF components of the examples", columns, names, values, "; ".join(notes))


def _examples(task: Any, key: Array) -> tuple[Batch, np.ndarray | None, str]:
    """Examples, and a label of each where the task has a natural one, and what it is."""
    if not isinstance(task, MaskedLanguageTask):
        return task.sample(key, EXAMPLES), None, ""
    batch = task.sample(key, 32 * EXAMPLES)
    tokens, mask = (np.asarray(a) for a in batch.target)
    alone = np.flatnonzero(mask.sum(1) == 1)[:EXAMPLES]
    words = tokens[alone][mask[alone]]
    tags = task.grammar.emission.argmax(0)[words]
    return jax.tree.map(lambda a: a[alone], batch), tags, "part of speech of the hidden word"


NPEFF = Probe(
    "npeff",
    "which examples does the model treat alike?",
    "components are read without the isotropic control in the note; there are too few; vectors are "
    "compared, not examples",
    measure,
    needs=lambda run: too_many_weights(run, "NPEFF"),
    invariant=False,
    seeds=2,
)
