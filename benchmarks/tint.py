"""What does a simulated training step cost, against the step itself?

One jitted pass of the simulator (the program run slot by slot) against a jitted forward pass of the
auxiliary model, its backward pass, the update, and a forward pass with the new weights, for every
sequence by itself; both return the logits of both passes and the changed weights. The auxiliary
model has random weights, 4 heads and 100 words. Ratios are of wall times in turns. Flops are XLA's
count, memory is what XLA plans for temporaries.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import paired, ratio, report

from constructions.core.inventory import counts
from constructions.core.transformer import randomise
from constructions.interchange.decoder import CHANGED, DecoderShape, Weights, decoder
from constructions.tint import algorithm
from constructions.tint.construction import Tint, simulate

WORDS, HEADS, RATE, ROUNDS = 100, 4, 1e-3, 15


@partial(jax.jit, static_argnames="shape")
def direct(weights: Weights, tokens: Any, train: Any, shape: DecoderShape) -> Any:
    """Logits before and after one step of gradient descent, and the weights after it."""
    after = algorithm.descend(weights, tokens, train, shape, steps=1, rate=RATE, trained=CHANGED)
    decode = partial(algorithm.decode, shape=shape)
    before = jax.vmap(decode, (None, 0))(weights, tokens)
    return before, jax.vmap(decode)(after, tokens), after


def compiled(lower: Any) -> tuple[Any, dict[str, float]]:
    """A compiled function, and what it takes."""
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    found = lowered.compile()
    ended = time.perf_counter()
    cost, memory = found.cost_analysis(), found.memory_analysis()
    return found, {
        "trace seconds": traced - began,
        "compile seconds": ended - traced,
        "megaflops": cost["flops"] / 1e6,
        "temporary MB": memory.temp_size_in_bytes / 1e6,
    }


def measure(
    layers: int = 2, width: int = 96, time: int = 64, batch: int = 1, mode: str = "exact"
) -> dict[str, Any]:
    """One comparison."""
    untrained = decoder(WORDS, positions=time, layers=layers, heads=HEADS, width=width)
    c = Tint(randomise(untrained, jax.random.key(0), 0.02), mode, learning_rate=RATE)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(WORDS, size=(batch, time), dtype=np.int32))
    train = jnp.broadcast_to(jnp.arange(time) < time // 2, tokens.shape)
    weights = c.weights
    ours, cost = compiled(lambda: simulate.lower(c, weights, tokens, train))
    theirs, peer = compiled(lambda: direct.lower(weights, tokens, train, shape=c.shape))
    seconds = paired(
        {
            "simulated": lambda: ours(weights, tokens, train),
            "direct": lambda: theirs(weights, tokens, train),
        },
        ROUNDS,
    )
    found = {
        "layers": layers,
        "width": width,
        "time": time,
        "batch": batch,
        "mode": mode,
        "time ratio": ratio(seconds["simulated"], seconds["direct"]),
        "flops ratio": cost["megaflops"] / peer["megaflops"],
        "milliseconds": {name: 1e3 * float(np.median(s)) for name, s in seconds.items()},
        "simulated": cost | {"tokens": len(c.layout.kinds(time)), "layers": c.program.depth},
        "direct": peer,
        "stored entries over the auxiliary's parameters": (
            counts(c.program).stored / c.shape.parameters
        ),
    }
    jax.clear_caches()
    return found


def main() -> None:
    report(
        "tint",
        {
            "width 96, two layers": [
                measure(time=time, batch=batch, mode=mode)
                for time in (64, 128)
                for batch in (1, 4)
                for mode in ("exact", "paper")
            ],
            "by width, two layers, 64 tokens": [measure(width=width) for width in (24, 48, 192)],
            "by layers, width 48, 64 tokens": [
                measure(layers=layers, width=48) for layers in (1, 4, 8)
            ],
        },
    )


if __name__ == "__main__":
    main()
