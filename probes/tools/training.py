"""What training does around a run's models: kernels, sharpness, no gradients, a teacher."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.core.compile import compile_program
from constructions.runs import Run, initial_models
from probes import kernels
from probes.descent import descend, gradient_moments
from probes.flat import Flat
from probes.sharpness import edge, sharpness
from probes.tools.result import MOST_WEIGHTS, Result, check_weights, seed_names, table
from synthetic.fitting.distillation import Distilled, teacher_loss
from synthetic.fitting.train import fit
from synthetic.fitting.zeroth_order import minimize_without_gradients, two_values
from synthetic.tasks.task import Batch, outcome

#: The most weights of models that are looked at in hundreds of steps, or by their curvature.
MOST = 20_000


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
        if outcome(self.task) != "values":
            return 16
        drawn = jax.eval_shape(lambda key: self.task.sample(key, 1), jax.random.key(0))
        target = jax.tree.leaves(drawn.target)[0]
        return max(16, 256 // (target.size // target.shape[-1]))

    def steps(self, small: int, large: int) -> int:
        """How many can be afforded: large models, and those of sequences, take their time."""
        return small if self.flat.theta.size < 5000 and self.examples > 64 else large

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

    def fresh(self, model: Any, key: Array) -> Array:
        """Mean loss of a model on examples of the key's own."""
        batch = self.task.sample(key, self.examples)
        found = self.flat.construction.apply(model, *batch.inputs)
        return self.task.loss(found, batch).mean()

    def sums(self, theta: Any, given: Any) -> Array:
        """One number an example: its outputs times random signs, `[example]`."""
        batch, signs = given
        return (self.outputs(theta, batch) * signs).reshape(len(signs), -1).sum(1)


def _subjects(run: Run, tool: str) -> tuple[dict[str, tuple[Subject, Array]], str]:
    """The construction, and the seeds' models at their end and start; what is left out."""
    names = seed_names(run)
    models = dict(zip(names, run.models, strict=True))
    starts = initial_models(run)
    models |= {f"{name}, its start": m for name, m in zip(names, starts, strict=True)}
    trained = Subject(Flat(run.construction, run.models[0]))
    check_weights(trained.flat, tool, MOST)
    found = {name: (trained, trained.flat.vector(model)) for name, model in models.items()}
    built = run.construction.reference
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


class Curved(NamedTuple):
    """A model with a full batch, and the largest curvature of its loss there."""

    subject: Subject
    theta: Array
    batch: Any
    sharpness: float


def _curved(run: Run, seed: int, tool: str) -> tuple[dict[str, Curved], str]:
    """The subjects whose loss has second derivatives; what is left out."""
    subjects, note = _subjects(run, tool)
    found, missing = {}, []
    for name, (subject, theta) in subjects.items():
        batch = subject.task.sample(jax.random.key(seed), subject.examples)
        try:
            value = max(sharpness(subject.whole, theta, batch), 1e-6)
        except (ValueError, TypeError):  # not finite; or of a derivative of its own
            missing.append(name)
        else:
            found[name] = Curved(subject, theta, batch, value)
    if not found:
        raise ValueError("the loss has no finite second derivatives, which this tool needs")
    if missing:
        lack = f"no finite second derivatives, left out: {', '.join(missing)}"
        note = "; ".join(filter(None, [note, lack]))
    return found, note


def kernel(run: Run, seed: int) -> Result:
    """Is full-batch descent from here what the kernel says, and does the kernel stay?"""
    subjects, left = _curved(run, seed, "'kernel'")
    notes = {left}
    rows, steps = [], min(given.subject.steps(100, 20) for given in subjects.values())
    for subject, theta, batch, largest in subjects.values():
        few = jax.tree.map(lambda a: a[:16], batch)
        shape = jax.eval_shape(subject.outputs, theta, few).shape
        given = few, jax.random.rademacher(jax.random.key(seed + 1), shape, theta.dtype)
        rate = 1 / largest  # half of what is stable
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
            notes.add("nothing is linearised: the model has no derivative forwards")
        changes = [kernels.kernel_change(grams[0], gram) for gram in grams[1:]]
        losses = path.losses[0], path.losses[-1], straight[-1]
        rows.append([rate, errors[0], np.log10(errors[0] / errors[1]), *changes, *losses])
    columns = ("step size", "error of half a step", "its order", "kernel change, 10 steps",
               f"{steps} steps", "loss before", "after", "after, linearised")  # fmt: skip
    note = "; ".join(sorted(filter(None, notes)))
    return table("gradient descent and its kernel", columns, subjects, rows, note)


def sharpest(run: Run, seed: int) -> Result:
    """The largest curvature, and what becomes of it in steps that it does not bear."""
    subjects, note = _curved(run, seed, "'sharpness'")
    recipe, rows = run.recipe, []
    steps = min(given.subject.steps(200, 20) for given in subjects.values())
    trained = subjects.get(seed_names(run)[0], next(iter(subjects.values())))
    rate = 1.25 * edge(1.0) / trained.sharpness

    def moments(subject: Subject, theta: Array, batch: Any) -> float:
        if recipe.optimizer not in ("adam", "adamw"):
            return np.nan
        keys = jax.random.split(jax.random.key(seed + 1), 16)
        size = min(recipe.batch, 256)
        mean, variance = second_moment(subject, theta, keys, size)
        scale = jnp.sqrt(mean**2 + variance * size / recipe.batch) + recipe.eps
        found = sharpness(subject.whole, theta, batch, scale)
        return found / edge(recipe.learning_rate, recipe.b1)

    for subject, theta, batch, here in subjects.values():
        path = descend(subject.whole, theta, batch, rate, steps)
        there = np.nan
        if bool(jnp.isfinite(path.thetas[-1]).all()):
            with suppress(ValueError):  # as far away as that
                there = sharpness(subject.whole, path.thetas[-1], batch) / edge(rate)
        ends = path.losses[0], path.losses[-1]
        adam = moments(subject, theta, batch)
        rows.append([here, edge(1.0) / here, adam, here / edge(rate), there, *ends])
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
    subjects, note = _subjects(run, "'zeroth-order'")
    steps = min(subject.steps(500, 100) for subject, _ in subjects.values())
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
        try:
            found = minimize_without_gradients(
                model, objective, key=jax.random.fold_in(key, 2), steps=steps, rate=rate
            ).model
        except FloatingPointError:  # too long a step for this one
            row.append(np.nan)
            continue
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
    """Does the algorithm as a teacher make the counterpart's fit less noisy and shorter?

    Of the first seed: both fits are compiled, which takes the time.
    """
    construction, counterpart = run.construction, run.construction.counterpart()
    task = counterpart.task

    def algorithm(*inputs: Array) -> Array:
        return construction.trace(*inputs)["prediction"]

    def teacher(*inputs: Array) -> Array:
        said = algorithm(*inputs)
        return jax.nn.softmax(said) if outcome(task) == "logits" else said

    first = Flat(construction, run.models[0])
    check_weights(first, "'distillation'", MOST_WEIGHTS)
    examples = Subject(first).examples
    batch = min(run.recipe.batch, 4 * examples, 256)
    steps = 300 if examples > 64 else 60
    recipe = replace(run.recipe, steps=steps, batch=batch, warmup=0, chunk=1000,
                     checkpoint_every=1000, ema=None, average_tail=None)  # fmt: skip
    held = construction.task.sample(jax.random.key(seed), 16 * examples)
    said = construction.task.loss(jax.jit(algorithm)(*held.inputs), held).mean()
    value = jax.jit(lambda theta: first.loss(theta, held))

    @jax.jit
    def moments(keys: Any, share: Any) -> Any:
        def loss(theta: Any, drawn: Any) -> Array:
            found = first.predict(theta, *drawn.inputs)
            taught = teacher_loss(task, found, teacher(*drawn.inputs), drawn).mean()
            return share * taught + (1 - share) * task.loss(found, drawn).mean()

        return gradient_moments(loss, lambda key: task.sample(key, batch), first.theta, keys)

    keys = jax.random.split(jax.random.key(seed + 1), 16)
    (mean, noise), (other, less) = (moments(keys, share) for share in (0.0, 1.0))
    bias = jnp.linalg.norm(mean - other) / jnp.sqrt((noise + less) / len(keys))
    row = [less / noise, bias, said]
    for source in (task, Distilled(task, teacher, 0.5)):
        found = fit(counterpart.init, source, recipe, predict=construction.apply, seed=run.seeds[0])
        row.append(value(first.vector(found.model)))
    columns = ("gradient's variance, of the task's own", "bias over its error", "teacher's loss",
               "loss, taught 0 %", "loss, taught 50 %")  # fmt: skip
    title = f"the algorithm as teacher, {recipe.steps} steps"
    return table(title, columns, seed_names(run)[:1], [row])
