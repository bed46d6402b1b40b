# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does training do to a model that already runs an algorithm?
#
# **Question.** A construction is a point in the space of weights. Does training near it only turn
# the knobs of a fixed kernel? How large a step does it bear? Can it be improved by values of the
# loss alone? Does it make a good teacher, and what does a larger batch change?
#
# **Answer.** Its kernel does not stay: training is not kernel-like. The step size decides which
# minimum is found, at the edge of stability, within seconds. Some ten thousand pairs of values
# repair a construction without a gradient. As a teacher it takes most of the noise out of the
# gradient.
# And Adam's path survives another batch size by a square root.

# %%
import os
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.transformer import Transformer, randomise
from probes import kernels
from probes.descent import descend, gradient_moments
from probes.sharpness import along, edge, sharpness
from probes.subject import ParameterVector
from synthetic.tasks.regression import RegressionTask, Uniform
from synthetic.theory.one_layer import optimal_step_size

QUICK = bool(os.environ.get("ORRERY_QUICK"))
jax.config.update("jax_disable_most_optimizations", QUICK)  # which compiles more than it computes
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"

task = RegressionTask(5, 10, inputs=Uniform(-1, 1))
descent = CATALOGUE["gradient-descent"](dim_x=5, num_examples=10, step_size=optimal_step_size(task))
wide = descent.counterpart().init(jax.random.key(0)).config
built = ParameterVector(descent, compile_program(descent.program, config=wide))
random = built.vector(randomise(built.model, jax.random.key(6), 0.2))
print(f"one layer of linear attention, {built.theta.size} weights")

# %% [markdown]
# ## Is training from a construction kernel-like?
#
# To first order a step of gradient descent changes the outputs by $-\eta K\,\partial L/\partial f$
# with $K = JJ^\top$ (Malladi et al. 2022, arXiv 2210.05643; with signs for Adam). That is true of
# any smooth model, and it is checked first: the error must fall as $\eta$. Training is kernel-like
# only if $K$ then stays. The control is a model that is linear in its weights: the same layer with
# its first step frozen into features.


# %%
def outputs(theta, batch):
    return built.predict(theta, *batch.inputs)


def loss(found, batch):
    return task.loss(found, batch).mean()


batch = task.sample(jax.random.key(0), 64)
rates = np.array([0.1, 0.01]) if QUICK else np.array([0.1, 0.01, 0.001])
for rule, scale in (("gradient", 1.0), ("sign", 0.1)):
    errors = [
        kernels.one_step_error(outputs, loss, built.theta, batch, float(r * scale), rule)
        for r in rates
    ]
    order = -np.diff(np.log10(errors))
    print(f"{rule:8s} one-step errors", [f"{e:.1e}" for e in errors], "order", order.round(3))
    assert abs(order[0] - 1) < 0.05

features = kernels.jacobian(outputs, built.theta, batch)


def linear(theta, batch):
    return (features @ theta).reshape(batch.target.shape)


def changes(f, theta, rate=0.1):
    path = descend(whole[f], theta, batch, rate, 300, 10)
    grams = []
    for place in path.thetas:
        jac = kernels.jacobian(f, place, batch)
        grams.append(kernels.gradient_kernel(jac, jac))
    return path, np.array([kernels.kernel_change(grams[0], gram) for gram in grams])


whole = {outputs: built.loss, linear: lambda theta, batch: loss(linear(theta, batch), batch)}
paths = {
    "linear in its weights": (*changes(linear, built.theta, 0.03), GREY),
    "construction": (*changes(outputs, built.theta), ORANGE),
    "random start": (*changes(outputs, random), BLUE),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, (path, moved, colour) in paths.items():
    axes[0].plot(path.steps, moved, "o-", ms=3, color=colour, label=name)
    print(f"{name:22s} kernel change {moved[1]:.2g} after 10 steps, {moved[-1]:.2g} after 300")
axes[0].set(xlabel="step", ylabel=r"$|K_t - K_0| / |K_0|$", yscale="symlog")
axes[0].legend(frameon=False)
for name, theta, colour in (
    ("construction", built.theta, ORANGE),
    ("random start", random, BLUE),
):
    real = descend(built.loss, theta, batch, 0.03, 300).losses
    straight = kernels.linearised_descent(outputs, loss, theta, batch, 0.03, 300)
    axes[1].plot(real, color=colour, label=name)
    axes[1].plot(straight, color=colour, ls=":", label="the same, linearised")
axes[1].set(xlabel="step of 0.03", ylabel="loss on 64 tasks")
axes[1].legend(frameon=False)
plt.show()
assert paths["linear in its weights"][1].max() < 1e-4
assert paths["construction"][1][1] > 0.3 and paths["random start"][1][1] > 0.3

# %% [markdown]
# **Refuted.** After ten steps the kernel has changed by two fifths of its size from the
# construction, and by more than its size from random weights; the linear model's does not move.
# What is less clear cut: from the construction, in small steps, the linearised model ends near the
# real one's loss, because there is little left to learn. From random weights it learns little: it
# ends at six times the real model's loss.
#
# ## How large a step does it bear?
#
# Gradient descent leaves minima sharper than $2/\eta$. On the way it settles where sharpness times
# $\eta/2$ is 1, the edge of stability: which minimum is found is decided by the step size.


# %%
def divided(arrays, by=10):
    """The sums over the context divided by their number: without that two layers explode."""
    return {
        name: divided(value, by) if isinstance(value, dict) else value
        if name != "scale" else value / by
        for name, value in arrays.items()
    }  # fmt: skip


def attention(layers, std, seed):
    shape = CATALOGUE["gradient-descent"](dim_x=5, num_examples=10, steps=layers, step_size=1.0)
    like = shape.counterpart().init(jax.random.key(0))
    model = randomise(like, jax.random.key(seed + 1), std)
    return ParameterVector(shape, Transformer(model.config, divided(model.arrays())))


def squared(flat, theta, batch):
    return 2 * flat.loss(theta, batch)


figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
with jax.enable_x64(True):  # what happens past the edge hangs on the last digits
    tasks, one = task.sample(jax.random.key(14), 256), attention(1, 0.2, 14)
    of_one = partial(squared, one)
    for rate, colour in ((0.03, GREY), (0.1, BLUE), (0.3, ORANGE)):
        path = descend(of_one, one.theta, tasks, rate, 2000, 100)
        found = along(of_one, path, tasks) / edge(rate)
        axes[0].plot(path.steps, found, color=colour, label=rf"$\eta$ = {rate:g}")
        up = 100 * np.mean(np.diff(path.losses[1000:]) > 1e-7)
        print(f"one layer, step {rate:4g}: {found[-1]:.3f} of the edge, {up:.0f} % of steps go up")
        if rate < 0.3:
            assert found[-1] < 0.8 if rate == 0.03 else abs(found[-1] - 1) < 0.15
axes[0].axhline(1, color="black", lw=0.7)
axes[0].set(xlabel="step", ylabel=r"sharpness $\times\ \eta / 2$", title="one layer", ylim=(0, 3))
axes[0].legend(frameon=False, ncols=3, loc="upper left")
tasks, two = task.sample(jax.random.key(2), 256), attention(2, 0.1, 2)
of_two = partial(squared, two)
path = descend(of_two, two.theta, tasks, 0.1, 1000 if QUICK else 4000, 100)
found = along(of_two, path, tasks) / edge(0.1)
axes[1].plot(path.steps, found, color=BLUE)
axes[1].axhline(1, color="black", lw=0.7)
axes[1].set(xlabel="step", title="two layers", ylim=(0, 2.5))
other = axes[1].twinx()
other.semilogy(np.arange(len(path.losses)), path.losses, color=ORANGE, lw=0.5)
other.set_ylabel("loss", color=ORANGE)
plt.show()
up = np.mean(np.diff(path.losses[len(path.losses) // 2 :]) > 0)
print(f"two layers: {np.median(found[10:]):.2f} of the edge, {100 * up:.0f} % of steps go up, and")
print(f"the loss falls from {path.losses[500]:.3f} to {path.losses[-1]:.3f}")
print(f"the construction itself: sharpness {sharpness(built.loss, built.theta, batch):.0f}")

# %% [markdown]
# Small steps stop below the edge, larger ones on it. At 0.3 this seed goes back and forth between
# two places; other seeds find a flatter minimum or diverge. Two layers stay at the edge, or a
# little above it, for thousands of steps, every other one of them upwards, while the loss falls.
#
# ## Without a gradient
#
# Two values of the loss a step, along a random direction (MeZO, Malladi et al. 2023, arXiv
# 2305.17333): an estimate of the gradient that is $n+2$ times as large in the mean square. Here it
# repairs a construction whose 144 weights were all disturbed; on the construction it finds nothing.

# %%
from synthetic.fitting.zeroth_order import minimize_without_gradients


def fresh(model, key):
    drawn = task.sample(key, 128)
    return task.loss(descent.apply(model, *drawn.inputs), drawn).mean()


held = task.sample(jax.random.key(99), 4096)
away = built.theta + 0.25 * jax.random.normal(jax.random.key(1), built.theta.shape)
steps = 500 if QUICK else 20_000
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
least = float(built.loss(built.theta, held))
for name, theta, colour in (("disturbed", away, BLUE), ("construction", built.theta, ORANGE)):
    found = minimize_without_gradients(
        built.merge(theta), fresh, key=jax.random.key(3), steps=steps, rate=1e-3
    )
    after = float(built.loss(built.vector(found.model), held))
    print(f"{name:12s} loss {built.loss(theta, held):.3f} -> {after:.3f} in {steps} steps")
    smooth = found.losses.reshape(-1, 50).mean(1)
    axis.plot(np.arange(len(smooth)) * 50, smooth, color=colour, label=name)
axis.axhline(least, color=GREY, ls=":", label="the construction's loss")
axis.set(xlabel="step (two values each)", ylabel="loss")
axis.legend(frameon=False)
plt.show()
assert after > 0.9 * least

# %% [markdown]
# ## The construction as a teacher
#
# Targets are noisy: $Wx$ is not determined by ten examples. The best step of gradient descent is
# the best that one layer can do, so its prediction in place of the target leaves the mean gradient
# as it is, and takes the noise away. The same holds of the exact posterior of a hidden word.

# %%
from synthetic.fitting.distillation import Distilled, teacher_loss
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import fit
from synthetic.grammar import chart

SHARES = {0.0: GREY, 1.0: ORANGE} if QUICK else {0.0: GREY, 0.3: BLUE, 1.0: ORANGE}
SEEDS = range(2 if QUICK else 5)
small = CATALOGUE["gradient-descent"](dim_x=5, num_examples=10)
counterpart = small.counterpart()


def by_descent(*inputs):
    return small.trace(*inputs)["prediction"]


def noise(flat, theta, task, teacher):
    """Trace of the gradient's covariance with the teacher's targets, over that with the task's."""

    def taught(theta, drawn):
        return teacher_loss(task, flat.predict(theta, *drawn.inputs), teacher(*drawn.inputs),
                            drawn).mean()  # fmt: skip

    keys = jax.random.split(jax.random.key(0), 64)
    moments = [
        gradient_moments(f, lambda key: task.sample(key, 64), theta, keys)
        for f in (flat.loss, taught)
    ]
    return float(moments[1][1] / moments[0][1])


def curves(construction, counterpart, teacher, recipe, metrics):
    found = {}
    for share in SHARES:
        history = fit(
            counterpart.init, Distilled(counterpart.task, teacher, share), recipe,
            predict=construction.apply, metrics=metrics, seeds=SEEDS,
        ).history  # fmt: skip
        steps = np.array([record["step"] for record in history])
        found[share] = steps, np.array([record["gap"] for record in history])
    return found


def excess(model):
    return {"gap": small.population_excess(model) / small.optimal_loss}


recipe = Recipe(steps=400 if QUICK else 2000, batch=64, learning_rate=1e-2, chunk=20)
found = curves(small, counterpart, by_descent, recipe, excess)
panels = {"excess loss over the best layer": (found, 0.02)}
assert found[1.0][1][-1].mean() < found[0.0][1][-1].mean()

best = ParameterVector(
    small, compile_program(small.program, config=counterpart.init(jax.random.key(0)).config)
)
share = noise(best, best.theta, small.task, by_descent)
print(f"variance of the taught gradient: {share:.1e} of the task's own, at the construction")
assert share < 1e-6


def by_chart(tokens, lengths, mask):
    return chart.inside_outside(words.grammar, tokens, lengths, mask).word_posterior


def divergence(model):
    return {"gap": reader.metrics(model)["divergence"]}


if not QUICK:  # half a minute to compile
    words = CATALOGUE["inside-outside"](grammar="toy", max_length=6, layers=1, heads=2, width=32)
    reader = words.counterpart()
    recipe = Recipe(steps=1000, batch=32, learning_rate=3e-3, chunk=20)
    found = curves(words, reader, by_chart, recipe, divergence)
    panels["KL from the posterior, nats"] = found, 0.2
    untrained = ParameterVector(words, reader.init(jax.random.key(0)))
    share = noise(untrained, untrained.theta, reader.task, by_chart)
    print(f"and {share:.2f} of it for the untrained reader of sentences")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, (name, (found, level)) in zip(axes, panels.items(), strict=not QUICK):
    for share, (steps, values) in found.items():
        label = f"taught for {100 * share:.0f} % of the steps"
        axis.semilogy(steps, values.mean(1), color=SHARES[share], label=label)
        axis.fill_between(steps, values.min(1), values.max(1), color=SHARES[share], alpha=0.2)
        reached = [int(steps[v < level][0]) if (v < level).any() else None for v in values.T]
        print(f"{name}: {label}: below {level} at steps {reached}, ends at {values[-1].mean():.4f}")
    axis.axhline(level, color="black", lw=0.7)
    axis.set(xlabel="step", ylabel=name)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The bands are all seeds. A taught layer falls to the last digits of float32, where Adam, dividing
# by gradients as small as that, can wander off again; the other one stays on the noise of its
# steps. Taught for the first part only, it comes back up to that noise. Of sentences the same is
# true, less sharply: the rest of the fit undoes most of what the first part gained.
#
# ## Another batch size
#
# Adam divides by the size of the gradient, which is mostly noise, so that $\kappa$ times the batch
# asks for $\sqrt\kappa$ times the rate (Malladi et al. 2022, arXiv 2205.10287). On a quadratic with
# noise a hundred times the gradient, and an eps of that size:

# %%
from synthetic.fitting.recipe import square_root_scaled

hessian = jnp.linspace(0.2, 1.0, 8)


def path_of(recipe, noise, key):
    rule = recipe.transformation()

    def run(key):
        def step(carry, key):
            theta, state = carry
            spread = noise / jnp.sqrt(recipe.batch) * jax.random.normal(key, (8,))
            change, state = rule.update(hessian * theta + spread, state, theta)
            theta = optax.apply_updates(theta, change)
            return (theta, state), 0.5 * (hessian * theta**2).sum()

        begin = (jnp.ones(8), rule.init(jnp.ones(8)))
        return jax.lax.scan(step, begin, jax.random.split(key, recipe.steps))[1]

    found = jax.jit(jax.vmap(run))(jax.random.split(key, 400 if QUICK else 1000)).mean(0)
    return found.reshape(20, -1)[:, -1]


noise_size = float(jnp.sqrt((hessian**2).mean() / 0.006))
base = Recipe(steps=1200, batch=1, learning_rate=1e-2, eps=noise_size, b2=0.99)
four = replace(base, batch=4, steps=300)
rules = {
    "square root": (square_root_scaled(base, 4), BLUE),
    "rate only": (replace(four, learning_rate=2e-2), GREEN),
    "linear": (replace(four, learning_rate=4e-2), ORANGE),
    "unchanged": (four, GREY),
}
wanted = path_of(base, noise_size, jax.random.key(0))
seen = np.arange(1, 21) * 60
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, (recipe, colour) in rules.items():
    found = path_of(recipe, noise_size, jax.random.key(1))
    off = float(jnp.abs(found / wanted - 1).mean())
    print(f"{name:12s} is off by {100 * off:.1f} %")
    axis.plot(seen, found, color=colour, label=name)
    assert (off < 0.05) == (name == "square root")
axis.plot(seen, wanted, "k:", label="the small batch")
axis.set(xlabel="examples seen", ylabel="loss")
axis.legend(frameon=False)
plt.show()
