"""Trees from span marginals, and how well their brackets agree with those of a treebank.

Conventions of the scores, which are those of evalb with its usual parameters: the brackets are
those of trees with all their unary nodes and without intermediate ones; the root's is counted, a
top bracket without a meaning (`TOP`) is not; words with the tags `, : `` '' .` are deleted, and
brackets that this empties; `PRT` counts as `ADVP`; brackets match as multisets. Sums run over the
corpus. The last figure, unlabelled F1 averaged over sentences, is that of work on grammar
induction: spans count once, and not at all if they hold one word or the whole sentence.

A sentence is a list of `(word, tag)`; decoded trees stand over exactly these.

For use as a library; `benchmarks/treebank.py` is an example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from nltk.tree import Tree

from synthetic.grammar import chart, sparse
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sparse import RuleList
from synthetic.grammar.treebank import TOPS, Induced, chain
from synthetic.grammar.trees import check, is_tag, node_spans, tag_nodes, unfold

Sentence = Sequence[tuple[str, str]]

PUNCTUATION = (",", ":", "``", "''", ".")
SAME_LABEL = {"PRT": "ADVP"}
NO_LABEL = "_"
"""A bracket that only unlabelled scores count."""


@dataclass(frozen=True)
class Agreement:
    """Numbers of brackets; ratios of nothing to nothing are 1."""

    matched: int
    gold: int
    guessed: int

    @property
    def precision(self) -> float:
        """Matched of guessed."""
        return self.matched / self.guessed if self.guessed else 1.0

    @property
    def recall(self) -> float:
        """Matched of gold."""
        return self.matched / self.gold if self.gold else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, `2 matched / (gold + guessed)`."""
        brackets = self.gold + self.guessed
        return 2 * self.matched / brackets if brackets else 1.0


class Scores(NamedTuple):
    """Agreement over a corpus; `sentence_f1` is the mean over sentences of two words or more."""

    labelled: Agreement
    unlabelled: Agreement
    sentence_f1: float
    sentences: int


def brackets(tree: Tree, name: str = "tree") -> tuple[list[tuple[str, int, int]], int]:
    """Brackets `(label, start, end)`, and the number of words; both count after deletion.

    `end` is exclusive, and children come before their parents. Messages call the tree `name`.

    Raises:
        TreebankError: as `treebank.clean`.
    """
    check(tree, name, top=True)
    counted = [0]  # of the words up to each
    for node in tag_nodes(tree):
        counted.append(counted[-1] + (node.label() not in PUNCTUATION))
    found: list[tuple[str, int, int]] = []
    for node, first, end in node_spans(tree):
        label, start, stop = str(node.label()), counted[first], counted[end]
        if not is_tag(node) and stop > start and label not in TOPS:
            found.append((SAME_LABEL.get(label, label), start, stop))
    return found, counted[-1]


def score(gold: Sequence[Tree], guessed: Sequence[Tree]) -> Scores:
    """Agreement of trees over the same sentences, in the conventions above.

    Raises:
        ValueError: there are not as many trees, or words in a tree; as in `brackets`.
    """
    if len(gold) != len(guessed):
        raise ValueError(f"{len(guessed)} trees guessed, must be {len(gold)} as in gold")
    labelled: tuple[Counter, Counter] = (Counter(), Counter())
    unlabelled: tuple[Counter, Counter] = (Counter(), Counter())
    each = []
    for number, pair in enumerate(zip(gold, guessed, strict=True)):
        named = (f"tree {number} of {side}" for side in ("gold", "guessed"))
        sides, (words, guessed_words) = zip(*map(brackets, pair, named), strict=True)
        if words != guessed_words:
            raise ValueError(f"tree {number} has {guessed_words} words, must have {words}")
        inner = []
        for side, found in enumerate(sides):
            labelled[side].update((number, *b) for b in found if b[0] != NO_LABEL)
            unlabelled[side].update((number, start, end) for _, start, end in found)
            spans = {(start, end) for _, start, end in found}
            inner.append(Counter(s for s in spans if 1 < s[1] - s[0] < words))
        if words > 1:
            each.append(_agree(*inner).f1)
    mean = float(np.mean(each)) if each else 1.0
    return Scores(_agree(*labelled), _agree(*unlabelled), mean, len(gold))


def _agree(gold: Counter, guessed: Counter) -> Agreement:
    return Agreement((gold & guessed).total(), gold.total(), guessed.total())


def right_branching(sentence: Sentence, label: str = "S") -> Tree:
    """Every word the sister of all that follow it; only the root has a label.

    Punctuation hangs beside the word before it, so that n words that are none give n - 1 brackets.
    The baseline of unlabelled scores, and what stands in for a sentence without a parse: a flat
    tree where labels count, right branching where they do not.
    """
    groups: list[list[Tree]] = []
    for word, tag in sentence:
        if groups and (tag in PUNCTUATION or all(t.label() in PUNCTUATION for t in groups[-1])):
            groups[-1].append(Tree(tag, [word]))
        else:
            groups.append([Tree(tag, [word])])
    rest: list[Tree] = []
    for n, group in enumerate(reversed(groups)):
        rest = group + ([Tree(NO_LABEL, rest)] if n > 1 else rest)
    return Tree(label, rest)


def symbol_recall(
    grammar: Grammar | Induced | RuleList,
    span_marginals: np.ndarray,
    tag_marginals: np.ndarray,
    sentences: Sequence[Sentence],
) -> list[Tree]:
    """Trees of greatest expected number of right symbols, one a span (Goodman 1996).

        best(i, j) = max_A mu(A, i, j) + max_k [best(i, k) + best(k + 1, j)]

    over the symbols of the binarised grammar; chains are expanded and the spans of intermediate
    symbols dropped afterwards. A sentence without a parse gets `right_branching`.

    Args:
        grammar: its names are those of `induce`.
        span_marginals: `[batch, i, j, nonterminal]`, tokens i..j inclusive.
        tag_marginals: `[batch, t, preterminal]`; all 0 where a sentence has no parse. Low-rank
            approximations may give Z <= 0: set these to 0 there.
        sentences: `batch` of them, none longer than the arrays.
    """
    above = [chain(s) for s in grammar.nonterminals], [chain(s)[:-1] for s in grammar.preterminals]
    spans, tags = np.asarray(span_marginals), np.asarray(tag_marginals)
    best, tag = spans.argmax(-1), tags.argmax(-1)

    def labels(n: int, i: int, j: int) -> Sequence[str]:
        return above[1][tag[n, i]] if i == j else above[0][best[n, i, j]]

    return _decode(spans.max(-1), tags, sentences, labels)


def label_recall(
    grammar: Grammar | Induced | RuleList,
    span_marginals: np.ndarray,
    tag_marginals: np.ndarray,
    sentences: Sequence[Sentence],
    threshold: float = 0.3,
) -> list[Tree]:
    """Trees of labels that are likely enough, any number a span.

        s_L(i, j) = sum over the symbols A whose chain holds L of mu(A, i, j)
        best(i, j) = sum_L max(0, s_L(i, j) - threshold) + max_k [best(i, k) + best(k + 1, j)]

    A span keeps the labels above the threshold, those that are expected higher in their chains
    first; a span without any is no bracket. Arguments as in `symbol_recall`.
    """
    chains = [chain(s) for s in grammar.nonterminals], [chain(s)[:-1] for s in grammar.preterminals]
    names = sorted({label for side in chains for symbol in side for label in symbol})
    spans, tags = np.asarray(span_marginals), np.asarray(tag_marginals)
    kept, depth = [], []
    for marginals, side in ((spans, chains[0]), (tags, chains[1])):
        holds = np.array([[label in symbol for label in names] for symbol in side])
        where = np.array([[s.index(x) if x in s else 0 for x in names] for s in side])
        kept.append(marginals @ holds.astype(marginals.dtype))
        depth.append(marginals @ where.astype(marginals.dtype))
    gain = np.maximum(kept[0] - threshold, 0).sum(-1)

    def labels(n: int, i: int, j: int) -> Sequence[str]:
        at, side = ((n, i), 1) if i == j else ((n, i, j), 0)
        likely = np.flatnonzero(kept[side][at] > threshold)
        order = sorted(likely, key=lambda x: depth[side][at][x] / kept[side][at][x])
        return [names[x] for x in order]

    return _decode(gain, tags, sentences, labels)


class Parsed(NamedTuple):
    """Trees, and the numbers of the sentences that have no parse: theirs are `right_branching`."""

    trees: list[Tree]
    unparsed: list[int]


def parse(
    grammar: Grammar | RuleList,
    sentences: Sequence[Sentence],
    decode: Callable[..., list[Tree]] = label_recall,
    batch: int = 16,
) -> Parsed:
    """Trees of sentences from the chart's marginals, `batch` sentences at a time; tags are read.

    Args:
        grammar: as `induce` gives them; a list of rules is parsed with sentence by sentence, by
            `charts.sparse`, which any number of symbols fits.
        sentences: of any lengths.
        decode: `label_recall`, `symbol_recall`, or another with their first four arguments.
        batch: a chart keeps `8 batch time^2 |N|` numbers or so.

    Raises:
        ValueError: a sentence is empty, or has a tag that is not in the vocabulary.
    """
    if isinstance(grammar, RuleList):
        words = [grammar.encode([tag for _, tag in sentence]) for sentence in sentences]
        return _parse_by_rules(grammar, words, sentences, decode)
    weights, unparsed, trees = grammar.weights(), [], []
    tokens, lengths = grammar.encode([[tag for _, tag in sentence] for sentence in sentences])
    for start in range(0, len(sentences), batch):
        # The last batch is filled up with its first sentence, so that all have one shape.
        rows = np.arange(start, start + batch)
        rows = np.where(rows < len(sentences), rows, start)
        given = jnp.asarray(tokens[rows]), jnp.asarray(lengths[rows])
        found = chart.inside_outside(weights, *given, strict=False)
        part = sentences[start : start + batch]
        log_z, spans, tags, _ = (np.asarray(x)[: len(part)] for x in found)
        spans, tags = np.nan_to_num(spans), np.nan_to_num(tags)  # NaN where there is no parse
        trees += decode(grammar, spans, tags, part)
        unparsed += [start + n for n in np.flatnonzero(~np.isfinite(log_z)).tolist()]
    return Parsed(trees, unparsed)


def _parse_by_rules(
    rules: RuleList,
    words: Sequence[Sequence[int]],
    sentences: Sequence[Sentence],
    decode: Callable[..., list[Tree]],
) -> Parsed:
    trees, unparsed = [], []
    for n, (numbers, sentence) in enumerate(zip(words, sentences, strict=True)):
        log_z, spans, tags = sparse.inside_outside(rules, numbers, strict=False)
        spans, tags = np.nan_to_num(spans), np.nan_to_num(tags)
        trees += decode(rules, spans[None], tags[None], [sentence])
        unparsed += [] if np.isfinite(log_z) else [n]
    return Parsed(trees, unparsed)


def best_splits(scores: np.ndarray) -> np.ndarray:
    """Where the binary trees of greatest total score split their spans.

    Args:
        scores: `[batch, i, j]` for the spans of tokens i..j inclusive, i < j; the rest is ignored.

    Returns:
        `[batch, i, j]`: the last token of the left half of i..j, the first one in a tie.
    """
    batch, time = scores.shape[:2]
    best = np.zeros((batch, time + 1, time + 1), scores.dtype)  # by start and width
    splits = np.zeros((batch, time, time), np.int32)
    for width in range(2, time + 1):
        starts = np.arange(time - width + 1)
        ends = starts + width - 1
        left = best[:, starts, 1:width]
        right = np.stack([best[:, starts + m, width - m] for m in range(1, width)], -1)
        total = left + right
        splits[:, starts, ends] = starts + total.argmax(-1)
        best[:, starts, width] = scores[:, starts, ends] + total.max(-1)
    return splits


def _decode(
    scores: np.ndarray,
    tags: np.ndarray,
    sentences: Sequence[Sentence],
    labels: Callable[[int, int, int], Sequence[str]],
) -> list[Tree]:
    """Trees of greatest total score; `labels(n, i, j)` stand over tokens i..j of sentence n."""
    splits = best_splits(scores)
    trees = []
    for n, sentence in enumerate(sentences):
        total = tags[n, 0].sum()  # 1, or 0 without a parse
        parsed = np.isfinite(total) and total > 0
        trees.append(
            _build(sentence, splits[n], n, labels) if parsed else right_branching(sentence)
        )
    return trees


def _build(
    sentence: Sentence,
    splits: np.ndarray,
    n: int,
    labels: Callable[[int, int, int], Sequence[str]],
) -> Tree:
    def one(seed: tuple[int, int]) -> tuple[Sequence[str], list[Any]]:
        i, j = seed
        above = labels(n, i, j)
        if i == j:
            word, tag = sentence[i]
            return [*above, tag], [word]
        k = int(splits[i, j])
        return above, [(i, k), (k + 1, j)]

    top = unfold((0, len(sentence) - 1), one)
    return top[0] if len(top) == 1 else Tree("TOP", top)
