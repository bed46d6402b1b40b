"""What a prediction makes of the examples in its context: their degrees, and maps of them."""

from __future__ import annotations

import jax
import numpy as np

from constructions.core.transformer import cast
from constructions.runs import Run
from probes import fourier
from probes.flat import Flat
from probes.ledger import compiled_like
from probes.saliency import saliency
from probes.tools.result import MOST_WEIGHTS, Result, seed_names, table

#: Examples that are left out in all ways, contexts (fewer of large models), and contexts that
#: maps are made for.
PLAYERS, CONTEXTS, MAPPED = 8, 16, 8


def degrees(run: Run, seed: int) -> Result:
    """Shares of the degrees, in examples of the context, of construction and trained models."""
    with jax.enable_x64(True):
        construction = run.construction
        large = Flat(construction, run.models[0]).theta.size > MOST_WEIGHTS
        inputs = construction.sample(jax.random.key(seed), CONTEXTS // 4 if large else CONTEXTS)
        players = min(PLAYERS, construction.context_size(*inputs))
        rows = []
        for model in (compiled_like(construction, run.models[0]), *run.models):
            if hasattr(model, "arrays"):
                model = cast(model, "float64")
            found = fourier.spectrum(construction, model, inputs, players)
            shares = np.append(found.shares, np.zeros(5))
            rows.append([found.degree, *shares[1:5], found.above(4)])
    names = ("construction", *seed_names(run))
    columns = ("highest degree", "1", "2", "3", "4", "above 4")
    return table(
        f"degree of the prediction in {players} examples of the context, shares of the variance",
        columns,
        names,
        rows,
        "degree 1 is a sum over examples; k steps of gradient descent have degree k at most",
    )


def maps(run: Run, seed: int) -> Result:
    """Completeness and soundness of leave-one-out maps, beside random maps."""
    construction = run.construction
    inputs = construction.sample(jax.random.key(seed), MAPPED)
    models = dict(zip(seed_names(run), run.models, strict=True))
    models = {"construction": compiled_like(construction, run.models[0]), **models}
    rows, names = [], []
    for name, model in models.items():
        for kind, key in (("", None), (", random map", jax.random.key(seed + 1))):
            found = saliency(construction, model, inputs, shuffle=key)
            rows.append(
                [
                    found.probability[:, 0].mean(),
                    found.completeness.mean(),
                    found.auc[:, 1:].max(1).mean(),
                    found.soundness.min(1).mean(),
                ]
            )
            names.append(name + kind)
    columns = (
        "probability of its label",
        "completeness",
        "best AUC of a wrong label",
        "worst soundness",
    )
    return table("saliency maps of the context as certificates", columns, names, rows)
