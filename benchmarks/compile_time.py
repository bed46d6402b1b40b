"""Time to build a construction, and time to compile it against its depth.

Layers of equal shape are scanned, so compilation must not grow with depth.
"""

import subprocess
import sys
import time

import jax
import numpy as np
from common import report

from constructions import CATALOGUE

BUILD = """
import time
from constructions import CATALOGUE
start = time.perf_counter()
CATALOGUE["gradient-descent"](steps=1, step_size=6.0).compile()
print(time.perf_counter() - start)
"""


def seconds_to_compile(depth: int) -> float:
    construction = CATALOGUE["gradient-descent"](steps=depth, step_size=1.0)
    model = construction.compile().model
    inputs = construction.sample(jax.random.key(0), 64)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(construction.apply).lower(model, *inputs).compile()
    return time.perf_counter() - start


def main() -> None:
    fresh = [
        float(subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    seconds_to_compile(10)
    times = {depth: [seconds_to_compile(depth) for _ in range(5)] for depth in (1, 10, 100)}
    medians = {depth: float(np.median(t)) for depth, t in times.items()}
    report(
        "compile_time",
        {
            "seconds to build one step in a fresh process": {
                "median": float(np.median(fresh)),
                "max": max(fresh),
            },
            "seconds to compile, by layers": medians,
            "100 layers / 10 layers": medians[100] / medians[10],
        },
    )


if __name__ == "__main__":
    main()
