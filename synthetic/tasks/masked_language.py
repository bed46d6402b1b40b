"""Masked words of a grammar's sentences: a task whose least loss is known exactly.

Every word of a sentence is hidden with the same probability, independently, and always by the same
mask. The expected loss is least for the posterior P(word | visible words), which inside-outside
computes.

With an arc task the loss also moves attention to the arcs of dependency trees, or away from them,

    L  +  weight * mean over arcs (i, h)  sum over layers and heads  (a_ih + a_hi)

with L the loss above and a the attention between words (Chen et al. 2023, arXiv 2309.07311, section
3; the direction from h to i is the transposed one). Above 0 the weight suppresses attention along
arcs, below 0 it promotes it.

A regulariser takes more from a model than its syntax: it also moves attention about. The control
does the same to as many arcs of the same lengths and directions at places where no arc is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from synthetic.compilation import compile_once
from synthetic.grammar.dependencies import Headed, dependencies
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import Sampler, Sentences, sample
from synthetic.guards import number
from synthetic.tasks.task import Batch, Outcome


@dataclass(frozen=True)
class MaskedLanguageTask:
    """Sentences with hidden words; a `Task`. Hashable.

    Attributes:
        grammar: proper, and not supercritical.
        max_length: longer sentences are not drawn.
        rate: probability that a word is hidden, above 0 and at most 1.
        highest: if given, each sentence has a rate of its own, uniform from `rate` to `highest`.
            More hidden words teach more, and the posterior is the optimum at every rate.
        final: if given, the rate goes from `rate` to `final` in the course of a fit, linearly, and
            is `final` elsewhere. Not together with `highest`.

    Raises:
        ValueError: a number out of range.
    """

    grammar: Grammar
    max_length: int = 20
    rate: float = 0.15
    highest: float | None = None
    final: float | None = None

    outcome: ClassVar[Outcome] = "probabilities"

    def __post_init__(self) -> None:
        number("max_length", self.max_length, whole=True, least=1)
        number("rate", self.rate, above=0, most=1)
        if self.highest is not None:
            number("highest", self.highest, least=self.rate, most=1)
        if self.final is not None:
            number("final", self.final, above=0, most=1)
        if self.final is not None and self.highest is not None:
            raise ValueError(
                f"final is {self.final} and highest {self.highest}, must be one of them"
            )

    @cached_property
    def _sampler(self) -> Sampler:
        with jax.ensure_compile_time_eval():
            return Sampler.of(self.grammar)

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw sentences.

        Returns:
            `inputs`: tokens `[batch, max_length]` int32, lengths `[batch]`, mask
                `[batch, max_length]` bool, True where a word is hidden; the tokens are there all
                the same, and it is for the model not to look. `target`: tokens and mask.
        """
        return self.sample_during(key, batch, jnp.asarray(1.0))

    def sample_during(self, key: Array, batch: int, progress: Float[Array, ""]) -> Batch:
        """As `sample`, at a rate between `rate` and `final`."""
        drawn, mask = self.draw(key, batch, progress)
        return Batch((drawn.tokens, drawn.lengths, mask), (drawn.tokens, mask))

    @compile_once(static_argnums=(0, 2))
    def draw(
        self, key: Array, batch: int, progress: Float[Array, ""]
    ) -> tuple[Sentences, Bool[Array, "batch time"]]:
        """The sentences of `sample_during`, with their trees, and which words are hidden."""
        words_key, mask_key, rate_key = jax.random.split(key, 3)
        drawn = sample(self._sampler, words_key, batch, self.max_length)
        there = jnp.arange(self.max_length) < drawn.lengths[:, None]
        rate = jnp.asarray(self.rate)
        if self.final is not None:
            rate = rate + (self.final - rate) * progress
        if self.highest is not None:
            rate = jax.random.uniform(rate_key, (batch, 1), minval=rate, maxval=self.highest)
        return drawn, there & jax.random.bernoulli(mask_key, rate, drawn.tokens.shape)

    def loss(self, prediction: Float[Array, "batch time word"], batch: Batch) -> Array:
        """Cross-entropy at hidden words in nats, `[batch]`; the mean is that over hidden words."""
        tokens, mask = batch.target
        if prediction.shape[:2] != tokens.shape:
            raise ValueError(
                f"prediction must have shape {(*tokens.shape, 'words')}, got {prediction.shape}"
            )
        chosen = jnp.take_along_axis(prediction, tokens[..., None], -1)[..., 0]
        tiny = jnp.finfo(prediction.dtype).tiny
        nats = jnp.where(mask, -jnp.log(jnp.maximum(chosen, tiny)), 0)
        return nats.sum(1) / jnp.maximum(mask.sum(1).mean(), 1 / len(mask))


def check_sentences(words: int, longest: int, tokens: Any, lengths: Any, mask: Any) -> None:
    """Raise ValueError unless these are sentences of at most `longest` words of that many kinds.

    Args:
        words: size of the vocabulary.
        longest: words of the longest sentence.
        tokens: `[batch, time]` integers; what stands past a sentence's end is not looked at.
        lengths: `[batch]` integers.
        mask: `[batch, time]` bool.
    """
    tokens, lengths, mask = (
        np.asarray(as_array(name, a))
        for name, a in (("tokens", tokens), ("lengths", lengths), ("mask", mask))
    )
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, must be [batch, time] "
            "integers"
        )
    if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}, must be "
            f"{tokens.shape[:1]} integers"
        )
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}, must be {tokens.shape} bool"
        )
    if not len(tokens):
        return
    most = min(longest, tokens.shape[1])
    if lengths.min() < 1 or lengths.max() > most:
        raise ValueError(
            f"lengths are {lengths.min()} to {lengths.max()}, must be 1 to {most}"
            + (", the construction's max_length" if most == longest else "")
        )
    there = np.arange(tokens.shape[1]) < lengths[:, None]
    used = tokens[there & ~mask]
    if used.size and (used.min() < 0 or used.max() >= words):
        raise ValueError(f"tokens are {used.min()} to {used.max()}, must be 0 to {words - 1}")


def as_array(name: str, given: Any) -> Any:
    """An array as it is, and lists as one; ValueError where their rows have different lengths."""
    if isinstance(given, jax.Array | np.ndarray):
        return given
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths, must be an array") from None


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
        number("weight", self.weight)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {allowed}")
        number("until", self.until, above=0, most=1)
        number("replaced", self.replaced, least=0, most=1)

    @cached_property
    def _vocabulary(self) -> int:
        return len(self.headed.grammar.vocabulary)

    def sample(self, key: Array, batch: int) -> Batch:
        """`sample_during` at the end of a fit."""
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
