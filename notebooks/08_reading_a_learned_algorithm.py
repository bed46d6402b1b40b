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
# # Reading a learned algorithm
#
# A model has learned something. Two questions about what it does with a context: of which degree is
# its prediction in the examples, and does a map of them explain it? And three about its weights:
# which few of them carry what was learned, which examples does the model treat alike, and are two
# fits that predict the same also near each other?
#
# **Answer.** The degree is the number of gradient steps, exactly, and maps of a context certify
# wrong labels too. A skill that was planted in 12 of 144 weights is found, all of it and nothing
# else, although 30 other weights moved several times as far. Three kinds of examples that nobody
# labelled come out as pure components. And two fits of one algorithm cannot be averaged: they agree
# on what they do and not on the basis in which they write it, which is why the first two tools say
# something about one lineage of models, and nothing across two.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from constructions import CATALOGUE
from constructions.core.compile import compile_program, config_of
from probes.context import Spectrum, degree_weights, saliency, spectrum
from probes.subject import ParameterVector

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"
COLOURS = (ORANGE, BLUE, GREEN)

# %% [markdown]
# ## How many steps? The degree of a prediction
#
# Let $x \in \{0, 1\}^N$ say which examples of a context are there. The prediction for a query is a
# function of $x$, and its Walsh-Hadamard transform splits the variance over all subsets into
# degrees: degree 1 is a sum over examples, the best linear datamodel (Saunshi et al. 2022, arXiv
# 2210.01072). One step of gradient descent is such a sum exactly, $k$ steps have degree $k$ at
# most, and $L$ layers of linear attention $(3^L - 1)/2$. So the highest degree reads off the
# algorithm.

# %%
examples = 6 if QUICK else 10
with jax.enable_x64(True):
    sizes = {"dim_x": 4, "num_examples": examples, "step_size": 0.6}
    built = {
        "1 step": CATALOGUE["gradient-descent"](**sizes),
        "2 steps": CATALOGUE["gradient-descent"](steps=2, **sizes),
        "3 steps": CATALOGUE["gradient-descent"](steps=3, **sizes),
        "GD++, 2 layers": CATALOGUE["gd-plus-plus"](
            dim_x=4, num_examples=examples, steps=2, step_size=1.2, curvature=0.1
        ),
    }
    inputs = built["1 step"].sample(jax.random.key(0), 16)
    spectra = {n: spectrum(c, c.compile().model, inputs) for n, c in built.items()}
    x, y, query = map(np.asarray, inputs)


def on_subsets(algorithm):
    """Answers of an algorithm for every subset of the examples, written out."""
    subsets = np.arange(2**examples)[:, None] >> np.arange(examples) & 1
    contexts = list(zip(x, y[..., 0], query[:, 0], strict=True))
    return np.array([[algorithm(u[s], v[s], q) for u, v, q in contexts] for s in subsets == 1])


def softmax(a, b, q):
    weights = np.exp(4 * a @ q)
    return weights @ b / max(weights.sum(), 1e-300)


others = {
    "1 step, over how many there are": lambda a, b, q: b @ a @ q / max(len(b), 1),
    "ridge regression": lambda a, b, q: np.linalg.solve(a.T @ a + 0.1 * np.eye(4), a.T @ b) @ q,
    "softmax attention": softmax,
}
for name, algorithm in others.items():
    weights = degree_weights(on_subsets(algorithm))
    spectra[name] = Spectrum(weights, float(np.finfo(float).eps))

figure, axis = plt.subplots(figsize=(7, 4))
for name, found in spectra.items():
    shares = np.maximum(found.shares[1:], 1e-34)
    axis.semilogy(
        np.arange(1, examples + 1), shares, "o-" if name in built else "s--", label=name, ms=4
    )
axis.axhline(1e-28, color=GREY, lw=0.8)
axis.text(examples, 2e-28, "rounding", ha="right", color=GREY)
axis.set_xlabel("degree")
axis.set_ylabel("share of the variance")
axis.set_xticks(range(1, examples + 1))
axis.legend(fontsize=8, loc="center right")
plt.show()
{name: (found.degree, f"{found.above(1):.2g}") for name, found in spectra.items()}

# %% [markdown]
# The constructions (circles) fall to rounding behind their degree: 1, 2, 3, and 4 for two layers of
# GD++, which move the inputs too. Whatever divides by something that depends on the examples
# (squares) has all degrees. A trained model is read off in the same way, `orrery probe degrees
# --run RUN`: a layer trained as GD++ has the same shares as the construction (a claim of
# `gd-plus-plus`).
#
# **It misleads** where a layer divides by the number of examples it sees, where examples are set to
# 0 instead of removed, and in float32, where a share below 1e-13 is rounding.
#
# ## Is a map of the context an explanation?
#
# In a classifier in context (`hyper-gradient`, one step on cross-entropy), order the examples by
# how much each speaks for a label, show the model the first of them only, and average the label's
# probability along the way. A map is *complete* if this is as high as the prediction itself, and
# *sound* if no map does the same for a label that the model does not predict (Gupta et al. 2022,
# arXiv 2211.02912).

# %%
classifier = CATALOGUE["hyper-gradient"](dim=8, classes=3, shots=4 if QUICK else 10, queries=1)
episodes = classifier.sample(jax.random.key(1), 16 if QUICK else 64)
model = classifier.compile().model
maps = saliency(classifier, model, episodes, labels=3)
random_maps = saliency(classifier, model, episodes, labels=3, shuffle=jax.random.key(2))

figure, axis = plt.subplots(figsize=(6, 3.5))
fraction = np.linspace(0, 1, maps.path.shape[-1])
worst = maps.auc[:, 1:].argmax(1) + 1
rows = np.arange(len(worst))
axis.plot(fraction, maps.path[:, 0].mean(0), color=BLUE, label="the label it predicts")
axis.plot(fraction, maps.path[rows, worst].mean(0), color=ORANGE, label="the best wrong label")
axis.plot(fraction, random_maps.path[:, 0].mean(0), "--", color=BLUE, label="that, random map")
axis.set_xlabel("share of the examples shown, those for the label first")
axis.set_ylabel("probability of the label")
axis.legend(fontsize=8)
plt.show()
{
    "completeness": round(float(maps.completeness.mean()), 3),
    "soundness, worst label": round(float(maps.soundness.min(1).mean()), 3),
    "random map": (
        round(float(random_maps.completeness.mean()), 3),
        round(float(random_maps.soundness.min(1).mean()), 3),
    ),
}

# %% [markdown]
# The maps are complete, and nearly as convincing for wrong labels: the model sums over its context,
# so that showing only the examples of a label leads it to that label. Completeness alone would have
# called these maps excellent.

# %% [markdown]
# ## Which weights carry a skill?
#
# Between two sets of weights, before and after, lie all the models in which some weights have moved
# and others have not (Panigrahi et al. 2023, arXiv 2302.06600):
#
# $$\theta(\gamma) = \theta_0 + \gamma \odot (\theta_1 - \theta_0), \qquad
#   \mathrm{Rel}(\gamma) = \frac{L(\theta_0) - L(\theta(\gamma))}{L(\theta_0) - L(\theta_1)} .$$
#
# The mask $\gamma$ is learned by descent on $-\mathrm{Rel}$, at a price for every weight that is
# in it. To know whether that works, plant a skill. The model is one layer of linear attention with
# four matrices of $6 \times 6$; before, they are 0. After, they hold one step of gradient descent,
# 12 numbers, and two distractions: noise everywhere, and large weights that write to columns which
# nobody reads.

# %%
from probes.grafting import gains, learn_mask, overlap, random_mask, top_movement

descent = CATALOGUE["gradient-descent"](dim_x=5, num_examples=10)
shape = config_of(descent.program).with_heads(6, 6)
flat = ParameterVector(descent, compile_program(descent.program, config=shape))
skill = flat.theta != 0
names = {part.rsplit(".", 1)[-1]: where for part, where in flat.parts.items()}
inert = jnp.zeros(144, bool).at[names["output"].start : names["output"].start + 30].set(True)

noise, far = jax.random.split(jax.random.key(0))
before = jnp.zeros(144)
after = flat.theta + 0.02 * jax.random.normal(noise, (144,))
after = jnp.where(inert, 3 + jax.random.uniform(far, (144,)), after)


def loss(examples, theta, key):
    return flat.loss(theta, descent.task.sample(key, examples))


key, measure = jax.random.key(1), jax.jit(partial(loss, 4096))
fall = measure(before, key) - measure(after, key)
mask = learn_mask(partial(loss, 256), before, after, fall, key)
masks = {
    "learned": mask,
    "moved most": top_movement(before, after, 12),
    "at random": random_mask(before, after, 12, key),
}
found = gains(partial(loss, 4096), before, after, jnp.stack(list(masks.values())), key)
for name, one, gain in zip(masks, masks.values(), found, strict=True):
    print(
        f"{name:11s} {int(one.sum()):3d} weights, {int((one & skill).sum()):2d} of the skill's, "
        f"{int((one & inert).sum()):2d} inert ones, gain {float(gain):6.3f}"
    )
assert overlap(skill, mask) == 1 and overlap(mask, skill) == 1
assert found[0] > 0.99 and abs(found[1:]).max() < 1e-3

figure, axes = plt.subplots(2, 4, figsize=(10, 5), layout="constrained", sharex=True, sharey=True)
largest = float(jnp.abs(after).max())
rows = (("how far it moved", jnp.abs(after) / largest, "Greys"), ("learned mask", mask, "Oranges"))
for row, (what, values, colours) in zip(axes, rows, strict=True):
    for axis, (name, part) in zip(row, names.items(), strict=True):
        axis.imshow(values[part].reshape(6, 6), cmap=colours, vmin=0, vmax=1)
        axis.set(title=f"{name}: {what}", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
plt.show()

# %% [markdown]
# The movement (above) points at the output's unread columns. The mask (below) is the program: the
# diagonals of query and key, and the one number each of value and output that turns $y$ into a
# step. Its gain is a little more than 1, because it leaves the noise behind. Movement and chance
# gain nothing at all: the step is a product of four matrices, and without any one of them it is 0.
#
# Write the same function in another basis, $W_K \to R W_K$, $W_Q \to R^{-\top} W_Q$, and the same
# skill is four times as large:

# %%
from constructions.core.symmetry import change_key_basis

turned = flat.vector(change_key_basis(flat.model, jax.random.key(5)))
batch = descent.task.sample(jax.random.key(2), 64)
gap = flat.predict(turned, *batch.inputs) - flat.predict(flat.theta, *batch.inputs)
drop = measure(before, key) - measure(turned, key)
other = learn_mask(partial(loss, 256), before, turned, drop, key)
print(f"largest difference of the predictions {float(jnp.abs(gap).max()):.1e}")
print(f"weights in the mask: {int(mask.sum())}, and {int(other.sum())} in the other basis")
assert jnp.abs(gap).max() < 1e-5 and other.sum() > 40

# %% [markdown]
# ## Which examples are treated alike?
#
# Examples that take the same path through a model are sensitive to the same weights. Their Fisher
# matrices, each divided by its norm, are split into few non-negative parts of rank one (NPEFF,
# Matena and Raffel 2023, arXiv 2310.04649):
#
# $$F_i = J_i^\top J_i \;\approx\; \sum_j W_{ij}\, g_j g_j^\top, \qquad W \ge 0 .$$
#
# Plant three kinds of examples: inputs of kind $t$ have two coordinates of their own and 0
# elsewhere. Nobody says which is which, and the control has inputs of all six coordinates.

# %%
from probes.merging import fisher_rows
from probes.npeff import decompose, isotropic_rows, top_examples
from synthetic.tasks.task import Batch

six = CATALOGUE["gradient-descent"](dim_x=6, num_examples=10)
wide = config_of(six.program).with_heads(7, 7)
model = ParameterVector(six, compile_program(six.program, config=wide))
query = next(part for name, part in model.parts.items() if name.endswith("query"))
kinds = np.repeat(np.arange(3), 100)


def drawn(blocks):
    rng = np.random.default_rng(0)
    inside = np.repeat(np.eye(3), 2, axis=1)[kinds] if blocks else np.ones((300, 6))
    x, x_query = (rng.uniform(-0.5, 0.5, (300, n, 6)) * inside[:, None] for n in (10, 1))
    w = rng.normal(size=(300, 6, 1))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, x @ w, x_query, x_query @ w)]
    return Batch(tuple(arrays[:3]), arrays[3])


explained = {}
weights = {}
for name in ("three kinds", "one kind"):
    rows = fisher_rows(model, model.theta, drawn(name == "three kinds"))[..., query]
    parts = decompose(rows, 6, jax.random.key(0))
    null = decompose(isotropic_rows(rows, jax.random.key(1)), 6, jax.random.key(0))
    weights[name] = np.asarray(parts.weights)
    explained[name] = (1 - float(parts.error), 1 - float(null.error))
    print(
        f"{name:11s} explains {explained[name][0]:.2f} of the Fisher matrices, "
        f"{explained[name][1]:.2f} of isotropic ones"
    )
assert explained["three kinds"][0] > 1.7 * explained["three kinds"][1]
assert explained["one kind"][0] < 1.5 * explained["one kind"][1]

figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for axis, (name, found) in zip(axes, weights.items(), strict=True):
    order = np.argsort([np.median(top_examples(found)[j]) for j in range(6)])
    image = axis.imshow(found.T[order], aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(xlabel="example; lines part the kinds", title=name)
    for edge in (100, 200):
        axis.axvline(edge, color="white", lw=1)
axes[0].set(ylabel="component", yticks=range(6), yticklabels=range(1, 7))
figure.colorbar(image, ax=axes, label="weight $W_{ij}$")
plt.show()
purest = [
    np.bincount(kinds[top], minlength=3).max() / 20 for top in top_examples(weights["three kinds"])
]
assert min(purest) == 1

# %% [markdown]
# On the left every component belongs to one kind. On the right there are components as well, but
# they explain hardly more than of matrices that have nothing in common. Ask for that number: that a
# component's own examples move most when the weights move along it is true on both sides.
#
# Components have rank one, and a kind fills four dimensions here. Six of them find the kinds from
# any start; three, one a kind, leave examples uncovered, and clusters then depend on the start.
# `orrery probe npeff` does the same for a saved run; of masked language models it also says how
# often the examples of a component hide words of one part of speech.
#
# ## Are two fits of one algorithm near each other?
#
# Two seeds learn to do the same gradient step. Halfway between their weights there is nothing; the
# Fisher information of each weight says which of the two to believe (Matena and Raffel 2021, arXiv
# 2111.09832) and saves most of the rest, but only by staying near one of them. Halfway between what
# their layers *do*, which no basis can change, there is the algorithm.

# %%
from constructions.runs import fit_family
from probes.merging import FISHER_MERGE

run = fit_family("gradient-descent", quick=True, seeds=(0, 1), steps=600 if QUICK else 1500)
merged = FISHER_MERGE(run, 0)
values = dict(zip(merged.columns, merged.values[0], strict=True))
values = {n: v for n, v in values.items() if n != "share of the first"}
print(merged.note)

figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
colours = [BLUE, BLUE, ORANGE, ORANGE, GREEN]
axis.barh(list(values), list(values.values()), color=colours)
axis.axvline(run.optimum, color=GREY, ls=":", label="least possible loss")
axis.set(xlabel="loss")
axis.invert_yaxis()
axis.legend(frameon=False, loc="lower right")
plt.show()
first, second, plain, fisher, middle = values.values()
assert plain > 1.3 * max(first, second) and fisher > 1.01 * min(first, second)
assert middle < 1.05 * max(first, second)

# %% [markdown]
# Masks, Fisher matrices and averages of weights compare models of one lineage. Across fits, compare
# functions, or what `constructions.core.canonical` keeps of the weights.
