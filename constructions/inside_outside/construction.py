"""Inside-Outside in a transformer: every span's probabilities, one layer a length.

Zhao, Panigrahi, Ge and Arora 2023 (arXiv 2303.08117) show that attention between the two ends of
a span can run the Inside-Outside algorithm. This is an exact construction of that kind: linear
attention at one relative offset a head, no softmax, no MLP and no norm. The tokens are BOS, the
words (a number for each, and one for a hidden word), EOS. One pass gives P(word | all others) at
every position, since the outside probability of a word never looks at that word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from constructions.claims import Claim, NearMiss, predict
from constructions.core.inventory import counts
from constructions.core.program import Program
from constructions.core.slots import Slot
from constructions.core.transformer import Transformer
from constructions.family import Compiled, Construction, Counterpart, Place, Tokens
from constructions.inputs import FLAGS, INTEGERS, Input
from constructions.inside_outside.exactness import (
    check_memory,
    check_size,
    dtype_of,
    is_parser,
    known,
    refuse_lost,
    settled,
    typical_scale,
)
from constructions.inside_outside.low_rank import LowRank, low_rank
from constructions.inside_outside.paper import claims, counterpart, near_misses
from constructions.inside_outside.tableau import (
    Layout,
    defined,
    inside_outside,
    layout,
    marginals,
    tableau,
    token_numbers,
    values,
    word_posterior,
)
from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar
from synthetic.tasks.masked_language import MaskedLanguageTask, as_array, check_sentences

NUMBER = int | float | np.integer | np.floating
#: Sentences that run in one go.
AT_ONCE = 512
#: The most that `max_length` may be: charts of the counterpart's task take its square.
MOST_WORDS = 1000


@dataclass(frozen=True)
class InsideOutside(Construction):
    """The transformer that parses with a grammar.

    Attributes:
        grammar: a `Grammar`, its JSON form, or the name of one in `synthetic.grammar.examples`. It
            need not be proper: a grammar restricted to some of its symbols also compiles.
        max_length: words of the longest sentence, at least 2.
        scale: factor on what a word's token holds, which cancels in every probability; None takes
            one at which sentences of the grammar have a Z of about 1
            (`constructions.inside_outside.exactness`). What float32 still does not hold is refused.
        masking: of the task: the probability that a word is hidden.
        layers, heads, width, activation: of the counterpart; "relu" has units that
            `probes.selectivity` can look at.
        reduction: a `LowRank`, or its JSON form, that spans of two words or more pass through, so
            that its rank takes the place of the number of nonterminals in the program; None for
            the exact one. The method `low_rank` makes one.
    """

    grammar: Any
    max_length: Any = 12
    scale: float | None = None
    masking: float = 0.15
    layers: int = 3
    heads: int = 4
    width: int = 64
    reduction: Any = None
    activation: str = "gelu"

    def __post_init__(self) -> None:
        grammar = self.grammar
        if isinstance(grammar, str):
            grammar = named(grammar)
        elif isinstance(grammar, Mapping):
            grammar = Grammar.from_json(dict(grammar))
        if not isinstance(grammar, Grammar):
            raise ValueError(f"grammar is {grammar!r}, must be a Grammar, its JSON form or a name")
        object.__setattr__(self, "grammar", grammar)
        longest = self.max_length
        if isinstance(longest, bool) or not isinstance(longest, NUMBER) or longest % 1 != 0:
            raise ValueError(f"max_length is {longest!r}, must be a whole number")
        if not 2 <= longest <= MOST_WORDS:
            raise ValueError(
                f"max_length is {longest}, must be at least 2 and at most {MOST_WORDS}"
            )
        object.__setattr__(self, "max_length", int(longest))
        if self.scale is not None and not (
            isinstance(self.scale, NUMBER) and np.isfinite(self.scale) and self.scale > 0
        ):
            raise ValueError(f"scale is {self.scale!r}, must be finite and above 0")
        if self.activation not in ("gelu", "relu"):
            raise ValueError(f"activation is {self.activation!r}, must be 'gelu' or 'relu'")
        if self.reduction is not None:
            labels = len(grammar.nonterminals)
            object.__setattr__(self, "reduction", LowRank.given(self.reduction, labels))

    @property
    def task(self) -> MaskedLanguageTask:
        """Masked words of sentences that the grammar makes."""
        return MaskedLanguageTask(self.grammar, self.max_length, self.masking)

    @property
    def factors(self) -> np.ndarray:
        """What each token number's leaf is multiplied by, `[words + 1]`; a mask's by 1."""
        g = self.grammar
        scale = self.scale
        if scale is None:
            scale = typical_scale(g, self.max_length)
        best = g.emission.max(0)
        return np.append(scale / np.where(best > 0, best, 1), 1.0)

    @property
    def leaves(self) -> np.ndarray:
        """beta(i, i) at words, MASK, BOS, EOS and PAD, `[words + 4, preterminals]`."""
        emission = self.grammar.emission
        visible = np.concatenate([emission.T, emission.sum(1)[None]]) * self.factors[:, None]
        return np.pad(visible, ((0, 3), (0, 0)))

    @cached_property
    def program(self) -> Program:
        """2 max_length layers of linear heads, each at one relative offset.

        Raises:
            ValueError: `max_length` is too large for a program of max_length^2 terms.
        """
        check_size(self.max_length)
        root, rules = self.passed
        form = None if self.reduction is None else self.reduction.products
        emission = self.grammar.emission
        return tableau(root, rules, self.leaves, emission, self.max_length, form)

    def compile(self, dtype: Any = None) -> Compiled:
        """As `Construction.compile`; ValueError where the matrices would not fit into memory."""
        check_memory(self.rank, len(self.grammar.preterminals), self.max_length, self.layout)
        return super().compile(dtype)

    @property
    def passed(self) -> tuple[np.ndarray, np.ndarray]:
        """`root` and `rules` of what spans pass on: symbols, or the directions of the reduction."""
        g, reduction = self.grammar, self.reduction
        if reduction is None:
            return g.root, g.rules
        return reduction.root(g.root), reduction.rules(g.rules)

    @property
    def rank(self) -> int:
        """Numbers that a span of two words or more passes on."""
        return len(self.grammar.nonterminals) if self.reduction is None else self.reduction.rank

    @property
    def layout(self) -> Layout:
        """Slots of the values of spans."""
        g = self.grammar
        return layout(self.rank, len(g.preterminals), self.max_length, len(g.nonterminals))

    @property
    def arguments(self) -> tuple[Input, ...]:
        """tokens and mask `[batch, time]`, lengths `[batch]`; see `word_posterior`."""
        both = ("batch", "time")
        return (
            Input("tokens", both, INTEGERS),
            Input("lengths", ("batch",), INTEGERS),
            Input("mask", both, FLAGS),
        )

    def check(self, tokens: Any, lengths: Any, mask: Any = None) -> None:
        """ValueError for sentences that are longer than the construction, and other bad input."""
        if any(isinstance(a, Tracer) for a in (tokens, lengths, mask)):
            return
        check_sentences(len(self.grammar.vocabulary), self.max_length, tokens, lengths, mask)

    def context_size(self, *inputs: Any) -> int:
        """Positions of the longest sentence: their words can be hidden."""
        return inputs[0].shape[1]

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The sentences with the words of all other positions hidden."""
        tokens, lengths, mask = inputs
        hidden = np.ones(tokens.shape[1], bool)
        hidden[np.asarray(kept, int)] = False
        there = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return tokens, lengths, mask | (there & hidden)

    def outside_context(
        self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any
    ) -> Any:
        """The posteriors of the words that are hidden from the start; 0 elsewhere."""
        del kept
        return jnp.where(inputs[2][..., None], prediction, 0)

    def trace(self, tokens: ArrayLike, lengths: ArrayLike, mask: ArrayLike) -> dict[str, Array]:
        """The algorithm; tokens and mask are `[batch, time]`, lengths `[batch]`.

        Returns:
            inside, outside: beta and alpha of spans of 2 to `max_length` words by first word,
                `[batch, time, words - 2, nonterminal]`, in units of the construction: times the
                factors of the words that they are about. With a reduction what is passed on of
                them, `[batch, time, words - 2, rank]`.
            leaves, around: of single words, `[batch, time, preterminal]`.
            span_products, tag_products: beta times alpha, by label.
            span_marginals, tag_marginals, prediction: as `synthetic.grammar.chart` has them; the
                prediction is its word posterior. With a reduction marginals may be negative, and
                are NaN where Z is not positive; the prediction takes what is negative as 0.
        """
        check_size(self.max_length)
        g, reduction = self.grammar, self.reduction
        tokens, lengths, mask = jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(mask)
        root, rules, leaves = (jnp.asarray(a, float) for a in (*self.passed, self.leaves))
        numbers = self.numbers(tokens, lengths, mask)[:, 1:-1]
        beta, alpha = inside_outside(root, rules, leaves[numbers], lengths, self.max_length)
        products = {n: alpha[n] * beta[n] for n in beta}
        if reduction is not None:
            encode, decode = (jnp.asarray(a, float) for a in (reduction.encode, reduction.decode))
            times = partial(jnp.matmul, precision="highest")
            for n in range(2, self.max_length + 1):
                products[n] = times(alpha[n], encode) * times(beta[n], decode.T)
        longer = range(2, self.max_length + 1)
        return {
            "inside": jnp.stack([beta[n] for n in longer], 2),
            "outside": jnp.stack([alpha[n] for n in longer], 2),
            "leaves": beta[1],
            "around": alpha[1],
            "span_products": jnp.stack([products[n] for n in longer], 2),
            "tag_products": products[1],
            **marginals(products, lengths, self.max_length),
            "prediction": word_posterior(alpha[1], jnp.asarray(g.emission, float), lengths),
        }

    def numbers(self, tokens: Array, lengths: Array, mask: Array) -> Array:
        """Token numbers with BOS, EOS and PAD, `[batch, time + 2]`."""
        return token_numbers(len(self.grammar.vocabulary), tokens, lengths, mask)

    def embed(self, tokens: Array, lengths: Array, mask: Array) -> list[Tokens]:
        """BOS, the words, EOS, padding; hidden words are all the same token."""
        numbers = self.numbers(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(mask))
        kinds = jnp.maximum(numbers - len(self.grammar.vocabulary), 0)
        parts = [slice(1), slice(1, -1), slice(-1, None)]  # each sentence may end among the words
        return [Tokens(kinds[:, p], words=numbers[:, p], read=p == parts[1]) for p in parts]

    def apply(
        self, model: Transformer, tokens: Array, lengths: Array, mask: Array
    ) -> Float[Array, "batch time word"]:
        """P(word at t | all other visible words); 0 past the end of a sentence."""

        def run(tokens: Array, lengths: Array, mask: Array) -> Array:
            stream, groups, read = self.stream(model, tokens, lengths, mask)
            found = model.word_probabilities(model(stream, groups, read=read))
            return jnp.where((groups[:, read] == 0)[..., None], found, 0)

        if len(tokens) <= AT_ONCE:
            return run(tokens, lengths, mask)
        # the queries of hundreds of heads are much larger than what comes out
        one = partial(jax.tree.map, lambda a: a[None])
        return jax.lax.map(
            lambda given: run(*one(given))[0], (tokens, lengths, mask), batch_size=AT_ONCE
        )

    def places(self, depth: int, tokens: Array, lengths: Array, mask: Array) -> dict[str, Place]:
        """The slots of every word; a value of a span is read at its first word."""
        at, words = self.layout, range(1, jnp.shape(tokens)[1] + 1)

        def spans(slots: Mapping[int, Slot]) -> Place:
            names = np.array([slots[n].name for n in range(2, self.max_length + 1)], object)
            return Place(names, np.array(words)[:, None], np.asarray(depth))

        return {
            "inside": spans(at.starts),
            "outside": spans(at.outside_starts),
            "leaves": Place.of(at.starts[1].name, words, depth),
            "around": Place.of(at.outside_starts[1].name, words, depth),
            "span_products": spans(at.products),
            "tag_products": Place.of(at.products[1].name, words, depth),
        }

    def read(
        self, model: Transformer, tokens: Array, lengths: Array, mask: Array
    ) -> dict[str, Array]:
        """The values of `trace`; marginals are products of slots over their sum at the word."""
        found = super().read(model, tokens, lengths, mask)
        spans = jnp.moveaxis(found["span_products"], 2, 0)
        products = dict(enumerate(spans, start=2)) | {1: found["tag_products"]}
        return found | marginals(products, lengths, self.max_length)

    def word_posterior(
        self,
        model: Transformer,
        tokens: Any,
        lengths: Any,
        mask: Any = None,
        *,
        strict: bool = True,
    ) -> Float[Array, "batch time word"]:
        """P(word at t | all other visible words), from one pass of a model of this class.

        NaN where no word at t makes a sentence of the grammar, 0 past the end of a sentence.

        Args:
            model: compiled, or trained.
            tokens: `[batch, time]` integers, without BOS and EOS, padded with anything.
            lengths: `[batch]`, 1 to `max_length`.
            mask: `[batch, time]`, True where a word is hidden; None: nowhere.
            strict: refuse sentences of which nothing is defined, and those whose probabilities the
                compiled model's type does not hold; otherwise, and under `jit`, they are NaN.

        Raises:
            ValueError: a shape, a dtype, a length or a word that does not fit; a sentence that has
                no parse, even if one of its words were another, or is out of range (`strict`).
        """
        given = self._given(tokens, lengths, mask)
        found = predict(self, model, *given)
        if not is_parser(model):
            return found
        kept = {"prediction": defined(found, given[1])}
        return settled(self, kept, given, dtype_of(model), strict)["prediction"]

    def span_marginals(
        self,
        model: Transformer,
        tokens: Any,
        lengths: Any,
        mask: Any = None,
        *,
        strict: bool = True,
    ) -> Float[Array, "batch first last nonterminal"]:
        """P(words first..last are one constituent | visible words), of the compiled model.

        Arguments and errors as for `word_posterior`, but that a sentence without a parse has none
        (an error, or NaN). 0 for spans of one word.
        """
        return self._marginals(model, "span_marginals", tokens, lengths, mask, strict)

    def tag_marginals(
        self,
        model: Transformer,
        tokens: Any,
        lengths: Any,
        mask: Any = None,
        *,
        strict: bool = True,
    ) -> Float[Array, "batch time preterminal"]:
        """P(pre-terminal of word t | visible words), of the compiled model; as `span_marginals`."""
        return self._marginals(model, "tag_marginals", tokens, lengths, mask, strict)

    def _marginals(
        self, model: Transformer, name: str, tokens: Any, lengths: Any, mask: Any, strict: bool
    ) -> Array:
        given = self._given(tokens, lengths, mask)
        found = {name: _read(self, model, *given)[name]}
        return settled(self, found, given, dtype_of(model), strict)[name]

    def evaluate(
        self, tokens: Any, lengths: Any, mask: Any = None, *, strict: bool = True
    ) -> dict[str, Array]:
        """The named values by the program's second back end, without dense matrices.

        The same as `read` and `apply` of the compiled model up to rounding, for grammars whose
        matrices would not fit. Arguments and errors as for `word_posterior`; of a sentence without
        a parse, marginals are NaN.
        """
        check_size(self.max_length)
        given = self._given(tokens, lengths, mask)
        found = values(self, given)
        return settled(self, found, given, found["prediction"].dtype, strict)

    def low_rank(self, tokens: Any, lengths: Any, rank: int) -> InsideOutside:
        """This construction with `rank` heads a direction for the nonterminals of a layer.

        Its reduction is the balanced truncation (`constructions.inside_outside.low_rank`) of what
        the exact construction finds in training sentences.

        Args:
            tokens, lengths: as for `word_posterior`.
            rank: 1 to the number of nonterminals.

        Raises:
            ValueError: a sentence does not fit, is out of the range of the type, or none has a
                parse; `rank` is out of range.
        """
        exact = replace(self, reduction=None)
        given = exact._given(tokens, lengths, None)
        if len(given[0]):
            dtype = jnp.result_type(float)
            refuse_lost(exact, np.asarray(known(exact, given, dtype).marginals), given, dtype)
        run = partial(exact.evaluate, strict=False)
        words, sizes = (np.asarray(a) for a in given[:2])
        return replace(self, reduction=low_rank(run, words, sizes, rank))

    def _given(self, tokens: Any, lengths: Any, mask: Any) -> tuple[Array, Array, Array]:
        """Checked where they are concrete, as arrays."""
        tokens, lengths = as_array("tokens", tokens), as_array("lengths", lengths)
        mask = np.zeros(np.shape(tokens), bool) if mask is None else as_array("mask", mask)
        if not any(isinstance(a, Tracer) for a in (tokens, lengths, mask)):
            self.check(tokens, lengths, mask)
        return jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(mask)

    def counterpart(self) -> Counterpart:
        """A masked language model without any part of the algorithm, see `language_model`.

        Its metric is the KL divergence of the exact posterior from it.
        """
        return counterpart(self)

    def near_misses(self) -> dict[str, NearMiss]:
        """Parses by a grammar that is off, or with half of the outside pass."""
        return near_misses(self)

    @property
    def examples(self) -> int:
        """Few: a divergence has little variance, and hundreds of heads are slow."""
        return int(np.clip(2**32 // counts(self.program).dense, 2**8, 2**11))

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about masked language models that can be decided exactly."""
        return claims(self.grammar, self.max_length)

    def tolerance(self, dtype: str) -> float:
        """Every value is a sum of products of non-negative numbers: nothing cancels."""
        return {"float64": 1e-12, "float32": 1e-4}[dtype]


@partial(jax.jit, static_argnums=0)
def _read(c: InsideOutside, model: Transformer, *inputs: Array) -> dict[str, Array]:
    return c.read(model, *inputs)
