"""What training does around a run's models: kernels, sharpness, no gradients, a teacher."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.compiler import compile_program
from constructions.runs import Run, initial_models
from probes import kernels
from probes.descent import descend, gradient_moments
from probes.flat import Flat
from probes.sharpness import edge, hessian_vector_by_differences, sharpness
from probes.tools.result import Result, seed_names, table
from synthetic.distillation import Distilled, teacher_loss
from synthetic.task import Batch, outcome
from synthetic.train import fit
from synthetic.zeroth_order import minimize_without_gradients, two_values

#: Models of more weights would take minutes.
MOST = 1_000_000


@dataclass(frozen=True, eq=False)
class Subject:
    """A model's functions of its weights; those of a run's models are compiled once."""

    flat: Flat

    @property
    def task(self) -> Any:
        """The construction's."""
        return self.flat.construction.task

    @cached_property
    def examples(self) -> int:
        """In a full batch; fewer of sequences, each of which is many predictions."""
        return 256 if outcome(self.task) == "values" else 16

    def steps(self, small: int, large: int) -> int:
        """How many can be afforded: a model of more than 5000 weights takes its time."""
        return small if self.flat.theta.size < 5000 else large

    def outputs(self, theta: Any, batch: Any) -> Array:
        """What is linear in weights if anything is: values, or log-probabilities."""
        if outcome(self.task) == "values":
            return self.flat.predict(theta, *batch.inputs)
        return self.flat.log_probabilities(theta, *batch.inputs)

    def loss(self, outputs: Any, batch: Any) -> Array:
        """Mean loss of `outputs`."""
        found = jax.nn.softmax(outputs) if outcome(self.task) == "probabilities" else outputs
        return self.task.loss(found, batch).mean()

    def whole(self, theta: Any, batch: Any) -> Array:
        """Mean loss."""
        return self.loss(self.outputs(theta, batch), batch)

    def sharpness(self, theta: Array, batch: Any, scale: Array | None = None) -> float:
        """Largest curvature; by differences where the model is differentiable once only."""
        with suppress(ValueError, TypeError):
            return sharpness(self.whole, theta, batch, scale)
        return sharpness(self.whole, theta, batch, scale, hessian_vector_by_differences)

    def fresh(self, model: Any, key: Array) -> Array:
        """Mean loss of a model on examples of the key's own."""
        batch = self.task.sample(key, self.examples)
        found = self.flat.construction.apply(model, *batch.inputs)
        return self.task.loss(found, batch).mean()

    def sums(self, theta: Any, given: Any) -> Array:
        """One number an example: its outputs times random signs, `[example]`."""
        batch, signs = given
        return (self.outputs(theta, batch) * signs).reshape(len(signs), -1).sum(1)


def _subjects(run: Run) -> tuple[dict[str, tuple[Subject, Array]], str]:
    """The construction, and every seed's model at its end and its start; what is left out."""
    names, models = seed_names(run), dict(zip(seed_names(run), run.models, strict=True))
    starts = initial_models(run)
    models |= {f"{name}, its start": m for name, m in zip(names, starts, strict=True)}
    trained = Subject(Flat(run.construction, run.models[0]))
    size = trained.flat.theta.size
    if size > MOST:
        raise ValueError(f"the model has {size} weights, must have at most {MOST} for this tool")
    found = {name: (trained, trained.flat.vector(model)) for name, model in models.items()}
    built = run.construction.compile().model
    with suppress(ValueError):  # in the trained models' shape, where it fits into that
        built = compile_program(run.construction.program, config=run.models[0].config)
        return {"construction": (trained, trained.flat.vector(built)), **found}, ""
    try:
        own = Subject(Flat(run.construction, built))
    except ValueError:  # no dense weights at all
        return found, "the construction is too large"
    if own.flat.theta.size > MOST:
        return found, f"the construction is too large: {own.flat.theta.size} weights"
    return {"construction": (own, own.flat.theta), **found}, ""


def kernel(run: Run, seed: int) -> Result:
    """Is full-batch descent from here what the kernel says, and does the kernel stay?"""
    subjects, note = _subjects(run)
    rows, steps = [], min(subject.steps(100, 20) for subject, _ in subjects.values())
    for subject, theta in subjects.values():
        batch = subject.task.sample(jax.random.key(seed), subject.examples)
        few = jax.tree.map(lambda a: a[:16], batch)
        shape = jax.eval_shape(subject.outputs, theta, few).shape
        given = few, jax.random.rademacher(jax.random.key(seed + 1), shape, theta.dtype)
        rate = 1 / max(subject.sharpness(theta, batch), 1e-6)  # half of what is stable
        path = descend(subject.whole, theta, batch, rate, steps, 10)
        grams = [
            kernels.gradient_kernel(j, j)
            for j in (kernels.jacobian(subject.sums, path.thetas[n], given) for n in (0, 1, -1))
        ]
        errors, straight = [np.nan, np.nan], [np.nan]
        try:
            errors = [
                kernels.one_step_error(subject.outputs, subject.loss, theta, batch, r)
                for r in (rate / 2, rate / 20)
            ]
            straight = kernels.linearised_descent(
                subject.outputs, subject.loss, theta, batch, rate, steps
            )
        except TypeError:  # of a derivative of its own, backwards only
            note = "nothing is linearised: the model has no derivative forwards"
        changes = [kernels.kernel_change(grams[0], gram) for gram in grams[1:]]
        losses = path.losses[0], path.losses[-1], straight[-1]
        rows.append([rate, errors[0], np.log10(errors[0] / errors[1]), *changes, *losses])
    columns = ("step size", "error of half a step", "its order", "kernel change, 10 steps",
               f"{steps} steps", "loss before", "after", "after, linearised")  # fmt: skip
    return table("gradient descent and its kernel", columns, subjects, rows, note)


def sharpest(run: Run, seed: int) -> Result:
    """The largest curvature, and what becomes of it in steps that it does not bear."""
    subjects, note = _subjects(run)
    recipe, rows = run.recipe, []
    steps = min(subject.steps(200, 20) for subject, _ in subjects.values())
    batches = {}
    for subject, _ in subjects.values():
        batches[subject] = subject.task.sample(jax.random.key(seed), subject.examples)
    trained, theta = subjects[seed_names(run)[0]]
    rate = 1.25 * edge(1.0) / max(trained.sharpness(theta, batches[trained]), 1e-6)

    def moments(subject: Subject, theta: Array) -> float:
        if recipe.optimizer not in ("adam", "adamw"):
            return np.nan
        keys = jax.random.split(jax.random.key(seed + 1), 16)
        size = min(recipe.batch, 256)
        mean, variance = second_moment(subject, theta, keys, size)
        scale = jnp.sqrt(mean**2 + variance * size / recipe.batch) + recipe.eps
        found = subject.sharpness(theta, batches[subject], scale)
        return found / edge(recipe.learning_rate, recipe.b1)

    for subject, theta in subjects.values():
        batch = batches[subject]
        here = subject.sharpness(theta, batch)
        path = descend(subject.whole, theta, batch, rate, steps)
        there = np.nan
        if bool(jnp.isfinite(path.thetas[-1]).all()):
            there = subject.sharpness(path.thetas[-1], batch) / edge(rate)
        ends = path.losses[0], path.losses[-1]
        rows.append([here, edge(1.0) / here, moments(subject, theta), here / edge(rate), there,
                     *ends])  # fmt: skip
    columns = ("sharpness", "largest stable step", "Adam's sharpness over its edge",
               f"sharpness over the edge of step {rate:.3g}", f"after {steps} such steps",
               "loss before", "after")  # fmt: skip
    return table("sharpness, and steps a quarter too large", columns, subjects, rows, note)


def second_moment(subject: Subject, theta: Array, keys: Array, size: int) -> tuple[Array, Array]:
    """Mean and variance of every weight's gradient over batches of that size."""

    gradients = _gradients(subject, size, theta, keys)
    return gradients.mean(0), gradients.var(0)


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(subject: Subject, size: int, theta: Array, keys: Array) -> Array:
    def one(key: Array) -> Array:
        return jax.grad(subject.whole)(theta, subject.task.sample(key, size))

    return jax.lax.map(one, keys)


def zeroth_order(run: Run, seed: int) -> Result:
    """Is each model a local optimum, as far as values of the loss alone can tell?"""
    subjects, note = _subjects(run)
    steps = min(subject.steps(1000, 100) for subject, _ in subjects.values())
    key, eps, rows = jax.random.key(seed), 3e-3, []
    for subject, theta in subjects.values():
        held = subject.task.sample(jax.random.fold_in(key, 1), 4 * subject.examples)
        here = float(subject.whole(theta, held))
        keys = jax.random.split(key, 64)
        above, below = (
            np.asarray(a, np.float64) for a in _both_sides(subject, theta, held, keys, eps)
        )
        slope = np.sqrt(np.mean(((above - below) / (2 * eps)) ** 2))
        trace = np.mean(above + below - 2 * here) / eps**2
        both = np.mean((above > here) & (below > here))
        rows.append([theta.size, slope, trace, both, here])
    rate = 0.3 / max(row[2] for row in rows)
    for row, (subject, theta) in zip(rows, subjects.values(), strict=True):
        objective, model = subject.fresh, subject.flat.merge(theta)
        found = minimize_without_gradients(
            model, objective, key=jax.random.fold_in(key, 2), steps=steps, rate=rate
        ).model
        held = subject.task.sample(jax.random.fold_in(key, 1), 4 * subject.examples)
        row.append(float(subject.whole(subject.flat.vector(found), held)))
    columns = ("weights", "length of the gradient", "trace of the Hessian",
               "directions up both ways", "loss", f"after {steps} steps")  # fmt: skip
    return table("descent on values alone", columns, subjects, rows, note)


@partial(jax.jit, static_argnums=0)
def _both_sides(subject: Subject, theta: Array, held: Batch, keys: Array, eps: Any) -> Any:
    def one(key: Array) -> tuple[Array, Array]:
        return two_values(lambda t: subject.whole(t, held), theta, key, eps)

    return jax.lax.map(one, keys)


def distillation(run: Run, seed: int) -> Result:
    """Does the algorithm as a teacher make the counterpart's fit less noisy and shorter?"""
    construction, counterpart = run.construction, run.construction.counterpart()
    task = counterpart.task

    def teacher(*inputs: Array) -> Array:
        return construction.trace(*inputs)["prediction"]

    first = Flat(construction, initial_models(run)[0])
    if first.theta.size > MOST:
        raise ValueError(f"the model has {first.theta.size} weights, must have at most {MOST}")
    words = outcome(task) != "values"
    batch = min(run.recipe.batch, 256)
    recipe = replace(run.recipe, steps=60 if words else 300, batch=batch, warmup=0, chunk=1000,
                     checkpoint_every=1000, ema=None, average_tail=None)  # fmt: skip
    held = construction.task.sample(jax.random.key(seed), 4 * (64 if words else 1024))

    def value(theta: Array) -> float:
        return float(jax.jit(first.loss)(theta, held))

    def own(theta: Any, drawn: Any) -> Array:
        return first.loss(theta, drawn)

    def taught(theta: Any, drawn: Any) -> Array:
        found = first.predict(theta, *drawn.inputs)
        return teacher_loss(task, found, teacher(*drawn.inputs), drawn).mean()

    def sample(key: Any) -> Any:
        return task.sample(key, batch)

    fits = {}
    for share in (0.0, 0.5):
        fits[share] = fit(
            counterpart.init, Distilled(task, teacher, share), recipe,
            predict=construction.apply, seeds=run.seeds,
        ).models  # fmt: skip
    keys = jax.random.split(jax.random.key(seed + 1), 32)
    said = construction.task.loss(teacher(*held.inputs), held).mean()
    rows = []
    for n, model in enumerate(run.models):
        theta = first.vector(model)
        moments = [gradient_moments(loss, sample, theta, keys) for loss in (own, taught)]
        (mean, noise), (other, less) = moments
        bias = jnp.linalg.norm(mean - other) / jnp.sqrt((noise + less) / len(keys))
        ends = [value(first.vector(fits[share][n])) for share in fits]
        rows.append([less / noise, bias, said, *ends])
    columns = ["gradient's variance, of the task's own", "bias over its error", "teacher's loss"]
    columns += [f"loss, taught {100 * share:.0f} %" for share in fits]
    return table(f"the algorithm as teacher, {recipe.steps} steps", columns, seed_names(run), rows)
