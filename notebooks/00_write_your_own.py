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
# # Write your own construction
#
# **Question.** I know an algorithm. Can a transformer run it exactly, and does a trained one of the
# same shape find it?
#
# **Answer, for a weighted moving average:** yes, with one head per weight, to rounding error; and
# the trained one computes the same function with the same heads, up to factors that cancel.
# The last figure shows both. All that a new family needs are the two classes below.

# %%
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from orrery import (
    Batch,
    Construction,
    Head,
    Layer,
    Place,
    Program,
    Slots,
    Tokens,
    constant,
    read_sites,
    verify,
)

QUICK = bool(os.environ.get("ORRERY_QUICK"))

# %% [markdown]
# Everything below follows these numbers; try others.

# %%
weights, dim, length = (0.5, 0.3, 0.2), 2, 12
training_steps = 500 if QUICK else 1500

# %% [markdown]
# ## The construction, in thirty lines
#
# The algorithm is $m_t = \sum_k w_k\, x_{t-k}$. As heads: the one with offset $-k$ looks $k$ tokens
# back with score 1, and writes $w_k x_{t-k}$ into a slot of its own. `program` says so in names of
# slots, `embed` what the tokens hold, `places` where the result stands. `trace` is the algorithm
# itself, as one would write it anywhere. The rest comes with the base class.


# %%
@dataclass(frozen=True)
class MovingAverage(Construction):
    weights: tuple[float, ...]
    dim: int
    length: int

    @property
    def program(self):
        slots = Slots()
        x, average = slots.add("x", self.dim), slots.add("average", self.dim, born=1)
        one = constant(1.0)
        return Program(slots, [Layer([
            Head(query=one, key=one, value=x, write={average: w}, window=(-k, -k))
            for k, w in enumerate(self.weights)
        ])])  # fmt: skip

    def embed(self, x):  # [batch, time, dim]
        return [Tokens("token", {"x": x})]

    def places(self, depth, x):
        return {"prediction": Place.of("average", range(x.shape[1]), depth)}

    def trace(self, x):
        before = [jnp.pad(x, ((0, 0), (k, 0), (0, 0))) for k in range(len(self.weights))]
        parts = [w * b[:, : x.shape[1]] for w, b in zip(self.weights, before, strict=True)]
        return {"prediction": sum(parts)}

    @property
    def task(self):
        return Averages(self)


# %% [markdown]
# A task is a sampler of batches and a loss; the inputs are the construction's, the target is what a
# model is trained on.


# %%
@dataclass(frozen=True)
class Averages:
    of: MovingAverage

    def sample(self, key, batch):
        x = jax.random.normal(key, (batch, self.of.length, self.of.dim))
        return Batch((x,), self.of.trace(x)["prediction"])

    def loss(self, prediction, batch):
        return 0.5 * jnp.square(prediction - batch.target).sum(-1).mean(-1)


# %% [markdown]
# ## Is it right?
#
# `verify` compiles the program, runs it on fresh inputs and compares every named value with the
# algorithm, in float64 and float32, in batches of several sizes.

# %%
construction = MovingAverage(tuple(weights), dim, length)  # settings are hashable
certificate = verify(construction)
for error in certificate.errors:
    print(f"{error.dtype}: relative error {error.max_rel_error:.1e}, allowed {error.tolerance:.0e}")
assert certificate.passed, f"the model differs from the algorithm: {certificate.errors}"

# %% [markdown]
# ## Does training find it?
#
# The counterpart is the same transformer with random weights. Nothing about it is special to this
# family.

# %%
result = construction.fit(
    steps=training_steps,
    batch=64,
    learning_rate=5e-2,
    schedule="cosine",
)
print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.2e}")

# %% [markdown]
# ## How alike are they?
#
# As functions, they are the same. As mechanisms, they need not be: attention can be read and edited
# by name at every layer, here the weights $a_{ij}$ that each head puts on token $j$ at token $i$.

# %%
inputs = construction.sample(jax.random.key(1), 64)
models = {"construction": construction.reference, "trained": result.model}
attention = {
    name: np.asarray(read_sites(construction, model, inputs, ["attention"])["attention"])
    for name, model in models.items()
}
heads = len(weights)
figure, axes = plt.subplots(
    2, heads, figsize=(2.6 * heads, 5.2), layout="constrained", squeeze=False
)
for row, (name, between) in zip(axes, attention.items(), strict=True):
    mean = between[0].mean(0)  # layer 0, averaged over the batch
    for head, axis in enumerate(row):
        limit = np.abs(mean[head]).max()
        axis.imshow(mean[head], cmap="PuOr", vmin=-limit, vmax=limit)
        axis.set(title=f"{name}, head {head}", xlabel="key token", ylabel="query token")
plt.show()

# %% [markdown]
# The masks are part of the class, so that trained heads look where constructed ones do; their
# scores and outputs are their own.

# %%
x = inputs[0]
wanted = construction.trace(x)["prediction"]
errors = {
    name: float(
        jnp.sqrt(jnp.mean((construction.predict(m, x) - wanted) ** 2) / jnp.mean(wanted**2))
    )
    for name, m in models.items()
}
print({name: f"{error:.1e}" for name, error in errors.items()})
rounding = certificate.errors[-1].tolerance
most = 0.3 if QUICK else 0.01
assert errors["construction"] < rounding, (
    f"the construction should be off by rounding only: {errors}"
)
assert errors["trained"] < most, (
    f"expected a trained model within {most:.0%} of the average, got {errors['trained']:.1%}: "
    f"{training_steps} steps may be too few for {heads} weights"
)

# %% [markdown]
# ## From the command
#
# In a module of its own, `mine.py` say, the family takes part in every command under
# `mine:MovingAverage`, once its settings have defaults:
#
#     orrery verify mine:MovingAverage
#     orrery fit mine:MovingAverage --out run
#     orrery compare mine:MovingAverage --run run --out report
#
# A package registers it under a name, `[project.entry-points."orrery.families"]` in its
# `pyproject.toml`, and what `claims` of the class says is then decided by `orrery claims`.
