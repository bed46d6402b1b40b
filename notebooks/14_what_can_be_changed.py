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
# # What can be changed without touching the rest?
#
# **Question.** A layer does its task. It shall do a second one, choose its own step size, or learn
# a fact. What does that do to what it did before?
#
# **Answer.** One token in front of a frozen layer learns a task of another mean as well as any
# number of tokens could, and queries that do not see it keep every bit (left). A softmax over
# validation losses chooses among step sizes with a bound on what that costs in every context
# (middle). A fact in a linear memory fades with the stream at a rate that is known in advance, and
# that depends on its key and not on how surprising it is (right).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from constructions import CATALOGUE
from constructions.claims import predict
from constructions.gradient_descent import facts
from probes.ledger import ledger
from synthetic.theory.experts import hedge_bound, regret

QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"

# %% [markdown]
# ## A second task by one token
#
# Old tasks have weights of mean 0, new ones of mean $w_0$. The frozen layer takes one step
# $c\sum_i y_i x_i$ of gradient descent. A token $(x_m, y_m)$ that only new queries see adds
# $b = c\,y_m x_m$, and the best $b$ is what the step leaves of the mean, $(1 - cNv)\,w_0$ with $v$
# the variance of an input. After Sandler et al. 2022 (arXiv 2203.15243), who tune such tokens with
# all else frozen.

# %%
memory = CATALOGUE["memory-token"](dim_x=4, num_examples=8)
losses = memory.losses
print("exact losses:", {name: round(value, 4) for name, value in losses.items()})
fit = memory.fit(seeds=range(2 if QUICK else 5), recipe=memory.counterpart().quick)
rows = ledger(memory, fit.models, batch=2**12 if QUICK else 2**16)
for row in rows:
    controls = {name: float(f"{row.values[name]:.2g}") for name in row.claim.catches}
    print(f"{row.claim.name}: {row.verdict}, trained {max(row.trained):.2g}, controls {controls}")
    assert row.verdict == "holds"

# %% [markdown]
# The trained token leaves old outputs equal to the bit, since no old query looks at it. Let old
# queries see it, and their predictions change as much as those of the new task.
#
# ## A step size for every context
#
# Contexts differ in their curvature. Each of four heads takes a step of its own size; what it
# predicts for validation examples is compared with their labels; softmax attention over the four
# expert tokens by minus the sum of these losses is Hedge (Freund and Schapire 1997), after Lu et
# al. 2022 (arXiv 2203.01400), who mix optimisers in this way.
#
# A small loss does not show that labels were used: here the best step size follows from the power
# of the inputs, and a step of that size, which looks at no validation label, has the loss of Hedge.
# Its predictions are others.

# %%
c = CATALOGUE["hedge"]()
inputs = c.sample(jax.random.key(0), 500 if QUICK else 4000)
held = jax.jit(c.read)(c.reference, *inputs)
found = regret(held["weight"][:, : c.validation], 1 - held["gain"])
bound = hedge_bound(c.validation, len(c.step_sizes))
print(f"regret: mean {found.mean():.2f}, most {found.max():.2f}, bound {bound:.2f}")
assert found.max() <= bound
scale = np.asarray(jnp.square(inputs[0]).mean((1, 2)) * 12) ** 0.5
by_scale = {s: abs(np.log2(scale / s)) < 0.5 for s in c.scales}
for s, chosen in by_scale.items():
    shares = np.asarray(held["weight"])[chosen, -1].mean(0)
    print(f"inputs of scale {s}: weights {np.round(shares, 2)} of step sizes {c.step_sizes}")
batch = c.task.sample(jax.random.key(1), 2000)
near = c.near_misses()
models = {"Hedge": c.reference, **{name: near[name].model for name in near}}
said = {name: predict(c, model, *batch.inputs) for name, model in models.items()}
mean = {name: float(c.task.loss(p, batch).mean()) for name, p in said.items()}
print("loss:", {name: round(value, 4) for name, value in mean.items()})
size = np.linalg.norm(said["Hedge"])
apart = {name: float(np.linalg.norm(p - said["Hedge"]) / size) for name, p in said.items()}
print("from Hedge's predictions:", {name: round(value, 2) for name, value in apart.items()})
assert apart["step size by power"] > 0.1
assert mean["Hedge"] < 0.6 * min(mean[name] for name in ("one step size", "shuffled labels"))

# %% [markdown]
# ## A fact among others
#
# A memory $W$ goes on with steps of gradient descent on a stream of keys. A fact planted along the
# key $k$ is recalled after $t$ steps by $k^\top(I - \eta C)^t k / |k|^2$, $C$ the second moment of
# the stream's keys. With a key for each sentence of a grammar it lasts exponentially long in the
# sentence's surprise $-\log p$, as Sun et al. 2024 (arXiv 2410.21750) find of surprising facts.
# Keys that are bags of words break this: a scrambled sentence, of infinite surprise, has the same
# bag as the sentence that it was.

# %%
grammar, sentences = facts.language()
chance, keys = facts.probability(grammar, sentences), facts.bags(grammar, sentences)
covariance = np.einsum("s,si,sj->ij", chance, keys, keys)
chosen = {
    "likely": ["the", "dog", "saw"],
    "unlikely": ["the", "heron", "sang"],
    "scrambled": ["saw", "dog", "the"],
}
planted = facts.bags(grammar, list(chosen.values()))
times, streams = np.array([1, 25, 50, 100, 200]), 50 if QUICK else 500
arrays = (jnp.asarray(a) for a in (keys, chance, planted))
recall = np.asarray(facts.streamed(jax.random.key(0), *arrays, 0.1, 200, streams))[times - 1]
for n, (name, sentence) in enumerate(chosen.items()):
    with np.errstate(divide="ignore"):
        surprise = -np.log(facts.probability(grammar, [sentence])[0])
    exact = facts.fading(covariance, planted[n], 0.1, times)
    print(f"{name}: surprise {surprise:.1f} nats, recall after 200 steps {exact[-1]:.3f}")
    spread = recall[:, :, n].std(1) / streams**0.5
    assert (abs(recall[:, :, n].mean(1) - exact) < 5 * spread + 1e-3).all()

# %% [markdown]
# ## The three answers in one figure

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
new = losses["without"], losses["new"]
axes[0].bar(["old task", "new, no token", "new, token"], [losses["old"], *new], color=BLUE)
tuned = [losses["new"] * (1 + value) for value in rows[0].trained]
axes[0].plot([2] * len(tuned), tuned, "o", color=ORANGE, label="token trained alone")
axes[0].set(ylabel="loss", ylim=(0, 1.25 * losses["without"]))
axes[0].legend(frameon=False)
for colour, (s, these) in zip((BLUE, GREEN, ORANGE), by_scale.items(), strict=True):
    path = np.asarray(held["weight"])[these].mean(0)
    best = int(path[-1].argmax())
    label = f"scale {s}: step size {c.step_sizes[best]:g}"
    axes[1].plot(range(len(path)), path[:, best], color=colour, label=label)
axes[1].set(xlabel="validation examples seen", ylabel="mean weight of the best step size")
axes[1].legend(frameon=False)
line = np.arange(201)
for n, (name, colour) in enumerate(zip(chosen, (BLUE, GREEN, ORANGE), strict=True)):
    style = "--" if name == "scrambled" else "-"
    axes[2].plot(
        line, facts.fading(covariance, planted[n], 0.1, line), style, color=colour, label=name
    )
    bars = 2 * recall[:, :, n].std(1) / streams**0.5
    axes[2].errorbar(times, recall[:, :, n].mean(1), bars, fmt="o", ms=4, color=colour)
axes[2].set(xlabel="steps on the stream", ylabel="recall of the fact")
axes[2].legend(frameon=False)
plt.show()
