"""Which claims about a gradient step survive which modification of the layer?

Every modification of `constructions.gradient_descent.modifications` is fitted with six seeds: the
loss over that of the step with a 95 % interval, and the exact test of which modification changes
it, against six further seeds (with five against five none of eleven could be found to); how often
the test finds that another seed matters, over 53 disjoint pairs of groups; and the share of the
seeds of which the ledger finds a claim of the step to hold. About ten minutes on two cores.
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

SEEDS, EXAMPLES = 6, 2**13


def interval(values: Any) -> dict[str, Any]:
    """Mean, 95 % interval (Student's t) and the values themselves."""
    values = np.asarray(values, float)
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    ends = [values.mean() - half, values.mean() + half]
    return {"mean": values.mean(), "interval": ends, "by seed": values.tolist()}


def decided(models: dict[str, Any]) -> dict[str, Any]:
    """Modification -> claim -> share of its models of which it holds; None where it has no say."""
    flat = [(name, model) for name, own in models.items() for model in own]
    found: dict[str, Any] = {name: {} for name in models}
    for row in ledger(Modified(), [model for _, model in flat], batch=EXAMPLES):
        held: dict[str, list[bool]] = {name: [] for name in models}
        for n, (name, _) in enumerate(flat):
            if f"trained {n}" not in row.lacking:
                held[name].append(row.claim.holds(row.trained[n]))
        for name, own in held.items():
            found[name][row.claim.name] = float(np.mean(own)) if own else None
        print(row.claim.name, flush=True)
    return found


def main() -> None:
    began, base = time.perf_counter(), Modified()
    models, losses, distances = {}, {}, {}
    for name in GRID:
        c = Modified(modification=name)
        models[name] = c.fit(seeds=range(SEEDS)).models
        values = outcomes(c, models[name])
        losses[name], distances[name] = values["loss"], interval(values["distance"])
        print(name, round(time.perf_counter() - began), "s", losses[name], flush=True)
    others = outcomes(base, base.fit(seeds=range(SEEDS, 2 * SEEDS)).models)["loss"]
    p = {name: float(permutation_test(found, others)) for name, found in losses.items()}
    quick = base.counterpart().quick
    many = outcomes(base, base.fit(seeds=range(100, 740), recipe=quick).models)["loss"]
    rates = {str(a): float(false_positives(many, SEEDS, a, 0).mean()) for a in (0.05, 0.1, 0.2)}
    print(rates, round(time.perf_counter() - began), "s", flush=True)
    report(
        "modifications",
        {
            "task": repr(base.task),
            "recipe": base.counterpart().recipe.to_json(),
            "loss over the step's, less 1": {name: interval(v) for name, v in losses.items()},
            "the same of other seeds of the plain layer": interval(others),
            "distance of predictions from the step's": distances,
            "p of the loss, against other seeds": p,
            "matters by Holm's rule at 5 %": holm({n: v for n, v in p.items() if n != "none"}),
            "share of tests of seeds against seeds with p at most": rates,
            "share of seeds of which a claim holds": decided(models),
            "seconds": round(time.perf_counter() - began),
        },
    )


if __name__ == "__main__":
    main()
