"""All that an accelerator can do differently, in one run of at most ten minutes.

    python benchmarks/device.py --save          # results/device_gpu.json; small sizes on a CPU

Fits against the memory bound: a step must at least write and read the batch that it draws, at the
bandwidth of a large copy measured in the same run. The mesa layer against plain softmax attention
and, where flash-linear-attention and a GPU are there, its Triton kernel (30 steps of conjugate
gradients, bfloat16, no gates). The chart, TinT against the step that it simulates, one large sweep
of patches, and certificates in float64 and float32. What was not begun after `--minutes` is left
out by name; with --save the file is written again after every part.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chart as chart_benchmark
import jax
import jax.numpy as jnp
import mesa as mesa_benchmark
import numpy as np
import tint as tint_benchmark
from common import RESULTS, machine, paired, ratio

from constructions import CATALOGUE
from constructions.family import verify
from constructions.mesa_layer import mesa
from probes.interchange import sweep
from synthetic.fitting.recipe import Recipe
from synthetic.grammar import chart

Figures = dict[str, Any]


def bandwidth(megabytes: int) -> float:
    """GB/s that a large addition of 1 reads and writes."""
    array = jnp.zeros(megabytes * 250_000, jnp.float32)
    run = jax.jit(lambda x: x + 1)
    (seconds,) = paired({"copy": lambda: run(array)}, 5).values()
    return 2 * array.nbytes / min(seconds) / 1e9


def fits(toy: bool) -> Figures:
    """Steps a second of the first family, by batch and by the number of seeds at once."""
    speed = bandwidth(8 if toy else 1024)
    found: Figures = {"copy, GB/s": speed}
    construction = CATALOGUE["gradient-descent"](**CATALOGUE["gradient-descent"].example())
    steps = 8 if toy else 400
    cases = ((64, 1),) if toy else ((2048, 1), (65536, 1), (2048, 16))
    for batch, seeds in cases:
        recipe = Recipe(steps=steps, batch=batch, chunk=steps // 4, learning_rate=1e-3)
        many = {"seeds": range(seeds)} if seeds > 1 else {}
        result = construction.fit(recipe=recipe, metrics=None, optimum=None, **many)
        drawn = jax.eval_shape(
            lambda key, batch=batch: construction.task.sample(key, batch), jax.random.key(0)
        )
        floats = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(drawn))
        rate = steps / result.seconds["run"]
        found[f"batch {batch}, {seeds} seeds"] = {
            "steps a second": rate,
            "share of the memory bound": rate * 2 * 4 * floats * seeds / 1e9 / speed,
            "compilation, s": result.seconds.get("compile"),
        }
    return found


def triton(arguments: tuple[Any, ...]) -> tuple[Callable[[], Any], Callable[[], Any]] | str:
    """The kernel of flash-linear-attention, forward, and forward and backward; or why not."""
    if jax.default_backend() != "gpu":
        return f"not measured: the back end is {jax.default_backend()}"
    try:
        import torch
        from fla.ops.mesa_net import chunk_mesa_net  # pyright: ignore
    except ImportError as error:
        return f"not measured: {error}"
    q, k, v, ridge, error = (torch.tensor(np.asarray(x), device="cuda") for x in arguments)
    q, k, v, error = (x.to(torch.bfloat16) for x in (q, k, v, error))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ridge = ridge[:, None].expand(-1, q.shape[-1]).contiguous()
    gate, weight = torch.zeros(q.shape[:3], device="cuda"), torch.ones(q.shape[:3], device="cuda")

    def output() -> Any:
        return chunk_mesa_net(*leaves, gate, weight, ridge, max_CG_iteration=30)[0]

    def forward() -> None:
        output()
        torch.cuda.synchronize()

    def both() -> None:
        torch.autograd.grad((output() * error).sum(), leaves)
        torch.cuda.synchronize()

    return forward, both


def mesa_layer(toy: bool) -> Figures:
    """Forward and backward in float32, in turns; ratios are to ours."""
    found: Figures = {}
    for length in (64,) if toy else (1024, 4096, 16384):
        q, k, v, ridge, error = mesa_benchmark.draw(length)
        # unit keys, as that library wants them
        arguments = (q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, ridge, error)
        peers = {"mesa": mesa}
        if length <= 4096:  # its scores are time by time
            peers["softmax"] = mesa_benchmark.softmax
        runs: dict[str, Callable[[], Any]] = {}
        figures: Figures = {}
        for name, function in peers.items():
            runs[name], figures[name] = mesa_benchmark.gradient(function, arguments)
        kernel = triton(arguments)
        if isinstance(kernel, str):
            figures["flash-linear-attention, Triton"] = kernel
        else:
            runs["flash-linear-attention, Triton"] = kernel[1]
            runs["flash-linear-attention, Triton, forward alone"] = kernel[0]
        seconds = paired(runs, 2 if toy else 10)
        for name, times in seconds.items():
            figures[name] = figures.get(name, {}) | {
                "ms": 1e3 * float(np.median(times)),
                "times mesa": ratio(times, seconds["mesa"]),
            }
        found[f"time {length}"] = figures
    return found


def marginals(toy: bool) -> Figures:
    """Span and tag marginals of a batch of sentences."""
    sizes = ((2, 3, 5, 2, 4),) if toy else ((30, 60, 1000, 32, 20), (30, 60, 1000, 256, 40))
    found: Figures = {}
    for n, p, v, batch, length in sizes:
        weights, tokens = chart_benchmark.draw(n, p, v, batch, length)
        given = (weights, tokens, jnp.full(batch, length), jnp.zeros((batch, length), bool))

        def run(*data: Any) -> Any:
            out = chart._inside_outside(*data)
            return out.span_marginals, out.tag_marginals

        ours, cost = chart_benchmark.compiled(run, *given)
        seconds = chart_benchmark.best_of(ours, 2 if toy else 10)
        work = chart_benchmark.flops(n, p, batch, length)
        found[f"{n} nonterminals, {p} pre-terminals, batch {batch}, length {length}"] = {
            "ms": 1e3 * seconds,
            "GF/s": work / seconds / 1e9,
            **cost,
        }
    return found | {"matrix product, GF/s": None if toy else chart_benchmark.peak()}


def simulated(toy: bool) -> Figures:
    """TinT's pass against the training step that it simulates."""
    if toy:
        return tint_benchmark.measure(layers=1, width=8, time=6)
    return {
        f"batch {batch}": tint_benchmark.measure(layers=4, width=192, time=128, batch=batch)
        for batch in (1, 16)
    }


def patches(toy: bool) -> Figures:
    """All layers times all tokens, one compilation."""
    layers, tokens, batch, chunk = (2, 4, 4, 2) if toy else (48, 64, 256, 32)
    construction = CATALOGUE["gradient-descent"](
        num_examples=tokens - 1, steps=layers - 1, step_size=1.0
    )
    model, seconds, runs = construction.compile().model, [], 0
    for seed in range(2 if toy else 4):
        keys = jax.random.split(jax.random.key(seed))
        base, source = (construction.sample(key, batch) for key in keys)
        start = time.perf_counter()
        effect = np.asarray(sweep(construction, model, base, source, chunk=chunk).effect)
        seconds.append(time.perf_counter() - start)
        runs = effect.size
    return {
        "patched runs": runs,
        "batch": batch,
        "seconds of the first sweep, with its compilation": seconds[0],
        "patched runs a second": runs / min(seconds[1:]),
    }


def certificates(toy: bool) -> Figures:
    """Every family's errors in both dtypes; a construction is exact on whatever runs it."""
    found: Figures = {}
    for name in ("gradient-descent",) if toy else CATALOGUE:
        construction = CATALOGUE[name](**CATALOGUE[name].example())
        certificate = verify(construction, batch=8 if toy else 256)
        found[name] = {
            e.dtype: {"verdict": e.verdict, "error": e.max_rel_error, "tolerance": e.tolerance}
            for e in certificate.errors
        }
    return found


PARTS: dict[str, Callable[[bool], Figures]] = {
    "fits": fits,
    "mesa layer, 4 heads of 32, batch 4": mesa_layer,
    "chart": marginals,
    "TinT": simulated,
    "patches": patches,
    "certificates": certificates,
}


def measure(toy: bool, minutes: float, keep: Callable[[Figures], None]) -> Figures:
    """Every part that can still begin in time; `keep` is given what there is after each."""
    began = time.perf_counter()
    figures: Figures = {"machine": machine(), "toy sizes": toy}
    for name, part in PARTS.items():
        start = time.perf_counter()
        if start - began > 60 * minutes:
            figures[name] = f"not measured: {minutes:g} minutes had passed"
        else:
            figures[name] = part(toy) | {"seconds for this part": time.perf_counter() - start}
            jax.clear_caches()
        keep(figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument("--minutes", type=float, default=8, help="begin no part after this time")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for them")
    given = parser.parse_args()
    file = given.out / f"device_{jax.default_backend()}.json"

    def keep(figures: Figures) -> None:
        if given.save:
            given.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(figures, indent=2) + "\n")

    toy = given.toy or jax.default_backend() == "cpu"
    print(json.dumps(measure(toy, given.minutes, keep), indent=2))


if __name__ == "__main__":
    main()
