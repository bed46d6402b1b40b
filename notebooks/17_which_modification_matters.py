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
# # Which modification matters?
#
# **Question.** One layer of linear attention, trained on in-context regression, is a step of
# gradient descent. Change one thing about the layer, and train it by the same recipe: is it still?
#
# **Answer.** With a bias it is, and with two heads in most seeds. Everything else ends the claims
# that its predictions are the step's (first figure): with a mesa head, GELU or two layers because
# the layer does *better* than a step, with softmax or a norm because it does worse (second figure).
# Of a ReLU MLP and of two tied layers the loss does not say so, since some seeds end above the step
# and others below. That a difference is more than one of seeds is decided by an exact test, which
# finds "another seed" to matter at the nominal rate (third figure).

# %%
import json
import os
from math import comb
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import constructions
from constructions.gradient_descent.modifications import (
    GRID,
    Modified,
    false_positives,
    holm,
    outcomes,
    permutation_test,
)

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"
kept = Path(constructions.__file__).parents[1] / "benchmarks/results/modifications_cpu.json"
kept = json.loads(kept.read_text())

# %% [markdown]
# ## A modified layer is a construction
#
# It has the claims of the step, another counterpart, and is fitted as any other. Of `GRID`, each
# entry changes one thing (after Narang et al. 2021, arXiv 2102.11972).

# %%
plain = Modified()
print(", ".join(GRID))
fit = plain.fit(seeds=range(2 if QUICK else 5), steps=300 if QUICK else 1500)
excess = outcomes(plain, fit.models)["loss"]
print(f"the plain layer: loss {plain.optimal_loss:.4f} at best, excess {excess.max():.1e} at most")
assert QUICK or excess.max() < 0.005

# %% [markdown]
# ## Which claims live?
#
# Six seeds of every modification, kept by `python benchmarks/modifications.py --save`. Dark is a
# claim that holds of all of them, white one that holds of none; a cross, that the claim is about
# the weights of one layer of linear attention and says nothing here. *If modifications did not
# matter, all rows would look like the first.*

# %%
shares = kept["share of seeds of which a claim holds"]
claims = [*shares["none"]]
matrix = np.array([[np.nan if v is None else v for v in shares[n].values()] for n in GRID])
for name, row in zip(GRID, matrix, strict=True):
    print(f"{name}: {np.nansum(row == 1):.0f} of {np.isfinite(row).sum()} claims hold of all seeds")

# %%
figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
axis.imshow(np.nan_to_num(matrix), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
for y, x in np.argwhere(np.isnan(matrix)):
    axis.text(x, y, "×", ha="center", va="center", color=GREY)
for y, x in np.argwhere((matrix > 0) & (matrix < 1)):
    axis.text(x, y, f"{matrix[y, x]:.1f}", ha="center", va="center")
axis.set(xticks=range(len(claims)), yticks=range(len(GRID)))
axis.set_xticklabels(claims, rotation=40, ha="right")
axis.set_yticklabels(GRID)
axis.set_title("share of six seeds of which a claim holds")
plt.show()

# %% [markdown]
# "Roll-out" holds of no trained layer, the plain one included: applied again and again to six
# examples in three dimensions, a layer shows errors of its step that its loss does not. A claim
# that fails of the plain layer says nothing about modifications.
#
# ## By how much does the loss change?
#
# The loss over that of the step, less 1. Below 0 a layer does better than the step, which then is
# not what it does. Seven of eleven matter, where Narang et al. find that most modifications change
# little: their models are large and measured downstream, this layer is measured to its closed form.
# *If none mattered, every dot would lie among those of the plain layer.*

# %%
losses = {n: np.array(v["by seed"]) for n, v in kept["loss over the step's, less 1"].items()}
others = np.array(kept["the same of other seeds of the plain layer"]["by seed"])
p = {name: float(permutation_test(found, others)) for name, found in losses.items()}
matters = holm({name: value for name, value in p.items() if name != "none"})
for name, found in losses.items():
    said = "matters" if matters.get(name) else "does not matter"
    print(f"{name}: loss {found.mean():+.3f}, p = {p[name]:.3f}, {said}")
assert p["none"] > 0.05 and not matters["bias"]

# %%
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
for y, (name, found) in enumerate(losses.items()):
    colour = ORANGE if matters.get(name) else BLUE
    axis.plot(found, y + np.linspace(-0.15, 0.15, len(found)), "o", color=colour, ms=4)
axis.plot(others, np.linspace(-0.15, 0.15, len(others)), "o", color=GREY, ms=4)
axis.axvline(0, color=GREY, lw=0.5)
axis.set(yticks=range(len(GRID)), xlabel="loss over that of a gradient step, less 1")
axis.set_yticklabels(GRID)
axis.invert_yaxis()
axis.set_title("orange: matters by Holm's rule at 5 %; grey: six other seeds")
plt.show()

# %% [markdown]
# The test is exact: of the $\binom{2n}{n}$ ways to call $n$ of $2n$ values "modified", it counts
# those whose means are as far apart as the real ones. Its least p is two over that number, and
# Holm's rule asks a little of each of several modifications: with five seeds, none of eleven could
# be found to matter, however large its effect. Seeds are worth more than decimals.

# %%
count = len(matters)
least = {n: 2 / comb(2 * n, n) for n in range(3, 9)}
needed = min(n for n, value in least.items() if value <= 0.05 / count)
print(f"of {count} modifications one can be found to matter from {needed} seeds each on")
assert needed == 6 == len(others)

# %% [markdown]
# ## Is another seed found to matter?
#
# The same layer and recipe, cut short so that seeds differ, in one program. Five seeds against five
# others, over disjoint groups. *If the test were too eager, the dots would lie above the steps of
# the nominal rate.*

# %%
recipe = plain.counterpart().quick
many = plain.fit(seeds=range(100, 180 if QUICK else 260), recipe=recipe, steps=150)
values = outcomes(plain, many.models)["loss"]
levels = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
nominal = np.floor(levels * 252 / 2) * 2 / 252
rates = np.array([false_positives(values, 5, level, 0).mean() for level in levels])
pairs = len(values) // 10
for level, rate, exact in zip(levels, rates, nominal, strict=True):
    print(f"p <= {level}: found in {rate:.3f} of tests, nominal {exact:.3f}")
long = kept["share of tests of seeds against seeds with p at most"]
print(
    "640 seeds, 375 steps, six against six:",
    ", ".join(f"p <= {a} in {rate:.3f}" for a, rate in long.items()),
)
spread = np.sqrt(nominal * (1 - nominal) / pairs)
assert (abs(rates - nominal) < 3 * spread).all()

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].hist(values, 30, color=BLUE)
axes[0].set(xlabel="loss over that of the step, less 1", ylabel="seeds")
grid = np.linspace(0, 0.55, 500)
axes[1].plot(grid, np.floor(grid * 126) / 126, color=GREY, lw=1, label="nominal")
axes[1].errorbar(levels, rates, 2 * spread, fmt="o", color=ORANGE, label="real seeds")
axes[1].set(xlabel="level of the test", ylabel="share of tests that find a difference")
axes[1].legend(frameon=False)
plt.show()
