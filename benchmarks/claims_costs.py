"""What does `orrery claims` cost, family by family? Kept in `probes/costs.json`, for what it tells.

CPU seconds of all cores together, which other work on the machine hardly changes, with five seeds:

    claims            the fit at quick settings, then the ledger. A few chunks of steps are run; the
                      first has the compilation, and all that are left cost as much as the last
    claims in full    the same at the recipe's own steps, every step dearer as its batch is larger
    numbers           what the family measures with --quick

    python benchmarks/claims_costs.py [NAME ...] [--save]

Without a name all families; with --save those that were measured replace what was kept of them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
from common import machine

from constructions import CATALOGUE
from constructions.runs import construct, fit_family
from probes.coverage import COSTS
from probes.ledger import ledger
from probes.report.commands import FEWER, measurements

SEEDS, CHUNKS = 5, 3


def costs(name: str) -> dict[str, float]:
    """CPU seconds of a family, as the module has them."""
    jax.clear_caches()
    began, marks = time.process_time(), []
    counterpart = construct(name).counterpart()
    recipe = counterpart.quick or counterpart.recipe
    run = fit_family(
        name,
        quick=True,
        seeds=range(SEEDS),
        steps=min(recipe.steps, CHUNKS * recipe.chunk),
        progress=lambda record: marks.append((record["step"], time.process_time() - began)),
    )
    (first, start), (_, end) = marks[0], marks[-1]
    step = (end - start) / max(1, marks[-1][0] - first) if len(marks) > 1 else start / first
    fitted = time.process_time()
    ledger(run.construction, run.models, batch=FEWER)
    decided = time.process_time()
    for _ in measurements(name, True, 0):
        pass
    full, decide = counterpart.recipe, decided - fitted
    dearer = step * full.batch / recipe.batch
    return {
        "claims": round(start + (recipe.steps - first) * step + decide, 1),
        "claims in full": round(start + (full.steps - first) * dearer + decide, 1),
        "numbers": round(time.process_time() - decided, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--save", action="store_true", help=f"keep them in {Path(COSTS).name}")
    given = parser.parse_args()
    for name in given.names or CATALOGUE:
        found = costs(name)
        print(name, json.dumps(found), flush=True)
        if given.save:  # after each, so that what is interrupted is not lost
            kept: dict[str, Any] = json.loads(COSTS.read_text()) if COSTS.exists() else {}
            families = kept.get("families", {}) | {name: found}
            kept = {"machine": machine(), "families": dict(sorted(families.items()))}
            COSTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
