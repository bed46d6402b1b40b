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
# # Open doors
#
# **Question.** I have written a mechanism by hand. Can I look at it with the tools that I know from
# trained models, and do they find what I know to be there?
#
# **Answer, for an induction head opened in TransformerLens:** yes. The exported model gives the
# construction's numbers to rounding error; its second head puts its weight on the token behind the
# last occurrence of the same token, and without the first head, which copies the token before, it
# finds nothing. The figure at the end shows both.
#
# Needs the extra `torch`: `pip install -e ".[torch]"`.

# %%
import warnings
from dataclasses import dataclass

warnings.filterwarnings("ignore", "IProgress not found")  # bars are not drawn here

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch
import transformers
from safetensors.torch import load_file
from transformer_lens.hook_points import HookPoint

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
    export,
    verify,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# Everything below follows these numbers; try others.

# %%
words, length, sharpness = 12, 24, 12.0

# %% [markdown]
# ## The construction
#
# Words are one-hot vectors $e_t$. One head copies the word before, $p_t = e_{t-1}$. The next looks
# for earlier tokens $j$ with $p_j = e_t$ and predicts $e_j$, which followed the same word then
# (Elhage et al. 2021, Olsson et al. 2022, arXiv 2209.11895):
#
# $$\hat e_{t+1} = \sum_{j \le t} a_{tj}\, e_j,\qquad a_{tj} \propto e^{s\, p_j \cdot e_t}$$


# %%
@dataclass(frozen=True)
class Induction(Construction):
    words: int
    length: int
    sharpness: float

    @property
    def program(self):
        slots = Slots()
        word = slots.add("word", self.words, meaning="e_t, one-hot")
        before = slots.add("before", self.words, born=1, meaning="p_t, the word before")
        guess = slots.add("guess", self.words, born=2, meaning="the word that followed")
        one, causal = constant(1.0), (None, 0)
        copy = Head(query=one, key=one, value=word, write={before: 1.0}, window=(-1, -1),
                    name="previous token")  # fmt: skip
        find = Head(query=word, key=before, value=word, write={guess: 1.0}, window=causal,
                    mixer="softmax", scale=self.sharpness, name="induction")  # fmt: skip
        return Program(slots, [Layer([copy]), Layer([find])], name="induction")

    def embed(self, word):  # [batch, time, words]
        return [Tokens("token", {"word": word})]

    def places(self, depth, word):
        at = range(word.shape[1])
        return {
            "before": Place.of("before", at, depth),
            "prediction": Place.of("guess", at, depth),
        }

    def trace(self, word):
        before = jnp.pad(word, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        scores = self.sharpness * jnp.einsum("btw,bsw->bts", word, before)
        causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        return {"before": before, "prediction": jnp.einsum("bts,bsw->btw", weights, word)}

    @property
    def task(self):
        return Repeated(self)


@dataclass(frozen=True)
class Repeated:
    """Half a sequence of words in random order, none twice, and the same half again."""

    of: Induction

    def sample(self, key, batch):
        orders = jax.vmap(lambda k: jax.random.permutation(k, self.of.words))
        half = orders(jax.random.split(key, batch))[:, : self.of.length // 2]
        word = jax.nn.one_hot(jnp.concatenate([half, half], 1), self.of.words)
        return Batch((word,), jnp.roll(word, -1, 1))

    def loss(self, prediction, batch):
        second = slice(self.of.length // 2, -1)  # what comes again
        return jnp.square(prediction - batch.target)[:, second].sum(-1).mean(-1)


construction = Induction(words, length, sharpness)
certificate = verify(construction)
print(certificate)
assert certificate.passed

# %% [markdown]
# ## Out, and in again
#
# The folder has the weights as safetensors, one file of torch, and a card that says where every
# named value is and what heads do. From here on nothing of orrery is used.

# %%
folder = export(construction.compile(), construction, "induction", certificate=certificate)
print(*sorted(file.name for file in folder.iterdir()), sep="\n")
card = (folder / "README.md").read_text()
print(card[card.index("## What heads do") : card.index("## The tableau")])

# %%
model = transformers.AutoModel.from_pretrained("./induction", trust_remote_code=True)
example = load_file(folder / "example.safetensors")
stream, kinds = example["inputs_embeds"], example["token_type_ids"]
out, cache = model.run_with_cache(inputs_embeds=stream, token_type_ids=kinds)
error = (out.last_hidden_state - example["last_hidden_state"]).abs().max().item()
print(f"largest error of {model.num_parameters()} weights in torch: {error:.1e}")
assert error < 1e-5

# %% [markdown]
# ## What TransformerLens sees
#
# The induction score of a head is the mean weight that it puts on the token behind the last
# occurrence of the same word: $t - T/2 + 1$ for the second half of a sequence of length $T$.


# %%
def induction_score(pattern):  # [batch, head, query, key]
    stripe = pattern.diagonal(1 - length // 2, -2, -1)[..., 1:]  # from query T / 2 on
    return stripe.mean((0, -1))[0].item()


def without(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return torch.zeros_like(value)


kept = {}


def keep(value: torch.Tensor, hook: HookPoint) -> None:
    kept["pattern"] = value.detach()


name = "blocks.1.attn.hook_pattern"
model.run_with_hooks(
    inputs_embeds=stream,
    token_type_ids=kinds,
    fwd_hooks=[("blocks.0.hook_attn_out", without), (name, keep)],
)
patterns = {"as it is": cache[name], "without the first head": kept["pattern"]}
scores = {title: induction_score(pattern) for title, pattern in patterns.items()}
for title, score in scores.items():
    print(f"induction score {title}: {score:.3f}")
assert scores["as it is"] > 0.99 and scores["without the first head"] < 0.1

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for axis, (title, pattern) in zip(axes, patterns.items(), strict=True):
    image = axis.imshow(pattern[0, 0], cmap="viridis", vmin=0, vmax=1)
    axis.set(title=title, xlabel="key token", ylabel="query token")
figure.colorbar(image, ax=axes, label="weight of attention")
plt.show()

# %% [markdown]
# Plain forward hooks and nnsight reach the same modules: `nnsight.NNsight(model)`, then
# `model.blocks[1].attn.hook_pattern.output` inside of a trace.
