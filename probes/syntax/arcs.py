"""Do heads of attention look along the arcs of a dependency tree?

A head names a head for every word, in one of two directions:

    from the word   argmax_j a_ij,      what the word looks at most
    to the word     argmax_j a_ji,      what looks at the word most

over the other words of the sentence; neither itself nor special tokens count. UAS (unlabelled
attachment score) is the share of arcs that are named rightly. One candidate for all arcs, or one
for each relation, is chosen on the first half of the sentences and scored on the second, and so are
fixed offsets j - i, which know nothing of the sentence (Clark et al. 2019, arXiv 1906.04341; Chen
et al. 2023, arXiv 2309.07311).

`emergence` gives numbers for every record of a fit: do heads look along arcs, can constituents be
read off the stream, and how far are the predictions from the exact posterior? Which of them rises
first says in which order things appear, not that one brings the other about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.imported import random_model
from constructions.inside_outside.construction import InsideOutside
from constructions.runs import Run
from probes.probe import Probe, Result, seed_names, table
from synthetic.grammar.dependencies import Arcs, Headed, dependencies
from synthetic.grammar.examples import headed
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import Sentences, ends, sample

DIRECTIONS = ("from the word", "to the word")

#: Offsets of the head from its dependent that a baseline may choose from.
OFFSETS = (-3, -2, -1, 1, 2)


class Chosen(NamedTuple):
    """The best of several candidates, and how good it is on sentences that it was not chosen on.

    Attributes:
        scores: `[candidate]`, UAS on the second half.
        best: the candidate that is best on the first half.
        uas: its UAS on the second.
        of_relation: `[relation]`, the candidate that is best for each relation on the first half.
        by_relation: `[relation]`, its UAS on the second; NaN for a relation that is not there.
        labelled: UAS on the second half with one candidate for each relation.
    """

    scores: Float[Array, " candidate"]
    best: Int[Array, ""]
    uas: Float[Array, ""]
    of_relation: Int[Array, " relation"]
    by_relation: Float[Array, " relation"]
    labelled: Float[Array, ""]


class ArcScores(NamedTuple):
    """Heads of attention beside fixed offsets.

    Attributes:
        heads: candidates are directions, layers, heads: `numpy.unravel_index(best, shape)`.
        shape: 2, layers, heads of a layer.
        offsets: candidates are `OFFSETS`.
        chance: UAS of a word drawn from the others.
        weight: `[2, layer, head]`, mean of a_ij or a_ji at arcs.
        share: `[relation]`, of the arcs on the second half.
    """

    heads: Chosen
    shape: tuple[int, int, int]
    offsets: Chosen
    chance: Float[Array, ""]
    weight: Float[Array, "direction layer head"]
    share: Float[Array, " relation"]


def words_and_attention(construction: Construction) -> Callable[..., tuple[Array, Array]]:
    """`predict(model, *inputs)`: the prediction of a language model and its attention over words.

    For `synthetic.fitting.train.fit` on tasks that regularise attention, and for what is below.
    Attention is `[layer, batch, head, word, word]`, without tokens that are not read, such as BOS
    and EOS. The model is run once.
    """

    def predict(model: Transformer, *inputs: Array) -> tuple[Array, Array]:
        stream, groups, read = construction.stream(model, *inputs)
        out, sites = model.run(stream, groups, sites=("attention",))
        found = model.word_probabilities(out[:, read])
        kinds = jnp.broadcast_to(groups, stream.shape[:2])[:, read]
        return jnp.where((kinds == 0)[..., None], found, 0), sites["attention"][..., read, read]

    return predict


def named_heads(
    attention: Float[Array, "layer batch head word word"], lengths: Int[Array, " batch"]
) -> Int[Array, "direction layer head batch word"]:
    """The head that each head of attention names for each word; anything for sentences of one."""
    place = jnp.arange(attention.shape[-1])
    there = place < lengths[:, None]
    pair = there[:, :, None] & there[:, None] & (place[:, None] != place)
    seen = jnp.where(pair[:, None], attention, -jnp.inf)
    both = jnp.stack([seen.argmax(-1), seen.argmax(-2)])
    return jnp.moveaxis(both, 2, 3)


def named_offsets(lengths: Int[Array, " batch"], time: int) -> Int[Array, "offset batch word"]:
    """The heads that fixed offsets name; -2 where they point out of the sentence."""
    place = jnp.arange(time) + jnp.asarray(OFFSETS)[:, None, None]
    return jnp.where((place >= 0) & (place < lengths[:, None]), place, -2)


def choose(candidates: Int[Array, "candidate batch word"], arcs: Arcs, relations: int) -> Chosen:
    """Choose on the first half of the sentences, score on the second.

    Raises:
        ValueError: fewer than two sentences.
    """
    batch = len(arcs.heads)
    if batch < 2:
        raise ValueError(f"there is {batch} sentence, must be at least 2: half of them choose")
    there = arcs.heads >= 0
    kind = jax.nn.one_hot(arcs.relations, relations, dtype=jnp.float32)  # 0 without an arc
    hits = (candidates == arcs.heads) & there

    def count(half: slice) -> tuple[Array, Array]:
        right = jnp.einsum("cbt,btr->cr", hits[:, half].astype(jnp.float32), kind[half])
        return right, kind[half].sum((0, 1))

    (chosen_by, _), (right, total) = count(slice(None, batch // 2)), count(slice(batch // 2, None))
    best, of_relation = chosen_by.sum(1).argmax(), chosen_by.argmax(0)
    own = jnp.take_along_axis(right, of_relation[None], 0)[0]
    scores = right.sum(1) / total.sum()
    return Chosen(
        scores,
        best,
        scores[best],
        of_relation,
        jnp.where(total > 0, own / jnp.maximum(total, 1), jnp.nan),
        own.sum() / total.sum(),
    )


def arc_scores(
    attention: Float[Array, "layer batch head word word"],
    arcs: Arcs,
    lengths: Int[Array, " batch"],
    relations: int,
) -> ArcScores:
    """All of it, for attention over words alone; may be called inside `jit`.

    Args:
        attention: as `words_and_attention` gives it; rows need not sum to 1.
        arcs: of the same sentences.
        lengths: of the sentences.
        relations: how many there are.

    Raises:
        ValueError: shapes that do not fit, fewer than two sentences.
    """
    layers, batch, heads, time = attention.shape[:4]
    if arcs.heads.shape != (batch, time):
        raise ValueError(f"arcs have shape {arcs.heads.shape}, must be {(batch, time)}")
    there = arcs.heads >= 0
    named = named_heads(attention, lengths).reshape(-1, batch, time)
    to = jnp.maximum(arcs.heads, 0)[None, :, None, :, None]
    along = jnp.take_along_axis(attention, to, -1)[..., 0]
    turned = jnp.take_along_axis(jnp.swapaxes(attention, -1, -2), to, -1)[..., 0]
    weight = jnp.where(there[:, None], jnp.stack([along, turned]), 0).sum((2, 4)) / there.sum()
    second = slice(batch // 2, None)
    others = jnp.where(there, 1 / jnp.maximum(lengths - 1, 1)[:, None], 0)[second]
    kind = jax.nn.one_hot(arcs.relations[second], relations).sum((0, 1))
    return ArcScores(
        choose(named, arcs, relations),
        (2, layers, heads),
        choose(named_offsets(lengths, time), arcs, relations),
        others.sum() / there[second].sum(),
        weight,
        kind / kind.sum(),
    )


def emergence(
    construction: InsideOutside, headed: Headed, key: Array, sentences: int = 256
) -> Callable[[Transformer], dict[str, Array]]:
    """`metrics(model)` for `synthetic.fitting.train.fit`, pure.

    Args:
        construction: whose counterpart is fitted.
        headed: its grammar, with heads.
        key: of the sentences; half of them choose heads and fit the probe, the others score.
        sentences: how many.

    Returns:
        a function to these numbers. `head_uas`, `relation_uas`: of the best head of attention, and
        of the best for each relation. `arc_weight`: the largest mean attention at arcs, over heads
        and directions. `span_f1`: of `span_f1` at the best layer behind the embedding.
        `divergence`: the counterpart's, of the exact posterior from the model at hidden words, in
        nats. No word is hidden for the others.

    Raises:
        ValueError: heads of another grammar.
    """
    if headed.grammar != construction.grammar:
        raise ValueError("headed is of another grammar, must be of the construction's")
    drawn = sample(construction.grammar, key, sentences, construction.max_length)
    gold = jax.jit(dependencies, static_argnums=0)(headed, drawn)
    told = construction.counterpart().metrics
    assert told is not None
    visible = jnp.zeros(drawn.tokens.shape, bool)

    def metrics(model: Transformer) -> dict[str, Array]:
        stream, groups, read = construction.stream(model, drawn.tokens, drawn.lengths, visible)
        _, sites = model.run(stream, groups, sites=("attention", "residual"))
        attention = sites["attention"][..., read, read]
        scores = arc_scores(attention, gold, drawn.lengths, len(headed.relations))
        spans = span_f1(sites["residual"][1:, :, read], drawn)
        return {
            "head_uas": scores.heads.uas,
            "relation_uas": scores.heads.labelled,
            "arc_weight": scores.weight.max(),
            "span_f1": spans.max(),
            **told(model),
        }

    return metrics


def span_f1(
    stream: Float[Array, "layer batch word width"], drawn: Sentences
) -> Float[Array, " layer"]:
    """F1 of the constituents that a ridge probe reads off the two ends of spans, by layer.

    The probe maps [h_i, h_j] to 1 where words i..j are a node of the derivation, else 0, and is
    fitted on the first half of the sentences. On the second half it names as many spans of each
    sentence as there are, n - 2 of n words, those with the highest scores, so that F1 is the share
    of them that is right. The whole sentence is left out. May be called inside `jit`.
    """
    gold, there = _node_spans(drawn, stream.shape[2])
    half = len(gold) // 2
    first, last = (jnp.arange(stream.shape[2])[:, None], jnp.arange(stream.shape[2]))
    i, j = jnp.nonzero(first < last, size=stream.shape[2] * (stream.shape[2] - 1) // 2)
    wanted, there = gold[:, i, j], there[:, i, j]

    def of(h: Float[Array, "batch word width"]) -> Float[Array, ""]:
        ones = jnp.ones((*there.shape, 1), h.dtype)
        x = jnp.concatenate([h[:, i], h[:, j], ones], -1) * there[..., None]
        fit, target = x[:half].reshape(-1, x.shape[-1]), (wanted * there)[:half].reshape(-1)
        gram = jnp.matmul(fit.T, fit, precision="highest")
        ridge = 1e-4 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=gram.dtype)
        right = jnp.matmul(fit.T, target.astype(h.dtype), precision="highest")
        weights = jnp.linalg.solve(gram + ridge, right)
        score = jnp.where(there, jnp.matmul(x, weights, precision="highest"), -jnp.inf)[half:]
        count = jnp.maximum(drawn.lengths[half:] - 2, 0)
        ranked = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        named = (ranked < count[:, None]) & there[half:]
        return (named & wanted[half:]).sum() / jnp.maximum(count.sum(), 1)

    return jax.lax.map(of, stream)


def _node_spans(
    drawn: Sentences, time: int
) -> tuple[Bool[Array, "batch word word"], Bool[Array, "batch word word"]]:
    """Which spans are nodes, and which there are: two words or more, not the whole sentence."""
    last: Int[Array, "batch nodes"] = ends(drawn.starts)
    row = jnp.arange(len(last))[:, None]
    place = jnp.where(last >= 0, drawn.starts, time)
    nodes = jnp.zeros((len(last), time, time), bool).at[row, place, last].set(True, mode="drop")
    first, end = jnp.arange(time)[:, None], jnp.arange(time)
    n = drawn.lengths[:, None, None]
    there = (first < end) & (end < n) & (end - first < n - 1)
    return nodes & there, there


SENTENCES = 512

#: Relations that have a column of their own: the most frequent ones, and no rare ones.
MOST, RAREST = 10, 0.02


def measure(run: Run, seed: int, heads: Headed | None = None) -> Result:
    """UAS of attention heads on fresh sentences, beside fixed offsets and random weights.

    No word is hidden. A candidate (a direction, layer and head, or an offset) is chosen on one half
    of the sentences and scored on the other: one for all arcs, or one for each relation.

    Args:
        run: of a family on the sentences of a grammar, whose attention is softmax.
        seed: of the sentences.
        heads: the grammar with heads. None: our table where the grammar is one of ours, else the
            head of every rule on the right.
    """
    grammar: Grammar = run.construction.grammar  # type: ignore[attr-defined]
    marked = headed(grammar) if heads is None else heads
    if marked.grammar != grammar:
        raise ValueError("heads is of another grammar, must be of the run's")
    time = run.construction.task.max_length  # type: ignore[attr-defined]
    drawn = sample(grammar, jax.random.key(seed), SENTENCES, time)
    gold = jax.jit(dependencies, static_argnums=0)(marked, drawn)
    attend, count = words_and_attention(run.construction), len(marked.relations)

    @jax.jit
    def scores(model: Transformer, tokens: Array, lengths: Array) -> tuple[Any, Any]:
        _, attention = attend(model, tokens, lengths, jnp.zeros(tokens.shape, bool))
        found = arc_scores(attention, gold, lengths, count)
        return found._replace(shape=()), jnp.array(found.shape)

    def score(model: Transformer) -> ArcScores:
        found, shape = jax.device_get(scores(model, drawn.tokens, drawn.lengths))
        return found._replace(shape=tuple(shape.tolist()))

    trained = [score(model) for model in run.models]
    initial = score(random_model(run))
    shown = np.argsort(-initial.share, kind="stable")[:MOST]
    shown = shown[initial.share[shown] >= RAREST]
    one = trained[0].offsets
    names = [*(f"trained, {name}" for name in seed_names(run)), "random weights", "best offset"]
    values = [
        [s.heads.uas, s.heads.labelled, s.weight.max(), *s.heads.by_relation[shown]]
        for s in (*trained, initial)
    ]
    values += [[one.uas, one.labelled, np.nan, *one.by_relation[shown]]]
    values += [[initial.chance, initial.chance, initial.chance, *[np.nan] * len(shown)]]
    columns = ["one head", "one a relation", "most weight on arcs"]
    columns += [f"{marked.relations[r]} ({100 * initial.share[r]:.0f} %)" for r in shown]
    where = np.unravel_index(int(trained[0].heads.best), trained[0].shape)
    note = (
        f"best head of {seed_names(run)[0]}: {DIRECTIONS[where[0]]}, layer {where[1] + 1}, head "
        f"{where[2] + 1}; best offset {OFFSETS[int(one.best)]:+d}"
    )
    if heads is None and marked == Headed.everywhere(grammar):
        note += "; the grammar marks no heads, so the right child of every rule is taken for it"
    return table("UAS of attention heads", columns, [*names, "chance"], values, note)


def needs_attention_over_words(run: Run) -> str:
    """Sentences of a grammar, and softmax attention."""
    if not isinstance(getattr(run.construction, "grammar", None), Grammar):
        return f"family {run.family!r} has no grammar: 'arcs' needs sentences that have trees"
    for model in run.models:
        if not isinstance(model, Transformer):
            return f"the model is a {type(model).__name__}, must be a Transformer"
        mixers = {heads.mixer for layer in model.config.layers() for heads in layer.heads}
        if mixers != {"softmax"}:
            found = ", ".join(sorted(mixers)) or "none"
            return f"the model's attention is {found}: 'arcs' needs softmax attention"
    return ""


ARCS = Probe(
    "arcs",
    "do heads look along dependency arcs, more than fixed offsets do?",
    "chance is the baseline; it is read as use: promoted heads follow arcs without better "
    "predictions",
    measure,
    needs_attention_over_words,
)
