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
# # Does your model descend?
#
# **Question.** I have a PyTorch model, here a GPT-2 that was trained on in-context linear
# regression. Does it run gradient descent, a step a layer, as linear attention does?
#
# **Answer.** Not a step a layer. With two layers its loss is that of four to five steps, and its
# predictions are nearer to ridge regression, and to eight steps, which are much the same, than to
# two steps (distance 0.14 against 0.35). Inside, the estimates of the first two steps can be read
# off the query's stream linearly ($R^2$ 0.89 and 0.95; 0.00 off the input or a random linear
# transformer), but the residuals that descent keeps in the context hardly (0.48 and 0.55), and what
# is predicted reaches the query later than in descent. What it does in place of descent, these
# probes do not say. One seed, 2000 steps of training; another model may differ.
#
# Needs the extra `torch`: `pip install -e ".[torch]"`.

# %%
import os
import warnings

warnings.filterwarnings("ignore", "IProgress not found")  # bars are not drawn here

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from orrery import compare, foreign_run, from_torch
from probes import find
from probes.interchange import sweep

transformers.logging.set_verbosity_error()
QUICK = bool(os.environ.get("ORRERY_QUICK"))
ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#666666"

# %% [markdown]
# Everything below follows these numbers; try others.

# %%
dim, examples, noise = 2, 10, 0.5
layers, heads, width = 2, 4, 32
training_steps, batch = (60, 64) if QUICK else (2000, 128)

# %% [markdown]
# ## The model
#
# Hugging Face's GPT-2 with a linear read-in and read-out. A token of the context is $(x_i, y_i)$,
# the last one is $(x, 0)$, and there the model says $\hat y$.


# %%
class Regressor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        off = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
        self.read_in = torch.nn.Linear(dim + 1, width)
        self.gpt2 = transformers.GPT2Model(
            transformers.GPT2Config(
                n_embd=width, n_layer=layers, n_head=heads, n_positions=examples + 1,
                vocab_size=1, bos_token_id=0, eos_token_id=0, **off,
            )
        )  # fmt: skip
        self.read_out = torch.nn.Linear(width, 1)

    def forward(self, tokens):
        stream = self.gpt2(inputs_embeds=self.read_in(tokens), use_cache=False)
        return self.read_out(stream.last_hidden_state)


def tokens(x, y, x_query):
    pairs, query = torch.cat([x, y], 2), torch.nn.functional.pad(x_query, (0, 1))
    return torch.cat([pairs, query], 1)


# %% [markdown]
# ## Training it
#
# $x_i, x \sim N(0, I)$, $w \sim N(0, I)$, $y_i = w \cdot x_i + $ noise; the loss is half the
# squared error at the query, $\frac12 (\hat y - w \cdot x)^2$.

# %%
torch.manual_seed(0)
torch.set_num_threads(1)  # the matrices are small
model, losses = Regressor(), []
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 3e-3, total_steps=training_steps, pct_start=0.1
)
for _ in range(training_steps):
    w, x = torch.randn(batch, dim, 1), torch.randn(batch, examples, dim)
    y, x_query = x @ w + noise * torch.randn(batch, examples, 1), torch.randn(batch, 1, dim)
    predicted = model(tokens(x, y, x_query))[:, -1:]
    loss = 0.5 * (predicted - x_query @ w).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
tenth = max(1, training_steps // 10)
print(f"training loss {np.mean(losses[:tenth]):.3f} -> {np.mean(losses[-tenth:]):.3f}")

# %% [markdown]
# ## In, as a black box
#
# A subject is a module, how its inputs are made of the construction's, and where its residual
# stream is: what goes into the first block, and what comes out of each. The construction that it is
# compared with makes as many steps of gradient descent as the model has layers.

# %%
stream = ["gpt2.h.0:input", *(f"gpt2.h.{layer}" for layer in range(layers))]
subject = from_torch(model, tokens, lambda out: out[:, -1:], {"residual": stream})
settings = {
    "dim_x": dim,
    "num_examples": examples,
    "inputs": "gaussian",
    "noise": noise,
    "steps": layers,
    "step_size": 0.7,
}
run = foreign_run("gradient-descent", subject, settings)

# %% [markdown]
# ## Which algorithm are its predictions nearest to?
#
# Gradient descent with $k$ steps from $w = 0$, each at the best step size for its $k$, and ridge
# regression with the penalty $\sigma^2$, which is the posterior mean: no model can be better. Three
# numbers: the loss, the distance of predictions, and the cosine between $w$ and the model's
# sensitivity $\partial \hat y / \partial x$, which autograd gives.


# %%
def descent(x, y, steps, step_size):
    w = np.zeros((len(x), dim, 1))
    for _ in range(steps):
        w += step_size / examples * x.mT @ (y - x @ w)
    return w


def ridge(x, y, penalty):
    return np.linalg.solve(x.mT @ x + penalty * np.eye(dim), x.mT @ y)


fresh = run.construction.task.sample(jax.random.key(1), 1024 if QUICK else 4096)
x, y, x_query = (np.asarray(a, np.float64) for a in fresh.inputs)
target = np.asarray(fresh.target)


def mean_loss(prediction):
    return 0.5 * np.square(prediction - target).mean()


counts = range(1, 9)
weights = {
    k: min(
        (descent(x, y, k, size) for size in np.linspace(0.1, 1.2, 23)),
        key=lambda w: mean_loss(x_query @ w),
    )
    for k in counts
}
weights["ridge"] = ridge(x, y, noise**2)
prediction = np.asarray(subject(*fresh.inputs))
sensitivity = subject.differentiate(*fresh.inputs)[:, 0, 0]


def compared(w):
    apart = np.sqrt(np.square(prediction - x_query @ w).mean() / np.square(x_query @ w).mean())
    norms = np.linalg.norm(sensitivity, axis=-1) * np.linalg.norm(w[..., 0], axis=-1)
    cosine = ((sensitivity * w[..., 0]).sum(-1) / norms).mean()
    return mean_loss(x_query @ w), apart, cosine


table = {name: compared(w) for name, w in weights.items()}
print(f"the model: loss {mean_loss(prediction):.4f}")
for name, (its_loss, apart, cosine) in table.items():
    title = name if name == "ridge" else f"{name} steps"
    print(f"{title:8s} loss {its_loss:.4f}, distance {apart:.2f}, cosine {cosine:.3f}")
one, best = table[1], table["ridge"]
if not QUICK:
    assert best[0] < mean_loss(prediction) < 0.5 * one[0], "expected a model well past one step"
    assert best[1] < 0.5 * one[1] and best[2] > one[2], "expected it nearer to ridge regression"

# %% [markdown]
# ## Can the algorithm's values be read off its stream?
#
# Linear probes for what gradient descent holds after every layer: the residual
# $y_i - w_k \cdot x_i$ at the tokens of the context, and the estimate $w_k \cdot x$ at the query. A
# number means something only above those of the columns for the input and for a random model.

# %%
find("linear")(run, placed=True, models=1)

# %% [markdown]
# ## Which tokens does the prediction use, after how many layers?
#
# Interchange interventions: one token, after so many layers, gets the stream that it has on another
# input; an effect of 1 makes the prediction that of the other input.

# %%
pair = [run.construction.sample(key, 64) for key in jax.random.split(jax.random.key(2))]
both = {"descent, a step a layer": run.construction.reference, "the model": subject}
effects = {
    name: np.abs(sweep(run.construction, which, *pair).effect) for name, which in both.items()
}
for name, effect in effects.items():
    at_query = ", ".join(f"{e:.2f}" for e in effect[:, -1])
    print(f"{name:24s}: effect of the query's stream after 0, 1, ... layers: {at_query}")

# %% [markdown]
# ## The whole page
#
# `compare` asks all probes that a black box can answer, decides the paper's claims, and says what
# it leaves out. From the command: `orrery compare gradient-descent --model my_package:subject`.

# %%
if not QUICK:
    comparison = compare(run, batch=2**10)
    print(comparison.verdict)
    for name, reason in comparison.omitted.items():
        print(f"left out: {name}: {reason}")

# %% [markdown]
# ## The figure

# %%
figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.6), layout="constrained")
axes[0].semilogy(counts, [table[k][0] for k in counts], "o-", color=ORANGE, label="descent")
axes[0].axhline(best[0], color=GREY, ls="--", label="ridge, the optimum")
axes[0].axhline(mean_loss(prediction), color=BLUE, label="the model")
axes[0].set(xlabel="steps of gradient descent", ylabel="loss")
axes[1].plot(counts, [table[k][1] for k in counts], "o-", color=ORANGE)
axes[1].axhline(best[1], color=GREY, ls="--")
axes[1].set(
    xlabel="steps of gradient descent", ylabel="distance of the model's predictions", ylim=(0, None)
)
for (name, effect), colour in zip(effects.items(), (ORANGE, BLUE), strict=True):
    axes[2].plot(effect[:, -1], "o-", color=colour, label=name)
    axes[2].plot(effect[:, :-1].mean(1), "s:", color=colour)
axes[2].set(
    xlabel="layers applied", ylabel="effect of an exchanged stream", xticks=range(layers + 1)
)
axes[2].plot([], [], "ko-", label="at the query")
axes[2].plot([], [], "ks:", label="at a token of the context")
for axis in (axes[0], axes[2]):
    axis.legend(frameon=False, fontsize=8)
plt.show()
