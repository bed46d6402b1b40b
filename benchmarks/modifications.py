"""Which claims about a gradient step survive which modification of the layer?

Every modification of `constructions.gradient_descent.modifications` is fitted with five seeds, and
the ledger decides the claims of the step on each of the models: the share of the seeds of which a
claim holds, and the mean of its statistic with a 95 % interval. Then the exact test of which
modification changes the loss, against five further seeds, and how often it finds that another seed
does, over 64 disjoint pairs of groups of five. About ten minutes on two cores.
"""

import time
from typing import Any

import numpy as np
from common import report
from scipy import stats

from constructions.gradient_descent.modifications import (
    GRID,
    Modified,
    false_positives,
    holm,
    outcomes,
    permutation_test,
)
from probes.ledger import ledger

SEEDS, EXAMPLES = 5, 2**13


def interval(values: Any) -> dict[str, Any]:
    """Mean, 95 % interval (Student's t) and the values themselves."""
    values = np.asarray(values, float)
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    ends = [values.mean() - half, values.mean() + half]
    return {"mean": values.mean(), "interval": ends, "by seed": values.tolist()}


def decided(c: Modified, models: Any) -> dict[str, Any]:
    """Claim -> share of the models of which it holds; None where it says nothing of them."""
    found: dict[str, Any] = {}
    for row in ledger(c, models, batch=EXAMPLES):
        asked = [v for n, v in enumerate(row.trained) if f"trained {n}" not in row.lacking]
        held = [row.claim.holds(value) for value in asked]
        found[row.claim.name] = float(np.mean(held)) if held else None
    return found


def main() -> None:
    began, claims, losses = time.perf_counter(), {}, {}
    base = Modified()
    others = outcomes(base, base.fit(seeds=range(SEEDS, 2 * SEEDS)).models)["loss"]
    distances = {}
    for name in GRID:
        c = Modified(modification=name)
        models = c.fit(seeds=range(SEEDS)).models
        values = outcomes(c, models)
        losses[name], distances[name] = values["loss"], interval(values["distance"])
        claims[name] = decided(c, models)
        print(name, round(time.perf_counter() - began), "s", claims[name], flush=True)
    p = {name: float(permutation_test(found, others)) for name, found in losses.items()}
    quick = base.counterpart().quick
    many = outcomes(base, base.fit(seeds=range(100, 740), recipe=quick).models)["loss"]
    rates = {str(a): float(false_positives(many, SEEDS, a, 0).mean()) for a in (0.05, 0.1, 0.2)}
    report(
        "modifications",
        {
            "task": repr(base.task),
            "recipe": base.counterpart().recipe.to_json(),
            "share of seeds of which a claim holds": claims,
            "loss over the step's, less 1": {name: interval(v) for name, v in losses.items()},
            "distance of predictions from the step's": distances,
            "p of the loss, against other seeds": p,
            "matters by Holm's rule at 5 %": holm(p),
            "share of tests of seeds against seeds with p at most": rates,
            "seconds": round(time.perf_counter() - began),
        },
    )


if __name__ == "__main__":
    main()
