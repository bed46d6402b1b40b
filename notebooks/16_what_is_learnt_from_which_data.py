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
# # What is learnt from which data?
#
# **Question.** The objective says what is asked of a model. What do the documents that are kept,
# the words that are hidden, the key of a fact and the augmentations of an input add to that?
#
# **Answer.** They decide it. Keeping probable text helps where noise is improbable, hurts where the
# improbable text is a rare domain, and hurts clean text (first figure). Corrupted spans are learnt
# later than single words, each measured to its own exact optimum (second). A fact lasts as long as
# its key is rare, which for a bag of words is not how surprising the sentence is (third). And
# features of equal contrastive loss tell a label perfectly, or not at all (fourth).

# %%
import json
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import constructions
from constructions.gradient_descent import facts
from constructions.inside_outside import pruning, spans, training_data
from constructions.kernel_descent.contrastive import Cube, trained
from synthetic.grammar.examples import named

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"

# %% [markdown]
# ## Which documents are kept
#
# Documents are strings of six words, from a grammar mixed with another and with noise, so that the
# distribution of the text is a table. A small grammar, fitted to a sample, gives each string its
# perplexity, and 60 % are kept: of low, middle or high perplexity, or at random (after Ankner et
# al. 2024, arXiv 2405.20541). Whichever perplexity is kept, that moves the text equally far,
#
# $$\mathrm{KL}(p(\cdot\mid\text{kept})\,\|\,p) = -\log p(\text{kept}),$$
#
# and the perplexity decides where to.


# %%
def kept_text(text):
    """What is kept of a text: its share, and its distribution; exact."""
    ways = pruning.ways(text, 0, 0.6, np.random.default_rng(0))
    kept = {which: text.probability * own for which, own in ways.items()}
    return {which: (own.sum(), own / own.sum()) for which, own in kept.items()}


losses = {}
for name, text in pruning.TEXTS.items():
    kept = kept_text(text)
    for which, (share, after) in kept.items():
        inside = after > 0
        ratio = after[inside] / text.probability[inside]
        divergence = after[inside] @ np.log(ratio)
        noise = text.noise * pruning.parts()[2][inside] @ ratio
        print(f"{name}, {which}: share kept {share:.2f}, noise in it {noise:.2f}")
        assert abs(divergence - (0.0 if which == "random" else -np.log(share))) < 1e-9
    chances = np.array([after for _, after in kept.values()])
    exact = training_data.limits(chances, text.wanted)
    losses[name] = dict(zip(kept, exact - exact[0], strict=True))

# %% [markdown]
# Masked language models are then trained on documents of each kind, five seeds each, and asked for
# hidden words of the text that is wanted: without noise, or with both domains in equal shares. What
# pruning adds to their loss, kept by `python benchmarks/training_data.py --save`, stands below with
# the loss of a model that knew exactly what had been kept. *If perplexity did not matter, all ways
# to prune would lie at 0 as random pruning does.*

# %%
file = Path(constructions.__file__).parents[1] / "benchmarks/results/training_data_cpu.json"
rows = json.loads(file.read_text())["rows"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for axis, name in zip(axes, pruning.TEXTS, strict=True):
    for at, which in enumerate(pruning.KEPT):
        row = rows[f"{which} kept, {name}, model"]
        added, error = row["measured"], row["error"]
        exact = losses[name][which]
        axis.errorbar(at, added, 2.78 * error, fmt="o", color=BLUE)
        axis.plot([at - 0.3, at + 0.3], [exact] * 2, color=ORANGE)
        print(f"{name}, {which} kept: {added:+.3f} nats a word, known exactly {exact:+.3f}")
    axis.axhline(0, color=GREY, lw=0.5)
    axis.set(xticks=range(4), title=name)
    axis.set_xticklabels(pruning.KEPT)
axes[0].set(ylabel="added loss, nats a hidden word")
figure.suptitle("dots: trained, 95 % interval; lines: models that know exactly what was kept")
plt.show()
assert rows["low kept, noisy, model"]["measured"] < 0 < rows["high kept, noisy, model"]["measured"]
assert rows["low kept, clean, model"]["measured"] > 0

# %% [markdown]
# On clean and noisy text trained models lose far less than what was kept would have them lose: they
# do not learn which strings are missing. Keeping improbable text saves the rare domain, but is no
# better there than pruning at random.
#
# How much noise must there be, for pruning to pay? The loss of a model that knows what was kept
# says it without a fit: as much as is pruned, 40 %; before that, text goes that is wanted. *If
# pruning by low perplexity were good for any text, its line would start below 0.*

# %%
noises = np.array([0.0, 0.4] if QUICK else [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
gains = {which: [] for which in pruning.KEPT}
for noise in noises:
    kept = kept_text(pruning.Text(1 - noise, 0.0, noise))
    chances = np.array([after for _, after in kept.values()])
    exact = training_data.limits(chances, pruning.parts()[0])
    for which, loss in zip(list(kept)[1:], exact[1:] - exact[0], strict=True):
        gains[which].append(loss)
pays = noises[np.array(gains["low"]) < 0]
print(f"keeping 60 % of low perplexity pays from a share of noise of {pays.min()} on")
assert gains["low"][0] > 0 > gains["low"][-1] and max(map(abs, gains["random"])) < 1e-6

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for (which, found), colour in zip(gains.items(), (BLUE, GREEN, ORANGE, GREY), strict=True):
    axis.plot(noises, found, "o-", color=colour, label=which)
axis.set(xlabel="share of noise in the text", ylabel="added loss, nats a hidden word")
axis.legend(frameon=False, title="perplexity kept")
plt.show()

# %% [markdown]
# ## Which words are hidden
#
# One mark stands for a span of one to three words, and the model says which, and how many (after
# Raffel et al. 2019, arXiv 1910.10683). Charts of every width give the exact posterior. Below is
# what models lack of the way from the words' frequencies to the posterior *of their own objective*,
# step by step. *If spans were learnt as easily as single words, the lines would meet.*

# %%
exact = spans.SpanTask(named("brackets"))
asked = exact.sample(jax.random.key(1), 1024)
chance, _ = exact.posterior(*asked.inputs)
tokens, mask = asked.target
width = (mask & (tokens != exact.empty)).sum(1)
told = np.asarray(chance)[np.arange(1024), np.asarray(width) - 1]
print(f"P(true width): mean {told.mean():.3f}, as expected {np.square(chance).sum(1).mean():.3f}")
seeds, steps = (range(1), 50) if QUICK else (range(2), 200)
curves = {}
for name, widest in (("spans", 3), ("single words", 1)):
    task = spans.SpanTask(named("brackets"), widest=widest)
    curves[name] = training_data.missing(task, seeds, steps)
    print(f"{name}: {curves[name][1][-1].mean():.3f} missing")
for name in curves:
    later = rows[f"missing of what can be learnt, {name}"]
    print(f"{name}, five seeds, {later['note'].partition(': ')[2]}")
if not QUICK:
    assert (curves["spans"][1][-1] > curves["single words"][1][-1]).all()

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for (name, (times, shares)), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
    axis.semilogy(times, shares, color=colour, lw=0.8)
    axis.semilogy(times, shares.mean(1), color=colour, lw=2, label=name)
axis.set(xlabel="steps", ylabel="missing of what can be learnt")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Which key a fact has
#
# A linear memory learns the sentences of a grammar, one step of gradient descent each. How many
# steps until half of a planted fact is gone? With a key for each sentence, $\log 2/(\eta p)$:
# exponential in the surprise $-\log p$, as Sun et al. 2024 (arXiv 2410.21750) find of surprising
# facts. With bags of words as keys, sentences share words, and fade with one another. *If surprise
# decided, the dots would lie on a line of that slope.*

# %%
grammar, sentences = facts.language()
probability, step = facts.probability(grammar, sentences), 0.1
times = np.unique(np.logspace(0, 5, 400).astype(int))
half_lives = {}
keys = {"one for each sentence": np.eye(len(sentences)), "bags of words": None}
keys["bags of words"] = facts.bags(grammar, sentences)
for name, own in keys.items():
    covariance = np.einsum("s,si,sj->ij", probability, own, own)
    recall = np.array([facts.fading(covariance, key, step, times) for key in own])
    half_lives[name] = times[np.argmax(recall < 0.5, axis=1)]
surprise = -np.log(probability)
slopes = {n: np.polyfit(surprise, np.log(h), 1)[0] for n, h in half_lives.items()}
print(
    "growth of the logarithm of half-lives with surprise:",
    {n: f"{s:.2f}" for n, s in slopes.items()},
)
assert abs(slopes["one for each sentence"] - 1) < 0.05 and slopes["bags of words"] < 0.6

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for (name, found), colour in zip(half_lives.items(), (BLUE, ORANGE), strict=True):
    axis.semilogy(surprise, found, "o", color=colour, ms=5, label=name)
line = np.linspace(surprise.min(), surprise.max(), 50)
axis.semilogy(line, np.log(2) / step * np.exp(line), color=GREY, lw=1, label=r"$\log 2/(\eta p)$")
axis.set(xlabel="surprise of the sentence, nats", ylabel="steps until half is forgotten")
axis.legend(frameon=False, title="keys")
plt.show()

# %% [markdown]
# ## Which augmentations are alike
#
# Augmentations keep three coordinates of a cube and scale four. Where those of different inputs
# never meet, every rotation of the features has the least contrastive loss, and the label is a
# linear function of them, or orthogonal to them (after Saunshi et al. 2022, arXiv 2202.14037).
# Which of them is found is up to the encoder; where augmentations overlap, the loss decides. *If
# the loss said how good features are, accuracy would be one number for each loss.*

# %%
cube = Cube()
angles = np.linspace(0, np.pi / 2, 19)
by_angle = [(cube.loss(f), cube.accuracy(f)) for f in map(cube.rotated, angles)]
assert np.ptp([loss for loss, _ in by_angle]) < 1e-9 and by_angle[0][1] == 1 > by_angle[-1][1]
kinds = {"linear, disjoint": (cube, None, BLUE), "MLP, disjoint": (cube, 256, ORANGE)}
kinds["MLP, overlapping"] = Cube(flips=(0.05, 0.25)), 256, GREEN
encoders = {}
for name, (own, hidden, _) in kinds.items():
    losses, right = trained(own, hidden, range(1 if QUICK else 5), 200 if QUICK else 1000)
    top = np.sort(np.linalg.eigvalsh(own.adjacency))[-own.features :]
    encoders[name] = losses + (top**2).sum(), right
    print(
        f"{name}: accuracy {right.min():.2f} to {right.max():.2f}, loss over the least "
        f"{encoders[name][0].max():.1e}"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
axes[0].plot(np.degrees(angles), [right for _, right in by_angle], color=BLUE)
axes[0].set(xlabel="rotation of optimal features, degrees", ylabel="accuracy downstream")
axes[0].axhline(0.5, color=GREY, lw=0.5)
for at, (name, (_, right)) in enumerate(encoders.items()):
    axes[1].plot(at + np.linspace(-0.1, 0.1, len(right)), right, "o", color=kinds[name][2])
axes[1].set(xticks=range(3), ylim=(0.45, 1.05), ylabel="accuracy downstream")
axes[1].set_xticklabels(kinds)
axes[1].axhline(0.5, color=GREY, lw=0.5)
plt.show()
