"""Time of a sweep of 192 patched runs: twelve layers, sixteen tokens, one compilation."""

import time

import jax
import numpy as np
from common import report

from constructions import CATALOGUE
from probes.interchange import sweep

LAYERS, TOKENS, BATCH = 12, 16, 64


def main() -> None:
    construction = CATALOGUE["gradient-descent"](
        num_examples=TOKENS - 1, steps=LAYERS - 1, step_size=1.0
    )
    model = construction.compile().model
    seconds = []
    for seed in range(6):
        base, source = (
            construction.sample(key, BATCH) for key in jax.random.split(jax.random.key(seed))
        )
        start = time.perf_counter()
        effect = np.asarray(sweep(construction, model, base, source).effect)
        seconds.append(time.perf_counter() - start)
    first, *rest = seconds
    report(
        "patching",
        {
            "patched runs": effect.size,
            "batch": BATCH,
            "seconds of the first sweep, with its compilation": first,
            "seconds of a sweep": {"median": float(np.median(rest)), "max": max(rest)},
        },
    )


if __name__ == "__main__":
    main()
