"""Full-batch descent of a function of one vector, with what it passes through.

Everything here and in `kernels` and `sharpness` takes functions `f(theta, data)`, as those of
`ParameterVector` are: compiled code then has its data as arguments. Two probes descend otherwise:
by values of the loss alone, and with the algorithm as a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from constructions.runs import Run, initial_models
from probes.probe import (
    Probe,
    Result,
    compiled_like,
    seed_names,
    table,
    too_many_weights,
    unknown_fit,
)
from probes.subject import ParameterVector, no_weights
from synthetic.compilation import compile_once
from synthetic.fitting.distillation import Distilled, teacher_loss
from synthetic.fitting.train import fit
from synthetic.fitting.zeroth_order import minimize_without_gradients, two_values
from synthetic.tasks.task import Batch, outcome

Theta = Float[Array, " weight"]
Loss = Callable[[Any, Any], Array]


class Path(NamedTuple):
    """Where a descent went.

    Attributes:
        steps: steps taken at every record, from 0 on.
        thetas: the weights there.
        losses: before every step, and at the end.
        states: of the optimiser, at every record.
    """

    steps: Int[np.ndarray, " record"]
    thetas: Float[Array, "record weight"]
    losses: Float[Array, " step"]
    states: Any


def descend(
    loss: Loss,
    theta: Theta,
    data: Any,
    rule: float | optax.GradientTransformation,
    steps: int,
    every: int | None = None,
) -> Path:
    """`steps` steps down `loss(theta, data)`, always the same data.

    Args:
        loss: to a scalar; pure.
        theta: where to begin.
        data: any pytree.
        rule: the step size of gradient descent, or an optax transformation.
        steps: at least 1.
        every: steps between records, a divisor of `steps`; None records the two ends.

    Raises:
        ValueError: `steps` or `every` is out of range.
    """
    every = steps if every is None else every
    if steps < 1 or every < 1 or steps % every:
        raise ValueError(f"steps={steps}, every={every}: must be at least 1, and a multiple of it")
    if not isinstance(rule, optax.GradientTransformation):
        return _descend(loss, None, steps // every, every, theta, data, rule)
    return _descend(loss, rule, steps // every, every, theta, data, 0.0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    loss: Loss, rule: Any, records: int, every: int, theta: Array, data: Any, rate: Any
) -> Any:
    update = optax.sgd(rate) if rule is None else rule

    def step(carry: Any, _: None) -> Any:
        theta, state = carry
        value, gradient = jax.value_and_grad(loss)(theta, data)
        change, state = update.update(gradient, state, theta)
        return (optax.apply_updates(theta, change), state), value

    def record(carry: Any, _: None) -> Any:
        carry, losses = jax.lax.scan(step, carry, None, every)
        return carry, (carry, losses)

    begin = (theta, update.init(theta))
    (last, _), (visited, losses) = jax.lax.scan(record, begin, None, records)
    thetas, states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), begin, visited)
    return thetas, states, jnp.append(losses.ravel(), loss(last, data))


def _descend(
    loss: Loss, rule: Any, records: int, every: int, theta: Array, data: Any, rate: Any
) -> Path:
    thetas, states, losses = _run(loss, rule, records, every, theta, data, rate)
    return Path(np.arange(records + 1) * every, thetas, losses, states)


def normalised(rate: float) -> optax.GradientTransformation:
    """Steps of one length: theta <- theta - rate g / |g|; none where g = 0."""

    def update(gradient: Any, params: Any) -> Any:
        del params
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > 0, -rate / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor * g, gradient)

    return optax.stateless(update)


def root(loss: Loss) -> Loss:
    """The square root of a loss that is at least 0: its gradient keeps its length near minima."""

    def square_root(theta: Any, data: Any) -> Array:
        return jnp.sqrt(loss(theta, data))

    return square_root


@compile_once(static_argnums=(0, 1), often=True)
def gradient_moments(
    loss: Loss, sample: Callable[[Any], Any], theta: Theta, keys: Array
) -> tuple[Theta, Float[Array, ""]]:
    """Mean over batches of the gradient, and the trace of its covariance.

    Args:
        loss: `loss(theta, data)`.
        sample: key to data.
        theta: where.
        keys: one a batch, `[n]`, at least 2.
    """

    def gradient(key: Array) -> Array:
        return jax.grad(loss)(theta, sample(key))

    gradients = jax.lax.map(gradient, keys)
    return gradients.mean(0), gradients.var(0, ddof=1).sum()


#: The most weights of models that are looked at in hundreds of steps, or by their curvature.
MOST = 20_000


@dataclass(frozen=True, eq=False)
class WeightFunctions:
    """A model's functions of its weights; those of a run's models are compiled once."""

    flat: ParameterVector

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


def weight_functions(run: Run) -> tuple[dict[str, tuple[WeightFunctions, Array]], str]:
    """The construction, and the seeds' models at their end and start; what is left out."""
    names, starts = seed_names(run), initial_models(run)
    models = dict(zip(names, run.models, strict=True))
    models |= {f"{name}, its start": m for name, m in zip(names, starts, strict=True)}
    trained = WeightFunctions(ParameterVector(run.construction, run.models[0]))
    found = {name: (trained, trained.flat.vector(model)) for name, model in models.items()}
    built = compiled_like(run.construction, run.models[0])
    if no_weights(built):
        return found, "the construction is too large"
    if built.config == run.models[0].config:  # in the trained models' shape, where it fits
        return {"construction": (trained, trained.flat.vector(built)), **found}, ""
    own = WeightFunctions(ParameterVector(run.construction, built))
    if own.flat.theta.size > MOST:
        return found, f"the construction is too large: {own.flat.theta.size} weights"
    return {"construction": (own, own.flat.theta), **found}, ""


def no_forward_derivative(f: Callable[[Any, Any], Any], theta: Theta, data: Any) -> str:
    """Why f has no derivative forwards in its weights, in one phrase; "" where it has one.

    JAX knows only while it traces, and says so by a TypeError of its own; any other is f's.
    """
    try:
        jax.eval_shape(lambda t: jax.jvp(lambda u: f(u, data), (t,), (t,)), theta)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return "the model has no derivative forwards"
    return ""


def measure_without_gradients(run: Run, seed: int) -> Result:
    """Is each model a local optimum, as far as values of the loss alone can tell?"""
    subjects, note = weight_functions(run)
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
def _both_sides(subject: WeightFunctions, theta: Array, held: Batch, keys: Array, eps: Any) -> Any:
    def one(key: Array) -> tuple[Array, Array]:
        return two_values(lambda t: subject.whole(t, held), theta, key, eps)

    return jax.lax.map(one, keys)


def measure_with_a_teacher(run: Run, seed: int) -> Result:
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

    first = ParameterVector(construction, run.models[0])
    examples = WeightFunctions(first).examples
    assert run.recipe is not None  # `unknown_fit`
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


ZEROTH_ORDER = Probe(
    "zeroth-order",
    "is each model a local optimum, by values of the loss alone?",
    "there are many weights: finding nothing in few steps says nothing",
    measure_without_gradients,
    needs=lambda run: too_many_weights(run, "'zeroth-order'", MOST) or unknown_fit(run),
    invariant=False,
    seeds=2,
)

DISTILLATION = Probe(
    "distillation",
    "does the algorithm as teacher take noise out of the fit?",
    "the fit is short; a teacher that is not the best predictor is a bias",
    measure_with_a_teacher,
    needs=lambda run: too_many_weights(run, "'distillation'") or unknown_fit(run),
    invariant=False,
    seeds=1,
)
