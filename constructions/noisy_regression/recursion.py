"""What a linear transformer computes on a regression context, layer by layer, as a recursion.

Tokens `e_i = (x_i; y_i)`; a layer adds `sum_k P_k G Q_k e_i` to each, `G = sum_i e_i e_i^T`. Every
token stays a linear function of its own start (Vladymyrov et al. 2024, Theorem 4.2 and Lemma 4.3):

    x_i^l = M x_i + y_i u,   y_i^l = a y_i - w . x_i,   T = [[M, u], [-w^T, a]],   e_i^l = T e_i

so that a context's whole computation is `(d + 1)^2` numbers whatever the number of examples, and
with `[[A, b], [c^T, delta]] = sum_k P_k G^l Q_k`, `G^l = T G^0 T^T`:

    M' = (I + A) M - b w^T,   u' = (I + A) u + a b,   a' = (1 + delta) a + c . u,
    w' = (1 + delta) w - M^T c,   that is   T' = (I + sum_k P_k T G^0 T^T Q_k) T,

from `T = I`. A query starts with y = 0; the prediction, minus its y entry, is `w . x_query`.

A DIAG layer has `P_k = diag(p_x I, p_y)`, `Q_k = diag(q_x I, q_y)`, of which the sums
`w_xx = sum_k p_x q_x, w_xy = sum_k p_x q_y, w_yx = sum_k p_y q_x, w_yy = sum_k p_y q_y` are all
that matters: with `Sigma, alpha, lambda` the blocks of `G^l`,

    A = w_xx Sigma,   b = w_xy alpha,   c = w_yx alpha,   delta = w_yy lambda.

The fits use `diag_weight` alone. The steps of FULL layers (`full_states`) and the reading of a DIAG
layer as gradient descent with momentum (`momentum_step`) are for use as a library.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from synthetic.tasks.noisy import Moments

# From this many layers on a matrix per context is cheaper than products nested one in another.
_DENSE = 5


class Gram(NamedTuple):
    """Blocks of `sum_i e_i e_i^T`; leading axes count contexts.

    Attributes:
        sigma: `sum_i x_i x_i^T`, `[..., d, d]`.
        alpha: `sum_i y_i x_i`, `[..., d]`.
        lam: `sum_i y_i^2`, `[...]`.
    """

    sigma: Array
    alpha: Array
    lam: Array


class State(NamedTuple):
    """What a layer has made of every token: `x_i^l = M x_i + y_i u`, `y_i^l = a y_i - w . x_i`.

    Attributes:
        M: `[..., d, d]`.
        u: `[..., d]`, the momentum.
        w: `[..., d]`, the weights that predict the query.
        a: `[...]`, by how much the labels have been rescaled.
    """

    M: Array
    u: Array
    w: Array
    a: Array


def context_gram(x: Float[Array, "*batch context d"], y: Float[Array, "*batch context 1"]) -> Gram:
    """The blocks of `G^0`."""
    return Gram(
        jnp.einsum("...ni,...nj->...ij", x, x, precision="highest"),
        jnp.einsum("...ni,...nk->...i", x, y, precision="highest"),
        jnp.sum(y**2, (-1, -2)),
    )


def initial_state(gram: Gram) -> State:
    """`T = I` for every context."""
    zero = jnp.zeros_like(gram.alpha)
    eye = jnp.eye(gram.alpha.shape[-1], dtype=zero.dtype)
    return State(jnp.broadcast_to(eye, gram.sigma.shape), zero, zero, jnp.ones_like(gram.lam))


def layer_gram(state: State, gram: Gram) -> Gram:
    """The blocks of `G^l = T G^0 T^T`, the Gram matrix of the tokens as they are now.

    Args:
        state: of the layer.
        gram: of the tokens at the start, `G^0`.
    """
    T = state_matrix(state)
    now = _product(_product(T, gram_matrix(gram)), T.swapaxes(-1, -2))
    return Gram(now[..., :-1, :-1], now[..., :-1, -1], now[..., -1, -1])


def state_matrix(state: State) -> Float[Array, "*batch width width"]:
    """`T = [[M, u], [-w^T, a]]`, `width = d + 1`."""
    return _blocks(state.M, state.u, -state.w, state.a)


def gram_matrix(gram: Gram) -> Float[Array, "*batch width width"]:
    """`[[Sigma, alpha], [alpha^T, lambda]]`."""
    return _blocks(gram.sigma, gram.alpha, gram.alpha, gram.lam)


def diag_step(state: State, gram: Gram, layer: ArrayLike) -> State:
    """One DIAG layer.

    Args:
        state: before it.
        gram: of the tokens at the start, `G^0`.
        layer: `(w_xx, w_xy, w_yx, w_yy)`.
    """
    w_xx, w_xy, w_yx, w_yy = jnp.asarray(layer)
    now = layer_gram(state, gram)
    return _step(state, w_xx * now.sigma, w_xy * now.alpha, w_yx * now.alpha, w_yy * now.lam)


def full_step(state: State, gram: Gram, P: ArrayLike, Q: ArrayLike) -> State:
    """One FULL layer.

    Args:
        state: before it.
        gram: of the tokens at the start, `G^0`.
        P: `[heads, d + 1, d + 1]`.
        Q: `[heads, d + 1, d + 1]`.
    """
    now = gram_matrix(layer_gram(state, gram))
    P, Q = jnp.asarray(P), jnp.asarray(Q)
    update = jnp.einsum("kop,...pq,kqr->...or", P, now, Q, precision="highest")
    return _step(
        state,
        update[..., :-1, :-1],
        update[..., :-1, -1],
        update[..., -1, :-1],
        update[..., -1, -1],
    )


def _step(state: State, A: Array, b: Array, c: Array, delta: Array) -> State:
    M, u, w, a = state
    return State(
        M=M + _product(A, M) - b[..., :, None] * w[..., None, :],
        u=u + _apply(A, u) + a[..., None] * b,
        w=(1 + delta)[..., None] * w - _apply(M.swapaxes(-1, -2), c),
        a=(1 + delta) * a + jnp.sum(c * u, -1),
    )


def diag_states(layers: Sequence[ArrayLike], gram: Gram) -> State:
    """States before, between and after DIAG layers, each with a leading axis `layers + 1`."""
    states = [initial_state(gram)]
    for layer in layers:
        states.append(diag_step(states[-1], gram, layer))
    return State(*(jnp.stack(parts) for parts in zip(*states, strict=True)))


def full_states(layers: Sequence[tuple[ArrayLike, ArrayLike]], gram: Gram) -> State:
    """States before, between and after FULL layers `(P, Q)`; a leading axis `layers + 1`."""
    states = [initial_state(gram)]
    for P, Q in layers:
        states.append(full_step(states[-1], gram, P, Q))
    return State(*(jnp.stack(parts) for parts in zip(*states, strict=True)))


class Momentum(NamedTuple):
    """A DIAG layer read as gradient descent with momentum (Lemma 4.4).

    With `w* ` the least-squares weights of the context, `r_i = y_i - w* . x_i` and
    `rho = sum_i r_i^2`, the gradient of `1/2 sum_i (w . x_i - a y_i)^2` is `-g`,

        g = Sigma^0 (a w* - w),   B = M + u w*^T,   alpha = B g + a rho u,
        u' = (1 - 0) u + w_xx Sigma^l u + w_xy a^2 rho u + w_xy a B g,
        w' = (1 + w_yy lambda^l) w - w_yx M^T alpha,

    so that `u` collects gradients (momentum) and `w` moves along it; `w_yy` rescales the labels,
    and `w_xy` makes the steps depend on `rho`, which is what shows the noise.

    Attributes:
        gradient: `g`, `[..., d]`.
        alpha: `sum_i y_i^l x_i^l`, `[..., d]`.
        lam: `sum_i (y_i^l)^2 = g . (a w* - w) + a^2 rho`, `[...]`.
        rho: `[...]`.
        next_u: `u'`, `[..., d]`.
        next_w: `w'`, `[..., d]`.
    """

    gradient: Array
    alpha: Array
    lam: Array
    rho: Array
    next_u: Array
    next_w: Array


def momentum_step(state: State, gram: Gram, layer: ArrayLike) -> Momentum:
    """The same layer as `diag_step`, in the names of `Momentum`; `Sigma^0` must be invertible."""
    w_xx, w_xy, w_yx, w_yy = jnp.asarray(layer)
    M, u, w, a = state
    best = jnp.linalg.solve(gram.sigma, gram.alpha[..., None])[..., 0]
    rho = gram.lam - jnp.sum(best * gram.alpha, -1)
    error = a[..., None] * best - w
    gradient = _apply(gram.sigma, error)
    B = M + u[..., :, None] * best[..., None, :]
    descent = _apply(B, gradient)
    alpha = descent + (a * rho)[..., None] * u
    lam = jnp.sum(gradient * error, -1) + a**2 * rho
    # Sigma^l = B Sigma^0 B^T + rho u u^T, since x_i^l = B x_i + r_i u and sum_i r_i x_i = 0
    sigma_u = _apply(B, _apply(gram.sigma, _apply(B.swapaxes(-1, -2), u)))
    sigma_u = sigma_u + (rho * jnp.sum(u**2, -1))[..., None] * u
    return Momentum(
        gradient=gradient,
        alpha=alpha,
        lam=lam,
        rho=rho,
        next_u=(1 + w_xy * a**2 * rho)[..., None] * u
        + w_xx * sigma_u
        + w_xy * a[..., None] * descent,
        next_w=(1 + w_yy * lam)[..., None] * w - w_yx * _apply(M.swapaxes(-1, -2), alpha),
    )


def diag_weight(layers: Float[Array, "layer 4"], moments: Moments) -> Float[Array, "d context"]:
    """`w` after all DIAG layers, in the eigenbasis of each context; the fast path of the fits.

    A DIAG layer has no basis of its own, so that `Sigma^0` may be diagonal. Up to four layers,
    `M` is applied to vectors through the layers that made it and never formed.
    """
    if len(layers) >= _DENSE:
        return _dense_weight(layers, moments)
    return _nested_weight(layers, moments)


def _nested_weight(layers: Array, moments: Moments) -> Array:
    values, alpha0, lam0 = moments.values, moments.correlation, moments.power
    past: list[tuple[Array, Array, Array, Array]] = []  # (layer, alpha^l, u, w) of every layer

    def apply(depth: int, v: Array) -> Array:  # M^l v
        if depth == 0:
            return v
        layer, alpha, u, w = past[depth - 1]
        if depth == 1:
            return v + layer[0] * values * v
        before = apply(depth - 1, v)
        return before + layer[0] * sigma(depth - 1, u, before) - layer[1] * _dot(w, v) * alpha

    def transposed(depth: int, v: Array) -> Array:  # (M^l)^T v
        if depth == 0:
            return v
        layer, alpha, u, w = past[depth - 1]
        if depth == 1:
            return v + layer[0] * values * v
        inner = transposed(depth - 1, v + layer[0] * sigma(depth - 1, u, v))
        return inner - layer[1] * _dot(alpha, v) * w

    def sigma(depth: int, u: Array, v: Array) -> Array:  # Sigma^l v
        back, along = transposed(depth, v), _dot(u, v)
        rest = (_dot(alpha0, back) + lam0 * along) * u
        return apply(depth, values * back + along * alpha0) + rest

    u, w, a = jnp.zeros_like(alpha0), jnp.zeros_like(alpha0), jnp.ones_like(lam0)
    for depth in range(len(layers)):
        w_xx, w_xy, w_yx, w_yy = layers[depth]
        source, alpha0_w = a * alpha0 - values * w, _dot(w, alpha0)
        lam = a**2 * lam0 - a * alpha0_w - _dot(w, source)
        alpha = apply(depth, source) + (a * lam0 - alpha0_w) * u
        past.append((layers[depth], alpha, u, w))
        moved = (1 + w_yy * lam) * w - w_yx * transposed(depth, alpha)
        a, u, w = (
            (1 + w_yy * lam) * a + w_yx * _dot(alpha, u),
            # not computed where nothing reads it
            u if depth == len(layers) - 1 else u + w_xx * sigma(depth, u, u) + w_xy * a * alpha,
            moved,
        )
    return w


def _dense_weight(layers: Array, moments: Moments) -> Array:
    values, alpha0, lam0 = moments.values.T, moments.correlation.T, moments.power
    d = alpha0.shape[1]
    M = jnp.broadcast_to(jnp.eye(d, dtype=alpha0.dtype), (*alpha0.shape, d))
    u, w, a = jnp.zeros_like(alpha0), jnp.zeros_like(alpha0), jnp.ones_like(lam0)
    for depth in range(len(layers)):
        w_xx, w_xy, w_yx, w_yy = layers[depth]
        alpha0_w = jnp.sum(w * alpha0, -1)
        source = a[:, None] * alpha0 - values * w
        lam = a**2 * lam0 - a * alpha0_w - jnp.sum(w * source, -1)
        alpha = _apply(M, source) + (a * lam0 - alpha0_w)[:, None] * u
        moved = (1 + w_yy * lam)[:, None] * w - w_yx * _apply(M.swapaxes(-1, -2), alpha)
        if depth < len(layers) - 1:
            square, back = _product(M.swapaxes(-1, -2), M), _apply(M.swapaxes(-1, -2), u)
            # Sigma^l = (M Sigma^0 + u alpha^T) M^T + (M alpha + lambda u) u^T
            inner = values[:, :, None] * square + alpha0[:, :, None] * back[:, None, :]
            row = _apply(square, alpha0) + lam0[:, None] * back
            norm, cross = jnp.sum(u**2, -1, keepdims=True), jnp.sum(alpha0 * back, -1)
            sigma_u = _apply(M, values * back + norm * alpha0)
            sigma_u = sigma_u + (cross[:, None] + lam0[:, None] * norm) * u
            M = M + w_xx * _product(M, inner) + (w_xx * u)[:, :, None] * row[:, None, :]
            M = M - (w_xy * alpha)[:, :, None] * w[:, None, :]
            a, u = (
                (1 + w_yy * lam) * a + w_yx * jnp.sum(alpha * u, -1),
                u + w_xx * sigma_u + w_xy * a[:, None] * alpha,
            )
        w = moved
    return w.T


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, 0)


def _apply(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision="highest")


def _product(a: Array, b: Array) -> Array:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")


def _blocks(corner: Array, column: Array, row: Array, last: Array) -> Array:
    top = jnp.concatenate([corner, column[..., :, None]], -1)
    bottom = jnp.concatenate([row, last[..., None]], -1)
    return jnp.concatenate([top, bottom[..., None, :]], -2)
