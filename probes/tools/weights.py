"""In weight space: which weights carry a skill, whom examples are treated like, what merges.

All of these depend on the basis that weights are written in, which no prediction shows: they say
something about models of one lineage, fitted on from the same weights, and nothing about two fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Transformer
from constructions.runs import Run, initial_models, load_checkpoints
from probes import averaging as averages
from probes import fisher, grafting
from probes import npeff as factors
from probes.flat import Flat
from probes.interpolation import interpolate
from probes.tools.result import MOST_WEIGHTS, Result, check_weights, seed_names, table
from synthetic.compilation import compile_once
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import Batch

#: Components that `npeff` looks for, examples that it looks at, and how it looks.
COMPONENTS, EXAMPLES, SEARCH = 8, 128, factors.Search(joint=400, restarts=2)
#: Outcomes drawn of each example, where it has more; and a component's top examples.
DRAWN, TOP = 4, 8


def _in_its_precision(tool: Callable[[Run, int], Result]) -> Callable[[Run, int], Result]:
    """The tool in the precision that the run was fitted in: weights are drawn again in it."""

    @wraps(tool)
    def inside(run: Run, seed: int) -> Result:
        flat = Flat(run.construction, run.models[0])
        with jax.enable_x64(str(flat.theta.dtype) == "float64"):
            return tool(run, seed)

    return inside


def _batch_size(flat: Flat, most: int, passes: int = 16) -> int:
    """As many examples as there is time for: fewer of large models, and of long predictions.

    `passes` is small where the batch is taken often.
    """
    one = flat.construction.task.sample(jax.random.key(0), 1)
    long = 16 * most // fisher.outcomes(flat, one)
    return int(np.clip(min(2**21 * passes // flat.theta.size, long), 16, most))


#: Standard errors by which a difference is more than chance.
SURE = 3


def _larger(first: Array, second: Array) -> bool:
    """Whether losses of the same examples are larger in the mean, by `SURE` standard errors."""
    gap = np.asarray(first, float) - np.asarray(second, float)
    return bool(gap.mean() > SURE * gap.std(ddof=1) / np.sqrt(len(gap)))


@_in_its_precision
def graft(run: Run, seed: int) -> Result:
    """The few weights that carry what the fit learned, and in which arrays they are.

    From the weights that each fit began with to those that it ended with. Raises ValueError where a
    fit did not improve on its start.
    """
    task, flat = run.construction.task, Flat(run.construction, run.models[0])
    check_weights(flat, "grafting", MOST_WEIGHTS)
    pairs = [
        (flat.vector(before), flat.vector(after))
        for before, after in zip(initial_models(run), run.models, strict=True)
    ]
    weights = flat.theta.size
    size = _batch_size(flat, 256, passes=2)

    def objective(theta: Array, key: Array) -> Array:
        return flat.loss(theta, task.sample(key, size))

    first, second, third = jax.random.split(jax.random.key(seed), 3)
    batch = task.sample(first, _batch_size(flat, 2048))
    losses = compile_once(flat.losses, often=True)
    rows, values = [], []
    for name, (before, after) in zip(seed_names(run), pairs, strict=True):
        start, end = losses(before, batch), losses(after, batch)
        if not _larger(start, end):
            raise ValueError(
                f"{name}: the loss is {float(start.mean()):.4g} before the fit and "
                f"{float(end.mean()):.4g} after it, on {start.size} examples: grafting needs a "
                f"fit that improved by more than chance, {SURE} standard errors of the difference"
            )
        mask = grafting.learn_mask(objective, before, after, start.mean() - end.mean(), second)
        kept = int(mask.sum())
        controls = [
            grafting.random_mask(before, after, kept, key) for key in jax.random.split(third, 5)
        ]
        without = [mask.at[part].set(False) for part in flat.parts.values()]
        masks = [mask, grafting.top_movement(before, after, kept), *controls, *without]
        left = [losses(grafting.graft(before, after, one), batch).mean() for one in masks]
        gain = (float(start.mean()) - np.asarray(left)) / float(start.mean() - end.mean())
        rows.append(name)
        values.append([weights, kept, 1.0, gain[0], gain[1], gain[2:7].mean(), np.nan])
        for (array, part), rest in zip(flat.parts.items(), gain[7:], strict=True):
            held = int(mask[part].sum())
            rows.append(f"{name}, {array}")
            share = held / kept if kept else np.nan
            values.append([part.stop - part.start, held, share, np.nan, np.nan, np.nan, rest])
    columns = (
        *("weights", "in the mask", "share of the mask", "gain of the mask"),
        *("gain of top movement", "gain of random masks", "gain without the array"),
    )
    note = (
        "gain: share of the fall in loss; a weight in the mask is worth "
        f"{grafting.MaskSettings().penalty:g} of it or more; masks compare within one lineage only"
    )
    return table(
        "skill grafting, from the start of the fit to its end", columns, rows, values, note
    )


@_in_its_precision
def npeff(run: Run, seed: int) -> Result:
    """Components of the examples' Fisher matrices: which examples a model treats alike.

    Raises ValueError for models of more weights than `MOST_WEIGHTS`, or that look at none.
    """
    flat = Flat(run.construction, run.models[0])
    check_weights(flat, "NPEFF", MOST_WEIGHTS)
    drawn, rows_key, starts, null = jax.random.split(jax.random.key(seed), 4)
    batch, labels, kind = _examples(run.construction.task, drawn)
    samples = DRAWN if fisher.outcomes(flat, batch) > DRAWN else 0
    names, values, notes = [], [], []
    for name, model in zip(seed_names(run), run.models, strict=True):
        theta = flat.vector(model)
        rows = fisher.fisher_rows(flat, theta, batch, samples, rows_key)
        known = np.asarray((rows != 0).any((1, 2)))
        if known.sum() < 4 * COMPONENTS:
            raise ValueError(
                f"{name}: {known.sum()} examples of {len(known)} have any Fisher information, "
                f"must be {4 * COMPONENTS}: the model's predictions do not depend on its weights"
            )
        rows, own = rows[known], jax.tree.map(lambda a, k=known: a[k], batch)
        inside, lift = factors.coordinates(factors.unit_rows(rows))
        found = factors.decompose(inside, COMPONENTS, starts, SEARCH)
        isotropic = factors.isotropic_rows(inside, null)
        control = factors.decompose(isotropic, COMPONENTS, starts, SEARCH)
        size = 0.02 * jnp.linalg.norm(theta)
        moved = factors.perturbation(flat, theta, own, lift(found.directions), size)
        ratio = factors.top_ratio(moved, factors.top_examples(found.weights, TOP))
        pure = np.full(COMPONENTS, np.nan)
        if labels is not None:
            pure = factors.purity(found.weights, labels[known], TOP)
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


@_in_its_precision
def fisher_merge(run: Run, seed: int) -> Result:
    """Fisher merges of two checkpoints of each fit, and of the fits of two seeds.

    Checkpoints share their start and their basis, as the method assumes; seeds share neither, and
    show what that costs. Raises ValueError for models of more weights than `MOST_WEIGHTS`, and
    where the run has neither two of the one nor the other.
    """
    flat = Flat(run.construction, run.models[0])
    check_weights(flat, "Fisher merging", MOST_WEIGHTS)
    pairs = _pairs(run)
    if not pairs:
        raise ValueError("the run has one seed and fewer than two checkpoints: nothing to merge")
    task = run.construction.task
    size = _batch_size(flat, 4096)
    choosing, judging, informing = (
        task.sample(key, n)
        for key, n in zip(
            jax.random.split(jax.random.key(seed), 3), (size, size, min(size, 256)), strict=True
        )
    )
    samples = DRAWN if fisher.outcomes(flat, informing) > DRAWN else 0
    losses = compile_once(flat.losses, often=True)
    between = compile_once(partial(interpolate, run.construction), often=True)
    rows, values, lost = [], [], []
    for name, models in pairs.items():
        thetas = jnp.stack([flat.vector(model) for model in models])
        fishers = jnp.stack(
            [
                fisher.normalised(fisher.diagonal_fisher(flat, theta, informing, samples))
                for theta in thetas
            ]
        )
        shares, _ = fisher.best_merge(
            lambda t: losses(t, choosing).mean(), thetas, fishers, fisher.share_grid(2)[:-1]
        )
        merged = losses(fisher.merge(thetas, fishers, jnp.asarray(shares)), judging)
        members = [losses(theta, judging) for theta in thetas]
        best = min(members, key=lambda found: float(found.mean()))
        plain = losses(thetas.mean(0), judging)
        if _larger(merged, best):
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
    kept = load_checkpoints(run.path) if run.path is not None else []
    if len(kept) > 1:
        for n, name in enumerate(seed_names(run)):
            found[f"{name}, steps {kept[0][0]} and {kept[-1][0]}"] = (kept[0][1][n], kept[-1][1][n])
    for a, b in list(combinations(range(len(run.seeds)), 2))[:3]:
        found[f"seeds {run.seeds[a]} and {run.seeds[b]}"] = (run.models[a], run.models[b])
    return found


def _half_way(between: Callable[..., Array], models: Sequence[Transformer], batch: Batch) -> float:
    """The loss half-way between two models whatever their bases, NaN where there is no such way."""
    try:
        return float(between(*models, batch, jnp.asarray([0.5]))[0])
    except (TypeError, ValueError):  # more than attention, or no places
        return float("nan")


@_in_its_precision
def averaging(run: Run, seed: int) -> Result:
    """What averages of the kept checkpoints gain over the last one, and averages of seeds lose.

    Raises ValueError for a run that has fewer than two checkpoints.
    """
    kept = load_checkpoints(run.path) if run.path is not None else []
    if len(kept) < 2:
        raise ValueError(
            f"the run has {len(kept)} checkpoints, averaging needs two: fit for longer, or with a "
            "smaller checkpoint_every"
        )
    flat, count = Flat(run.construction, run.models[0]), len(kept)
    batch = run.construction.task.sample(jax.random.key(seed), _batch_size(flat, 2**14))
    losses = compile_once(flat.losses, often=True)
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
            np.asarray(losses(averages.average(thetas, weights), batch), float)
            for weights in (
                averages.latest(several, several),
                averages.exponential(several, 0.5),
            )
        )
        gap = uniform - each[-1]
        factor = float("nan")
        if exact is not None:
            middle = averages.average(thetas, averages.latest(several, several))
            mine, *theirs = (float(exact(theta)) for theta in (middle, *thetas))
            factor = averages.measured_factor(mine, theirs)
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        values.append([each[-1].mean(), uniform.mean(), moving.mean(), gap.mean(), error, factor])
    columns = (
        *("last", f"LAWA of {count}", "EMA, decay 1/2", "LAWA less last", "standard error"),
        "excess over its members'",
    )
    note = f"checkpoints at steps {', '.join(str(step) for step, _ in kept)}"
    if run.recipe.averages:
        note += "; they hold averages already, as the recipe says"
    return table("losses of averages of checkpoints", columns, list(groups), values, note)
