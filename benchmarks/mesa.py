"""The mesa layer forward and backward on one core, against what one would use instead.

All peers but one are written out here, from formulas. "naive CG" is torch: every H_t formed, 30
steps of conjugate gradients with 1e-5 in their denominators, for the output and again for the
implicit gradient. "flash-linear-attention, naive CG" is that library's own reference in torch, in
chunks and by autograd, where the library can be imported. "Sherman-Morrison
scan" is the recursion of von Oswald et al. 2023 (arXiv 2309.05858, eq. 7-8) by JAX autodiff.
"softmax" is plain attention, "linear attention" the chunked one that the layer is made of. Ratios
are of CPU times, the best of several turns in one run. Start it with one core (`taskset -c 0`) to
compare.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
).strip()

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report
from jax import Array, lax

from constructions.mesa_layer import mesa
from constructions.mesa_layer.problem import causal, decay_of, join, split, states

BATCH, HEADS, DIM = 4, 4, 32
METHODS = ("chunked", "scan", "conjugate-gradients", "cholesky")


def draw(length: int) -> tuple[Array, ...]:
    """Queries, keys, values, ridge, and a cotangent."""
    rng = np.random.default_rng(0)
    q, k, v, error = rng.normal(size=(4, BATCH, length, HEADS, DIM))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, np.ones(HEADS), error))


def scan(query: Array, key: Array, value: Array, ridge: Array) -> Array:
    """R_t = R_{t-1} - R k k^T R / (1 + k^T R k), G_t = G_{t-1} + v k^T, o_t = G_t R_t q_t."""
    batch, _, heads, dim = query.shape
    inverse = jnp.broadcast_to(jnp.eye(dim) / ridge[:, None, None], (batch, heads, dim, dim))
    moment = jnp.zeros((batch, heads, value.shape[-1], dim))

    def step(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple:
        inverse, moment = carry
        q, k, v = xs
        u = (inverse * k[..., None, :]).sum(-1)
        share = 1 / (1 + (k * u).sum(-1))
        inverse = inverse - share[..., None, None] * u[..., :, None] * u[..., None, :]
        moment = moment + v[..., :, None] * k[..., None, :]
        x = (inverse * q[..., None, :]).sum(-1)
        return (inverse, moment), (moment * x[..., None, :]).sum(-1)

    xs = tuple(x.swapaxes(0, 1) for x in (query, key, value))
    return lax.scan(step, (inverse, moment), xs)[1].swapaxes(0, 1)


def softmax(query: Array, key: Array, value: Array, ridge: Array) -> Array:
    """Plain causal attention; the ridge has no part in it."""
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


def linear_attention(query: Array, key: Array, value: Array, ridge: Array) -> Array:
    """sum_{s <= t} (q_t . k_s) v_s in chunks."""
    q, k, v = (split(x, 32) for x in (query, key, value))
    decay = decay_of(None, q.shape[0], 32, q.dtype)
    return join(causal(q, k, v, states(k, v, decay), decay), query.shape[1])


def gradient(function: Callable, arguments: tuple[Array, ...]) -> tuple[Callable, dict]:
    """Forward and backward of one function, compiled, and what that costs."""

    def both(q: Array, k: Array, v: Array, ridge: Array, error: Array) -> tuple:
        output, back = jax.vjp(function, q, k, v, ridge)
        return output, *back(error)

    start = time.perf_counter()
    run = jax.jit(both).lower(*arguments).compile()
    cost = {
        "compilation, s": time.perf_counter() - start,
        "temporary memory, MB": run.memory_analysis().temp_size_in_bytes / 1e6,
    }
    return lambda: jax.block_until_ready(run(*arguments)), cost


def naive_cg(arguments: tuple[Array, ...], steps: int = 30) -> Callable[[], Any] | str:
    """The layer by conjugate gradients on every H_t in torch, or why not."""
    try:
        import torch
    except ImportError as error:
        return f"not measured: {error}; install the extra `peers`"
    torch.set_num_threads(1)
    q, k, v, ridge, error = (torch.tensor(np.asarray(x)) for x in arguments)
    q, k, v, error = (x.transpose(1, 2).contiguous() for x in (q, k, v, error))
    mask = torch.tril(torch.ones(q.shape[2], q.shape[2]))

    def solve(gram: Any, right: Any) -> Any:
        x = torch.zeros_like(right)
        residual = direction = right
        size = (residual**2).sum(-1, keepdim=True)
        for _ in range(steps):
            image = (gram @ direction[..., None])[..., 0] + ridge[:, None, None] * direction
            length = size / ((direction * image).sum(-1, keepdim=True) + 1e-5)
            x = x + length * direction
            residual = residual - length * image
            new = (residual**2).sum(-1, keepdim=True)
            direction = residual + new / (size + 1e-5) * direction
            size = new
        return x

    @torch.no_grad()
    def run() -> Any:
        gram = (k[..., :, None] * k[..., None, :]).cumsum(2)
        x = solve(gram, q)
        keys = (x @ k.mT) * mask
        output = keys @ v
        values = (error @ v.mT) * mask
        adjoint = solve(gram, values @ k)
        d_key = values.mT @ x - keys.mT @ adjoint - ((adjoint @ k.mT) * mask).mT @ x
        return output, adjoint, d_key, keys.mT @ error, -(x * adjoint).sum((0, 2, 3))

    return run


def library_cg(arguments: tuple[Array, ...], steps: int = 30) -> Callable[[], Any] | str:
    """The reference of flash-linear-attention, or why not."""
    try:
        import torch
        from fla.ops.mesa_net.naive import naive_mesa_net_CG  # pyright: ignore
    except ImportError as error:
        return f"not measured: {error}"
    torch.set_num_threads(1)
    q, k, v, ridge, error = (torch.tensor(np.asarray(x)) for x in arguments)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ridge = ridge[:, None].expand(-1, q.shape[-1])
    log_gate, weight = torch.zeros(q.shape[:-1]), torch.ones(q.shape[:-1])

    def run() -> Any:
        output = naive_mesa_net_CG(*leaves, log_gate, ridge, weight, 32, steps)[0]
        return output.detach(), *torch.autograd.grad((output * error).sum(), leaves)

    return run


def turns(runs: dict[str, Callable[[], Any]], rounds: dict[str, int]) -> dict[str, float]:
    """Least CPU time of each in ms, all in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for number in range(max(rounds.values())):
        for name, run in runs.items():
            if number < rounds[name]:
                start = time.process_time()
                run()
                best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def speed() -> dict[str, Any]:
    """Forward and backward of every method and peer at time 1024, of the default at 4096."""
    arguments, long = draw(1024), draw(4096)
    functions: dict[str, Callable] = {
        **{name: (lambda *a, name=name: mesa(*a, method=name)) for name in METHODS},
        "chunked, not refined": lambda *a: mesa(*a, refinements=0),
        "Sherman-Morrison scan, autodiff": scan,
        "softmax": softmax,
        "linear attention": linear_attention,
    }
    compiled = {name: gradient(function, arguments) for name, function in functions.items()}
    compiled["chunked, time 4096"] = gradient(functions["chunked"], long)
    runs = {name: run for name, (run, _) in compiled.items()}
    rounds = {name: 10 for name in runs} | dict.fromkeys(METHODS[1:], 2) | {"chunked": 20}
    missing, outputs = {}, runs["chunked"]()
    # of each peer the output that its method is to be right in: autograd through thirty steps of
    # conjugate gradients gives queries and keys no usable derivative
    peers = {
        "naive CG, 30 steps, torch": (naive_cg(arguments), 2, lambda x: x.swapaxes(1, 2)),
        "flash-linear-attention, naive CG, 30 steps": (library_cg(arguments), 0, lambda x: x),
    }
    for name, (theirs, number, laid_out) in peers.items():
        if isinstance(theirs, str):
            missing[name] = theirs
            continue
        runs[name], rounds[name] = theirs, 2
        found, ours = laid_out(theirs()[number].numpy()), np.asarray(outputs[number])
        assert np.abs(found - ours).max() < 0.05 * np.abs(ours).max()
    best = turns(runs, rounds)
    figures: dict[str, Any] = {}
    for name, ms in best.items():
        cost = compiled[name][1] if name in compiled else {}
        figures[name] = {"ms": ms, "times chunked": ms / best["chunked"], **cost}
    return figures | missing


def dynamics(length: int, batch: int = 4, dim: int = 10) -> tuple[np.ndarray, ...]:
    """Queries, keys, values s_t, s_{t-1}, s_t of rotating states with noise of .01."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(batch, dim, dim)))[0]
    state = [rng.uniform(-1, 1, (batch, dim))]
    for _ in range(length - 1):
        noise = 0.01 * rng.normal(size=(batch, dim))
        state.append(np.einsum("bij,bj->bi", turn, state[-1]) + noise)
    now = np.stack(state, 1).astype(np.float32)[:, :, None]
    before = np.concatenate([np.zeros_like(now[:, :1]), now[:, :-1]], 1)
    return now, before, now


def error_of(method: str, ridge: float, length: int) -> dict[str, float]:
    """Relative errors (root mean squares) in float32, against float64."""
    tokens = dynamics(length)
    q, k, v = (x.astype(np.float64) for x in tokens)
    weight = np.random.default_rng(1).normal(size=q.shape)
    gram = np.cumsum(k[..., :, None] * k[..., None, :], 1) + ridge * np.eye(k.shape[-1])
    moment = np.cumsum(v[..., :, None] * k[..., None, :], 1)
    right = (moment @ np.linalg.solve(gram, q[..., None]))[..., 0]

    def slopes(method: str, *data: Array) -> tuple[tuple[Array, ...], Array]:
        def loss(q: Array, k: Array, v: Array, ridge: Array) -> tuple[Array, Array]:
            output = mesa(q, k, v, ridge, method=method)
            return (output * data[4]).sum(), output

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*data[:4])

    arrays = (*tokens, np.full(1, ridge), weight)
    with jax.enable_x64(True):
        exact, _ = slopes("cholesky", *(jnp.asarray(x, jnp.float64) for x in arrays))
        exact = [np.asarray(x) for x in exact]
    found, output = slopes(method, *(jnp.asarray(x, jnp.float32) for x in arrays))

    def relative(x: Any, y: np.ndarray) -> float:
        return float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))

    names = ("output", "d query", "d key", "d value")
    pairs = zip((output, *found), (right, *exact), strict=True)
    return dict(zip(names, (relative(x, y) for x, y in pairs), strict=True))


def main() -> None:
    size = f"batch {BATCH}, heads {HEADS}, dim {DIM}, time 1024, forward and backward"
    errors = {
        f"ridge {ridge}, time {length}, {method}": error_of(method, ridge, length)
        for ridge in (1.0, 1e-3)
        for length in (64, 1024, 4096)
        for method in METHODS
    }
    report("mesa", {size: speed(), "float32 error, linear dynamics, dim 10": errors})


if __name__ == "__main__":
    main()
