"""What masked language models know of spans, tags and trees: probes for what the exact chart says.

Probes at every layer of several models, beside the controls of `probes.syntax.sentence_probes`. A
tree is one number for each pair of neighbours: between words t and t + 1 let n_t be the number of
nodes above both (the depth of their lowest common ancestor, LCA). In a binary tree these numbers
determine the tree, as the split of a span is where its least number is. A probe for them is a probe
for trees (Gomez-Rodriguez and Vilares 2018, "Constituent parsing as sequence labeling"; Vilares et
al. 2020). Relative depths are the changes n_t - n_{t-1}, with n_{-1} = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from nltk.tree import Tree

from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.imported import random_model
from constructions.runs import Run
from probes.probe import Probe, Result, seed_names, table
from probes.subject import Inputs, Readable, activations, no_weights
from probes.syntax.sentence_probes import (
    EMBEDDING,
    LayerScores,
    Rows,
    arrays,
    batch_and_time,
    checked_lengths,
    fit,
)
from synthetic.grammar import chart
from synthetic.grammar.brackets import best_splits
from synthetic.grammar.sentences import Sentences, ends
from synthetic.grammar.trees import node_spans
from synthetic.tasks.masked_language import MaskedLanguageTask


def word_stream(construction: Construction, model: Readable, inputs: Inputs) -> np.ndarray:
    """The residual stream at the words, `[layer, batch, time, feature]`; layer 0 is the embedding.

    Without the tokens that the construction adds (BOS, EOS). For constructions whose tokens that
    are read out are the words, such as "inside-outside".
    """
    found = activations(construction, model, ("residual",))(*inputs)["residual"]
    holder = model if isinstance(model, Transformer) else construction.reference
    read = construction.stream(holder, *inputs).read
    return np.asarray(found[:, :, read])


def span_probe(
    models: Mapping[str, Any],
    marginals: Any,
    lengths: Any,
    key: Array,
    *,
    labels: bool = False,
    probe: str = "linear",
) -> LayerScores:
    """Can the probability that words i..j are a constituent be read off words i and j?

    The features are `[h_i, h_j]`, the target is max_A mu(A, i, j), for all i < j but the whole
    sentence. R^2 is of a target that is nearly 0 or 1 for most spans: it says more of which spans
    are constituents than of the uncertainty about it.

    Args:
        models: column -> `[layer, batch, time, feature]`, as `word_stream` has it.
        marginals: `[batch, time, time, nonterminal]`, mu, exact: of `synthetic.grammar.chart`.
        lengths: `[batch]`.
        key: of the split and the control task.
        labels: the targets are all of mu(., i, j), not the largest one.
        probe: "linear", or "two-layer".

    Raises:
        ValueError: a shape that does not fit, a column that is named like a control, no model,
            another probe.
    """
    marginals, lengths = np.asarray(marginals), np.asarray(lengths)
    batch, time = batch_and_time(models)
    if marginals.ndim != 4 or marginals.shape[:3] != (batch, time, time):
        raise ValueError(
            f"marginals has shape {marginals.shape}, must be {(batch, time, time, 'nonterminal')}"
        )
    n = checked_lengths(lengths, batch, time)[:, None, None]
    first, last = np.arange(time)[:, None], np.arange(time)
    b, i, j = np.nonzero((first < last) & (last < n) & (last - first < n - 1))
    found = marginals[b, i, j]
    rows = Rows(b, np.stack([i, j, j - i, lengths[b]], 1), batch)
    return fit(
        {name: np.concatenate([h[:, b, i], h[:, b, j]], -1) for name, h in arrays(models)},
        found if labels else found.max(-1, keepdims=True),
        rows,
        key,
        probe=probe,
    )


def tag_probe(
    models: Mapping[str, Any],
    tags: Any,
    mask: Any,
    lengths: Any,
    key: Array,
    *,
    probe: str = "linear",
) -> LayerScores:
    """Can the probabilities of a hidden word's tag be read off the model at that word?

    The model has not seen the word, so all that is there has come from other words.

    Args:
        models: column -> `[layer, batch, time, feature]`, as `word_stream` has it.
        tags: `[batch, time, preterminal]`, P(tag | visible words), exact: of
            `synthetic.grammar.chart`.
        mask: `[batch, time]` bool, True where a word is hidden.
        lengths: `[batch]`.
        key: of the split and the control task.
        probe: "linear", or "two-layer".

    Raises:
        ValueError: as `span_probe`.
    """
    tags, mask, lengths = np.asarray(tags), np.asarray(mask), np.asarray(lengths)
    batch, time = batch_and_time(models)
    for name, shape in (("tags", tags.shape[:2]), ("mask", mask.shape)):
        if shape != (batch, time):
            raise ValueError(f"{name} has shape {shape}, must begin with {(batch, time)}")
    lengths = checked_lengths(lengths, batch, time)
    b, t = np.nonzero(mask & (np.arange(time) < lengths[:, None]))
    rows = Rows(b, np.stack([t, lengths[b]], 1), batch)
    features = {name: h[:, b, t] for name, h in arrays(models)}
    return fit(features, tags[b, t], rows, key, probe=probe, whole=False)


#: Sentences that the probes draw.
SENTENCES = 512

RIGHT_BRANCHING, ORACLE = "right-branching", "oracle"
Span = tuple[int, int]


def lca_depths(starts: Any, last: Any, lengths: Any) -> np.ndarray:
    """n_t, `[batch, time - 1]`, padded with -1.

    Args:
        starts, last: `[batch, nodes]`, first and last word of every node of two words or more,
            padded with -1, as `Sentences.starts` and `synthetic.grammar.sentences.ends` have them.
        lengths: `[batch]`; time is nodes + 1, the words of the longest binary tree.
    """
    starts, last, lengths = (np.asarray(a) for a in (starts, last, lengths))
    gap = np.arange(starts.shape[1])
    above = (starts[:, :, None] <= gap) & (last[:, :, None] > gap) & (starts >= 0)[:, :, None]
    return np.where(gap < lengths[:, None] - 1, above.sum(1), -1)


def decode(depths: Any) -> set[Span]:
    """The binary tree of a sentence as spans (first, last) of two words or more.

    A span is split behind its word with the least depth, the first of equals; what is flat
    becomes right-branching. Only the order of the depths matters.

    Args:
        depths: `[words - 1]`, any numbers.
    """
    depths = np.asarray(depths)
    found, waiting = set(), [(0, len(depths))]
    while waiting:
        first, last = waiting.pop()
        if first < last:
            found.add((first, last))
            split = first + int(np.argmin(depths[first:last]))
            waiting += [(first, split), (split + 1, last)]
    return found


def tree_spans(tree: Tree) -> set[Span]:
    """Spans (first, last) of the nodes over two words or more; unary chains count once."""
    return {(first, end - 1) for _, first, end in node_spans(tree) if end - first > 1}


def right_branching(length: int) -> set[Span]:
    """The spans of the tree that splits off one word after the other."""
    return {(first, length - 1) for first in range(length - 1)}


def expected_trees(marginals: Any, lengths: Any) -> list[set[Span]]:
    """The binary tree of each sentence with most expected right spans (Goodman 1996).

        best(i, j)  =  P(words i..j are a constituent) + max_k [best(i, k) + best(k + 1, j)]

    Two binary trees of one sentence have equally many spans, so that this is also the tree of
    greatest expected unlabelled F1: nothing that knows the visible words alone can do better on
    average. Its spans beside the sampled tree's are the column "oracle" of `tree_probe`.

    Args:
        marginals: `[batch, time, time, nonterminal]`, mu(A, i, j), exact: of
            `synthetic.grammar.chart`.
        lengths: `[batch]`.

    Raises:
        ValueError: a shape that does not fit, or a length out of range.
    """
    # in float64: sums that are equal to rounding should stay so
    marginals = np.asarray(marginals, float)
    if marginals.ndim != 4 or marginals.shape[1] != marginals.shape[2]:
        raise ValueError(
            f"marginals has shape {marginals.shape}, must be [batch, time, time, nonterminal]"
        )
    lengths = checked_lengths(np.asarray(lengths), *marginals.shape[:2])
    trees = []
    for splits, length in zip(best_splits(marginals.sum(-1)), lengths.tolist(), strict=True):
        found, waiting = set(), [(0, length - 1)]
        while waiting:
            first, last = waiting.pop()
            if first < last:
                found.add((first, last))
                split = int(splits[first, last])
                waiting += [(first, split), (split + 1, last)]
        trees.append(found)
    return trees


def span_f1(found: set[Span], gold: set[Span], length: int) -> float:
    """Unlabelled F1 of a sentence, without the spans of one word and of all words.

    NaN where the gold tree has none left: such a sentence asks nothing.
    """
    found, gold = ({s for s in spans if 0 < s[1] - s[0] < length - 1} for spans in (found, gold))
    return 2 * len(found & gold) / (len(found) + len(gold)) if gold else np.nan


def tree_probe(
    models: Mapping[str, Any],
    sentences: Sentences,
    key: Array,
    *,
    relative: bool = True,
    words: int = 2,
    probe: str = "linear",
    marginals: Any = None,
) -> LayerScores:
    """Can the tree of a sentence be read off the model, from neighbours alone?

    A probe predicts the relative depth n_t - n_{t-1} (or n_t itself) from `[h_t, h_{t+1}]`;
    the predictions of a test sentence, added up, are decoded to a tree. The score is the
    unlabelled F1, mean over sentences of three words or more, without trivial spans. The control
    task is to tell the tree of another sentence of the same length.

    It misleads where trees lean to one side: compare with the columns "place" and
    "right-branching". The tree is the one that the sentence was made with, and a sentence that is
    ambiguous has others: no model of words reaches 1 on it. What the exact posterior reaches is
    the column "oracle".

    Args:
        models: column -> `[layer, batch, time, feature]`, as `word_stream` has it.
        sentences: with their trees.
        key: of the split and the control task.
        relative: predict changes of depth.
        words: 1 for features `h_t` alone.
        probe: "linear", or "two-layer".
        marginals: `[batch, time, time, nonterminal]`, of the words that the models saw, for the
            column "oracle"; see `expected_trees`. None: there is none.

    Raises:
        ValueError: a shape that does not fit, a column that is named like another, no model,
            another probe, or `words` that is neither 1 nor 2.
    """
    if words not in (1, 2):
        raise ValueError(f"words is {words}, must be 1 or 2")
    batch, time = batch_and_time(models)
    reserved = {RIGHT_BRANCHING, ORACLE}
    if reserved & set(models) or sentences.tokens.shape != (batch, time):
        raise ValueError(
            f"models are {list(models)} with batch and time {(batch, time)}, must fit tokens "
            f"{sentences.tokens.shape} and not be named '{RIGHT_BRANCHING}' or '{ORACLE}'"
        )
    if marginals is not None and np.shape(marginals)[:3] != (batch, time, time):
        raise ValueError(
            f"marginals has shape {np.shape(marginals)}, must be "
            f"{(batch, time, time, 'nonterminal')}"
        )
    lengths = checked_lengths(np.asarray(sentences.lengths), batch, time)
    starts, last = np.asarray(sentences.starts), np.asarray(ends(sentences.starts))
    depths = lca_depths(starts, last, lengths)
    gold = [
        set(zip(a[a >= 0].tolist(), z[a >= 0].tolist(), strict=True))
        for a, z in zip(starts, last, strict=True)
    ]
    wanted = np.diff(depths, axis=1, prepend=0) if relative else depths
    b, t = np.nonzero(depths >= 0)

    def missed(found: np.ndarray, whose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        guess = np.zeros(depths.shape)
        guess[b, t] = found[:, 0]
        guess = guess.cumsum(1) if relative else guess
        decoded = [decode(row[: n - 1]) for row, n in zip(guess, lengths.tolist(), strict=True)]
        return _misses(decoded, [gold[s] for s in whose], lengths)

    trees = {RIGHT_BRANCHING: [right_branching(n) for n in lengths.tolist()]}
    if marginals is not None:
        trees[ORACLE] = expected_trees(marginals, lengths)
    return fit(
        {n: np.concatenate([h[:, b, t + w] for w in range(words)], -1) for n, h in arrays(models)},
        wanted[b, t, None].astype(float),
        Rows(b, np.stack([t, lengths[b]], 1), batch),
        key,
        probe=probe,
        judge=missed,
        score="F1",
        fixed={name: _misses(found, gold, lengths) for name, found in trees.items()},
    )


def _misses(
    found: Sequence[set[Span]], gold: Sequence[set[Span]], lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """1 - F1 and 1 of each sentence, 0 and 0 where F1 is not defined."""
    f1 = [span_f1(*given) for given in zip(found, gold, lengths.tolist(), strict=True)]
    return np.nan_to_num(1 - np.array(f1)), 1.0 - np.isnan(f1)


def _sentences(run: Run, seed: int) -> tuple[dict[str, np.ndarray], Sentences, Any, Any]:
    """Streams of the models at words of fresh sentences; these, which are hidden, their chart."""
    construction = run.construction
    task: Any = construction.task
    drawn, mask = task.draw(jax.random.key(seed), SENTENCES, jnp.asarray(1.0))
    inputs = (drawn.tokens, drawn.lengths, mask)
    models = {f"trained, {n}": m for n, m in zip(seed_names(run), run.models, strict=True)}
    models["random init"] = random_model(run)
    streams = {name: word_stream(construction, m, inputs) for name, m in models.items()}
    return streams, drawn, mask, chart.inside_outside(task.grammar, *inputs)


def _as_table(title: str, found: Mapping[str, LayerScores]) -> Result:
    """Held-out scores, at the layer that validation sentences choose and at every layer."""
    columns = [*dict.fromkeys(column for scores in found.values() for column in scores.by_layer)]
    rows, values, notes = [], [], []
    for name, scores in found.items():
        rows.append(f"{name}, best layer")
        values.append([scores[c] if c in scores.by_layer else np.nan for c in columns])
        by_layer = {c: scores.by_layer.get(c, np.zeros(0)) for c in columns}
        for layer in range(max(map(len, by_layer.values()))):
            rows.append(f"{name}, {layer} layers applied")
            values.append([s[layer] if layer < len(s) else np.nan for s in by_layer.values()])
        gain, low, high = scores.gain(columns[0], EMBEDDING)
        notes.append(f"{name}: {gain:+.3f} ({low:+.3f} to {high:+.3f}) over the embedding")
    return table(title, columns, rows, values, "; ".join(notes))


def measure_spans(run: Run, seed: int) -> Result:
    """Linear probes for marginals of spans, and for the tags of hidden words."""
    streams, drawn, mask, truth = _sentences(run, seed)
    key = jax.random.key(seed + 1)
    found = {
        "spans": span_probe(streams, truth.span_marginals, drawn.lengths, key),
        "tags of hidden words": tag_probe(streams, truth.tag_marginals, mask, drawn.lengths, key),
    }
    return _as_table("held-out R^2 of ridge probes for spans and tags", found)


def measure_trees(run: Run, seed: int) -> Result:
    """Linear probes for the depths at which neighbours meet, decoded to trees."""
    streams, drawn, _, truth = _sentences(run, seed)
    key = jax.random.key(seed + 1)
    scores = tree_probe(streams, drawn, key, marginals=truth.span_marginals)
    return _as_table("unlabelled F1 of trees that ridge probes read off", {"trees": scores})


def needs_hidden_words(run: Run) -> str:
    """A masked language model of the sentences of a grammar."""
    if not isinstance(run.construction.task, MaskedLanguageTask):
        return f"family {run.family!r} is no masked language model of a grammar's sentences"
    return next((no_weights(model) for model in run.models if no_weights(model)), "")


SPANS = Probe(
    "spans",
    "can constituents, and the tags of hidden words, be read off the stream at words?",
    "it is not compared with the embedding: which spans are constituents is largely in the words",
    measure_spans,
    needs_hidden_words,
)

TREES = Probe(
    "trees",
    "can the tree of a sentence be read off pairs of neighbouring words?",
    "trees lean to one side (see place and right-branching); an ambiguous sentence has others, and "
    "the oracle is what the exact posterior reaches",
    measure_trees,
    needs_hidden_words,
)
