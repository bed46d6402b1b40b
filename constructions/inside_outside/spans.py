r"""Corrupted spans: one mark stands for a run of words, and the model says which, and how many.

A sentence x_1 .. x_n loses the words of one span, whose width m is uniform in 1..min(widest, n) and
whose place is uniform among n - m + 1 (after Raffel et al. 2019, arXiv 1910.10683, section 3.3; one
span and this law of widths are ours). With i words before and j behind the mark the exact posterior
of a fill f = f_1 .. f_m is

    P(f | before, after)  ~  P(before f after) / (min(widest, i + m + j) (i + j + 1)),

and the sum over all fills of one width is a likelihood of hidden words, so that one chart for every
width gives P(m | before, after), and inside it the posterior of every word.

What a model without order among its outputs can learn of it, word by word, is the marginal

    P(f_t = w)  =  sum_m P(m) P(f_t = w | m),        f_t empty for t > m,

which no such model surpasses. Of single hidden words the optimum is the posterior of one chart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from constructions.inside_outside.construction import InsideOutside
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import sample
from synthetic.tasks.task import Batch, Outcome


@dataclass(frozen=True)
class SpanTask:
    """Sentences of at most `max_length` words with one span in `widest` masked slots; a `Task`.

    Slots past the width of the span are empty. With `widest` 1 they are single hidden words.
    """

    grammar: Grammar
    max_length: int = 8
    widest: int = 3

    outcome: ClassVar[Outcome] = "probabilities"

    def __post_init__(self) -> None:
        if not 1 <= self.widest <= self.max_length:
            raise ValueError(f"widest is {self.widest}, must be 1 to {self.max_length}")

    @property
    def empty(self) -> int:
        """The number of the word that stands in slots past the span's width."""
        return len(self.grammar.vocabulary)

    @property
    def room(self) -> int:
        """Positions of a sentence whose span takes all slots."""
        return self.max_length + self.widest - 1

    def sample(self, key: Array, batch: int) -> Batch:
        """Tokens `[batch, room]`, lengths (visible words and slots) and mask, True in the slots.

        The target is the tokens, `empty` past the width, and the mask.
        """
        words_key, width_key, place_key = jax.random.split(key, 3)
        drawn = sample(self.grammar, words_key, batch, self.max_length)
        n = drawn.lengths
        most = jnp.minimum(self.widest, n)
        width = 1 + (jax.random.uniform(width_key, (batch,)) * most).astype(jnp.int32)
        width = jnp.minimum(width, most)
        start = (jax.random.uniform(place_key, (batch,)) * (n - width + 1)).astype(jnp.int32)
        start = jnp.minimum(start, n - width)[:, None]
        at, width = jnp.arange(self.room, dtype=jnp.int32), width[:, None]
        # behind the slots stands what stood behind the span
        source = jnp.where(at < start + self.widest, at, at - self.widest + width)
        tokens = jnp.take_along_axis(drawn.tokens, jnp.clip(source, 0, self.max_length - 1), 1)
        mask = (at >= start) & (at < start + self.widest)
        tokens = jnp.where(mask & (at >= start + width), self.empty, tokens)
        lengths = n + self.widest - width[:, 0]
        tokens = jnp.where(at < lengths[:, None], tokens, 0)
        return Batch((tokens, lengths, mask), (tokens, mask))

    def loss(self, prediction: Float[Array, "batch time word"], batch: Batch) -> Array:
        """Cross-entropy in nats, the mean over the slots of a sentence, `[batch]`."""
        tokens, mask = batch.target
        chosen = jnp.take_along_axis(prediction, tokens[..., None], -1)[..., 0]
        nats = -jnp.log(jnp.maximum(chosen, jnp.finfo(chosen.dtype).tiny))
        return jnp.where(mask, nats, 0).sum(1) / self.widest

    def posterior(
        self,
        tokens: Array,
        lengths: Array,
        mask: Array,
        assumed: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch time word"]]:
        """P(width) and the marginals of every slot, the last word being `empty`; exact by charts.

        Tokens in slots are not looked at. `assumed` are widths to be taken for certain.
        """
        first = mask.argmax(1)[:, None]
        at = jnp.arange(self.room, dtype=jnp.int32)
        scores, words = [], []
        for width in range(1, self.widest + 1):
            source = jnp.where(at < first + width, at, at + self.widest - width)
            shown = jnp.take_along_axis(tokens, jnp.minimum(source, self.room - 1), 1)
            hidden = (at >= first) & (at < first + width)
            shown = jnp.where(hidden, 0, shown)
            total = lengths - self.widest + width
            found = chart.inside_outside(self.grammar, shown, total, hidden, strict=False)
            law = jnp.log(jnp.minimum(self.widest, total).astype(found.log_z.dtype))
            scores.append(jnp.where(total <= self.max_length, found.log_z - law, -jnp.inf))
            slots = jnp.pad(jnp.nan_to_num(found.word_posterior), [(0, 0), (0, 0), (0, 1)])
            past = mask & (at >= first + width)
            words.append(jnp.where(past[..., None], jnp.eye(self.empty + 1)[-1], slots))
        chance = jax.nn.softmax(jnp.stack(scores, -1))
        if assumed is not None:
            chance = jax.nn.one_hot(assumed - 1, self.widest)
        marginal = jnp.einsum("bm,mbtw->btw", chance, jnp.stack(words), precision="highest")
        return chance, jnp.where(mask[..., None], marginal, 0)

    @cached_property
    def reader(self) -> InsideOutside:
        """Whose counterpart is the model: its vocabulary has one word more, the empty one."""
        g = self.grammar
        words = (*g.vocabulary, "<empty>")
        emission = np.pad(g.emission, ((0, 0), (0, 1)))
        more = Grammar(g.nonterminals, g.preterminals, words, g.root, g.rules, emission)
        return InsideOutside(more, self.room, layers=2, heads=2, width=32)
