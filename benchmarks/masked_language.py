"""How close do masked language models come to the exact posterior, how soon, and with what?

Fits on the English-like grammar, whose tags at hidden words have an entropy of about half a nat.
The figure is the mean KL divergence of the exact posterior from the model at hidden words, in nats,
on 512 sentences that no fit sees, where one word in seven is hidden. On an accelerator the sweeps
run at the sizes of Zhao et al. 2023 (A12L12 and so on: heads, layers), here at small ones.
"""

import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from common import report

from constructions.inside_outside.construction import InsideOutside
from synthetic.fitting.train import fit
from synthetic.grammar import chart
from synthetic.tasks.masked_language import MaskedLanguageTask

SEEDS = (0, 1, 2)
STEPS = 12000
ON_CPU = jax.default_backend() == "cpu"
LONGEST = 8 if ON_CPU else 20
#: Layers, heads and width of the sweep, and the steps of each fit.
SWEEP = (
    [(1, 4, 64), (2, 4, 64), (3, 4, 64), (6, 4, 64), (3, 1, 64), (3, 2, 64), (3, 8, 64)]
    if ON_CPU
    else [(1, 12, 768), (3, 12, 768), (6, 12, 768), (12, 12, 768), (12, 3, 768), (12, 24, 768)]
)
SWEEP_STEPS = 1800 if ON_CPU else 100_000


def tag_entropy(construction: InsideOutside) -> float:
    """Mean entropy of the pre-terminal's posterior at hidden words, in nats."""
    tokens, lengths, mask = construction.task.sample(jax.random.key(1), 2048).inputs
    found = chart.inside_outside(construction.grammar, tokens, lengths, mask).tag_marginals
    p = np.asarray(found)[np.asarray(mask)]
    return float(-np.sum(p * np.log(np.where(p > 0, p, 1)), -1).mean())


def fitted(
    construction: InsideOutside,
    steps: int,
    task: MaskedLanguageTask | None = None,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, Any]:
    """Divergences of the seeds, fitted at once, at the end and as they fell."""
    counterpart = construction.counterpart()
    recipe = replace(counterpart.recipe, steps=steps)
    start, seconds = time.perf_counter(), []
    found = fit(
        counterpart.init,
        task or counterpart.task,
        recipe,
        predict=construction.apply,
        metrics=counterpart.metrics,
        seeds=seeds,
        progress=lambda _: seconds.append(time.perf_counter() - start),
    )
    kept = [n for n, record in enumerate(found.history) if record["step"] % (steps // 6) == 0]
    return {
        "steps": steps,
        "seconds, compilation included": seconds[-1],
        "divergence by seed": found.history[-1]["divergence"],
        "seconds and divergences": [
            [round(seconds[n], 1), *found.history[n]["divergence"]] for n in kept
        ],
    }


def main() -> None:
    base = InsideOutside(grammar="english", max_length=LONGEST)
    masked = MaskedLanguageTask(base.grammar, base.max_length)
    rates = {
        "15 % of the words hidden": masked,
        "30 % falling to 15 %": replace(masked, rate=0.3, final=0.15),
        "15 to 50 %, every sentence its own": replace(masked, highest=0.5),
    }
    report(
        "masked_language",
        {
            "grammar": repr(base.grammar),
            "longest sentence": base.max_length,
            "entropy of tags at hidden words, nats": tag_entropy(base),
            "default, seeds one by one": [fitted(base, STEPS, seeds=(seed,)) for seed in SEEDS],
            "masking rate": {n: fitted(base, SWEEP_STEPS, t) for n, t in rates.items()},
            "layers, heads, width": {
                f"A{heads}L{layers}, {width}": fitted(
                    replace(base, layers=layers, heads=heads, width=width), SWEEP_STEPS
                )
                for layers, heads, width in SWEEP
            },
        },
    )


if __name__ == "__main__":
    main()
