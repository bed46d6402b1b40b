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
# # How does a linear transformer deal with noise that nobody tells it of?
#
# **Question.** Every context has its own noise level. The best prediction is ridge regression whose
# strength is the variance of that noise. Linear attention has no way to look the variance up, and
# gradient descent, however well preconditioned, treats all contexts alike. Vladymyrov et al. 2024
# (arXiv 2402.14180) find that trained linear transformers do better. How?
#
# **Answer.** With four numbers a layer, all of which have a meaning: a step size, a curvature, a
# momentum that grows with the residual and a factor that shrinks labels by their power. The figure
# shows the last one at work: predictions are shrunk more where there is more noise.

# %%
import os
from itertools import cycle

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from constructions import CATALOGUE
from constructions.claims import predict
from constructions.noisy_regression.fitting import fit
from synthetic.tasks.noisy import NoisyRegressionTask
from synthetic.theory.ridge import adaptive_ridge, ridge

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"
family = CATALOGUE["noisy-regression"]

# %% [markdown]
# The task of everything below, and the largest number of layers, 2 or more; try others.

# %%
sizes = {"dim_x": 10, "num_examples": 20}
noise_levels = (1.0, 3.0)
most_layers = 2 if QUICK else 3

# %% [markdown]
# ## Four numbers a layer
#
# Tokens are $(x_i, y_i)$, a query is $(x, 0)$. With $\Sigma = \sum_i x_i x_i^\top$,
# $\alpha = \sum_i y_i x_i$ and $\lambda = \sum_i y_i^2$ of the context as it is now, a layer does
#
# $$x_j \leftarrow x_j + w_{xx} \Sigma x_j + w_{xy}\, y_j \alpha, \qquad
#   y_j \leftarrow y_j + w_{yx}\, \alpha \cdot x_j + w_{yy} \lambda\, y_j .$$
#
# That is two heads, one comparing inputs and one comparing labels:
#
#     Head(query=x, key=x, value=(x, y), write={x: w_xx, y: w_yx}, keys="context")
#     Head(query=y, key=y, value=(x, y), write={x: w_xy, y: w_yy}, keys="context")
#
# Every token stays a linear function of its own start, $x_j = M x_j^0 + y_j^0 u$ and
# $y_j = a\, y_j^0 - w \cdot x_j^0$, so the whole computation on a context is $(M, u, w, a)$: the
# trace of the construction. Numbers of any size compile:

# %%
rng = np.random.default_rng(0)
wild = family(layers=rng.normal(size=(3, 4)) / 100, max_noise=max(noise_levels), **sizes)
certificate = wild.compile().certificate
print("certificate:", {e.dtype: f"{e.max_rel_error:.1e}" for e in certificate.errors})
assert certificate.passed, f"the model differs from the recursion: {certificate.errors}"
inputs = wild.sample(jax.random.key(0), 4)
print({name: value.shape for name, value in wild.trace(*inputs).items()})

# %% [markdown]
# ## The best numbers
#
# So few numbers do not need a training run: Levenberg-Marquardt on thousands of contexts, from many
# starts, ends at the optimum in seconds.

# %%
task = NoisyRegressionTask(noise_levels=noise_levels, **sizes)
models, fitted = {}, None
with jax.enable_x64(True):
    for depth in range(1, most_layers + 1):
        fitted = fit(task, depth, shallower=fitted) if fitted else fit(task, depth)
        models[depth] = family(layers=fitted.layers, noise_levels=noise_levels, **sizes)
for depth, model in models.items():
    for number, reading in enumerate(model.readings, start=1):
        print(
            f"{depth} layers, layer {number}: step {reading.step_size:.4f}, curvature "
            f"{reading.curvature:.4f}, momentum {reading.momentum:+.5f}, "
            f"rescaling {reading.rescaling:+.6f}"
        )

# %% [markdown]
# In the last layer nothing reads $x$ any more, so its curvature and momentum mean nothing. Against
# ridge regression, on the same examples, as loss beyond the ridge that knows the noise:

# %%
examples = task.sample(jax.random.key(1), 2**14 if QUICK else 2**17)
noise = examples.target.noise


@jax.jit
def baselines(inputs, noise):
    return {
        "oracle": ridge(*inputs, noise**2),
        "constant ridge": ridge(*inputs, task.mean_square_noise),
        "adaptive ridge": adaptive_ridge(*inputs),
    }


predictions = baselines(examples.inputs, noise)
for depth, model in models.items():
    predictions[f"depth {depth}"] = predict(model, model.compile().model, *examples.inputs)
oracle = task.loss(predictions["oracle"], examples)
beyond = {n: float((task.loss(p, examples) - oracle).mean()) for n, p in predictions.items()}
for name, value in beyond.items():
    print(f"{name:15s} adjusted loss {value:.3f}")
assert beyond["depth 2"] < beyond["constant ridge"] < beyond["depth 1"], (
    "expected that one layer loses to the best constant ridge, and two layers beat it, as they do "
    f"in 10 dimensions with noise 1 or 3; with {task} the losses beyond the oracle are {beyond}"
)

# %% [markdown]
# Two layers beat every constant ridge, and with it gradient descent of any depth, which is linear
# in the labels and sees of the noise only its average. The paper's Table 1 has 0.201 for two layers
# and 0.222 for the constant ridge; `orrery claims noisy-regression` measures the whole table.
#
# ## What it does with the noise
#
# Ridge regression shrinks: the slope of its predictions on the targets is below 1, and the oracle's
# falls with the noise. A method that is linear in the labels has one slope for all noise levels.

# %%
low, high = min(noise_levels), max(noise_levels)
levels = np.linspace(low / 2, high * 7 / 6, 7)  # from below the task's noise to above it


def slopes(method):
    found = []
    for level in levels:
        probe = NoisyRegressionTask(noise_levels=(float(level),), **sizes)
        drawn = probe.sample(jax.random.key(2), 2**12 if QUICK else 2**14)
        guess, target = method(drawn), drawn.target.value
        found.append(float(jnp.mean(guess * target) / jnp.mean(target**2)))
    return found


figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
known = slopes(lambda b: ridge(*b.inputs, b.target.noise**2))
fixed = slopes(lambda b: ridge(*b.inputs, task.mean_square_noise))
axis.plot(levels, known, color=GREY, lw=2.5, label="ridge that knows the noise")
axis.plot(levels, fixed, color=GREY, ls=":", label="constant ridge")
shown = {}
for (depth, model), colour in zip(models.items(), cycle((ORANGE, BLUE, GREEN)), strict=False):
    compiled = model.compile().model
    shown[depth] = slopes(lambda b, m=model, c=compiled: predict(m, c, *b.inputs))
    axis.plot(levels, shown[depth], "o-", ms=3, color=colour, label=f"depth {depth}")
axis.axvspan(low, high, color=GREY, alpha=0.08, lw=0)
axis.set(xlabel=r"noise $\sigma$ of the context", ylabel="slope of predictions on targets")
axis.legend(frameon=False)
plt.show()
# between the noise levels nearest to the lowest and the highest of the task
first, last = np.abs(levels - low).argmin(), np.abs(levels - high).argmin()
falls, most = shown[2][first] - shown[2][last], known[first] - known[last]
print(
    f"slope of two layers: {falls:.2f} less at noise {high:g} than at {low:g}, of the ridge that "
    f"knows the noise {most:.2f}"
)
assert np.ptp(fixed) < 0.1, f"the slope of a constant ridge should not move: {fixed}"
assert falls > most / 4, (
    "expected that two layers shrink more where there is more noise, at least a quarter as much as "
    f"the ridge that knows it: {known}, but their slopes are {shown[2]}"
)

# %% [markdown]
# ## And a trained one?
#
# Full matrices $P$ and $Q$ have 242 numbers a head (in 10 dimensions) where this has four a layer.
# Trained with Adam from small random weights, two layers of them end where the four numbers are:

# %%
best = models[2]
quick = best.counterpart().quick
result = best.fit(seeds=range(1 if QUICK else 3), recipe=quick, steps=750 if QUICK else quick.steps)
loss = float(task.loss(predictions["depth 2"], examples).mean())
for number, model in enumerate(result.models):
    trained = float(task.loss(predict(best, model, *examples.inputs), examples).mean())
    print(f"seed {number}: loss {trained:.4f}, that of the four numbers {loss:.4f}")
    most = 0.05 if QUICK else 0.02
    assert trained / loss - 1 < most, (
        f"expected a loss at most {most:.0%} above that of the four numbers, got {trained:.4f} "
        f"against {loss:.4f}: {result.history[-1]['step']} steps may be too few"
    )
