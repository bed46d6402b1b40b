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
# # What does linear attention do beyond one step of gradient descent?
#
# **Question.** One layer is one step. von Oswald et al. 2022 (arXiv 2212.07677) go on: two layers
# beat two steps; tokens need not come in pairs; attention has a softmax; the world is not linear.
# What do the weights do in each of these cases, and is it still gradient descent?
#
# **Answer.** Two layers also change the inputs, and what they do then is one formula, GD++:
# gradient descent whose curvature has been flattened. Pairing tokens is one more layer, two
# softmax heads are a linear one up to an error that can be made 1e-8, and an MLP in front makes it
# descent on features. All of these are exact constructions; the figure shows the first one.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.softmax import soften
from constructions.softened import Softened
from synthetic.theory.optimal_descent import optimal_descent
from synthetic.theory.spectral import descent_filter

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"

# %% [markdown]
# ## GD++: descent that flattens its own curvature
#
# The head of gradient descent writes $y$. Let it write $x$ as well:
#
#     Head(query=x, key=x, value=(x, W0 @ x - y), write={x: -gamma, y: eta / N})
#
# With $S = \sum_i x_i x_i^\top$ every input becomes $(I - \gamma S)\,x$, and each eigenvalue of $S$
# goes through two numbers, what is left of the error and what is left of the eigenvalue:
#
# $$\rho \leftarrow \rho\,(1 - \tfrac{\eta}{N}\lambda), \qquad
#   \lambda \leftarrow \lambda\,(1 - \gamma\lambda)^2 .$$
#
# The loss of $K$ steps is then an average of $\rho_K^2$ over eigenvalues, and its best settings
# can be computed to four digits without training anything.

# %%
task = CATALOGUE["gradient-descent"]().task
contexts = 10_000 if QUICK else 40_000
plain = optimal_descent(task, 2, shared=True, curvature=False, contexts=contexts)
plus = optimal_descent(task, 2, shared=True, curvature=True, contexts=contexts)
for name, best in (("gradient descent", plain), ("GD++", plus)):
    print(
        f"two equal steps of {name:17s} loss {best.loss:.4f} +- {best.standard_error:.4f}, "
        f"eta {best.step_sizes[0]:.2f}, gamma {best.curvatures[0]:.3f}"
    )
assert plus.loss < 0.75 * plain.loss

eigenvalues = np.linspace(0, 4.5, 300)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for best, colour, name in ((plain, ORANGE, "gradient descent"), (plus, BLUE, "GD++")):
    rates = best.step_sizes / task.num_examples
    after = descent_filter(eigenvalues, rates, best.curvatures)
    axes[0].plot(eigenvalues, after.residual[-1], color=colour, label=f"two steps of {name}")
    axes[1].plot(eigenvalues, after.eigenvalues[1], color=colour, label=name)
axes[0].axhline(0, color=GREY, lw=0.5)
axes[0].set(xlabel=r"eigenvalue of $S$", ylabel=r"what is left of the error, $\rho$")
axes[0].legend(frameon=False)
axes[1].set(xlabel=r"eigenvalue of $S$", ylabel="the same after one step")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Large eigenvalues are pushed down, so that the second step can be long where it matters: GD++
# removes most of the error for small eigenvalues, at which plain descent hardly begins.
#
# ## The construction, and a trained layer applied twice

# %%
descent = CATALOGUE["gradient-descent"](
    steps=2,
    step_size=float(plus.step_sizes[0]),
    curvature=float(plus.curvatures[0]),
    recurrent=True,
)
compiled = descent.compile()
print("certificate:", {e.dtype: f"{e.max_rel_error:.1e}" for e in compiled.certificate.errors})
assert compiled.certificate.passed

# %% [markdown]
# A layer of full matrices, trained from small random weights and applied twice, ends at the same
# two numbers. They are read off its canonical tensor, which is what its weights determine.

# %%
from constructions.claims import Evidence
from constructions.gradient_descent.paper import coefficients

result = descent.fit(seeds=range(1 if QUICK else 2), recipe=descent.counterpart().quick)
examples = descent.task.sample(jax.random.key(1), 4096)
for model in result.models:
    evidence = Evidence(descent, model, compiled.model, examples, jax.random.key(2))
    eta, gamma = coefficients(evidence)
    loss = evidence.loss(evidence.prediction) / evidence.loss(evidence.expected)
    print(f"trained: eta {eta:.2f}, gamma {gamma:.3f}, loss {loss:.3f} times that of GD++")
    assert abs(eta / plus.step_sizes[0] - 1) < 0.1 and abs(loss - 1) < 0.05

# %% [markdown]
# The paper's trained values for $N$ = 10, 25, 50, 100 are $\gamma$ = 0.179, 0.099, 0.056, 0.029.
# The optimum has them too, with nothing trained (`orrery claims gradient-descent` prints all four).
#
# ## Softmax heads
#
# Two softmax heads with scores $\pm\varepsilon s$ differ by $s_j - \bar s$, to first order: the
# mean is lost, and one layer is 6 % worse for it. A null token of value 0 and score $c$ takes the
# normalisation upon itself, and then two softmax heads are a linear one. `soften` rewrites any
# program of linear heads so:

# %%
one = CATALOGUE["gradient-descent"]()
batch = one.task.sample(jax.random.key(3), 4096)
exact = one.predict(one.compile().model, *batch.inputs)
centred = compile_program(soften(one.program, scale=1e-2, num_keys=10))
lost = one.task.loss(one.predict(centred, *batch.inputs), batch).mean()
print(
    f"centred: loss {lost / one.task.loss(exact, batch).mean():.3f} times that of the linear head"
)


def error(scale, null_score, dtype):
    with jax.enable_x64(dtype == "float64"):
        soft = Softened(one, scale=scale, null_score=null_score)
        inputs = [jnp.asarray(np.asarray(a, dtype)) for a in batch.inputs]
        wanted = one.predict(one.compile().model, *inputs)
        gap = soft.apply(soft.compile().model, *inputs) - wanted
        return float(jnp.sqrt(jnp.mean(gap**2) / jnp.mean(wanted**2)))


scales = np.logspace(-6, -0.5, 7 if QUICK else 12)
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for dtype, colour in (("float32", ORANGE), ("float64", BLUE)):
    axis.loglog(scales, [error(s, 25.0, dtype) for s in scales], "o-", color=colour, label=dtype)
axis.loglog(scales, scales**2 / 6, color=GREY, ls=":", label=r"$\varepsilon^2 / 6$")
axis.set(xlabel=r"scale of the scores, $\varepsilon$", ylabel="relative error", ylim=(1e-12, 1))
axis.legend(frameon=False)
plt.show()
assert error(1e-4, 25.0, "float64") < 1e-7 and error(0.03, 25.0, "float32") < 1e-4

# %% [markdown]
# ## Tokens that come one by one
#
# If $x_i$ and $y_i$ are separate tokens, a layer before has to pair them. It does so by position
# codes alone: the token of $x_i$ looks at the next one and copies it into its buffer, the token of
# $y_i$ looks at itself and erases itself, and everybody else looks at a dump token that holds
# nothing. With softmax heads the right token gets all the weight but $T e^{-\beta}$, where $\beta$
# is the score: at 40 that is below the rounding of float64.

# %%
separate = CATALOGUE["separate-tokens"](dim_x=10, num_examples=10)
sharp = [5, 10, 20, 30, 40]
with jax.enable_x64(True):
    inputs = separate.sample(jax.random.key(4), 256)
    step = separate.trace(*inputs)["prediction"]
    for beta in sharp:
        blunt = CATALOGUE["separate-tokens"](dim_x=10, num_examples=10, score_scale=float(beta))
        gap = float(jnp.abs(blunt.predict(blunt.compile().model, *inputs) - step).max())
        print(f"score {beta:2d}: largest difference from the gradient step {gap:.1e}")
    assert gap < 1e-14

small = CATALOGUE["separate-tokens"](dim_x=2, num_examples=4)
model, tokens = small.compile().model, small.sample(jax.random.key(0), 1)
stream, groups, _ = small.stream(model, *tokens)
attention = model.run(stream, groups, sites=("attention",))[1]["attention"][0, 0]
names = [f"${v}_{i}$" for i in range(1, 5) for v in "xy"] + ["query", "dump"]
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for axis, weights, title in zip(axes, attention, ("copy", "erase"), strict=False):
    axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(title=title, xlabel="looks at")
axes[0].set(ylabel="token")
plt.show()

# %% [markdown]
# Trained from scratch with a first layer that attends by position, two layers end within 0.5 % of
# one step, as the paper says. If that layer may attend by content as well, they go on below it: at
# small sizes to half of the loss (`orrery claims separate-tokens` has both).
#
# ## A world that is not linear
#
# Put an MLP $m$ in front: the same head then does gradient descent on $|W m(x_i) - y_i|^2$, and one
# step from zero is a kernel smoother,
#
# $$\hat y = \frac{\eta}{N} \sum_i y_i\, m(x_i) \cdot m(x).$$
#
# For sine waves $y = a \sin(x + \rho)$ the features to have are $\sin$ and $\cos$; a ReLU layer
# interpolates them to any accuracy. That is a transformer for sine regression with nothing trained.

# %%
from synthetic.tasks.sine import SineTask, optimal_smoother, optimal_step

kernel = CATALOGUE["kernel-descent"](knots=158)
batch = kernel.task.sample(jax.random.key(5), 2**14)
built = kernel.compile().model
loss = float(kernel.task.loss(kernel.predict(built, *batch.inputs), batch).mean())
print(f"hand-built: loss {loss:.5f}; closed form of one step {optimal_step(kernel.task).loss:.5f},")
print(f"of the best kernel {optimal_smoother(kernel.task).loss:.5f}")
wide = SineTask(low_amplitude=0.1, high_amplitude=5.0)
print(f"with the paper's amplitudes up to 5: {optimal_smoother(wide).loss:.3f}, against its 0.006")
assert abs(loss / optimal_step(kernel.task).loss - 1) < 0.05

result = kernel.fit(seeds=range(1 if QUICK else 3), recipe=kernel.counterpart().quick)
prior = CATALOGUE["kernel-descent"](knots=158, init_weight="prior mean")
informed = prior.compile().model
rows = {"one step from 0": (kernel, built), "one step from the prior mean": (prior, informed)}
rows |= {f"trained, seed {n}": (kernel, m) for n, m in enumerate(result.models)}
for name, (c, m) in rows.items():
    value = float(c.task.loss(c.predict(m, *batch.inputs), batch).mean())
    print(f"{name:30s} loss {value:.5f}")

grid = jnp.linspace(-5, 5, 200)
x, y, _ = (a[:1] for a in batch.inputs)
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, (c, m), colour in zip(rows, rows.values(), (ORANGE, GREEN, BLUE), strict=False):
    axis.plot(grid, c.predict(m, x, y, grid[None, :, None])[0, :, 0], color=colour, label=name)
axis.plot(x[0, :, 0], y[0, :, 0], "o", color=GREY, label="context")
axis.set(xlabel="$x$", ylabel="$y$")
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
assert value < 0.006

# %% [markdown]
# Two findings. The published loss of 0.006 belongs to the amplitudes of the public code, up to 0.5:
# with the text's, up to 5, no kernel gets below 0.19 in one step. And the trained model is below
# the step from zero: half-turn phases give the sine waves a mean, and it starts there.
