"""The mesa layer as a function of queries, keys and values."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from constructions.mesa_layer.orthogonal import by_rotations
from constructions.mesa_layer.problem import Given, checked, join, split
from constructions.mesa_layer.solvers import METHODS, Settings, solved
from synthetic.guards import number

AXES = ("batch", "time", "head")
LARGE = 2.0**20  # numbers up to here, of few millions of tokens, overflow in no sum
# the largest condition number at which sums and solves in this dtype keep their promise
WELL_CONDITIONED = {"float32": 2.0**9, "float64": 2.0**20}


def reference(
    query: Array,
    key: Array,
    value: Array,
    regularization: Array,
    input_gate: Array | None = None,
    forget_gate: Array | None = None,
) -> Array:
    """What `mesa` computes, as it is written in the papers: arguments as there, slow, unchecked.

    H <- gamma H + beta k k^T,   G <- gamma G + beta v k^T,   o = G (H + ridge)^-1 q
    """
    ridge = regularization if regularization.ndim == 2 else regularization[:, None]
    ridge = ridge[..., None] * jnp.eye(query.shape[-1])
    ones = jnp.ones(query.shape[:-1], query.dtype)
    beta = ones if input_gate is None else input_gate
    gamma = ones if forget_gate is None else forget_gate

    def token(sums: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple:
        gram, moment = sums
        q, k, v, beta, gamma = xs
        weighted, kept = beta[..., None, None] * k[..., None, :], gamma[..., None, None]
        gram, moment = (
            kept * gram + k[..., None] * weighted,
            kept * moment + v[..., None] * weighted,
        )
        solution = jnp.linalg.solve(gram + ridge, q[..., None])
        return (gram, moment), (moment @ solution)[..., 0]

    by_time = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, beta, gamma))
    batch, _, heads, dim = query.shape
    gram, moment = (jnp.zeros((batch, heads, n, dim), query.dtype) for n in (dim, value.shape[-1]))
    return jnp.moveaxis(lax.scan(token, (gram, moment), by_time)[1], 0, 1)


def mesa(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    regularization: ArrayLike,
    *,
    input_gate: ArrayLike | None = None,
    forget_gate: ArrayLike | None = None,
    method: str = "auto",
    chunk: int | None = None,
    refinements: int = 1,
    steps: int | None = None,
    tolerance: float | None = None,
) -> Array:
    """What ridge regression on all pairs (k_s, v_s) so far predicts for the query.

        o_t = G_t (H_t + ridge)^-1 q_t
        G_t = sum_{s <= t} zeta_ts beta_s v_s k_s^T,    H_t = sum_{s <= t} zeta_ts beta_s k_s k_s^T

    with zeta_ts the product of the forget gates in (s, t]; the pair at t is included and the ridge
    does not decay (von Oswald et al. 2023, arXiv 2309.05858, eq. 4-8, whose 1 / lambda is the ridge
    here; with gates von Oswald et al. 2025, arXiv 2506.05233, eq. 5-10). Derivatives are implicit
    and as cheap as the layer, in reverse mode, forward mode, and the one over the other
    (Hessian-vector products); nothing of size time x dim^2 is stored.

    Precision, of every method unless `refinements` is 0. Errors of the output are relative to its
    largest entry over all times of a sequence and head (a time whose output is small beside others
    may be off by more of its own size), those of a gradient to the largest entry of the gradient
    with respect to that argument, of the same sequence and head. In float32 they are at most 1e-4
    and 1e-3, up to condition numbers of H_t + ridge of 1e11, and beyond wherever the keys
    themselves are well-conditioned, however small the ridge is; outputs in float64 at most 1e-9.
    Times whose condition number may exceed 512 (float32) or 2^20 (float64) are computed by
    rotations of the data in float64 (see `orthogonal`), token by token: slower, as "scan" is. A key
    or value that is not finite, or beyond 2^200 in float64, makes outputs NaN from its time on,
    none before.

    The default method is the chunked one without, conjugate gradients with a forget gate:

    - "chunked": exact, all times at once by products of matrices, then refined. No forget gate.
    - "scan": exact, token by token with a state of constant size, in many short steps. No forget
      gate.
    - "conjugate-gradients": all times at once, until `tolerance` is reached or `steps` are over.
    - "cholesky": one factor per time. The reference: dim^3 work per token.

    Args:
        query: `[batch, time, head, dim]`.
        key: `[batch, time, head, dim]`.
        value: `[batch, time, head, value_dim]`.
        regularization: the ridge, `[head]` or `[head, dim]` (a diagonal), positive.
        input_gate: beta, `[batch, time, head]`, at least 0; ones if not given.
        forget_gate: gamma, `[batch, time, head]`, in (0, 1]; ones if not given.
        method: one of the above, or "auto".
        chunk: tokens in a chunk; by default 32, or 64 where dim is more than 32.
        refinements: steps x <- x + (H + ridge)^-1 (q - (H + ridge) x) of "chunked" and "scan". The
            first takes off what float32 loses in the inverse, the next bring little. With none,
            no method looks at condition numbers.
        steps: the most steps of conjugate gradients; 4 dim + 20 by default, for in floating point
            ill-conditioned systems take more than dim.
        tolerance: residual at which they end, relative to the right side; the dtype's epsilon by
            default.

    Returns:
        `[batch, time, head, value_dim]`, in the dtype that query, key and value promote to;
        computed in float32 or more.

    Raises:
        ValueError: shapes or dtypes are other than these, a value is out of range (of concrete
            arrays only), the method is unknown or has no forget gate.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    dtype = jnp.result_type(query, key, value)
    given = checked(query, key, value, regularization, input_gate, forget_gate, AXES)
    dim, forget = given.query.shape[-1], given.forget_gate
    if method == "auto":
        method = "chunked" if forget is None else "conjugate-gradients"
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, must be one of {['auto', *METHODS]}")
    if forget is not None and not METHODS[method].forgets:
        able = [name for name, one in METHODS.items() if one.forgets]
        raise ValueError(f"method is {method!r}, must be one of {able} with a forget_gate")
    chunk = (32 if dim <= 32 else 64) if chunk is None else chunk
    steps = 4 * dim + 20 if steps is None else steps
    numbers = {"chunk": (chunk, 1), "refinements": (refinements, 0), "steps": (steps, 1)}
    for name, (size, least) in numbers.items():
        number(name, size, whole=True, least=least)
    if tolerance is None:
        tolerance = float(jnp.finfo(given.query.dtype).eps)
    elif not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, must be at least 0")
    chunk = min(chunk, given.query.shape[1])
    return _mesa(method, chunk, Settings(refinements, steps, tolerance), given).astype(dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _mesa(method: str, chunk: int, settings: Settings, given: Given) -> Array:
    beta, gamma = given.input_gate, given.forget_gate
    cut = given._replace(
        query=split(given.query, chunk),
        key=split(given.key, chunk),
        value=split(given.value, chunk),
        input_gate=None if beta is None else split(beta, chunk),
        forget_gate=None if gamma is None else split(gamma, chunk, fill=1.0),
    )
    wild = out_of_range(cut)
    output, condition = solved(METHODS[method], settings, tamed(wild, cut))
    if settings.refinements:
        condition = lax.stop_gradient(condition)
        if method == "scan":  # its errors stay in the state
            condition = _largest_so_far(condition)
        doubtful = wild | ~(condition <= WELL_CONDITIONED[given.key.dtype.name])[..., None]
        output = by_rotations(doubtful, output, cut)
    else:
        output = jnp.where(wild, jnp.nan, output)
    return join(jnp.asarray(output), given.query.shape[1])


def out_of_range(given: Given) -> Array:
    """Times whose sums of products may overflow, or are NaN, `[chunk, batch, head, time, 1]`."""
    query, key, value, ridge, input_gate, forget_gate = given

    def beyond(x: Array) -> Array:
        return ~(jnp.abs(x) <= LARGE).all(-1, keepdims=True)

    pair = beyond(key) | beyond(value)
    if input_gate is not None:
        pair |= beyond(input_gate[..., None])
    if forget_gate is not None:  # a smaller one leaves no digits of products with it
        pair |= ~(forget_gate >= LARGE**-3)[..., None]
    pair |= ~((ridge >= LARGE**-3) & (ridge <= LARGE**3)).all(-1)[:, None, None]
    # what has once entered the sums stays there
    so_far = _largest_so_far(pair[..., 0].astype(int))[..., None] > 0
    return lax.stop_gradient(so_far | beyond(query))


def _largest_so_far(x: Array) -> Array:
    """The largest entry at any time up to each, `[chunk, batch, head, time]`."""
    within = lax.cummax(x, axis=3)
    chunks = lax.cummax(within[..., -1:], axis=0)
    before = jnp.concatenate([within[:1, ..., :1], chunks[:-1]])
    return jnp.maximum(within, before)


def tamed(wild: Array, given: Given) -> Given:
    """The same with no token of those times: the other times are as they were."""
    query, key, value = (jnp.where(wild, 0, x) for x in given[:3])
    ridge, input_gate, forget_gate = given[3:]
    ridge = jnp.where((ridge >= LARGE**-3) & (ridge <= LARGE**3), ridge, 1)
    if input_gate is not None:
        input_gate = jnp.where(wild[..., 0], 0, input_gate)
    if forget_gate is not None:
        forget_gate = jnp.where(wild[..., 0], 1, forget_gate)
    return Given(query, key, value, ridge, input_gate, forget_gate)


def mesa_attention(
    query: ArrayLike,
    key: ArrayLike,
    regularization: ArrayLike,
    *,
    input_gate: ArrayLike | None = None,
    forget_gate: ArrayLike | None = None,
) -> Array:
    """The layer's attention weights: with them its output is o_t = sum_{s <= t} a_ts v_s.

        a_ts = zeta_ts beta_s k_s . (H_t + ridge)^-1 q_t

    is what it reads out if the value of token s is the s-th unit vector. Arguments as of `mesa`,
    whose default method this is.

    Returns:
        `[batch, head, time t, time s]`, 0 for s > t.

    Raises:
        ValueError: as `mesa`.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    checked(query, key, key, regularization, input_gate, forget_gate, AXES)
    batch, time, heads, _ = query.shape
    units = jnp.broadcast_to(jnp.eye(time, dtype=query.dtype)[:, None], (batch, time, heads, time))
    weights = mesa(
        query, key, units, regularization, input_gate=input_gate, forget_gate=forget_gate
    )
    return jnp.moveaxis(weights, 1, 2)
