"""The layer and its derivative, for any method that solves its linear systems.

With G_t = sum_{s <= t} zeta_ts beta_s v_s k_s^T, H_t the same sum of k_s k_s^T, and

    q*_t = (H_t + ridge)^-1 q_t,     o_t = G_t q*_t,     e_t = dL / do_t,
    e*_t = (H_t + ridge)^-1 G_t^T e_t

the derivative needs a second solve with the same matrices and nothing of the first but q*
(von Oswald et al. 2025, arXiv 2506.05233, appendix D; the backward recursion of arXiv 2309.05858,
appendix C, takes the inverse apart again, which is unstable). With the pairs p_s = (v_s, -k_s) and
the cotangents c_t = (e_t, e*_t) the loss changes by

    dL = sum_t e*_t . (dq_t - dridge q*_t) + sum_{s <= t} d(zeta_ts beta_s (q*_t . k_s) (c_t . p_s))

where the differential leaves q* and c as they are. With Z_s = sum_{t >= s} zeta_ts q*_t c_t^T and
the parts (a_s, b_s) = Z_s^T k_s, of the sizes of v and k, the gradients are

    k_s:     beta_s (Z_s p_s - b_s)
    v_s:     beta_s a_s
    beta_s:  (a_s, b_s) . p_s
    gamma_s: sum_{r < s <= t} zeta_tr beta_r (q*_t . k_r) (c_t . p_r) / gamma_s

which are linear attentions backwards in time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from constructions.mesa_layer.problem import (
    Problem,
    Scalars,
    Settings,
    States,
    Tokens,
    anticausal,
    causal,
    condition,
    decay_of,
    dot,
    problem_of,
    states,
    weighted,
)


class Method(NamedTuple):
    """A way to solve the systems, and whether it allows forget gates.

    `prepare(problem)` is what both solves share; `solve(problem, prepared, right, settings)` gives
    the solutions.
    """

    prepare: Callable[[Problem], Any]
    solve: Callable[[Problem, Any, Tokens, Settings], Tokens]
    forgets: bool


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def solved(
    method: Method,
    settings: Settings,
    query: Tokens,
    key: Tokens,
    value: Tokens,
    ridge: Float[Array, "head 1 dim"],
    input_gate: Scalars | None,
    forget_gate: Scalars | None,
) -> tuple[Tokens, Scalars]:
    """o_t = G_t (H_t + ridge)^-1 q_t in chunks, and bounds of the condition numbers."""
    return _forward(method, settings, query, key, value, ridge, input_gate, forget_gate)[0]


def _forward(
    method: Method,
    settings: Settings,
    query: Tokens,
    key: Tokens,
    value: Tokens,
    ridge: Array,
    input_gate: Scalars | None,
    forget_gate: Scalars | None,
) -> tuple[tuple[Tokens, Scalars], tuple[Problem, Any, Tokens, States, Tokens]]:
    chunks, *_, chunk, _ = key.shape
    decay = decay_of(forget_gate, chunks, chunk, key.dtype)
    problem = problem_of(key, ridge, input_gate, forget_gate, decay)
    prepared = method.prepare(problem)
    solution = _finite(method.solve(problem, prepared, query, settings), settings)
    values = weighted(value, input_gate)
    moment = states(key, values, decay)
    output = causal(solution, key, values, moment, decay)
    return (output, condition(problem)), (problem, prepared, value, moment, solution)


def _backward(
    method: Method,
    settings: Settings,
    saved: tuple[Problem, Any, Tokens, States, Tokens],
    errors: tuple[Tokens, Scalars],
) -> tuple[Array | None, ...]:
    error, _ = errors
    problem, prepared, value, moment, solution = saved
    key, beta, decay = problem.key, problem.input_gate, problem.decay
    right = causal(error, weighted(value, beta), key, moment.mT, decay)
    adjoint = _finite(method.solve(problem, prepared, right, settings), settings)
    d_ridge = -(solution * adjoint).sum((0, 1, 3))[:, None]

    pair = jnp.concatenate([value, -key], -1)
    cotangent = jnp.concatenate([error, adjoint], -1)
    after = states(solution, cotangent, decay, reverse=True)
    of_key = anticausal(pair, cotangent, solution, after.mT, decay)
    of_pair = anticausal(key, solution, cotangent, after, decay)
    size = value.shape[-1]
    d_key = weighted(of_key - of_pair[..., size:], beta)
    d_value = weighted(of_pair[..., :size], beta)
    d_beta = None if beta is None else (pair * of_pair).sum(-1)
    d_gamma = None
    if problem.forget_gate is not None:
        before = jnp.concatenate([moment, -problem.gram], -1)
        d_gamma = _of_forget_gate(problem, pair, cotangent, solution, before, after)
    return adjoint, d_key, d_value, d_ridge, d_beta, d_gamma


def _finite(x: Tokens, settings: Settings) -> Tokens:
    """Solutions without those that overflowed, where `mesa` takes these times from elsewhere.

    Their cotangents are 0 there, and a product with 0 has to be 0.
    """
    return jnp.where(jnp.isfinite(x), x, 0) if settings.refinements else x


def _of_forget_gate(
    problem: Problem,
    pair: Tokens,
    cotangent: Tokens,
    solution: Tokens,
    before: States,
    after: States,
) -> Scalars:
    """dgamma_s: all that passes from r < s to t >= s, in four parts by r and t in the chunk or not.

    Sums of what does pass: differences of cumulative sums over all pairs would leave rounding
    errors where the gate lets nothing through, and divide them by it.
    """
    key, decay, gate = problem.key, problem.decay, problem.forget_gate
    assert gate is not None
    earlier = weighted(key, problem.input_gate)
    upto = jnp.tril(jnp.ones_like(decay.within[0, 0, 0]))  # [t, s]: t >= s
    ahead = jnp.triu(upto.T, 1)  # [r, s]: r < s
    passing = dot(solution, earlier.mT) * dot(cotangent, pair.mT) * decay.within
    inside = (dot(passing, ahead) * upto).sum(-2)
    from_before = decay.since_start * (dot(solution, before) * cotangent).sum(-1)
    to_after = decay.until_end * (dot(earlier, after) * pair).sum(-1)
    through = decay.across * (before * after).sum((-2, -1))
    passed = inside + dot(from_before, upto) + dot(to_after, ahead) + through[..., None]
    return passed / gate


solved.defvjp(_forward, _backward)
