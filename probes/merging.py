r"""Merging of models by the Fisher information of their weights, and averages of checkpoints.

With f(x) what a model predicts and p its likelihood, the Fisher information of example i is

    F_i = A_i^T A_i,     rows of A_i:  sqrt(p_y) grad log p_y   for every outcome y,

and for values of unit Gaussian likelihood A_i is the Jacobian of f(x_i). Where an example has many
outcomes, rows may be drawn: A_i^T A_i is then F_i in the mean, from gradients of log p at outcomes
that the model itself draws.

Merging (Matena and Raffel 2021, arXiv 2111.09832) multiplies Gaussian posteriors: with lambda_m the
model's share,

    theta* = (sum_m lambda_m F_m)^-1 sum_m lambda_m F_m theta_m,

exactly the joint least squares solution for linear models and full F_m, and an approximation with
the diagonals, which depend on the basis that the weights are written in. It is for models of one
lineage: the same initial weights, and so the same basis.

What averages of checkpoints gain: near a minimum the loss is quadratic. Along a direction of
curvature lambda, SGD with step size eta multiplies the distance to the minimum by rho = 1 - eta
lambda a step and adds noise, so that two iterates k steps apart have correlation rho^k, and their
mean has

    (1 + (1 - eta lambda)^k) / 2

of the excess loss of one of them (Sandler et al. 2023, arXiv 2301.02312): close iterates are the
same point and gain nothing, distant ones halve it. In general sum_ab w_a w_b rho^|t_a - t_b|. Where
averages do worse than their members, these are not around one minimum.
(`synthetic.fitting.recipe.Recipe` averages while it fits, over every step.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.core.transformer import Transformer
from constructions.runs import Run
from probes.interpolation import interpolate, obstacle
from probes.probe import (
    Probe,
    Result,
    batch_size,
    checkpoints_of,
    in_its_precision,
    larger,
    seed_names,
    table,
    too_many_weights,
)
from probes.subject import ParameterVector
from synthetic.guards import number
from synthetic.tasks.task import Batch, outcome

#: Examples whose gradients are taken at once.
_BLOCK = 32
#: Outcomes drawn of each example by the probe, where it has more.
DRAWN = 4

Rows = Float[Array, "example outcome weight"]


def fisher_rows(
    flat: ParameterVector,
    theta: Float[Array, " weight"],
    batch: Batch,
    samples: int = 0,
    key: Any = None,
) -> Rows:
    """A_i of every example, `[example, outcome, weight]`.

    Outcomes that the task's loss does not look at (words that are not hidden) count for nothing.

    Args:
        flat: the model's functions.
        theta: where.
        batch: of the task.
        samples: 0 for all outcomes, else how many are drawn from the model for each example.
        key: of the draws; None takes that of seed 0.
    """
    found = _blocks(flat, samples, False, theta, batch, _keys(key, batch))
    return found.reshape(-1, *found.shape[2:])


def diagonal_fisher(
    flat: ParameterVector,
    theta: Float[Array, " weight"],
    batch: Batch,
    samples: int = 0,
    key: Any = None,
) -> Float[Array, " weight"]:
    """The diagonal of the mean F_i; arguments as for `fisher_rows`, at the memory of a few rows."""
    keys = _keys(key, batch)
    return _blocks(flat, samples, True, theta, batch, keys).sum(0) / len(keys)


def _keys(key: Any, batch: Batch) -> Array:
    count = len(jax.tree.leaves(batch.inputs)[0])
    return jax.random.split(jax.random.key(0) if key is None else key, count)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _blocks(
    flat: ParameterVector, samples: int, squared: bool, theta: Array, batch: Batch, keys: Array
) -> Array:
    """Rows of each block of examples, stacked; or the sums of their squares."""
    kind = outcome(flat.construction.task)
    counted = counted_places(flat, theta, batch, kind)

    def one(inputs: tuple[Array, ...], counted: Array, key: Array) -> Array:
        def predicted(theta: Array) -> Array:
            alone = tuple(a[None] for a in inputs)
            if kind == "values":
                return flat.predict(theta, *alone)[0]
            return flat.log_probabilities(theta, *alone)[0]

        found, pull = jax.vjp(predicted, theta)
        return jax.vmap(lambda w: pull(w)[0])(_weights(kind, found, counted, samples, key))

    def block(part: Any) -> Array:
        rows = jax.vmap(one)(*part)
        return jnp.square(rows).sum((0, 1)) if squared else rows

    size = max(s for s in range(1, _BLOCK + 1) if len(keys) % s == 0)
    split = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (batch.inputs, counted, keys))
    return jax.lax.map(block, split)


def counted_places(flat: ParameterVector, theta: Array, batch: Batch, kind: str) -> Array:
    """Which places of a prediction the loss looks at, `[example, ...]` without the outcomes."""
    if kind == "values":
        return jnp.ones(jax.eval_shape(flat.predict, theta, *batch.inputs).shape, theta.dtype)
    task = flat.construction.task
    prediction = flat.predict(theta, *batch.inputs)
    slope = jax.grad(lambda p: task.loss(p, batch).sum())(prediction)
    return (slope != 0).any(-1).astype(prediction.dtype)


def _weights(kind: str, found: Array, counted: Array, samples: int, key: Array) -> Array:
    """What the rows of A are sums of gradients with, `[row, *prediction]`."""
    if not samples and kind == "values":
        return jnp.eye(found.size, dtype=found.dtype).reshape(-1, *found.shape)
    if not samples:
        scale = jnp.exp(found / 2) * counted[..., None]
        return jnp.diag(scale.reshape(-1)).reshape(-1, *found.shape)
    if kind == "values":
        drawn = jax.random.normal(key, (samples, *found.shape), found.dtype)
    else:
        chosen = jax.random.categorical(key, found, shape=(samples, *found.shape[:-1]))
        drawn = jax.nn.one_hot(chosen, found.shape[-1], dtype=found.dtype) * counted[..., None]
    return drawn / np.sqrt(samples)


def normalised(fisher: Float[Array, " *entries"]) -> Float[Array, " *entries"]:
    """F over its Euclidean norm, so that no model weighs more for being surer."""
    return fisher / jnp.linalg.norm(fisher)


def merge(
    thetas: Float[Array, "model weight"],
    fishers: Float[Array, "model weight"] | Float[Array, "model weight weight"],
    shares: Float[Array, " model"],
    floor: float = 1e-6,
) -> Float[Array, " weight"]:
    """theta*, with diagonal or with full Fisher matrices.

    Args:
        thetas: the models' weights.
        fishers: F of each; the paper's are `normalised`.
        shares: lambda of each.
        floor: added to the first model's F (its diagonal), which keeps its weights where no model
            has any information.
    """
    thetas, fishers = jnp.asarray(thetas), jnp.asarray(fishers)
    if fishers.ndim == 2:
        weighted = jnp.asarray(shares)[:, None] * fishers.at[0].add(floor)
        return (weighted * thetas).sum(0) / weighted.sum(0)
    size = thetas.shape[1]
    weighted = jnp.asarray(shares)[:, None, None] * fishers.at[0].add(floor * jnp.eye(size))
    right = jnp.einsum("mpq,mq->p", weighted, thetas, precision="highest")
    return jnp.linalg.solve(weighted.sum(0), right)


def share_grid(models: int, parts: int = 10) -> np.ndarray:
    """All shares that are multiples of 1 / parts and sum to 1, `[choice, model]`.

    The first model's is never 0: it is what entries without information fall back on.
    """
    grid = np.stack(np.meshgrid(*[np.arange(parts + 1)] * models, indexing="ij"), -1)
    grid = grid.reshape(-1, models)
    return grid[(grid.sum(1) == parts) & (grid[:, 0] > 0)] / parts


def best_merge(
    loss: Callable[[Array], Array],
    thetas: Float[Array, "model weight"],
    fishers: Float[Array, "model weight"],
    shares: np.ndarray,
) -> tuple[np.ndarray, float]:
    """The shares, of those given, of the merge with the least loss; and that loss.

    The choice is made on the loss given: measure the merge on other examples.
    """
    losses = [float(loss(merge(thetas, fishers, jnp.asarray(s)))) for s in shares]
    best = int(np.nanargmin(losses))
    return shares[best], losses[best]


def latest(count: int, window: int) -> Float[np.ndarray, " checkpoint"]:
    """LAWA: equal weights on the last `window` of `count` checkpoints, 0 on the others.

    Raises:
        ValueError: `window` is out of range.
    """
    if not 1 <= window <= count:
        raise ValueError(f"window is {window}, must be from 1 to {count}, the checkpoints")
    return np.where(np.arange(count) >= count - window, 1 / window, 0.0)


def exponential(count: int, decay: float) -> Float[np.ndarray, " checkpoint"]:
    """EMA without bias: weights in proportion to decay^(checkpoints since).

    Raises:
        ValueError: `decay` is not above 0 and below 1.
    """
    number("decay", decay, above=0, below=1)
    weights = decay ** np.arange(count - 1, -1, -1.0)
    return weights / weights.sum()


def average(
    thetas: Float[Array, "checkpoint weight"], weights: Float[np.ndarray, " checkpoint"]
) -> Float[Array, " weight"]:
    """sum_t w_t theta_t."""
    return (np.asarray(weights, thetas.dtype)[:, None] * thetas).sum(0)


def measured_factor(average_excess: float, member_excesses: Sequence[float]) -> float:
    """Excess loss of an average over the mean excess of its members.

    1/2 for two independent iterates around one minimum, 1 where they are one point, above 1 where
    they belong to different minima or bases. NaN where the members have no excess.
    """
    excess = float(np.mean(member_excesses))
    return average_excess / excess if excess > 0 else float("nan")


@in_its_precision
def measure_fisher_merge(run: Run, seed: int) -> Result:
    """Fisher merges of two checkpoints of each fit, and of the fits of two seeds.

    Checkpoints share their start and their basis, as the method assumes; seeds share neither, and
    show what that costs.
    """
    flat = ParameterVector(run.construction, run.models[0])
    pairs = _pairs(run)
    task = run.construction.task
    size = batch_size(flat, 4096)
    choosing, judging, informing = (
        task.sample(key, n)
        for key, n in zip(
            jax.random.split(jax.random.key(seed), 3), (size, size, min(size, 256)), strict=True
        )
    )
    samples = DRAWN if flat.outcomes(informing) > DRAWN else 0
    losses = jax.jit(flat.losses)
    between = jax.jit(partial(interpolate, run.construction))
    rows, values, lost = [], [], []
    for name, models in pairs.items():
        thetas = jnp.stack([flat.vector(model) for model in models])
        fishers = jnp.stack(
            [normalised(diagonal_fisher(flat, theta, informing, samples)) for theta in thetas]
        )
        shares, _ = best_merge(
            lambda t: losses(t, choosing).mean(), thetas, fishers, share_grid(2)[:-1]
        )
        merged = losses(merge(thetas, fishers, jnp.asarray(shares)), judging)
        members = [losses(theta, judging) for theta in thetas]
        best = min(members, key=lambda found: float(found.mean()))
        plain = losses(thetas.mean(0), judging)
        if larger(merged, best):
            lost.append(name)
        found = [*(float(m.mean()) for m in members), plain.mean(), merged.mean(), shares[0]]
        rows.append(name)
        values.append([*found, _half_way(between, models, judging)])
    columns = (
        *("loss of the first", "loss of the second", "plain average", "Fisher merge"),
        *("share of the first", "half-way between what layers do"),
    )
    note = "no merge is worse than its better member"
    if lost:
        note = f"worse than the better member: {', '.join(lost)}"
    if any(name.startswith("seeds") for name in lost):
        note += "; the assumption is not met: two seeds share neither start nor basis"
    return table("merging models by their Fisher information", columns, rows, values, note)


def _pairs(run: Run) -> dict[str, Sequence[Transformer]]:
    """What can be merged: the ends of what is kept of each seed, three pairs of seeds."""
    found: dict[str, Sequence[Transformer]] = {}
    kept = checkpoints_of(run)
    if len(kept) > 1:
        for n, name in enumerate(seed_names(run)):
            found[f"{name}, steps {kept[0][0]} and {kept[-1][0]}"] = (kept[0][1][n], kept[-1][1][n])
    for a, b in list(combinations(range(len(run.seeds)), 2))[:3]:
        found[f"seeds {run.seeds[a]} and {run.seeds[b]}"] = (run.models[a], run.models[b])
    return found


def _half_way(between: Callable[..., Array], models: Sequence[Transformer], batch: Batch) -> float:
    """The loss half-way between two models whatever their bases, NaN where there is no such way."""
    if obstacle(*(model.config for model in models)):  # more than attention
        return float("nan")
    return float(between(*models, batch, jnp.asarray([0.5]))[0])


@in_its_precision
def measure_averages(run: Run, seed: int) -> Result:
    """What averages of the kept checkpoints gain over the last one, and averages of seeds lose."""
    kept = checkpoints_of(run)
    flat, count = ParameterVector(run.construction, run.models[0]), len(kept)
    batch = run.construction.task.sample(jax.random.key(seed), batch_size(flat, 2**14))
    losses = jax.jit(flat.losses)
    groups = {
        name: [flat.vector(models[n]) for _, models in kept]
        for n, name in enumerate(seed_names(run))
    }
    if len(run.seeds) > 1:
        groups["control: seeds"] = [flat.vector(model) for model in run.models]
    population = run.construction.counterpart().exact
    exact = population and jax.jit(lambda theta: population(flat.merge(theta)))
    values = []
    for members in groups.values():
        thetas, several = jnp.stack(members), len(members)
        each = np.stack([losses(theta, batch) for theta in thetas]).astype(float)
        uniform, moving = (
            np.asarray(losses(average(thetas, weights), batch), float)
            for weights in (
                latest(several, several),
                exponential(several, 0.5),
            )
        )
        gap = uniform - each[-1]
        factor = float("nan")
        if exact is not None:
            middle = average(thetas, latest(several, several))
            mine, *theirs = (float(exact(theta)) for theta in (middle, *thetas))
            factor = measured_factor(mine, theirs)
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        values.append([each[-1].mean(), uniform.mean(), moving.mean(), gap.mean(), error, factor])
    columns = (
        *("last", f"LAWA of {count}", "EMA, decay 1/2", "LAWA less last", "standard error"),
        "excess over its members'",
    )
    note = f"checkpoints at steps {', '.join(str(step) for step, _ in kept)}"
    if run.recipe is not None and run.recipe.averages:
        note += "; they hold averages already, as the recipe says"
    return table("losses of averages of checkpoints", columns, list(groups), values, note)


def needs_a_pair(run: Run) -> str:
    """Not too many weights, and two checkpoints or seeds."""
    if missing := too_many_weights(run, "Fisher merging"):
        return missing
    if len(run.seeds) < 2 and len(checkpoints_of(run)) < 2:
        return "the run has one seed and fewer than two checkpoints: nothing to merge"
    return ""


def needs_checkpoints(run: Run) -> str:
    """Two checkpoints."""
    if (kept := len(checkpoints_of(run))) < 2:
        return (
            f"the run has {kept} checkpoints, averaging needs two: fit for longer, or with a "
            "smaller checkpoint_every"
        )
    return ""


FISHER_MERGE = Probe(
    "fisher-merge",
    "do two models share a start and a basis, so that their weights can be merged?",
    "seeds are taken to differ because they do not merge: compare with the column half-way between "
    "what layers do",
    measure_fisher_merge,
    needs_a_pair,
    invariant=False,
)

AVERAGING = Probe(
    "averaging",
    "is the fit still bouncing around one minimum, so that averaging helps?",
    "the recipe averages already, or the loss is still falling",
    measure_averages,
    needs_checkpoints,
    invariant=False,
)
