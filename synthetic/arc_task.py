"""Masked words of sentences with heads, and a loss that holds attention to their arcs or off them.

    L  +  weight * mean over arcs (i, h)  sum over layers and heads  (a_ih + a_hi)

with L the loss of `synthetic.masked_language` and a the attention between words (Chen et al. 2023,
arXiv 2309.07311, section 3; the direction from h to i is the transposed one). Above 0 the weight
suppresses attention along arcs, below 0 it promotes it.

A regulariser takes more from a model than its syntax: it also moves attention about. The control
does the same to as many arcs of the same lengths and directions at places where no arc is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from synthetic.dependencies import Headed, dependencies
from synthetic.masked_language import MaskedLanguageTask
from synthetic.task import Batch

CHOICES = {"arcs": ("gold", "random"), "over": ("sum", "max")}


@dataclass(frozen=True)
class ArcTask:
    """A task whose predictions are the probabilities of words and the attention between them.

    Attributes:
        words: the sentences, and how many of their words are hidden.
        headed: its grammar, with heads.
        weight: of attention at arcs; 0 for a task without regulariser.
        arcs: "gold" for those of the derivation, "random" for the control.
        over: the "sum" over layers and heads, or their "max" in either direction.
        until: the share of a fit after which the weight is 0, above 0.
        replaced: the share of the words to be told in whose place a random word stands, not the
            mask, as in BERT. Visible words may be wrong then, and the model must look elsewhere to
            know.

    Raises:
        ValueError: a number or name out of range, heads of another grammar.
    """

    words: MaskedLanguageTask
    headed: Headed
    weight: float = 0.0
    arcs: str = "gold"
    over: str = "sum"
    until: float = 1.0
    replaced: float = 0.0

    def __post_init__(self) -> None:
        if self.words.grammar != self.headed.grammar:
            raise ValueError("headed is of another grammar, must be of the one that words are of")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight is {self.weight}, must be finite")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {allowed}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until is {self.until}, must be above 0 and at most 1")
        if not 0 <= self.replaced <= 1:
            raise ValueError(f"replaced is {self.replaced}, must be 0 to 1")

    @cached_property
    def _vocabulary(self) -> int:
        return len(self.headed.grammar.vocabulary)

    def sample(self, key: Array, batch: int) -> Batch:
        """As at the end of a fit."""
        return self.sample_during(key, batch, jnp.asarray(1.0))

    def sample_during(self, key: Array, batch: int, progress: Float[Array, ""]) -> Batch:
        """Draw sentences.

        Returns:
            `inputs`: tokens, lengths, mask, as the masked language task has them. `target`: the
                words, which of them are to be told, dependents and heads of the arcs that the
                weight is on, `[batch, time]` each, heads -1 where there is none, and the weight
                `[batch]`.
        """
        words_key, random_key, which_key, arcs_key = jax.random.split(key, 4)
        drawn, hidden = self.words.draw(words_key, batch, progress)
        tokens, shape = drawn.tokens, drawn.tokens.shape
        wrong = hidden & jax.random.bernoulli(which_key, self.replaced, shape)
        seen = jnp.where(wrong, jax.random.randint(random_key, shape, 0, self._vocabulary), tokens)
        heads = dependencies(self.headed, drawn).heads
        dependents = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        if self.arcs == "random":
            dependents, heads = random_arcs(arcs_key, heads, drawn.lengths)
        weight = jnp.full(batch, self.weight) * (progress <= self.until)
        target = tokens, hidden, dependents, heads, weight
        return Batch((seen, drawn.lengths, hidden & ~wrong), target)

    def loss(self, prediction: tuple[Array, Array], batch: Batch) -> Float[Array, " batch"]:
        """The module's equation, `[batch]`.

        Args:
            prediction: probabilities `[batch, time, word]` and attention `[layer, batch, head,
                time, time]` between words.
            batch: as `sample` draws it.
        """
        found, attention = prediction
        tokens, hidden, dependents, heads, weight = batch.target
        told = self.words.loss(found, Batch(batch.inputs, (tokens, hidden)))
        there = heads >= 0
        between = attention.sum((0, 2)) if self.over == "sum" else attention.max((0, 2))
        row, head = jnp.arange(len(heads))[:, None], jnp.maximum(heads, 0)
        along = between[row, dependents, head] + between[row, head, dependents]
        arcs = jnp.maximum(there.sum(1).mean(), 1 / len(heads))
        return told + weight * jnp.where(there, along, 0).sum(1) / arcs


def random_arcs(
    key: Array, heads: Int[Array, "batch time"], lengths: Int[Array, " batch"]
) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    """For every arc one of the same length and direction elsewhere in its sentence.

    The place is uniform among those where no arc is, in either direction; an arc that finds no
    place is left out.

    Args:
        key: of the places.
        heads: `[batch, time]`, -1 where there is none.
        lengths: `[batch]`.

    Returns:
        dependents and heads, `[batch, time]`, heads -1 where there is none; the entry at word i
        stands for the arc of word i.
    """
    time = heads.shape[1]
    place = jnp.arange(time, dtype=jnp.int32)
    offset = heads - place
    to = place + offset[:, :, None]  # [batch, arc, place]
    inside = (place < lengths[:, None])[:, None] & (to >= 0) & (to < lengths[:, None, None])
    of_head = jnp.take_along_axis(heads[:, None], jnp.clip(to, 0, time - 1), 2)
    free = inside & (heads >= 0)[:, :, None] & (heads[:, None] != to) & (of_head != place)
    dice = jnp.where(free, jax.random.uniform(key, free.shape), -1)
    dependents = dice.argmax(-1).astype(jnp.int32)
    return dependents, jnp.where(free.any(-1), dependents + offset, -1)
