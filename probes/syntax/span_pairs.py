"""Pairs of sentences with a constituent at the same place, and what its exchange ought to do.

The chimera of two sentences of one length is the base with words i..j taken from the source. Where
i..j is a constituent for sure, all that the rest of a sentence sees of it is the vector
beta(., i, j) of what is inside, so that exchanging that vector must do what exchanging the words
does: hidden words outside get the chimera's posterior (`probes.syntax.span_interchange` looks).

Spans whose label is known from the rest of the sentence ask nothing, as the grammar is
context-free: the words outside are then independent of those inside. Pairs are those for which the
posteriors of base and chimera differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from constructions.family import Construction
from constructions.inside_outside.construction import AT_ONCE, InsideOutside
from probes.probe import NotApplicable
from synthetic.grammar import chart


class Text(NamedTuple):
    """Sentences as a construction takes them: `[batch, time]`, `[batch]`, `[batch, time]`."""

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray


class SpanPairs(NamedTuple):
    """Pairs of sentences, a span each, and the exact answer.

    Attributes:
        base, source, chimera: the sentences; hidden words are taken over like others.
        first, last: `[pair]`, the span.
        crossing: `[pair, 2]`, first and last word of another span that holds a part of this one
            and so is no constituent; its end outside is not hidden.
        hidden: `[pair, time]`, hidden words of the base outside of the span.
        before, after: `[pair, time, word]`, exact posteriors of base and chimera.
        marginals: `[pair, 4]`, P(the span is a constituent) in base, source, chimera, and in the
            base with the source's inside values of this span, in units of the construction. The
            last is small where trees without the span weigh more than the source's words do.
    """

    base: Text
    source: Text
    chimera: Text
    first: np.ndarray
    last: np.ndarray
    crossing: np.ndarray
    hidden: np.ndarray
    before: np.ndarray
    after: np.ndarray
    marginals: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """|p(chimera) - p(base)|^2 over hidden words outside, `[pair]`."""
        return (np.where(self.hidden[..., None], self.after - self.before, 0) ** 2).sum((1, 2))


def span_pairs(
    construction: Construction,
    tokens: Any,
    lengths: Any,
    mask: Any,
    key: Array,
    *,
    sure: float = 0.9,
    gap: float = 0.05,
    most: int = 256,
) -> SpanPairs:
    """Pairs among these sentences; each is in one at most, with one span, drawn at random.

    Spans have two words or more, but not all, and a hidden word outside. Take many sentences: few
    pairs in a hundred have posteriors that differ.

    Args:
        construction: an "inside-outside"; its grammar, and the units of its inside values.
        tokens, lengths, mask: `[batch, time]`, `[batch]` and `[batch, time]`; True is hidden.
        key: of the choice.
        sure: all four of `SpanPairs.marginals` are at least this, in (0, 1).
        gap: `SpanPairs.gap` is at least this, above 0.
        most: pairs.

    Raises:
        TypeError: the construction is of another family.
        ValueError: bad sentences, a number out of range, or no pair among the sentences.
    """
    if not isinstance(construction, InsideOutside):
        raise TypeError(f"construction is {construction!r}, must be an InsideOutside")
    if not 0 < sure < 1 or not gap > 0 or not 1 <= most <= AT_ONCE:
        raise ValueError(
            f"sure is {sure}, gap {gap} and most {most}, must be within (0, 1), above 0, and in "
            f"1..{AT_ONCE}"
        )
    construction.check(tokens, lengths, mask)
    text = Text(np.asarray(tokens), np.asarray(lengths), np.asarray(mask))
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    base, source, first, last = _candidates(construction, text, sure, rng)
    crossing = _crossing(first, last, text.lengths[base], text.mask[base], rng)
    fine = np.flatnonzero(crossing[:, 0] >= 0)
    if fine.size:
        one, other = (Text(*(a[who[fine]] for a in text)) for who in (base, source))
        pairs = _answered(construction, one, other, first[fine], last[fine], crossing[fine])
        good = np.flatnonzero((pairs.gap >= gap) & (pairs.marginals.min(1) >= sure))
        # they come in the order of their lengths
        chosen = rng.permutation(good)[:most]
        if chosen.size:
            return jax.tree.map(lambda a: a[chosen], pairs)
    raise NotApplicable(
        f"no two of {len(text.tokens)} sentences have a constituent at the same place with sure "
        f"{sure} and gap {gap}; take more sentences, or hide more words"
    )


def _candidates(
    construction: InsideOutside, text: Text, sure: float, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """(base, source, first, last): a sure span of each sentence, and another that has the same."""
    found = chart.inside_outside(construction.grammar, *text).span_marginals
    spans = np.asarray(found.sum(-1))
    batch, time = text.tokens.shape
    before = np.pad(np.cumsum(text.mask & _there(text), 1), ((0, 0), (1, 0)))
    inside = before[:, None, 1:] - before[:, :-1, None]
    width = np.arange(time) - np.arange(time)[:, None]
    good = (spans >= sure) & (width > 0) & (width < text.lengths[:, None, None] - 1)
    good &= inside < before[:, -1, None, None]
    drawn = np.where(good, rng.random(good.shape), -1).reshape(batch, -1)
    choice = drawn.argmax(1)
    kind = np.where(drawn.max(1) >= 0, text.lengths * time * time + choice, -1)
    order = np.lexsort((rng.random(batch), kind))
    order = order[kind[order] >= 0]
    same = kind[order]
    # every second one of a kind is the source of the one before it
    place = np.arange(len(order)) - np.searchsorted(same, same)
    base = np.flatnonzero((place[:-1] % 2 == 0) & (same[:-1] == same[1:]))
    first, last = np.divmod(choice[order[base]], time)
    return order[base], order[base + 1], first, last


def _crossing(
    first: np.ndarray,
    last: np.ndarray,
    lengths: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """A crossing span of each, `[pair, 2]`, its outer end visible; -1: there is none."""
    time = mask.shape[1]
    i, j, n = (a[:, None, None] for a in (first, last, lengths))
    start, end = np.arange(time)[:, None], np.arange(time)
    left = (start < i) & (i <= end) & (end < j) & ~mask[:, :, None]
    right = (i < start) & (start <= j) & (j < end) & (end < n) & ~mask[:, None]
    fits = (left | right).reshape(len(mask), time * time)
    chosen = np.where(fits, rng.random(fits.shape), -1).argmax(1)
    return np.where(fits.any(1), np.divmod(chosen, time), -1).T


def _answered(
    construction: InsideOutside,
    base: Text,
    source: Text,
    first: np.ndarray,
    last: np.ndarray,
    crossing: np.ndarray,
) -> SpanPairs:
    """The pairs with the chart of the chimera."""
    words = np.arange(base.tokens.shape[1])
    within = (first[:, None] <= words) & (words <= last[:, None])
    chimera = Text(
        np.where(within, source.tokens, base.tokens),
        base.lengths,
        np.where(within, source.mask, base.mask),
    )
    charts = [
        chart.inside_outside(construction.grammar, *text, strict=False)
        for text in (base, source, chimera)
    ]
    log_z = [np.asarray(c.log_z, float) for c in charts]
    row = np.arange(len(first))
    # a chimera may have no parse, so no span either
    marginals = [
        np.nan_to_num(c.span_marginals.sum(-1))[row, first, last].astype(float).clip(0, 1)
        for c in charts
    ]
    # Trees with the span weigh in the exchange what they weigh in the chimera, the others what
    # they do in the base; the factors are the construction's, a word's, and differ within the span.
    logs = np.log(construction.factors)
    mask = len(construction.grammar.vocabulary)
    factor = [np.where(within, logs[np.where(t.mask, mask, t.tokens)], 0) for t in (base, source)]
    possible = np.isfinite(log_z[0]) & np.isfinite(log_z[2])
    ratio = np.where(possible, log_z[2] - log_z[0], -np.inf) + (factor[1] - factor[0]).sum(1)
    with_span, without = np.exp(np.minimum(ratio, 700)) * marginals[2], 1 - marginals[0]
    total = with_span + without
    exchanged = np.where(possible, with_span / np.where(total > 0, total, 1), 0)
    return SpanPairs(
        base,
        source,
        chimera,
        first,
        last,
        crossing,
        base.mask & _there(base) & ~within,
        np.nan_to_num(charts[0].word_posterior),
        np.nan_to_num(charts[2].word_posterior),
        np.stack([*marginals, exchanged], 1),
    )


def _there(text: Text) -> np.ndarray:
    """Where there are words, `[batch, time]`."""
    return np.arange(text.tokens.shape[1]) < text.lengths[:, None]
