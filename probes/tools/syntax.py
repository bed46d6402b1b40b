"""Tools on syntax and on single units: attention along arcs, class selectivity."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.runs import Run, initial_models
from probes.arcs import DIRECTIONS, OFFSETS, ArcScores, arc_scores, words_and_attention
from probes.selectivity import check_units, selectivity, with_units
from probes.tools.result import Result, seed_names, table
from synthetic.compilation import compile_once
from synthetic.grammar.dependencies import Headed, dependencies
from synthetic.grammar.examples import headed
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import sample
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import outcome

SENTENCES = 512

#: Relations that have a column of their own: the most frequent ones, and no rare ones.
MOST, RAREST = 10, 0.02


def arcs(run: Run, seed: int, heads: Headed | None = None) -> Result:
    """UAS of attention heads on fresh sentences, beside fixed offsets and random weights.

    No word is hidden. A candidate (a direction, layer and head, or an offset) is chosen on one half
    of the sentences and scored on the other: one for all arcs, or one for each relation.

    Args:
        run: of a family on the sentences of a grammar, whose attention is softmax.
        seed: of the sentences.
        heads: the grammar with heads. None: our table where the grammar is one of ours, else the
            head of every rule on the right.
    """
    grammar: Any = getattr(run.construction, "grammar", None)
    if not isinstance(grammar, Grammar):
        raise ValueError(
            f"family {run.family!r} has no grammar: 'arcs' needs sentences that have trees"
        )
    for model in run.models:
        _check_attention(model)
    marked = headed(grammar) if heads is None else heads
    if marked.grammar != grammar:
        raise ValueError("heads is of another grammar, must be of the run's")
    time = run.construction.task.max_length  # type: ignore[attr-defined]
    drawn = sample(grammar, jax.random.key(seed), SENTENCES, time)
    gold = compile_once(dependencies, static_argnums=0)(marked, drawn)
    attend, count = words_and_attention(run.construction), len(marked.relations)

    @jax.jit
    def measure(model: Transformer, tokens: Array, lengths: Array) -> tuple[Any, Any]:
        _, attention = attend(model, tokens, lengths, jnp.zeros(tokens.shape, bool))
        found = arc_scores(attention, gold, lengths, count)
        return found._replace(shape=()), jnp.array(found.shape)

    def score(model: Transformer) -> ArcScores:
        found, shape = jax.device_get(measure(model, drawn.tokens, drawn.lengths))
        return found._replace(shape=tuple(shape.tolist()))

    trained = [score(model) for model in run.models]
    initial = score(initial_models(run)[0])
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


def _check_attention(model: Any) -> None:
    if not isinstance(model, Transformer):
        raise ValueError(f"the model is a {type(model).__name__}, must be a Transformer")
    mixers = {heads.mixer for layer in model.config.layers() for heads in layer.heads}
    if mixers != {"softmax"}:
        found = ", ".join(sorted(mixers)) or "none"
        raise ValueError(f"the model's attention is {found}: 'arcs' needs softmax attention")


class Labelled(NamedTuple):
    """Inputs with a class for each token that a model reads out.

    Attributes:
        inputs: of the construction.
        classes: `[batch, token]`, -1 for none.
        what: the classes are of.
    """

    inputs: tuple[Array, ...]
    classes: Array
    what: str


def labelled(construction: Construction, key: Array, batch: int) -> Labelled:
    """Inputs of a construction's task with classes: tags of words, or labels that are asked for.

    ValueError, in one line, for tasks that have neither.
    """
    task = construction.task
    if isinstance(task, MaskedLanguageTask):
        drawn, hidden = task.draw(key, batch, jnp.asarray(1.0))
        return Labelled((drawn.tokens, drawn.lengths, hidden), drawn.tags, "tags of words")
    drawn = task.sample(key, batch)
    if outcome(task) == "values":
        raise ValueError(
            f"{type(task).__name__} is regression, which has no classes: 'selectivity' needs "
            "words or labels"
        )
    target = drawn.target
    if not (hasattr(target, "ndim") and jnp.issubdtype(target.dtype, jnp.integer)):
        raise ValueError(f"{type(task).__name__}: its target is no array of class labels")
    return Labelled(drawn.inputs, target.reshape(len(target), -1), "labels")


def units(run: Run, seed: int) -> Result:
    """Class selectivity of the units of every MLP, beside exchanged labels and random weights."""
    for model in run.models:
        check_units(model)
    given = labelled(run.construction, jax.random.key(seed), SENTENCES)
    predict = jax.jit(lambda model, *inputs: with_units(run.construction)(model, *inputs)[1])
    rows, values, sizes = [], [], np.zeros(0)
    models = [*run.models, initial_models(run)[0]]
    names = [*(f"trained, {name}" for name in seed_names(run)), "random weights"]
    for name, model in zip(names, models, strict=True):
        found = np.asarray(predict(model, *given.inputs))
        if found.shape[1:3] != given.classes.shape:
            raise ValueError(
                f"labels are {given.classes.shape}, must be one for each of the "
                f"{found.shape[1:3]} tokens that are read"
            )
        for layer, own in enumerate(found):
            result = selectivity(
                own.reshape(-1, own.shape[-1]),
                np.asarray(given.classes).reshape(-1),
                jax.random.key(seed + 1),
            )
            rows.append(f"{name}, layer {layer + 1}")
            gain = result.mean - result.chance
            values.append([result.mean, result.chance, gain, result.above, result.dead.mean()])
            sizes = result.sizes[result.sizes > 0]
    columns = ["mean index", "exchanged labels", "difference", "above all shuffles", "dead units"]
    note = (
        f"classes: {len(sizes)} {given.what}, of {sizes.min()} to {sizes.max()} examples; 0.05 of "
        "the units are above all 19 shuffles by chance"
    )
    return table("class selectivity of units", columns, rows, values, note)
