r"""Unlearning by a class token: the class's token is deleted, and nothing else is touched.

Shah et al. 2023 (arXiv 2311.15268) put a discrete bottleneck of keys and values before a classifier
and unlearn a class by deleting the keys that its examples use. Here the key of class c is its
token. With W_c the row that it holds, the logits of a query q are a sum over class tokens,

    logit(q)  =  sum_c 1_c  s(W_c, q),

so that without token d the logit of d is 0 and every other one keeps its bits. Where W_c are the
shrunk prototypes, what is left are the logits of the posterior of the other classes,

    P(c | q, c != d)  =  P(c | q) / (1 - P(d | q)),

renormalised by the softmax over them: the classifier is the one that never saw class d.

None of this follows from the predictions. Tokens that hold A W and are read with the inverse of A
predict the same, and deleting one takes from all classes ("classes mixed").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.claims import Claim, Evidence, same_width
from constructions.core.transformer import Transformer
from constructions.hyper_transformer.episodes import GROUPS
from synthetic.compilation import compile_once
from synthetic.tasks.classes import Labels, Queries, Support
from synthetic.tasks.task import Batch

_PAPER = "Shah et al. 2023, arXiv 2311.15268"
_GAUGE = "invariant under changes of basis that act on every token alike"
#: A group that no head looks at where examples without labels do not count.
_UNSEEN = GROUPS.index("unlabelled")


#: Episodes in which claims delete every class in turn.
_EPISODES = 2**12


@compile_once(static_argnums=0, often=True)
def unlearnt(
    construction: Any, model: Transformer, support: Support, labels: Labels, queries: Queries
) -> Float[Array, "class batch query class"]:
    """Logits of the queries without the token of each class in turn.

    The token keeps its place in the stream, where no head sees it: its kind becomes one that is
    attended to by nobody.

    Args:
        construction: of the few-shot families, its `unlabelled` 0.
        model: of its class.
        support, labels, queries: as for `predict`.

    Returns:
        first axis: the class whose token is gone. Its own logit stays in the last axis.
    """
    if construction.unlabelled:
        raise ValueError(
            f"unlabelled is {construction.unlabelled}, must be 0: examples without labels learn "
            "from the class as well"
        )
    inputs = support, labels, queries
    stream = construction.stream(model, *inputs)
    first = construction.positions(support, queries)[0].start
    place = construction.places(model.config.depth, *inputs)["prediction"]

    def without(number: Array) -> Array:
        groups = stream.groups.at[first + number].set(_UNSEEN)
        return place.from_output(model, stream._replace(groups=groups), construction.program.slots)

    return jax.lax.map(without, jnp.arange(construction.classes))


@compile_once
def others(logits: Array) -> Float[Array, "class ..."]:
    """Of logits `[deleted, ..., class]` those of the other classes, less their mean over them."""
    count = logits.shape[-1]
    kept = np.array([[c for c in range(count) if c != d] for d in range(count)])
    index = kept.reshape(count, *[1] * (logits.ndim - 2), count - 1)
    found = jnp.take_along_axis(logits, jnp.asarray(index), -1)
    return found - found.mean(-1, keepdims=True)


def _some(e: Evidence) -> Batch:
    """The first `_EPISODES` of the examples."""
    return e.once("some", lambda: jax.tree.map(lambda a: a[:_EPISODES], e.examples))


def _without(e: Evidence) -> Array:
    """Centred logits of the other classes, without each class's token in turn."""
    return others(unlearnt(e.construction, e.model, *_some(e).inputs))


def _with_all(e: Evidence, logits: Array) -> Array:
    """The same of logits `[episode, query, class]` that all classes have gone into."""
    return others(jnp.broadcast_to(logits, (e.construction.classes, *logits.shape)))


def damage(e: Evidence) -> float:
    """What deleting a class's token does to the other logits, relative: root mean squares."""
    after, before = _without(e), _with_all(e, e.prediction[:_EPISODES])
    return float(jnp.sqrt(jnp.mean((after - before) ** 2) / jnp.mean(before**2)))


def above_rest(e: Evidence) -> float:
    """Cross-entropy among the other classes over that of their exact posterior, less 1.

    On the queries of the other classes, mean over the class whose token is deleted.
    """
    examples = _some(e)
    exact = e.once("some posterior", lambda: e.construction.task.posterior(*examples.inputs))
    losses = (_loss(x, examples.target) for x in (_without(e), _with_all(e, exact)))
    return float(next(losses) / next(losses)) - 1


@compile_once
def _loss(logits: Array, target: Array) -> Array:
    """Mean cross-entropy of the queries whose class was not deleted, among the others."""
    deleted = jnp.arange(len(logits)).reshape(-1, 1, 1)
    number = jnp.where(target > deleted, target - 1, target)  # among the others
    asked = target != deleted
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), number[..., None], -1)[..., 0]
    return jnp.where(asked, nats, 0).sum() / asked.sum()


def _harmless(note: str, *catches: str) -> Claim:
    return Claim(
        "unlearning leaves the others",
        "Without the token of a class, logits of the other classes are what they were.",
        damage,
        0.05,
        "<=",
        f"{_PAPER} (deleting the keys of a class leaves accuracy on the others)",
        catches=catches,
        gauge=_GAUGE,
        needs=(same_width,),
        note=note,
    )


GRADIENT_CLAIMS = (
    _harmless(
        "Refuted: trained class tokens are mixed, see a class a token, and deleting one damages "
        "all classes. The construction, whose predictions are the same, unlearns exactly.",
        "classes mixed",
        "codes exchanged",
    ),
)

PROTOTYPE_CLAIMS = (
    _harmless("", "codes exchanged"),
    Claim(
        "unlearning ends at the posterior",
        "Without the token of a class, what is left is the exact posterior of the other classes, "
        "as of a classifier that never saw it.",
        above_rest,
        0.01,
        "<=",
        f"{_PAPER} (no training is needed to unlearn)",
        catches=("codes exchanged", "no norm", "linear for softmax"),
        gauge=_GAUGE,
        needs=(same_width,),
    ),
)
