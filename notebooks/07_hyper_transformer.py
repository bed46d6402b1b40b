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
# # Can attention write a classifier, and which one do trained transformers write?
#
# **Question.** A HyperTransformer (Zhmoginov et al. 2022, arXiv 2201.04182) reads a few labelled
# examples and writes the weights of a classifier into tokens, one for each class. What algorithm
# is that? Does training find it, and can anything do better?
#
# **Answer.** One head of linear attention writes exactly one gradient step on cross-entropy, and
# two trained layers end there. One head of softmax attention writes class means, from which the
# exact posterior follows: trained, it is the best classifier that there is. Examples without
# labels count after one more layer, and what is kept from task to task is never forgotten.

# %%
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from constructions import CATALOGUE
from constructions.claims import Evidence, predict
from constructions.hyper_transformer.paper import centred, held_weights, own_weights

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, PINK, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#666666"

# %% [markdown]
# ## One head is one step
#
# Examples are tokens $(e_i, y_i)$, with a constant at the end of $e_i$; the token of class $c$
# holds $(W_c, 1_c)$, with $W_c = 0$ at first. The head
#
#     Head(query=code - 1 / C, key=label, value=example, write={weights: eta / n}, queries="class")
#
# writes $W_c = \frac{\eta}{n} \sum_i (y_{ic} - \frac1C)\, e_i$. With all $p_{ic} = 1/C$ that is the
# gradient of the cross-entropy at zero, for weights and biases. A second head applies it: a query
# looks at the class tokens with scores $W_c \cdot e$ and takes their codes. Softmax attention
# compares features with weights in the very form of the cross-entropy, so that further steps are
# possible, two layers each.

# %%
step = CATALOGUE["hyper-gradient"](dim=2, classes=3, shots=4, steps=1, step_size=3.0)
more = replace(step, steps=4)


def cross_entropy(weight, e, y):
    return -jax.nn.log_softmax(e @ weight.T)[jnp.arange(len(y)), y].mean()


with jax.enable_x64(True):
    support, labels, queries = step.sample(jax.random.key(3), 1)
    e = jnp.concatenate([support[0], jnp.ones((12, 1))], 1)
    for c in (step, more):
        weight = jnp.zeros((3, 3))
        for _ in range(c.steps):
            weight -= 3.0 * jax.grad(cross_entropy)(weight, e, labels[0])
        wanted = queries[0] @ weight[:, :2].T + weight[:, 2]
        error = float(
            jnp.abs(predict(c, c.compile().model, support, labels, queries) - wanted).max()
        )
        print(f"{c.steps} step(s) in {2 * c.steps} layers: {error:.1e} from jax.grad")
        assert error < 1e-12

nearest = CATALOGUE["hyper-prototypes"](dim=2, classes=3, shots=4, shrinkage=1.0)
ticks = np.linspace(-3, 3, 200)
plane = np.stack(np.meshgrid(ticks, ticks), -1)
inputs = support.astype(jnp.float32), labels, queries.astype(jnp.float32)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", sharey=True)
titles = "one step", "four steps", "nearest prototype"
for axis, c, title in zip(axes, (step, more, nearest), titles, strict=True):
    held = c.read(c.compile().model, *inputs)  # what the class tokens hold
    if c is nearest:
        weight, bias = held["weight"][0], held["bias"][0, :, 0]
    else:
        weight, bias = held["weight"][0, -1, :, :2], held["weight"][0, -1, :, 2]
    won = (plane @ np.asarray(weight).T + np.asarray(bias)).argmax(-1)
    colours = {"colors": [ORANGE, BLUE, GREEN], "alpha": 0.25}
    axis.contourf(ticks, ticks, won, levels=[-0.5, 0.5, 1.5, 2.5], **colours)
    for k, colour in enumerate((ORANGE, BLUE, GREEN)):
        own = support[0][labels[0] == k]
        axis.plot(*own.T, "o", color=colour, label=f"class {k + 1}")
    axis.set(title=title, xlabel="$e_1$")
axes[0].set(ylabel="$e_2$", xlim=(-3, 3), ylim=(-3, 3))
axes[0].legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# ## What training finds
#
# Both families have a counterpart: the same layers with full matrices, trained from random weights
# on the cross-entropy of the queries. Classes are Gaussian here, so that the best classifier has a
# closed form. With equally many examples a class it is the one of *shrunk prototypes*,
# $\kappa\,\mu_c \cdot q - \kappa^2 |\mu_c|^2 / 2$ over the variance: softmax attention for the
# means, a gated MLP for their norms.

# %%
found = {}
for name in ("hyper-gradient", "hyper-prototypes"):
    c = CATALOGUE[name](**CATALOGUE[name].example())
    quick = c.counterpart().quick
    model = c.fit(recipe=replace(quick, steps=500) if QUICK else quick, seed=1).model
    episodes = c.task.sample(jax.random.key(4), 2**13)
    evidence = Evidence(c, model, c.compile().model, episodes, jax.random.key(5))
    posterior = c.task.posterior(*episodes.inputs)
    found[name] = evidence
    print(
        f"{name:16s} loss {evidence.loss(evidence.prediction):.4f} trained, "
        f"{evidence.loss(evidence.expected):.4f} built, {evidence.loss(posterior):.4f} posterior"
    )
    assert evidence.loss(evidence.prediction) < 1.03 * evidence.loss(evidence.expected)

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for axis, (name, evidence), colour in zip(axes, found.items(), (ORANGE, BLUE), strict=True):
    ours, theirs = (
        np.asarray(centred(p)).ravel()[:3000] for p in (evidence.prediction, evidence.expected)
    )
    axis.plot(theirs, ours, ".", color=colour, ms=2)
    axis.plot([-6, 6], [-6, 6], color=GREY, lw=0.8, label="equal")
    axis.set(title=name, xlabel="logit, built by hand", ylabel="logit, trained")
    axis.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
    axis.legend(frameon=False)
plt.show()

for name, evidence in found.items():
    together, alone = held_weights(evidence), own_weights(evidence)
    print(
        f"{name:16s} weights read off all class tokens: R^2 {together:.3f}; off its own {alone:.3f}"
    )
    assert together > 0.98

# %% [markdown]
# The logits are those of the constructions (their mean over classes, which changes no probability,
# taken away). Where the weights are differs. Through softmax attention the token of a class holds
# the prototype of that class. With linear attention all class tokens together hold the classifier,
# but not each its own row: only a sum over tokens reaches the logits, and what a matrix $A$ mixes
# in the tokens its inverse unmixes there. The reading "the token of class $c$ holds $W_c$" is
# refuted for it, by a symmetry.
#
# ## Examples without labels
#
# One more layer in front: examples without a label look at labelled ones with like features and
# take over their labels. The prototypes count them, the surer the more. The layer is all that the
# gain comes from.

# %%
sizes = (20, 100) if QUICK else (5, 20, 50, 100)
gains, ablated = [], []
for unlabelled in sizes:
    c = CATALOGUE["hyper-semi-supervised"](
        dim=20, classes=5, shots=1, queries=20, spread=0.7, unlabelled=unlabelled, sharpness=3.0,
        similarity=0.4, scale=0.75, shrinkage=1.0,
    )  # fmt: skip
    episodes = c.task.sample(jax.random.key(6), 300)
    known = np.asarray(c.task.accuracy(c.task.posterior(*episodes.inputs), episodes))
    for model, rows in (
        (c.compile().model, gains), (c.near_misses()["no guesses"].model, ablated)
    ):  # fmt: skip
        accuracy = np.asarray(c.task.accuracy(predict(c, model, *episodes.inputs), episodes))
        difference = accuracy - known
        rows.append((accuracy.mean(), difference.mean(), difference.std(ddof=1) / 300**0.5))
    print(
        f"{unlabelled:3d} without labels: accuracy {known.mean():.3f} -> {gains[-1][0]:.3f}, "
        f"gain {gains[-1][1]:.3f} +- {gains[-1][2]:.3f}"
    )
assert gains[-1][1] > 5 * gains[-1][2] and ablated[-1][1] < 2 * ablated[-1][2]

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for rows, colour, name in ((gains, BLUE, "guessed labels"), (ablated, PINK, "that layer removed")):
    _, mean, error = np.array(rows).T
    axis.plot(sizes, mean, "o-", color=colour, label=name)
    axis.fill_between(sizes, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, lw=0)
axis.axhline(0, color=GREY, lw=0.8, ls=":", label="posterior of the labelled examples")
axis.set(xlabel="examples without labels", ylabel="gain in accuracy", xscale="log")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## From task to task
#
# A class token can come with the mean of what it has seen before (Vladymyrov et al. 2023, arXiv
# 2301.04584). It takes part in attention as one more example of its class, with its score raised by
# $\log N_c$, so that it counts as often as examples went into it: the softmax makes the running
# mean. Classes that a task does not show stay as they are.

# %%
c = CATALOGUE["hyper-prototypes"](dim=5, classes=4, shots=5)
model, memory = c.compile().model, None
support, labels, queries = c.sample(jax.random.key(7), 256)
order = jnp.argsort(labels, stable=True)  # task by task, one class at a time
support = jnp.take_along_axis(support, order[..., None], 1)
labels = jnp.take_along_axis(labels, order, 1)
for first in range(0, 20, 5):
    before = memory
    part = slice(first, first + 5)
    memory = c.update(model, support[:, part], labels[:, part], memory)
    if before is not None:
        assert (memory.mean[:, : first // 5] == before.mean[:, : first // 5]).all()
at_once = c.predict(model, support, labels, queries)
remembered = c.predict(model, support[:, :0], labels[:, :0], queries, memory)
gap = float(jnp.abs(remembered - at_once).max())
print(f"four tasks of one class each, against all examples at once: {gap:.1e} in float32")
assert gap < 1e-4
