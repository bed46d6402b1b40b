"""Masked words of a grammar's sentences: a task whose least loss is known exactly.

Every word of a sentence is hidden with the same probability, independently, and always by the same
mask. The expected loss is least for the posterior P(word | visible words), which inside-outside
computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from synthetic.grammar import Grammar
from synthetic.sentences import Sampler, Sentences, sample
from synthetic.task import Batch, Outcome


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
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, Integral):
            raise ValueError(f"max_length is {self.max_length!r}, must be a whole number")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, must be at least 1")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}, must be above 0 and at most 1")
        if self.highest is not None and not self.rate <= self.highest <= 1:
            raise ValueError(f"highest is {self.highest}, must be {self.rate} to 1")
        if self.final is not None and not 0 < self.final <= 1:
            raise ValueError(f"final is {self.final}, must be above 0 and at most 1")
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
