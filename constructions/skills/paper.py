"""What is stated of composing skills, as claims about models trained on a share of the pairs."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from constructions.claims import Claim, Evidence, is_function, predict
from constructions.core.transformer import Transformer

MIX, THEORY = "Yu et al. 2023, arXiv 2310.17567", "Arora and Goyal 2023, arXiv 2307.15936"


def lengthened(model: Any, loops: int) -> Any:
    """The model with another number of loops; a function stays what it is."""
    if is_function(model):
        return model
    (segment,) = model.config.segments
    config = replace(model.config, segments=(replace(segment, repeats=loops),))
    return Transformer(config, model.arrays())


def held_out(e: Evidence, named: int = 2, fed_back: bool = False) -> float:
    """Accuracy on tuples that are held out; of other sizes than two all are.

    Longer ones are read in as many loops, or two skills at a time, from state to predicted state.
    """
    c, batch = e.construction, min(e.size, 2**12)
    if named == 2:
        task = replace(c.task, which="held out")
        examples = task.sample(e.key, batch)
        return float(task.accuracy(e.apply(*examples.inputs), examples).mean())
    longer = replace(c, named=named, slots=named, shown=0)
    examples = longer.task.sample(e.key, batch)
    found, text = examples.inputs
    if fed_back:
        for first in range(0, named, 2):
            found = jnp.sign(e.apply(found, text[:, first : first + 2]))
    else:
        found = predict(longer, lengthened(e.model, named), found, text)
    return float(longer.task.accuracy(found, examples).mean())


_claim = partial(
    Claim,
    direction=">=",
    catches=("skills exchanged", "by heart", "random table", "bag of skills"),
    gauge="invariant: signs of the model's outputs",
)
CLAIMS = (
    _claim(
        "pairs never shown",
        "Trained on half of the pairs of skills, the model composes the others.",
        held_out,
        0.9,
        source=f"{MIX} (combinations of skills that no training text had)",
        note="Its heads carry as many numbers as a state has; with heads as wide as the stream it "
        "learns pairs by heart, and is right on a seventh of the others. Seeds differ: of five at "
        "quick settings three compose all pairs, one four in five, one stays on a plateau.",
    ),
    _claim(
        "quadruples, two by two",
        "It composes four, given two at a time and what it said of the first two.",
        partial(held_out, named=4, fed_back=True),
        0.8,
        source=f"{THEORY} (competence on tuples of skills follows from that on fewer)",
    ),
    _claim(
        "quadruples at once",
        "It composes four in one pass, in as many loops.",
        partial(held_out, named=4),
        0.8,
        source=f"{THEORY}, the same",
        note="Refuted: trained for two loops, the layer tells the first from the second.",
    ),
)
