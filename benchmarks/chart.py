"""Span and tag marginals of a batch of sentences, on one core, against two peers.

torch-struct (`SentCFG`, the extra `peers`) gives marginals by autodiff of a log-semiring chart, and
rule counts as well. The log-semiring baseline is what a plain JAX program for this is: logsumexp
over splits, a product with the rules, one sentence under `vmap`, a scan over widths, autodiff. It
stands for SynJax, which is not on the package index: of the same kind, SynJax's vmapped form with
one rule tensor took 765 ms at 10 nonterminals, 20 pre-terminals, batch 32, length 20, on a core
whose matrix product reached 88 GF/s. NLTK has no inside-outside; the last figure is of the most
probable trees, against its `ViterbiParser`, on sentences of the English-like grammar.

The bound is that of counted multiplications at the speed of a 1024^3 float32 matrix product in the
same process: for each span the outer products of its splits and one N^2 x N product with the rules,
N x N for a leaf at either end, rules times leaves once a word; marginals are three times that.
Start it with one core (`taskset -c 0`) to compare.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import nltk
import numpy as np
from common import report
from jax import lax

from synthetic.grammar import chart
from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Weights
from synthetic.grammar.sentences import sample

SETTINGS = ((10, 20, 200, 32, 10), (10, 20, 200, 32, 20), (30, 60, 1000, 32, 10))


def draw(n: int, p: int, v: int, batch: int, length: int) -> tuple[Weights, jax.Array]:
    """A random dense grammar and random sentences."""
    rng, s = np.random.default_rng(0), n + p
    arrays = (
        rng.dirichlet(np.ones(s)),
        rng.dirichlet(np.ones(s * s), n).reshape(n, s, s),
        rng.dirichlet(np.ones(v), p),
    )
    weights = Weights(*(jnp.asarray(a, jnp.float32) for a in arrays))
    return weights, jnp.asarray(rng.integers(0, v, (batch, length)), jnp.int32)


def best_of(run: Callable[[], Any], rounds: int = 5, limit: float = 60.0) -> float:
    """Shortest of a few runs, in seconds; fewer where one takes long."""
    seconds, began = [], time.perf_counter()
    while len(seconds) < rounds and time.perf_counter() - began < limit:
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak() -> float:
    """GF/s of a float32 matrix product of 1024^3."""
    a, product = jnp.ones((1024, 1024)), jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * 1024**3 / best_of(lambda: product(a, a)) / 1e9


def flops(n: int, p: int, batch: int, length: int) -> float:
    """Multiplications and additions of marginals, at the least that this order of sums allows."""
    spans = length * (length - 1) / 2
    splits = length * (length - 1) * (length + 1) / 6
    inside = splits * n**2 + spans * (n**3 + 2 * n**2) + 2 * length * p * n * (n + p)
    return 3 * 2 * batch * inside


def log_semiring(weights: Weights, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Span and tag marginals as derivatives of log Z by spans' and tags' log potentials."""
    root, rules, emission = (jnp.log(a) for a in weights)
    n, s = rules.shape[:2]
    length = tokens.shape[1]

    def log_z(spans: jax.Array, tags: jax.Array, words: jax.Array) -> jax.Array:
        table = jnp.full((length + 1, length, s), -1e30)
        table = table.at[1, :, n:].set(emission[:, words].T + tags)
        m, i = jnp.arange(1, length), jnp.arange(length)

        @jax.checkpoint
        def step(table: jax.Array, width: jax.Array) -> tuple[jax.Array, None]:
            left = table[m][:, :, :, None]
            row = jnp.clip(i + m[:, None], 0, length - 1)
            right = table[jnp.clip(width - m, 0)[:, None], row][:, :, None]
            fits = (m[:, None] < width) & (i + width <= length)
            pairs = jnp.where(fits[..., None, None], left + right, -1e30)
            pairs = jax.nn.logsumexp(pairs, 0)  # over splits, then over rules
            most = pairs.max((1, 2), keepdims=True)
            values = jnp.einsum("ibc,abc->ia", jnp.exp(pairs - most), jnp.exp(rules))
            values = jnp.log(values) + most[..., 0] + spans[width]
            return table.at[width, :, :n].set(values), None

        table, _ = lax.scan(step, table, jnp.arange(2, length + 1))
        return jax.nn.logsumexp(table[length, 0, :n] + root[:n])

    spans = jnp.zeros((length + 1, length, n))
    tags = jnp.zeros((length, s - n))
    return jax.vmap(jax.grad(log_z, (0, 1)), (None, None, 0))(spans, tags, tokens)


def torch_struct(weights: Weights, tokens: jax.Array) -> Callable[[], Any] | str:
    """Marginals by torch-struct, or why not."""
    try:
        import torch
        from torch_struct import SentCFG
    except ImportError as error:
        return f"not measured: {error}; install the extra `peers`"
    torch.set_num_threads(1)
    n, batch = weights.rules.shape[0], tokens.shape[0]
    root, rules, emission = (torch.tensor(np.log(np.asarray(a))) for a in weights)
    terms = emission.T[torch.tensor(np.asarray(tokens)).long()].contiguous()
    rules = rules.expand(batch, *rules.shape).contiguous()
    tops = root[:n].expand(batch, n).contiguous()
    return lambda: SentCFG((terms, rules, tops)).marginals


def compiled(function: Callable, *arguments: Any) -> tuple[Callable[[], Any], dict[str, float]]:
    start = time.perf_counter()
    run = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = run.memory_analysis()
    run(*arguments)
    return lambda: run(*arguments), {
        "compilation, s": seconds,
        "temporary memory, MB": memory.temp_size_in_bytes / 1e6,
    }


def measure(n: int, p: int, v: int, batch: int, length: int) -> dict[str, Any]:
    weights, tokens = draw(n, p, v, batch, length)
    lengths, mask = jnp.full(batch, length), jnp.zeros((batch, length), bool)

    def marginals(*data: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = chart._inside_outside(*data)
        return found.span_marginals, found.tag_marginals

    ours, cost = compiled(marginals, weights, tokens, lengths, mask)
    speed = peak()
    seconds, speed = best_of(ours, 20), max(speed, peak())
    figures: dict[str, Any] = {
        "matrix product, GF/s": speed,
        "orrery": {
            "ms": 1e3 * seconds,
            **cost,
            "fraction of the bound": flops(n, p, batch, length) / 1e9 / speed / seconds,
        },
    }
    run, cost = compiled(log_semiring, weights, tokens)
    theirs = best_of(run, 3)
    spans, tags = run()
    np.testing.assert_allclose(tags, ours()[1], atol=1e-3)
    figures["log semiring"] = {"ms": 1e3 * theirs, **cost, "times orrery's": theirs / seconds}
    run = torch_struct(weights, tokens)
    if isinstance(run, str):
        return {**figures, "torch-struct": run}
    theirs = best_of(run, 3)
    figures["torch-struct"] = {"ms": 1e3 * theirs, "times orrery's": theirs / seconds}
    return figures


def against_nltk(batch: int = 32, length: int = 10) -> dict[str, Any]:
    """Most probable trees of sentences of at most `length` words."""
    grammar = named("english")
    drawn = sample(grammar, jax.random.key(0), batch, length)
    weights, lengths = grammar.weights(), np.asarray(drawn.lengths)
    ours = lambda: chart.viterbi(weights, drawn.tokens, drawn.lengths)  # noqa: E731
    found = np.asarray(ours().log_prob)
    seconds = best_of(ours, 20)
    parser, began = nltk.ViterbiParser(grammar.to_nltk()), time.perf_counter()
    trees = [
        next(parser.parse([grammar.vocabulary[w] for w in row[:n]]))
        for row, n in zip(np.asarray(drawn.tokens), lengths, strict=True)
    ]
    theirs = time.perf_counter() - began
    np.testing.assert_allclose(found, [np.log(tree.prob()) for tree in trees], rtol=1e-5)
    return {
        "orrery, ms": 1e3 * seconds,
        "nltk, ms": 1e3 * theirs,
        "nltk / orrery": theirs / seconds,
    }


def main() -> None:
    figures = {
        f"{n} nonterminals, {p} pre-terminals, {v} words, batch {b}, length {length}": measure(
            n, p, v, b, length
        )
        for n, p, v, b, length in SETTINGS
    }
    report("chart", figures | {"most probable trees": against_nltk()})


if __name__ == "__main__":
    main()
