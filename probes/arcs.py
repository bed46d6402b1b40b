"""Do heads of attention look along the arcs of a dependency tree?

A head names a head for every word, in one of two directions:

    from the word   argmax_j a_ij,      what the word looks at most
    to the word     argmax_j a_ji,      what looks at the word most

over the other words of the sentence; neither itself nor special tokens count. UAS (unlabelled
attachment score) is the share of arcs that are named rightly. One candidate for all arcs, or one
for each relation, is chosen on the first half of the sentences and scored on the second, and so are
fixed offsets j - i, which know nothing of the sentence (Clark et al. 2019, arXiv 1906.04341; Chen
et al. 2023, arXiv 2309.07311).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from constructions.core.transformer import Transformer
from constructions.family import Construction
from synthetic.grammar.dependencies import Arcs

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
