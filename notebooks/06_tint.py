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
# # Can a transformer train another one in its forward pass?
#
# **Question.** Panigrahi et al. 2023 (arXiv 2307.01189) put the weights of a small language model
# into the tokens of a larger one, whose layers then run the small model, differentiate its loss on
# the text so far, change its weights and run it again: gradient descent, within one forward pass.
# They approximate on the way. How near is such a step to the true one, what does each approximation
# cost, and what is a step worth?
#
# **Answer.** With a transposed softmax and products of numbers as parts, the step is gradient
# descent up to rounding, for every weight. Of the paper's approximations, finite differences cost a
# percent or less. Two cost the rest, half of the step's length together: no gradient through the
# scores of attention, and gains that are not trained. Models with small random weights hide both.
# On text whose words were exchanged, the simulator is worth what dynamic evaluation is worth at the
# same rate, and the gains are what matters most there.

# %%
import os
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np

from constructions.core.inventory import components, counts
from constructions.core.transformer import randomise
from constructions.interchange.decoder import TrainedAuxiliary, from_arrays
from constructions.tint.algorithm import MODES
from constructions.tint.construction import Tint
from constructions.tint.experiments import PUBLISHED, hardness, table
from constructions.tint.measurements import (
    ABLATION,
    ablation,
    adaptation,
    by_matrix,
    descent_logits,
    gradient_update,
    mean,
    simulated_update,
    update_error,
)
from synthetic.tasks.adaptation import AdaptationTask

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, PINK, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#666666"
layers, depths = (1, (1,)) if QUICK else (2, (1, 2, 4))
size = {"heads": 2, "width": 8, "length": 16} if QUICK else {"heads": 4, "width": 16, "length": 32}
fit = {"steps": 200} if QUICK else {"steps": 1000, "learning_rate": 1e-2}


rate = 0.1


def auxiliary(layers):
    return TrainedAuxiliary("toy" if QUICK else "english", layers=layers, **size, **fit)


# %% [markdown]
# ## What it is made of
#
# The auxiliary model is a decoder of GPT-2's shape, fitted to text of a grammar. Each matrix
# $[W\, b]$ has tokens of its own, one for each row. A linear layer is then a linear head from the
# text to those tokens, without a softmax: the score of a token of the text with a row is an entry
# of $W x + b$, and a one-hot number written in the row's token says where to put it. In the
# backward pass keys and values change places, and to descend, rows look at the text.

# %%
c = Tint(auxiliary(layers), "exact", learning_rate=rate)
passes = {layer.name: layer for layer in c.program.layers}
for layer in passes.values():
    if layer.name in ("output 0", "output 0, backward"):
        for head in layer.single_heads:
            print(f"{head.name:26} {head.mixer}, from {head.queries[0]} to {head.keys[0]}")
print(components(c.program).markdown())
print(f"{components(c.program).plain:.0%} of the heads are such as GPT-2 has")
print(counts(c.program))
print(f"the auxiliary model has {c.shape.parameters} parameters")

# %% [markdown]
# Real sizes follow from the numbers of a configuration, without allocating anything: the program's
# own entries, what is stored with the auxiliary model's weights, and the paper's parameters, by its
# formula and with the prefix tokens and tables that it leaves out.

# %%
print(table("exact", ("GPT-2",) if QUICK else tuple(PUBLISHED)))

# %% [markdown]
# No map of the program holds a learned number: the weights of the auxiliary model come in with the
# tokens, and what is stored are identities and multiples of them.
#
# ## Is it gradient descent?
#
# Every sequence of the batch trains its own copy, on the first half of its words. What the
# simulator writes is compared with the true gradient of every matrix, in three modes: exact, by
# finite differences throughout, and as in the paper.

# %%
sequences = 64 if QUICK else 256
tokens, train = c.task.sample(jax.random.key(0), sequences).inputs
true = gradient_update(c.weights, tokens, train, c.shape)
simulators = {mode: Tint(c.auxiliary, mode, learning_rate=rate) for mode in MODES}
wrote = {mode: simulated_update(s, tokens, train) for mode, s in simulators.items()}
errors = {mode: by_matrix(found, true) for mode, found in wrote.items()}

figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
names = list(errors["exact"])
marks = {"paper": (ORANGE, "s"), "finite-difference": (GREEN, "^"), "exact": (BLUE, "o")}
for mode, (colour, mark) in marks.items():
    for n, name in enumerate(names):
        each = np.median(errors[mode][name].relative, 1)
        label = mode if n == 0 else None
        axis.plot(np.full(len(each), n), each, mark, color=colour, alpha=0.7, label=label)
axis.axhline(1, color=GREY, lw=0.8, ls=":")
axis.set(yscale="log", ylabel="error of the step over its length, median")
axis.set_xticks(range(len(names)), names)
axis.set_xlabel("weights; a mark for each layer")
axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()
whole = {mode: update_error(found, true) for mode, found in wrote.items()}
for mode, f in whole.items():
    print(f"{mode}: cosine {f.cosine.mean():.7f}, relative error {np.median(f.relative):.1e}")
assert whole["exact"].relative.max() < 1e-4
assert whole["finite-difference"].cosine.mean() > 0.999 > whole["paper"].cosine.mean()

# %% [markdown]
# ## What each approximation costs
#
# One approximation at a time, the rest exact, against the true gradient of all weights of blocks
# and norms: for models fitted to text, and for random ones (weights of standard deviation .02), by
# depth.

# %%
costs = {}
ways = {"value-only attention": ORANGE, "norms by differences": BLUE}
if not QUICK:
    ways |= {"gains not trained": PINK, "all (paper)": "black"}
for depth in depths:
    settings = auxiliary(depth)
    base, text = settings.model, Tint(settings).text
    drawn = randomise(base, jax.random.key(1), 0.02)
    weights = {kind: from_arrays(m.arrays()) for kind, m in (("fitted", base), ("random", drawn))}
    words, mask = AdaptationTask(text, settings.length).sample(jax.random.key(2), 32).inputs
    costs[depth] = ablation(base, words, mask, weights, {way: ABLATION[way] for way in ways})

figure, axes = plt.subplots(1, 2, figsize=(8.4, 4), sharey=True, layout="constrained")
for axis, kind in zip(axes, ("fitted", "random"), strict=True):
    for way, colour in ways.items():
        middle = [np.median(costs[n][way][kind].relative) for n in depths]
        axis.semilogy(depths, middle, "o-", color=colour, label=way, lw=1.2)
    axis.set(title=kind, xlabel="layers", xticks=depths)
axes[0].set_ylabel("error of the step over its length, median")
axes[1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
deep = {way: float(np.median(found["fitted"].relative)) for way, found in costs[depths[-1]].items()}
hidden = {
    way: float(np.median(found["random"].relative)) for way, found in costs[depths[-1]].items()
}
for way in ways:
    print(f"{way}: {deep[way]:.1e} fitted, {hidden[way]:.1e} random")
assert deep["value-only attention"] > 10 * deep["norms by differences"]
assert deep["value-only attention"] > 10 * hidden["value-only attention"]

# %% [markdown]
# For fitted models, what is left out is a third to a half of the step, at any depth, and what is
# taken by differences less than a hundredth. Random models of the same shape make the same
# approximations look harmless: their keys and queries hardly matter for the loss, and neither do
# their gains. There, gains alone are all that the paper's way costs.
#
# ## What a step is worth
#
# The front part of a text is trained on, the rest is predicted. The text is of the grammar that the
# auxiliary model knows, with its words exchanged for one another. Dynamic evaluation is the same
# step by autograd, at the same rate, on the same weights.

# %%
shares = (0.3, 0.5, 0.7, 0.9)
gains = {}
for mode in ("paper", "exact"):
    for share in shares:
        batch = replace(c.task, share=share).sample(jax.random.key(3), sequences)
        gains[mode, share] = adaptation(simulators[mode], batch)

figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
at = 100 * np.array(shares)
for mode, colour in (("paper", ORANGE), ("exact", BLUE)):
    each = [gains[mode, share] for share in shares]
    descent = [mean(a.descent - a.before) for a in each]
    low, high = (np.array([d.mean + s * d.error for d in descent]) for s in (-1, 1))
    axis.plot(at, (low + high) / 2, color=colour, label=f"autograd, the weights of {mode}")
    axis.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
    simulated = [mean(a.simulated - a.before).mean for a in each]
    axis.plot(at, simulated, "o", color=colour, label=f"simulated, {mode}")
alone = []
for share in shares:
    batch = replace(c.task, share=share).sample(jax.random.key(3), sequences)
    words, mask = batch.inputs
    scores = descent_logits(c.weights, words, mask, rate, c.shape, 1, ("gain", "offset"))
    loss = c.task.loss(jax.nn.softmax(scores), batch)
    alone.append(mean(loss - gains["exact", share].before).mean)
axis.plot(at, alone, "--", color=GREY, label="autograd, gains and offsets alone")
axis.axhline(0, color=GREY, lw=0.8, ls=":")
axis.set(xlabel="share of the text that is trained on, %", ylabel="change of the loss, nats a word")
axis.legend(frameon=False)
plt.show()
print("change of the loss, nats a word, and its standard error")
for (mode, share), found in gains.items():
    each = found.summary()
    steps = [each[f"{name} less before"] for name in ("descent", "simulated")]
    shown = ["{:.3f} ({:.3f})".format(*step) for step in steps]
    print(f"{mode}, {share:.0%} trained on: autograd {shown[0]}, simulated {shown[1]}")
assert (
    max(abs(gains["exact", s].simulated - gains["exact", s].descent).max() for s in shares) < 1e-3
)
assert mean(gains["exact", 0.9].simulated - gains["exact", 0.9].before).mean < 0

# %% [markdown]
# Points lie on their lines: a simulated step is a step. Why are the two lines apart? A model whose
# words were exchanged is sure of what is wrong, its loss is above that of a uniform guess, and most
# of what a step of this size does is to make it less sure. Gains of the norms do that best: alone,
# with the offsets, they are worth as much as all weights together, and the paper's way does not
# train them. A loss after a step says little about how near the step is to the gradient.
#
# ## When is it safe to leave attention's scores out?
#
# Where a head looks at one token alone, its choice does not change with the scores. With
# $\varepsilon_i = 1 - \max_j a_{ij}$ and $c_{ij} = \langle dy_i, v_j \rangle$, what is left out is
# bounded,
#
# $$|dq_i| \le 2\, \varepsilon_i\, (\max_j c_{ij} - \min_j c_{ij})\, \max_j |k_j| / \sqrt d.$$

# %%
h = hardness(c, tokens, train)
there = np.asarray(h.bound) > 1e-6 * np.asarray(h.bound).max()
eps, dropped, bound = (np.asarray(a)[there] for a in h)
shown = np.random.default_rng(0).permutation(len(eps))[:4000]
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
axes[0].loglog(eps[shown], dropped[shown], ".", color=BLUE, ms=2, alpha=0.3, rasterized=True)
axes[0].set(
    xlabel=r"softness of attention, $\varepsilon_i$", ylabel=r"gradient that is dropped, $|dq_i|$"
)
axes[1].loglog(bound[shown], dropped[shown], ".", color=BLUE, ms=2, alpha=0.3, rasterized=True)
ends = np.array([bound.min(), bound.max()])
axes[1].loglog(ends, ends, color="black", lw=0.8, label="equal")
axes[1].set(xlabel="bound", ylabel=r"$|dq_i|$")
axes[1].legend(frameon=False)
plt.show()
print(
    f"medians: softness {np.median(eps):.2f}, dropped over bound {np.median(dropped / bound):.2f}"
)
assert (dropped <= bound * 1.001).all()

# %% [markdown]
# No point is above the bound. Hard heads do drop little, but few heads of these models are hard,
# and the bound is some twenty times too high in the middle: it says when leaving the scores out is
# safe, not how much it costs.
