"""Time to build a construction, and time to compile it against its depth.

Layers of equal shape are scanned, so compilation must not grow with depth. And processor time of a
command whose programs an earlier one has kept, over that of the first one and of one that is
started for nothing (`list`).
"""

import os
import resource
import subprocess
import sys
import tempfile
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


def processor_seconds(arguments: str, cache: str) -> float:
    """User and system time of a command, in a process of its own."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR",)}
    before = spent()
    subprocess.run(
        [sys.executable, "-m", "probes.cli", *arguments.split()],
        env=kept | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return spent() - before


def main() -> None:
    fresh = [
        float(subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    seconds_to_compile(10)
    times = {depth: [seconds_to_compile(depth) for _ in range(5)] for depth in (1, 10, 100)}
    medians = {depth: float(np.median(t)) for depth, t in times.items()}
    with tempfile.TemporaryDirectory() as cache:
        command = "verify hyper-semi-supervised"
        first, second = (processor_seconds(command, cache) for _ in range(2))
        nothing = processor_seconds("list", cache)
    report(
        "compile_time",
        {
            "seconds to build one step in a fresh process": {
                "median": float(np.median(fresh)),
                "max": max(fresh),
            },
            "seconds to compile, by layers": medians,
            "100 layers / 10 layers": medians[100] / medians[10],
            f"processor seconds of `{command}`": {"first": first, "second": second},
            "second / first": second / first,
            "`list` / second": nothing / second,
        },
    )


if __name__ == "__main__":
    main()
