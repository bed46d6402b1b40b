"""Text as a task: the next token of a stream, at every place of a window.

A stream comes from a file (bytes or characters) or from a grammar. One grammar's text can be learnt
by heart; where every window has names of its own for the words (`renamed`), or a law of its own
(`BigramTask`), what is to be known has to be found in the window, and the loss falls
along it.

In a `BigramTask` each sequence is a Markov chain of its own. The rows of the transition matrix are
drawn from a Dirichlet distribution for every sequence, so that weights can hold nothing but the
prior. What is best is known: with n_ij the pairs (i, j) so far and n_i = sum_j n_ij,

    P(x_{t+1} = j | x_1 .. x_t = i)  =  (n_ij + a) / (n_i + words a),    a the concentration.

Ridge regression of the next word on the last one, both one-hot, gives n_ij / (n_i + ridge).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from synthetic.files import TextError, decode
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import sample
from synthetic.guards import number
from synthetic.tasks.task import Batch, Outcome

UNITS = ("characters", "bytes")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A stream of tokens. Equal to itself alone; hashable.

    Attributes:
        tokens: `[time]` integers.
        vocabulary: what each number stands for.

    Raises:
        ValueError: tokens are no such array, or one is no number of the vocabulary.
    """

    tokens: np.ndarray
    vocabulary: tuple[str, ...]

    def __post_init__(self) -> None:
        tokens, size = np.asarray(self.tokens), len(self.vocabulary)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise ValueError(
                f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, must be [time] "
                "integers, at least one"
            )
        if tokens.min() < 0 or tokens.max() >= size:
            raise ValueError(
                f"tokens are {tokens.min()} to {tokens.max()}, must be 0 to {size - 1}"
            )

    def __repr__(self) -> str:
        return f"Corpus({len(self.tokens)} tokens, {len(self.vocabulary)} words)"

    @classmethod
    def from_file(cls, path: str | PathLike[str], unit: str = "characters") -> Corpus:
        """The characters of a text file, or the bytes of any file; those that occur, in order.

        Args:
            path: of a file in UTF-8 or, with its byte-order mark, UTF-16 (`text_files.decode`); the
                mark is no character of the text, and line ends stay as they are.
            unit: "characters" or "bytes".

        Raises:
            ValueError: the unit is another, or the file cannot be read, is empty or is no text.
        """
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}, must be one of {UNITS}")
        try:
            raw = Path(path).read_bytes()
            text = decode(raw) if unit == "characters" else raw.decode("latin-1")
        except TextError as error:
            raise ValueError(f"path={str(path)!r}: {error}; unit='bytes' takes any file") from error
        except OSError as error:
            raise ValueError(f"path={str(path)!r}: {error.strerror or error}") from error
        if not text:
            raise ValueError(f"path={str(path)!r}: the file is empty")
        vocabulary = sorted(set(text))
        number = {symbol: n for n, symbol in enumerate(vocabulary)}
        return cls(np.array([number[symbol] for symbol in text], np.int32), tuple(vocabulary))

    @classmethod
    def from_grammar(
        cls,
        grammar: Grammar,
        key: Array,
        sentences: int,
        max_length: int = 20,
        separator: str = ".",
    ) -> Corpus:
        """Independent sentences of a grammar, each with `separator`, the last token, behind it.

        Raises:
            ValueError: the separator is a word of the grammar, or as `sentences.sample`.
        """
        if separator in grammar.vocabulary:
            raise ValueError(f"separator is {separator!r}, must not be a word of the grammar")
        drawn = sample(grammar, key, sentences, max_length)
        place, lengths = np.arange(max_length + 1), np.asarray(drawn.lengths)[:, None]
        tokens = np.pad(np.asarray(drawn.tokens), ((0, 0), (0, 1)))
        tokens = np.where(place == lengths, len(grammar.vocabulary), tokens)
        return cls(tokens[place <= lengths], (*grammar.vocabulary, separator))

    def split(self, share: float = 0.1) -> tuple[Corpus, Corpus]:
        """The front part, and the share at the end that is held out; one vocabulary.

        Raises:
            ValueError: the share is not between 0 and 1, or leaves a part without tokens.
        """
        cut = len(self.tokens) - round(share * len(self.tokens)) if 0 < share < 1 else 0
        if not 0 < cut < len(self.tokens):
            raise ValueError(
                f"share is {share}, must be between 0 and 1 and leave tokens in both parts "
                f"of {len(self.tokens)}"
            )
        return Corpus(self.tokens[:cut], self.vocabulary), Corpus(
            self.tokens[cut:], self.vocabulary
        )


class NextToken:
    """The loss of predicting every next token, and what is predicted: their probabilities."""

    outcome: ClassVar[Outcome] = "probabilities"

    def loss(self, prediction: Float[Array, "batch time word"], batch: Batch) -> Array:
        """Mean cross-entropy of a sequence in nats a token, `[batch]`."""
        return self.loss_by_position(prediction, batch).mean(1)

    def loss_by_position(
        self, prediction: Float[Array, "batch time word"], batch: Batch
    ) -> Float[Array, "batch time"]:
        """Cross-entropy at every place in nats; entry t is of the token behind t + 1 seen ones."""
        return cross_entropy(prediction, batch.target)


@dataclass(frozen=True)
class TextTask(NextToken):
    """The next token in windows of a corpus, drawn uniformly; a `Task`. Hashable.

    The corpus becomes a constant of the compiled step, in the smallest integers that hold it.

    Attributes:
        corpus: the stream.
        length: tokens that are seen, and as many that are predicted: the same, one place further.
        renamed: every window has a permutation of the vocabulary of its own, uniform.

    Raises:
        ValueError: the length is below 1, or the corpus too short for one window.
    """

    corpus: Corpus
    length: int = 128
    renamed: bool = False

    def __post_init__(self) -> None:
        most = len(self.corpus.tokens) - 1
        if not 1 <= self.length <= most:
            raise ValueError(
                f"length is {self.length}, must be 1 to {most} for a corpus of {most + 1} tokens"
            )

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return len(self.corpus.vocabulary)

    @cached_property
    def _stream(self) -> Array:
        small = np.min_scalar_type(max(self.words - 1, 1))
        with jax.ensure_compile_time_eval():
            return jnp.asarray(self.corpus.tokens.astype(small))

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw windows.

        Returns:
            `inputs`: tokens `[batch, length]` int32; `target`: the next ones, the same shape.
        """
        place, names = jax.random.split(key)
        starts = jax.random.randint(place, (batch, 1), 0, len(self.corpus.tokens) - self.length)
        tokens = self._stream[starts + jnp.arange(self.length + 1)].astype(jnp.int32)
        if self.renamed:
            order = jnp.argsort(jax.random.uniform(names, (batch, self.words)))
            tokens = jnp.take_along_axis(order.astype(jnp.int32), tokens, 1)
        return Batch((tokens[:, :-1],), tokens[:, 1:])


def cross_entropy(
    prediction: Float[Array, "*place word"], target: Int[Array, "*target"]
) -> Float[Array, "*target"]:
    """-log of the probability that the prediction gives to the target, in nats.

    Raises:
        ValueError: the shapes do not fit.
    """
    if prediction.shape[:-1] != target.shape:
        raise ValueError(
            f"prediction must have shape {(*target.shape, 'words')}, got {prediction.shape}"
        )
    chosen = jnp.take_along_axis(prediction, target[..., None], -1)[..., 0]
    return -jnp.log(jnp.maximum(chosen, jnp.finfo(prediction.dtype).tiny))


def text_entropy(
    grammar: Grammar, key: Array, sentences: int, max_length: int = 20
) -> tuple[float, float]:
    """Entropy of `Corpus.from_grammar`'s text in nats a token, and its standard error.

        E[-log P(sentence)] / E[length + 1],    P(sentence) = sum over trees / P(length <= max)

    with the sum by inside-outside, the expectations over drawn sentences. No predictor has a lower
    loss, whatever it knows; one that sees the sentence from its beginning can reach it.

    Raises:
        ValueError: the grammar is supercritical, so that its sentences have no distribution (those
            of a critical one have, given `max_length`); as `sentences.sample`.
    """
    drawn = sample(grammar, key, sentences, max_length)
    kept = float(np.log(grammar.length_probabilities(max_length).sum()))
    found = chart.log_z(grammar, drawn.tokens, drawn.lengths)
    nats = kept - np.asarray(found, np.float64)
    tokens = np.asarray(drawn.lengths, np.float64) + 1
    rate = nats.mean() / tokens.mean()
    spread = (nats - rate * tokens).std() / np.sqrt(sentences) / tokens.mean()
    return float(rate), float(spread)


@dataclass(frozen=True)
class BigramTask(NextToken):
    """The next word of Markov chains, a `Task`. Hashable.

    Attributes:
        words: size of the vocabulary.
        length: words that are seen, and as many that are predicted: the same, one place further.
        concentration: of the Dirichlet distribution of every row; small ones give laws that are
            nearly deterministic.

    Raises:
        ValueError: a number out of range.
    """

    words: int = 16
    length: int = 128
    concentration: float = 0.1

    def __post_init__(self) -> None:
        number("words", self.words, whole=True, least=2)
        number("length", self.length, whole=True, least=1)
        number("concentration", self.concentration, above=0)

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw chains; the first word is uniform.

        By Polya's urn: each word from what is known of the law by then, which gives sequences the
        same distribution as a law drawn beforehand.

        Returns:
            `inputs`: words `[batch, length]` int32; `target`: the next ones, the same shape.
        """
        first, rest = jax.random.split(key)
        start = jax.random.randint(first, (batch,), 0, self.words)
        rows = jnp.arange(batch)

        def draw(state: tuple[Array, Array], uniform: Array) -> tuple[tuple[Array, Array], Array]:
            urns, word = state
            below = jnp.cumsum(urns[rows, word], -1)
            following = (below <= uniform[:, None] * below[:, -1:]).sum(-1)
            following = jnp.minimum(following, self.words - 1)
            return (urns.at[rows, word, following].add(1), following), following

        urns = jnp.full((batch, self.words, self.words), self.concentration)
        uniform = jax.random.uniform(rest, (self.length, batch))
        words = jax.lax.scan(draw, (urns, start), uniform)[1]
        words = jnp.concatenate([start[None], words]).T.astype(jnp.int32)
        return Batch((words[:, :-1],), words[:, 1:])

    def posterior(self, words: Int[Array, "batch time"]) -> Float[Array, "batch time word"]:
        """What is best at every place: P(x_{t+1} | x_1 .. x_t) of the module's equation."""
        here = jax.nn.one_hot(words, self.words)
        # [t, s]: word s is word t's, and the word behind it has been seen
        same = jnp.tril(words[:, :, None] == words[:, None, :], -1).astype(here.dtype)
        following = jnp.roll(here, -1, axis=1)
        counts = jnp.matmul(same, following, precision="highest") + self.concentration
        return counts / counts.sum(-1, keepdims=True)
