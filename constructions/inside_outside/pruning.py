r"""Pruning text by the perplexity that a small model has of it, where every step is exact.

Documents are strings of `LENGTH` words, from a mixture p of grammars and of noise, so that p is a
table of all strings. A small model, a grammar of two symbols re-estimated on a sample of them
(`chart.em`), gives each string its perplexity, and the strings of low, middle or high perplexity
are kept (Ankner et al. 2024, arXiv 2405.20541). What is kept has the distribution

    p(x | kept) = p(x) / p(kept)  on the strings kept,    KL(p(. | kept) || p) = -log p(kept),

whatever the model and whichever end is kept: how far pruning moves the text depends on the share
alone, and only where it moves it to on the model.

What is learnt from it is asked on the text without noise, of two kinds of models: larger grammars,
re-estimated on as many documents of each kind, and masked language models after as many steps on
fresh documents of each kind. The latter tend to p(word | visible words, kept), whose loss on the
wanted text is exact by the table, as is the least one, that of the wanted text itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar, Weights
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import Batch

KEPT = ("low", "middle", "high", "random")
LENGTH = 6
#: Three pairs of a noun and a verb one after the other; and pairs of brackets, one in another.
_CLAUSES = Grammar.from_text(
    "S -> C CC [1.0]\nCC -> C C [1.0]\nC -> N V [1.0]\nN -> 'a' [0.7] | 'b' [0.3]\n"
    "V -> 'c' [0.6] | 'd' [0.4]"
)
_NESTED = Grammar.from_text(
    "S -> 'a' S 'c' [0.25] | 'b' S 'd' [0.25] | 'a' 'c' [0.25] | 'b' 'd' [0.25]"
)


@dataclass(frozen=True)
class Text:
    """Every string of `LENGTH` words, and how probable each is in a mixture.

    Attributes:
        clauses, nested, noise: shares of the two grammars and of random words; they sum to 1.
        asked: share of the nested domain in what models are asked about; None for its own.
    """

    clauses: float = 1.0
    nested: float = 0.0
    noise: float = 0.0
    asked: float | None = None

    def __post_init__(self) -> None:
        shares = self.clauses, self.nested, self.noise
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9 or self.noise >= 1:
            raise ValueError(f"shares are {shares}, must be at least 0 and sum to 1, not all noise")

    @property
    def probability(self) -> np.ndarray:
        """p, `[string]`."""
        return np.array([self.clauses, self.nested, self.noise]) @ parts()

    @property
    def wanted(self) -> np.ndarray:
        """The text without noise that models are asked about, `[string]`."""
        nested = self.nested / (1 - self.noise) if self.asked is None else self.asked
        return np.array([1 - nested, nested]) @ parts()[:2]


@lru_cache
def strings() -> np.ndarray:
    """All of them, `[string, LENGTH]` int32."""
    return np.array(list(product(range(len(_CLAUSES.vocabulary)), repeat=LENGTH)), np.int32)


def table(grammar: Grammar | Weights) -> np.ndarray:
    """P(string | its length) by a grammar, `[string]`, exact by the chart."""
    tokens = strings()
    log_z = chart.log_z(grammar, tokens, np.full(len(tokens), LENGTH, np.int32))
    found = np.exp(np.asarray(log_z, float))
    return found / found.sum()


@lru_cache
def parts() -> np.ndarray:
    """The grammars' and the noise's distributions, `[3, string]`."""
    with jax.enable_x64(True):
        return np.stack([table(_CLAUSES), table(_NESTED), np.full(n := len(strings()), 1 / n)])


@jax.jit
@jax.vmap
def _em(start: Weights, tokens: Array) -> tuple[Weights, Array]:
    found = chart.em(start, tokens, jnp.full(len(tokens), LENGTH, jnp.int32), steps=20)
    return found.weights, found.log_likelihood[-1]


def fitted(tokens: np.ndarray, symbols: int, seed: int, trust: float = 0.99) -> np.ndarray:
    """log q of every string, `[string]`, by a grammar re-estimated on documents.

    It has so many nonterminals and as many pre-terminals, is the likeliest of those from eight
    random starts, and is mixed with 1 - trust of random words.
    """
    sizes = symbols, symbols, len(_CLAUSES.vocabulary)
    starts = [Grammar.random(8 * seed + n, *sizes).weights() for n in range(8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    found, likelihood = _em(stacked, np.broadcast_to(tokens, (8, *tokens.shape)))
    best = jax.tree.map(lambda leaf: leaf[likelihood.argmax()], found)
    return np.log(trust * table(best) + (1 - trust) * parts()[2])


def keep(probability: np.ndarray, perplexity: np.ndarray, which: str, share: float) -> np.ndarray:
    """How much of each string is kept, `[string]`: all or nothing, but for random pruning.

    Strings of a share of the probability, as nearly as whole ones allow, from one end of `KEPT`.
    """
    if which not in KEPT:
        raise ValueError(f"which is {which!r}, must be one of {KEPT}")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    if which == "random":
        return np.full(len(probability), share)
    order = np.argsort(perplexity, kind="stable")
    middle = np.cumsum(probability[order]) - probability[order] / 2
    start = {"low": 0.0, "middle": (1 - share) / 2, "high": 1 - share}[which]
    found = np.zeros(len(probability))
    found[order] = (start <= middle) & (middle <= start + share)
    return found


def ways(
    text: Text, seed: int, share: float, rng: np.random.Generator, documents: int = 128
) -> dict[str, np.ndarray]:
    """How much of each string every way to prune keeps, `[string]`, and none of them ("all").

    By the perplexity of a grammar of two symbols that is fitted to documents of the text.
    """
    p = text.probability
    perplexity = -fitted(strings()[rng.choice(len(p), documents, p=p)], 2, seed)
    kept = {which: keep(p, perplexity, which, share) for which in KEPT}
    return {"all": np.ones(len(p)), **kept}


@dataclass(frozen=True, eq=False)
class Documents(MaskedLanguageTask):
    """Strings with hidden words, drawn by one row of `chances`, `[row, string]`.

    Fits of several rows run in one program.
    """

    grammar: Grammar = _CLAUSES
    max_length: int = LENGTH
    rate: float = 0.3
    chances: np.ndarray = field(default_factory=lambda: parts())
    row: float = 0.0

    NUMBERS: ClassVar[tuple[str, ...]] = ("row",)

    def sample_during(self, key: Array, batch: int, progress: Array) -> Batch:
        """Draw documents; tokens, lengths and mask, and tokens and mask as the target."""
        del progress
        words, hidden = jax.random.split(key)
        total = jnp.asarray(np.cumsum(self.chances, -1))[jnp.asarray(self.row, int)]
        drawn = jnp.searchsorted(total / total[-1], jax.random.uniform(words, (batch,)), "right")
        tokens = jnp.asarray(strings())[jnp.minimum(drawn, len(total) - 1)]
        mask = jax.random.bernoulli(hidden, self.rate, tokens.shape)
        return Batch((tokens, jnp.full(batch, LENGTH), mask), (tokens, mask))

    def posterior(self, tokens: Array, lengths: Array, mask: Array) -> Array:
        """P(word | visible words) where documents are drawn by the row, `[batch, time, word]`."""
        del lengths
        agree = (mask[:, None] | (tokens[:, None] == strings())).all(-1)
        words = jax.nn.one_hot(strings(), len(self.grammar.vocabulary))
        both = agree * jnp.asarray(self.chances)[jnp.asarray(self.row, int)]
        found = jnp.einsum("bs,stw->btw", both, words, precision="highest")
        return found / found.sum(-1, keepdims=True)


#: Texts, by what they are made of, and what is asked of models of them.
TEXTS = {
    "noisy": Text(0.6, 0.0, 0.4),
    "clean": Text(),
    "a rare domain": Text(0.8, 0.2, 0.0, asked=0.5),
}
