"""Inside-outside over batches of sentences: the exact oracle of a grammar in Chomsky normal form.

    Z(words) = sum over trees of root[top] * product of rules * product of emissions

and what follows from it: marginals of spans and tags, the posterior of every word given the others,
also where some words are hidden. `tables` and `decode` hold the parts.

For use as a library, since no command calls them: `em`, `em_step`, `expected_counts`, `entropy`,
`viterbi`, `labelled_recall` and `binarisation_symbols`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from synthetic.grammar import decode, tables
from synthetic.grammar.decode import labelled_recall_trees, viterbi_trees
from synthetic.grammar.grammar import Grammar, Weights
from synthetic.grammar.tables import log_of, power_of_two

__all__ = [
    "InsideOutside",
    "binarisation_symbols",
    "em",
    "em_step",
    "entropy",
    "expected_counts",
    "inside_outside",
    "labelled_recall",
    "labelled_recall_trees",
    "log_z",
    "viterbi",
    "viterbi_trees",
]


#: The most bytes that the tables of a batch may take.
MOST_BYTES = 64 * 2**30


class InsideOutside(NamedTuple):
    """Likelihoods, marginals and posteriors of a batch of sentences; zeros beyond the end of each.

    A probability given words that have probability 0 is 0/0, and NaN here: marginals of a sentence
    without a parse, and the posterior at a word whose others have no parse whatever it is.

    Attributes:
        log_z: log of the probability of the visible words (and of the length); -inf: no parse.
        span_marginals: P(words i..j, inclusive, are one constituent A | visible words), i < j.
        tag_marginals: P(pre-terminal of word t | visible words).
        word_posterior: P(word at t | all other visible words); does not look at the word at t.
    """

    log_z: Float[Array, " batch"]
    span_marginals: Float[Array, "batch time time nonterminals"]
    tag_marginals: Float[Array, "batch time preterminals"]
    word_posterior: Float[Array, "batch time vocabulary"]


def inside_outside(
    g: Grammar | Weights,
    tokens: Any,
    lengths: Any,
    mask: Any = None,
    *,
    strict: bool = True,
) -> InsideOutside:
    """Marginals and posteriors, exactly.

    Args:
        g: a grammar, or its arrays: any finite, non-negative ones; their dtype is used.
        tokens: `[batch, time]` integers, without BOS and EOS; what stands past a sentence's end
            changes nothing.
        lengths: `[batch]` integers in 1..time. One word has a pre-terminal as its whole tree.
        mask: `[batch, time]` bool, True where the word is hidden: it may be any.
        strict: refuse a sentence of which nothing is defined; otherwise, and under `jit`, its
            probabilities are NaN.

    Every span has a scale of its own: a symbol is lost where its likelihood is below 1e-38
    (float32) or 1e-308 (float64) of that of another symbol of the span. Where rare rules alone
    parse a sentence, five of 1e-9 in one span say, take float64.

    A sentence without a parse has log_z = -inf and no marginals (NaN). It may have a posterior
    where exchanging one word would mend it: that word's own number is not looked at.

    Raises:
        ValueError: a shape or dtype is another, a length out of range, a word not in the
            vocabulary, a sentence that has no parse whatever any one of its words is (the last
            three for concrete arrays only).
    """
    found = _inside_outside(*_checked(g, tokens, lengths, mask))
    if strict and not any(isinstance(a, Tracer) for a in (*found, tokens, lengths, mask)):
        nothing = np.isnan(found.word_posterior).any(-1) | _beyond(tokens, lengths)
        nothing = nothing.all(1) & np.isneginf(found.log_z)
        refuse_unparsed(g, nothing, tokens, lengths, mask, "even if one of its words were another")
    return found


def refuse_unparsed(
    g: Grammar | Weights,
    bad: np.ndarray,
    tokens: Any,
    lengths: Any,
    mask: Any,
    what: str = "",
) -> None:
    """Raise ValueError that names the first of the sentences marked in `bad`, if there is one."""
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{name_sentence(g, row, tokens, lengths, mask)} has no parse{what and ', ' + what}: "
            "nothing follows from it"
        )


def name_sentence(g: Grammar | Weights, row: int, tokens: Any, lengths: Any, mask: Any) -> str:
    """Such as `sentence 3 ('a' 'dog' _)`: number in the batch, words, and _ for hidden ones."""
    words = np.asarray(tokens)[row, : np.asarray(lengths)[row]].tolist()
    hidden = np.zeros(len(words)) if mask is None else np.asarray(mask)[row]
    names = g.vocabulary if isinstance(g, Grammar) else None
    said = [
        "_" if hide else repr(names[word]) if names else f"word {word}"
        for word, hide in zip(words, hidden, strict=False)
    ]
    some = said if len(said) <= 12 else [*said[:11], f".. {len(said)} words"]
    return f"sentence {row} ({' '.join(some)})"


def log_z(
    g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any = None
) -> Float[Array, " batch"]:
    """log Z alone: about a third of the work of `inside_outside`, same arguments."""
    return _log_z(*_checked(g, tokens, lengths, mask))


def expected_counts(g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any = None) -> Weights:
    """Expected number of uses of every weight, given the visible words, over the whole batch.

    Those of one sentence (its rule marginals) are those of a batch of one. Sentences of
    probability zero add nothing.
    """
    return _expected_counts(*_checked(g, tokens, lengths, mask))[0]


def em_step(
    g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any = None
) -> tuple[Weights, Float[Array, ""]]:
    """One step of re-estimation: the new weights, and the log-likelihood of the old ones."""
    weights, *data = _checked(g, tokens, lengths, mask)
    counts, value = _expected_counts(weights, *data)
    return tables.proper(counts, weights), value


def em(
    g: Grammar | Weights,
    tokens: Any,
    lengths: Any,
    mask: Any = None,
    steps: int = 10,
) -> tables.Fit:
    """`steps` of re-estimation: weights, and the log-likelihood before and after every step."""
    if steps < 0:
        raise ValueError(f"steps is {steps}, must not be negative")
    return _em(*_checked(g, tokens, lengths, mask), steps=steps)


def entropy(
    g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any = None
) -> Float[Array, " batch"]:
    """Nats of uncertainty about the tree and the hidden words, given the visible words.

    H = log Z - sum over weights of E[count] log(weight)

    Raises:
        ValueError: as `log_z`; a sentence has no parse (NaN under `jit`).
    """
    found = _entropy(*_checked(g, tokens, lengths, mask))
    if not any(isinstance(a, Tracer) for a in (found, tokens, lengths, mask)):
        refuse_unparsed(g, np.isnan(found), tokens, lengths, mask)
    return found


def viterbi(g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any = None) -> decode.Viterbi:
    """The most probable tree of each sentence (and hidden words), as pointers."""
    return decode.viterbi(*_checked(g, tokens, lengths, mask))


def labelled_recall(
    result: InsideOutside,
    lengths: Any,
    *,
    exclude: Sequence[int] = (),
    threshold: float = 0.0,
) -> decode.LabelledRecall:
    """The binary tree with most expected correct spans, from marginals (Goodman 1996).

    Args:
        result: of `inside_outside`.
        lengths: `[batch]`.
        exclude: nonterminals that score nothing and are never labels, such as those that
            binarisation made (`binarisation_symbols`).
        threshold: a span scores its marginal less this, or 0 and no label where that is negative.
    """
    batch, _, _, count = result.span_marginals.shape
    if np.shape(lengths) != (batch,):
        raise ValueError(f"lengths has shape {np.shape(lengths)}, must be {(batch,)}")
    outside = [symbol for symbol in exclude if not 0 <= symbol < count]
    if outside:
        raise ValueError(f"exclude has {outside[0]}, must be in 0..{count - 1}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}, must be in [0, 1)")
    scored = np.ones(count, bool)
    scored[list(exclude)] = False
    return decode.labelled_recall(
        result.span_marginals,
        result.tag_marginals,
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(scored),
        jnp.asarray(threshold, result.span_marginals.dtype),
    )


def binarisation_symbols(grammar: Grammar) -> list[int]:
    """Nonterminals whose name starts with "@": parts of longer rules."""
    return [n for n, name in enumerate(grammar.nonterminals) if name.startswith("@")]


_log_z = jax.jit(tables.log_z)
_expected_counts = jax.jit(tables.expected_counts)
_em = jax.jit(tables.em, static_argnames="steps")
_entropy = jax.jit(tables.entropy)


@jax.jit
def _inside_outside(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> InsideOutside:
    time, dtype = tokens.shape[1], weights.rules.dtype
    leaf = tables.leaves(weights, tokens, lengths, mask)
    inside = tables.inside(weights, leaf)
    outside = tables.outside(weights, leaf, inside, lengths)
    z, e_z = tables.top(weights, leaf, inside, lengths)
    some = z > 0
    reciprocal = jnp.where(some, 1 / jnp.where(some, z, 1), 0)

    scale = power_of_two(outside.leaf_exponent + leaf.exponent - e_z, dtype) * reciprocal
    tags = outside.leaf * leaf.values * scale[..., None]
    widths = slice(1, time + 1)
    e = inside.start_exponent[:time, :, widths] + outside.start_exponent[:time, :, widths]
    scale = power_of_two(e - e_z[:, None], dtype) * reciprocal[:, None]
    spans = jnp.moveaxis(outside.start[:time, ..., widths], -1, 2) * inside.start[:time, :, widths]
    spans = _by_last_word(jnp.swapaxes(spans * scale[..., None], 0, 1))

    # 0/0 where there is no parse. The posterior does not ask for one: it leaves a word out.
    there = jnp.arange(time) < lengths[:, None]
    nothing = there & ~some[:, None]
    tags = jnp.where(nothing[..., None], jnp.nan, jnp.swapaxes(tags, 0, 1))
    pair = nothing[:, :, None] & nothing[:, None] & (jnp.arange(time)[:, None] < jnp.arange(time))
    spans = jnp.where(pair[..., None], jnp.nan, spans)
    posterior = tables.einsum("ibt,tw->biw", outside.leaf, weights.emission)
    whole = posterior.sum(-1, keepdims=True)
    posterior = jnp.where(whole > 0, posterior / jnp.where(whole > 0, whole, 1), jnp.nan)
    posterior = jnp.where(there[..., None], posterior, 0)
    return InsideOutside(log_of(z, e_z), spans, tags, posterior)


def _by_last_word(spans: Array) -> Array:
    """`[batch, i, width - 1, symbol]` as `[batch, i, j, symbol]`, j = i + width - 1.

    Rows that are one longer, read on as one line, move by one to the right each.
    """
    batch, time, _, count = spans.shape
    line = jnp.pad(spans, ((0, 0), (0, 0), (0, 1), (0, 0)))
    line = line.reshape(batch, time * (time + 1), count)
    return line[:, : time * time].reshape(batch, time, time, count)


def _checked(
    g: Grammar | Weights, tokens: Any, lengths: Any, mask: Any
) -> tuple[Weights, Array, Array, Array]:
    """The arguments as arrays.

    Raises:
        ValueError: see `inside_outside`.
    """
    weights = g.weights() if isinstance(g, Grammar) else g
    tokens, lengths = _array("tokens", tokens, 2), _array("lengths", lengths, 1)
    batch, time = tokens.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {lengths.shape}, must be {(batch,)} like tokens")
    mask = jnp.zeros((batch, time), bool) if mask is None else _array("mask", mask, 2)
    if mask.shape != (batch, time):
        raise ValueError(f"mask has shape {mask.shape}, must be {(batch, time)} like tokens")
    if mask.size and mask.dtype != bool:
        raise ValueError(f"mask has dtype {mask.dtype}, must be bool")
    # tables by first and by last word, of spans of all widths, and what comes out
    size = 8 * weights.rules.dtype.itemsize * batch * time**2 * len(weights.root)
    if size > MOST_BYTES:
        raise ValueError(
            f"tokens has shape {(batch, time)}: a chart of so many takes {size / 2**30:.3g} GiB, "
            f"must take at most {MOST_BYTES / 2**30:.3g} GiB"
        )
    if not isinstance(lengths, Tracer):
        for length in np.asarray(lengths):
            if not 1 <= length <= time:
                raise ValueError(f"lengths has {length}, must be in 1..{time}")
        if not isinstance(tokens, Tracer):
            words = np.asarray(tokens)[np.arange(time) < np.asarray(lengths)[:, None]]
            size = weights.emission.shape[1]
            bad = words[(words < 0) | (words >= size)]
            if bad.size:
                raise ValueError(f"tokens has {bad[0]}, must be in 0..{size - 1}")
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return weights, tokens, lengths, jnp.asarray(mask, bool)


def _array(name: str, given: Any, axes: int) -> Any:
    """As an array, of integers unless it is the mask; ValueError where it is none."""
    if not isinstance(given, Array | np.ndarray):
        try:
            given = np.asarray(given)
        except ValueError:
            raise ValueError(f"{name} has rows of different lengths, must be an array") from None
    if given.ndim != axes:
        raise ValueError(f"{name} has shape {given.shape}, must have {axes} axes")
    if name != "mask" and given.size and not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {given.dtype}, must be integers")
    return given


def _beyond(tokens: Any, lengths: Any) -> np.ndarray:
    """Whether a place is behind the end of its sentence, `[batch, time]`."""
    return np.arange(np.shape(tokens)[1]) >= np.asarray(lengths)[:, None]
