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
# # What does the parametrisation prefer?
#
# **Question.** Many weights of one layer have the least loss. Which of them does training find, and
# does it find them at all?
#
# **Answer.** Heads that are products of two factors move in a geometry of their own: from large
# weights to the solution of least $l_2$ norm, from small ones to that of least $l_1$ norm (left).
# With label noise a layer goes on moving along its minima, to the flattest, up to $K$ times faster
# with $K$ workers (middle). And of a small ReLU layer gradient descent mostly misses the optimum,
# which for a few points can be enumerated (right). Each has a closed form, drawn as a line.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import nnls

from constructions.gradient_descent import local_sgd, mirror_flow, relu_optimum
from synthetic.tasks.regression import RegressionTask

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"
jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Two factors are another geometry
#
# A head for each coordinate scales its scores by $q_i$ and what it writes by $p_i$: the layer
# multiplies by $m_i = p_i q_i$. Gradient flow keeps $c_i = p_i^2 - q_i^2$, and so (Li et al. 2022,
# arXiv 2207.04036)
#
# $$\frac{d}{dt}\,\tfrac12\operatorname{asinh}\frac{2 m_i}{c_i} = -\frac{\partial L}{\partial m_i}$$
#
# Where inputs have low rank, the flow ends at the Bregman projection of its start.

# %%
loss = mirror_flow.Quadratic.of(mirror_flow.low_rank_task())
l1, l2 = mirror_flow.least_norms(loss)
print(f"{len(loss.vector)} coordinates, of which the loss determines {loss.basis.shape[1]}")
scales = np.logspace(-2, 1, 13)
nearest = [mirror_flow.projection(loss, np.full(6, s**2), np.zeros(6)) for s in scales]
rng = np.random.default_rng(0)
trained = {}
for scale in (0.01, 0.1, 1.0, 10.0):
    p = scale * rng.uniform(0.95, 1.05, (5, 6))
    trained[scale] = mirror_flow.limits(loss, p, 0 * p)
    norms = np.abs(trained[scale]).sum(1) / l1, np.linalg.norm(trained[scale], axis=1) / l2
    shown = [f"{n.mean():.3f} +- {n.std(ddof=1) / 5**0.5:.3f}" for n in norms]
    print(f"start {scale:5}: l1 norm {shown[0]}, l2 norm {shown[1]} of the least")
assert np.abs(trained[0.01]).sum(1).mean() < 1.05 * l1
assert np.linalg.norm(trained[10.0], axis=1).mean() < 1.02 * l2

# %% [markdown]
# Let all heads share one value scale, $m_i = p\,q_i$. The flows along the gradients of two $m_i$ no
# longer commute, and no potential of this kind fits where training ends.

# %%
p, q = jnp.asarray(rng.uniform(0.3, 0.5, 6)), jnp.asarray(rng.uniform(-0.2, 0.2, 6))
apart = mirror_flow.order_of_flows(lambda w: w[0] * w[1], jnp.stack([p, q]), 0.5)
shared = mirror_flow.order_of_flows(lambda w: w[0] * w[1:], jnp.concatenate([p[:1], q]), 0.5)
print(f"two flows in either order end apart by {apart:.1e} with own scales, {shared:.2f} shared")
assert apart < 1e-12 and shared > 0.05

# %% [markdown]
# ## Along the minima
#
# Scale the value by $u$ and the scores by $w$: every layer of the right step size $uw$ is a
# minimum. The trace of the Hessian there is $a\,m^*(s^2 + s^{-2})$, and label noise shrinks
# $u^2 - w^2$. $K$ workers that average after $H$ steps do so faster (Gu et al. 2023, arXiv
# 2303.01215), by $1 + (K-1)\,\psi(2\eta h H)$. At constant $H$ that is lost as the step size falls;
# at $H \sim 1/\eta^2$ (Gu et al. 2023, arXiv 2310.14423) it grows to $K$.

# %%
task, product = RegressionTask(10, 10), 0.005
keys = jax.random.split(jax.random.key(0), 10 if QUICK else 40)
length = 4000 if QUICK else 20_000
alone = local_sgd.drift(keys, task, product, 1, length).mean()
locals_ = np.array([20, 100, 400] if QUICK else [20, 100, 400, 2000])
ratios, errors = [], []
for local in locals_:
    found = local_sgd.drift(keys, task, product, int(local), max(length, 20 * int(local))) / alone
    ratios.append(found.mean())
    errors.append(found.std(ddof=1) / len(found) ** 0.5)
    exact = float(local_sgd.drift_ratio(8, int(local), product))
    print(
        f"H = {local:4d}: faster by {ratios[-1]:.2f} +- {errors[-1]:.2f}, closed form {exact:.2f}"
    )
    assert abs(ratios[-1] / exact - 1) < (0.1 if QUICK else 0.02)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
s = np.linspace(0.45, 2.2, 200)
axes[0].plot(s, local_sgd.sharpness(s, task), color=BLUE)
axes[0].axvline(1, color=GREY, lw=0.5)
axes[0].set(xlabel="scale $s$ along the minima", ylabel="trace of the Hessian")
etas = np.logspace(-5, -2, 60)
rules = {
    "H = 20": (np.full(60, 20.0), ORANGE),
    r"H ~ 1 / $\eta$": (0.2 / etas, GREEN),
    r"H ~ 1 / $\eta^2$": (2e-3 / etas**2, BLUE),
}
for name, (count, colour) in rules.items():
    axes[1].semilogx(etas, local_sgd.drift_ratio(8, count, etas), color=colour, label=name)
axes[1].axhline(8, color=GREY, lw=0.5)
axes[1].invert_xaxis()
axes[1].set(xlabel=r"step size times curvature, $\eta h$", ylabel="drift, 8 workers over 1")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Is the optimum found?
#
# $N$ points of the plane have $2N$ activation patterns, the vertices of a zonotope (Matena and
# Raffel 2022, arXiv 2210.00176). Given the pattern and the sign of every unit, the least loss is a
# non-negative least-squares problem, so that the optimum of a few units is one over a finite list.

# %%
points, target = relu_optimum.points_and_targets(0)
tries = 50 if QUICK else 2000
keys = jax.random.split(jax.random.key(1), tries)
shares, lowest = [], []
for units in (1, 2, 3):
    best, chosen = relu_optimum.optimum(points, target, units)
    arrays = jnp.asarray(points), jnp.asarray(target)
    found = np.asarray(relu_optimum.descend(keys, *arrays, units, 3000))
    starts = np.random.default_rng(units).integers(0, 32, (10 if QUICK else 40, units)).tolist()
    moved = np.array([relu_optimum.greedy(points, target, tuple(c)) for c in starts])
    shares.append([(losses < 1.01 * best).mean() for losses in (found, moved)])
    lowest.append(found.min() / best)
    print(
        f"{units} units: optimum {best:.4f}; within 1 % of it {shares[-1][0]:.1%} of descents, "
        f"{shares[-1][1]:.0%} of searches from cone to cone; best descent {lowest[-1]:.4f} times it"
    )
assert min(lowest) > 1 - 1e-9  # never beaten
assert np.mean(shares, axis=0)[0] < np.mean(shares, axis=0)[1]

# %% [markdown]
# With as many units as there are signed cones, cones drawn at random fit as well as any.

# %%
features = relu_optimum.columns(points)
random_loss = {}
for units in (1, 2, 4, 8, 16, 32):
    drawn = np.random.default_rng(units).integers(0, 32, (50, units)).tolist()
    random_loss[units] = np.median([relu_optimum.least_loss(c, features, target) for c in drawn])
print("median loss of random cones:", {u: float(round(v, 4)) for u, v in random_loss.items()})
assert random_loss[2] > 1.5 * relu_optimum.optimum(points, target, 2)[0] > random_loss[32]

# %% [markdown]
# ## The three answers in one figure

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
lines = {"$l_1$": (lambda m: np.abs(m).sum(-1) / l1, BLUE),
         "$l_2$": (lambda m: np.linalg.norm(m, axis=-1) / l2, ORANGE)}  # fmt: skip
for name, (norm, colour) in lines.items():
    axes[0].semilogx(scales, norm(np.array(nearest)), color=colour, label=f"{name}, projection")
    for scale, m in trained.items():
        axes[0].semilogx([scale] * 5, norm(m), "o", color=colour, ms=4)
axes[0].set(xlabel="scale of the start", ylabel="norm over the least one")
axes[0].set_title("dots: trained, five seeds each")
axes[0].legend(frameon=False)
grid = np.logspace(0.8, 4, 100)
axes[1].semilogx(grid, local_sgd.drift_ratio(8, grid, product), color=BLUE, label="closed form")
axes[1].errorbar(locals_, ratios, 2 * np.array(errors), fmt="o", color=ORANGE, label="label noise")
axes[1].axhline(8, color=GREY, lw=0.5)
axes[1].set(xlabel="local steps $H$", ylabel="drift over that of one step")
axes[1].set_title(r"8 workers, $\eta h$ = 0.005")
axes[1].legend(frameon=False)
t = np.linspace(-1.1, 1.1, 400)
best, chosen = relu_optimum.optimum(points, target, 3)
weights, _ = nnls(features[list(chosen)].reshape(-1, 8).T, target)
edges = relu_optimum.rays(points)
curve = 0 * t
for j, c in enumerate(chosen):
    for end in (0, 1):
        unit = np.maximum(np.stack([t, 0 * t + 1], 1) @ edges[(c + end) % 16], 0)
        curve += (1 if c < 16 else -1) * weights[2 * j + end] * unit
axes[2].plot(t, curve, color=BLUE, label="global optimum, 3 units")
axes[2].plot(points[:, 0], target, "o", color=ORANGE, label="points")
axes[2].set(xlabel="input", ylabel="output")
axes[2].set_title(f"found by {shares[2][0]:.1%} of descents")
axes[2].legend(frameon=False)
plt.show()
