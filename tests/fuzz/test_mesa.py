"""The mesa layer against its definition in exact fractions: all methods, decoding, weights."""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.fuzzing import COUNTS, built, examples, fuzz
from hypothesis import event
from hypothesis import strategies as st

from constructions.mesa_layer import METHODS, mesa, mesa_attention, mesa_start, mesa_step

TIME, DIM, VALUES = 6, 4, 2  # fewer pairs than dimensions, then more
MOST = 4  # allowed relative errors beyond that say nothing
KEYS = ("any", "any", "repeated", "parallel", "opposite", "nearly", "zero", "unit")
#: What is compared: the methods that take a forget gate, and those that take none.
WAYS = [*METHODS, "attention", "decoding"]


@dataclass
class Problem:
    """Arguments of `mesa` for one head, float64: `[time, ...]`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    ridge: np.ndarray
    input_gate: np.ndarray
    forget_gate: np.ndarray

    def rounded(self, dtype: Any) -> "Problem":
        """In another dtype, as exact numbers of it."""
        return Problem(*(np.asarray(a, dtype) for a in vars(self).values()))


@built
def problems(draw: Any) -> Problem:
    """Keys that repeat, are parallel or zero; sizes 1e-3 to 1e3, ridges 1e-8 to 1, any gates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    key = rng.normal(size=(TIME, DIM))
    for t in range(TIME):
        kind, other = draw(st.sampled_from(KEYS)), draw(st.integers(0, max(t - 1, 0)))
        changes = {
            "repeated": key[other],
            "parallel": 3 * key[other],
            "opposite": -key[other],
            "nearly": key[other] * (1 + 1e-4 * rng.normal(size=DIM)),
            "zero": 0 * key[t],
            "unit": np.eye(DIM)[other % DIM],
        }
        key[t] = changes.get(kind, key[t])
    key *= 10.0 ** draw(st.integers(-3, 3))
    ridge = np.full(DIM, 10.0 ** draw(st.integers(-8, 0)))
    if draw(st.booleans()):
        ridge *= rng.uniform(0.5, 2, DIM)
    gates = st.lists(st.sampled_from((1.0, 1.0, 0.5, 2.0, 0.0, 1e-3)), min_size=TIME, max_size=TIME)
    kept = st.lists(st.sampled_from((1.0, 1.0, 0.9, 0.5, 1e-3)), min_size=TIME, max_size=TIME)
    return Problem(
        rng.normal(size=(TIME, DIM)),
        key,
        rng.normal(size=(TIME, VALUES)),
        ridge,
        np.array(draw(st.one_of(st.just([1.0] * TIME), gates))),
        np.array(draw(st.one_of(st.just([1.0] * TIME), kept))),
    )


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """The solution of a linear system, by elimination in fractions."""
    rows = [[*row, x] for row, x in zip(matrix, right, strict=True)]
    for n in range(len(rows)):
        rows[n] = [x / rows[n][n] for x in rows[n]]  # positive definite: no pivot is 0
        for m in range(len(rows)):
            if m != n:
                rows[m] = [x - rows[m][n] * y for x, y in zip(rows[m], rows[n], strict=True)]
    return [row[-1] for row in rows]


def exact(p: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention weights `[t, s]`, condition numbers of H_t + ridge, and sizes of the weights.

    A size adds to |a_ts| what its product of key and query is rounded at, |k| |q| / |H_t + ridge|.
    """
    q, k, ridge, beta, gamma = (
        np.vectorize(Fraction, otypes=[object])(np.asarray(a, float))
        for a in (p.query, p.key, p.ridge, p.input_gate, p.forget_gate)
    )
    weights, sizes, conditions = np.zeros((TIME, TIME)), np.zeros((TIME, TIME)), np.zeros(TIME)
    gram = np.full((DIM, DIM), Fraction(0), object)
    left: list[Fraction] = []
    for t in range(TIME):
        left = [w * gamma[t] for w in left] + [beta[t]]
        gram = gram * gamma[t] + beta[t] * np.outer(k[t], k[t])
        full = gram + np.diag(ridge)
        x = np.array(solve(full.tolist(), q[t].tolist()))
        weights[t, : t + 1] = [float(w * (k[s] @ x)) for s, w in enumerate(left)]
        conditions[t] = np.linalg.cond(full.astype(float))
        over = np.linalg.norm(p.query[t]) / np.linalg.norm(full.astype(float), 2)
        rounded = [float(w) * np.linalg.norm(p.key[s]) * over for s, w in enumerate(left)]
        sizes[t, : t + 1] = np.abs(weights[t, : t + 1]) + rounded
    return weights, conditions, sizes


def found(p: Problem, way: str, dtype: Any) -> np.ndarray:
    """The output by one way, `[time, value]`; weights `[t, s]` for "attention"."""
    forgets = way in ("decoding", "attention") or METHODS[way].forgets
    gates = {"input_gate": p.input_gate} | ({"forget_gate": p.forget_gate} if forgets else {})
    gates = {name: jnp.asarray(a, dtype)[None, :, None] for name, a in gates.items()}
    q, k, v = (jnp.asarray(a, dtype)[None, :, None] for a in (p.query, p.key, p.value))
    ridge = jnp.asarray(p.ridge, dtype)[None]
    if way == "attention":
        return np.asarray(mesa_attention(q, k, ridge, **gates))[0, 0]
    if way != "decoding":
        return np.asarray(mesa(q, k, v, ridge, method=way, **gates))[0, :, 0]
    state, out = mesa_start(1, DIM, VALUES, ridge), []
    for t in range(TIME):
        now = {name: a[:, t] for name, a in gates.items()}
        state, o = mesa_step(state, q[:, t], k[:, t], v[:, t], ridge, **now)
        out.append(np.asarray(o)[0, 0])
    return np.stack(out)


@fuzz(quick=10, share=0.25, problem=problems(), double=st.booleans())
def test_mesa(problem: Problem, double: bool) -> None:
    """Finite everywhere, and as near as the layer promises where that says something.

    float32: 1e-4 up to condition numbers of 1e7, beyond that 50 roundings of the square root, by
    which rotations of the data are conditioned. float64: 400 roundings of the condition number.
    """
    double = double and examples() > 0  # which would compile everything once more
    dtype = np.float64 if double else np.float32
    worst: Counter[str] = Counter()
    with jax.enable_x64(double):
        problem = problem.rounded(dtype)
        remembers = Problem(**vars(problem) | {"forget_gate": np.ones(TIME)})
        oracles = {True: exact(problem), False: exact(remembers)}
        for way in WAYS:
            forgets = way in ("decoding", "attention") or METHODS[way].forgets
            weights, conditions, sizes = oracles[forgets]
            v = np.eye(TIME) if way == "attention" else np.asarray(problem.value, float)
            out = found(problem, way, dtype)
            assert np.isfinite(out).all(), f"{way}: not finite"
            size = sizes @ np.abs(v).max(1, keepdims=True)
            size = np.maximum(size, 1e-10)  # where a gate of 0 lets nothing in
            error = (np.abs(out - weights @ v) / size).max(1)
            eps = np.finfo(dtype).eps
            allowed = 400 * eps * conditions
            if not double:
                rotated = 50 * eps * np.sqrt(conditions)
                allowed = np.where(conditions <= 1e7, np.minimum(allowed, 1e-4), rotated)
            for t in range(TIME):
                if allowed[t] <= MOST:
                    assert error[t] <= allowed[t], (
                        f"{way}, time {t}: relative error {error[t]:.2e} at condition "
                        f"{conditions[t]:.2e}"
                    )
                elif error[t] > 0.01:
                    worst[way] += 1
    for way in worst:
        event(f"{way} wrong")
        COUNTS[f"mesa: problems beyond that, {np.dtype(dtype)}, {way} off by over 1 %"] += 1
