"""Closed forms for one layer of linear attention on in-context linear regression.

Notation, used by every function. The context is `N` examples `x_i` with covariance `C` and
`y_i = W x_i + noise`, the rows `w` of `W` have covariance `L` (`Lambda` in the papers), the noise
has variance `s2`, the query has the distribution of the inputs. The loss is the one of
`RegressionTask`: half the squared error, summed over outputs, against the clean target. A layer
with token Gram matrix `G = sum_i e_i e_i^T`, `e_i = (x_i; y_i)`, predicts

    y_hat_o = sum_{ab,c} T[o, a, b, c] G[a, b] x_query[c],
    T[o, a, b, c] = Sym_ab sum_h (P W_V)_h[o, a] (W_K^T W_Q)_h[b, c],

with the sign of the readout absorbed in `P W_V`. `T` is all that the prediction depends on.

Two parts of the prediction never mix, because they differ in parity in some row of `W`: the part
`(sum_i y_i x_i)^T M x_query` with `M[a, c] = 2 T[o, a, x + o, c]`, which can match the target, and
the rest, which can only add loss. Everything is exact; constants are computed in float64.

Sources: Ahn et al. (2023), Theorem 1 and Zhang et al. (2024), Theorem 4.1 for the optimum with
Gaussian inputs; Mahankali et al. (2024) for gradient descent as the optimum; the forms with task
covariance, noise, kurtosis and arbitrary weights follow from fourth moments and are derived at
each function.

For use as a library, since no command calls them: `excess_law`, `gradient_descent_loss`,
`gram_tensor`, `input_scale_curve` and `one_layer_population_loss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from synthetic.tasks.regression import Gaussian, RegressionTask, Uniform


class Optimum(NamedTuple):
    """The best one-layer weights: `y_hat = (sum_i y_i x_i)^T matrix x_query`, and their loss."""

    matrix: np.ndarray
    loss: float


class ExcessLaw(NamedTuple):
    """`(L - L*) / L* = coefficient * delta^2`, with `delta = |M - M*| / |M*|` (Frobenius)."""

    coefficient: float
    optimal_loss: float


@dataclass(frozen=True, eq=False)
class _Moments:
    """What the loss needs to know of a task: moments up to the fourth, in float64.

    `gram` is `K = E[s s^T] / N` of `s = sum_i y_i x_i`. With `E[x_a x_b x_c x_d] = C_ab C_cd +
    C_ac C_bd + C_ad C_bc + k4 [a = b = c = d]` (`k4 = 0` for Gaussians, `(kurtosis - 3) v^2` for
    independent coordinates), `K = (N + 1) C L C + (tr(C L) + s2) C + k4 diag(L)`.
    """

    examples: int
    outputs: int
    inputs: np.ndarray
    weights: np.ndarray
    inputs_k4: float
    weights_k4: float
    noise: float

    @property
    def signal(self) -> float:
        """`tr(C L)`, the variance of a clean target."""
        return float(np.trace(self.inputs @ self.weights))

    @property
    def gram(self) -> np.ndarray:
        c, lam, n = self.inputs, self.weights, self.examples
        fourth = self.inputs_k4 * np.diag(np.diag(lam))
        return (n + 1) * c @ lam @ c + (self.signal + self.noise) * c + fourth


def _moments(task: RegressionTask) -> _Moments:
    return _Moments(
        examples=task.num_examples,
        outputs=task.dim_y,
        inputs=_covariance(task.inputs, task.dim_x, "inputs"),
        weights=_covariance(task.weights, task.dim_x, "weights"),
        inputs_k4=_fourth_cumulant(task.inputs),
        weights_k4=_fourth_cumulant(task.weights),
        noise=task.noise**2,
    )


def _covariance(distribution: Gaussian | Uniform, dim: int, name: str) -> np.ndarray:
    if distribution.mean != 0:
        raise ValueError(f"{name} must have mean 0 for a closed form, got {distribution}")
    return distribution.covariance_matrix(dim)


def _fourth_cumulant(distribution: Gaussian | Uniform) -> float:
    if isinstance(distribution, Gaussian):
        return 0.0
    return (distribution.kurtosis - 3) * distribution.variance**2


def _isotropic(task: RegressionTask) -> tuple[float, float]:
    """Variances `(v, lambda)` of inputs and weights; refuses a task that has other covariances."""
    moments = _moments(task)
    variances = []
    for name, matrix in (("inputs", moments.inputs), ("weights", moments.weights)):
        variance = float(matrix[0, 0])
        if not np.array_equal(matrix, variance * np.eye(task.dim_x)):
            raise ValueError(f"{name} must have covariance v I for this law, got {matrix.tolist()}")
        variances.append(variance)
    return variances[0], variances[1]


def optimal_one_layer(task: RegressionTask) -> Optimum:
    """Best one layer of linear attention, with any number of heads.

        M* = [(N + 1) L C + (tr(L C) + s2) I + k4 C^-1 diag(L)]^-1 L,
        loss = 1/2 dim_y [tr(L C) - N tr(L C M* C)],

    the minimum of the convex quadratic `1/2 E |(s^T M - w^T) x_query|^2`, `s = sum_i y_i x_i`.
    Gaussian inputs (`k4 = 0`) with `L = I`, no noise: `N M* = [(1 + 1/N) C + tr(C)/N I]^-1` (Ahn
    et al. Theorem 1, Zhang et al. Theorem 4.1). Independent coordinates of variance `v` and
    kurtosis `kappa`, `L = I`: `M* = I / (v D)`, `loss = 1/2 dim_y v d (1 - N / D)`, with
    `D = N + d - 2 + kappa + s2 / v`; one step of gradient descent with `step_size = N / (v D)`.

    Returns:
        `matrix` M* `[dim_x, dim_x]` float64 (the same for every output) and `loss`, summed over
        the outputs as the task's loss is.

    Raises:
        ValueError: inputs or weights do not have mean 0.
    """
    m = _moments(task)
    c, lam, n = m.inputs, m.weights, m.examples
    system = (n + 1) * lam @ c + (m.signal + m.noise) * np.eye(len(c))
    if m.inputs_k4 != 0:
        system += m.inputs_k4 * np.linalg.solve(c, np.diag(np.diag(lam)))
    matrix = np.linalg.solve(system, lam)
    loss = 0.5 * m.outputs * (m.signal - n * np.trace(lam @ c @ matrix @ c))
    return Optimum(matrix, float(loss))


def optimal_step_size(task: RegressionTask) -> float:
    """Step size of the best single step of gradient descent from zero weights.

    The minimum over `eta` of `gradient_descent_loss`: `N tr(C L C) / tr(K C)` (`K` the Gram
    matrix of the context, see `_Moments`). Isotropic: `N / (v D)`, and then the step is the
    optimum over all one-layer weights.
    """
    m = _moments(task)
    c = m.inputs
    return float(m.examples * np.trace(c @ m.weights @ c) / np.trace(m.gram @ c))


def gradient_descent_loss(step_size: float | int, task: RegressionTask) -> float:
    """Expected loss after one step of gradient descent from zero weights.

    `W_1 = step_size / N sum_i y_i x_i^T`; with `M = step_size / N I`,

        loss = 1/2 dim_y [tr(C L) - 2 N tr(M C L C) + N tr(M^T K M C)].

    Isotropic, `L = I`: `1/2 v d [1 - 2 eta v + eta^2 v^2 (kappa + d + N - 2 + s2 / v) / N]`.
    """
    return float(input_scale_curve(task, [1.0], step_size)[0])


def input_scale_curve(
    task: RegressionTask,
    factors: Sequence[float | int] | np.ndarray,
    step_size: float | int | None = None,
) -> np.ndarray:
    """Loss of one fixed gradient step on inputs and queries that are scaled by each factor.

    The formula of `gradient_descent_loss` with `C -> f^2 C`, `k4 -> f^4 k4`. The noise, the
    weights and the step size stay what they were.

    Args:
        task: the task whose inputs are scaled.
        factors: scales `f` of the inputs, `[n]`.
        step_size: of the gradient step; default `optimal_step_size(task)`.

    Returns:
        The expected loss at each factor, `[n]` float64.
    """
    m = _moments(task)
    eta = optimal_step_size(task) if step_size is None else float(step_size)
    c, n = m.inputs, m.examples
    f = np.asarray(factors, np.float64)
    noise = m.noise * np.trace(c @ c)
    clean = np.trace(m.gram @ c) - noise
    linear = 2 * eta * np.trace(c @ m.weights @ c)
    quadratic = eta**2 / n * (clean * f**6 + noise * f**4)
    return 0.5 * m.outputs * (m.signal * f**2 - linear * f**4 + quadratic)


def saddle_levels(task: RegressionTask) -> np.ndarray:
    """Loss at the saddles that training visits, from zero weights to the optimum.

    `L_k = L_0 - k (L_0 - L*) / d`, `k = 0..d`: the best loss of a product of rank `k` for one
    output, isotropic inputs and weights. `[dim_x + 1]` float64.

    Raises:
        ValueError: inputs or weights are not isotropic, or there are several outputs (whose
            products need not have the same rank).
    """
    _isotropic(task)
    if task.dim_y != 1:
        raise ValueError(f"dim_y must be 1 for the saddle levels, got {task.dim_y}")
    start = 0.5 * _moments(task).signal
    gain = start - optimal_one_layer(task).loss
    return start - np.arange(task.dim_x + 1) / task.dim_x * gain


def excess_law(task: RegressionTask) -> ExcessLaw:
    """How the loss grows with the distance from the optimum, isotropic inputs and weights.

    `(L - L*) / L* = N / (d - 2 + kappa + s2 / (v lambda)) delta^2`, exact for every `M` (any
    output's `M` may deviate; `delta` is then over all outputs) with no other part in `T`.

    Raises:
        ValueError: inputs or weights are not isotropic.
    """
    v, variance = _isotropic(task)
    kappa = task.inputs.kurtosis
    rest = task.dim_x - 2 + kappa + task.noise**2 / (v * variance)
    return ExcessLaw(task.num_examples / rest, optimal_one_layer(task).loss)


def gram_tensor(value_products: ArrayLike, key_query_products: ArrayLike) -> Array:
    """The canonical tensor of one layer from its heads' products.

    `T[o, a, b, c] = Sym_ab sum_h value[h, o, a] key_query[h, b, c]`.

    Args:
        value_products: rows of `P W_V` that write the outputs, with the sign of the readout,
            `[heads, dim_y, dim_x + dim_y]`.
        key_query_products: first `dim_x` columns of `W_K^T W_Q` (the query's y entry is 0),
            `[heads, dim_x + dim_y, dim_x]`.

    Returns:
        `[dim_y, dim_x + dim_y, dim_x + dim_y, dim_x]`.
    """
    value, key_query = jnp.asarray(value_products), jnp.asarray(key_query_products)
    tensor = jnp.einsum("hoa,hbc->oabc", value, key_query, precision="highest")
    return (tensor + tensor.swapaxes(1, 2)) / 2


def one_layer_population_loss(tensor: ArrayLike, task: RegressionTask) -> Array:
    """Expected loss of any one-layer linear attention, exact; `optimal loss + excess`.

    See `one_layer_excess`, which is the better quantity near the optimum in float32.
    """
    return one_layer_excess(tensor, task) + optimal_one_layer(task).loss


def one_layer_excess(tensor: ArrayLike, task: RegressionTask) -> Array:
    """Expected loss of any one-layer linear attention, less that of the best one.

    For output `o`, with `A_c = T[o, :d, :d, c]`, `M_j = 2 T[o, :d, d + j, :]` and
    `t = T[o, d:, d:, :]`, the excess is the sum of terms that do not mix:

        own row:      N/2 tr((M_o - M*)^T K (M_o - M*) C)
        other rows:   N/2 tr(M_j^T K M_j C), j != o
        y_j y_k:      2 E[(sum_i y_ij y_ik)^2] t_jk^T C t_jk, j < k
        even in all:  1/2 E |f|_C^2, f_c = tr(A_c S) + sum_j t_jjc sum_i y_ij^2, S = sum_i x_i x_i^T

    The last two follow from the fourth moments, given the weights, of independent examples. A sum
    of squares: there is no cancellation, so that float32 resolves an excess far below the loss.

    Args:
        tensor: `T` as in `gram_tensor`, `[dim_y, dim_x + dim_y, dim_x + dim_y, dim_x]`; the first
            axis may be left out where `dim_y` is 1. It need not be symmetric.
        task: a static value under `jit`; its moments enter as constants.

    Returns:
        A scalar of the tensor's dtype; `jit`, `vmap` and `grad` apply.

    Raises:
        ValueError: wrong shape, or inputs or weights do not have mean 0.
    """
    T = jnp.asarray(tensor)
    d, outputs = task.dim_x, task.dim_y
    shape = (outputs, d + outputs, d + outputs, d)
    if T.shape != shape and not (outputs == 1 and T.shape == shape[1:]):
        raise ValueError(f"tensor must have shape {shape} for this task, got {T.shape}")
    T = T.reshape(shape)
    T = (T + T.swapaxes(1, 2)) / 2

    m = _moments(task)
    root = _root(m.inputs)
    target = np.einsum("oj,ac->oajc", np.eye(outputs), optimal_one_layer(task).matrix)
    mixed = 2 * T[:, :d, d:, :] - _constant(target, T)
    # |root_K^T M root_C|^2 = tr(M^T K M C): K and C as squares, never as differences
    mixed = _contract(_contract(mixed, _root(m.gram), 1), root, 3)
    odd = 0.5 * m.examples * jnp.sum(mixed**2)

    quadratic = _contract(T[:, :d, :d, :], root, 3)
    pairs = _contract(T[:, d:, d:, :], root, 3)
    return odd + _even_loss(quadratic, pairs, root, m)


def _even_loss(A: Array, t: Array, root: np.ndarray, m: _Moments) -> Array:
    """Loss of `f_c = tr(A_c S) + sum_jk t_jkc sum_i y_ij y_ik`; the axis `c` is whitened already.

    Given `W` the examples are independent, so that for `f = sum_i q(e_i)`,
    `E[f^2] = E_W[N E[q^2 | W] + N (N - 1) E[q | W]^2]`; `h = w^T C w`, `E[h] = tr(C L)`.
    """
    n, c, lam = m.examples, m.inputs, m.weights
    clc = c @ lam @ c
    mixed_h = float(np.trace(clc @ lam))  # E[(w_j^T C w_k)^2], j != k
    var_h = 2 * mixed_h + m.weights_k4 * float(np.sum(np.diag(c) ** 2))
    square_h = m.signal**2 + var_h
    power = m.signal + m.noise  # E[y^2]
    same_y4 = (
        3 * square_h
        + m.inputs_k4 * float(np.sum(3 * np.diag(lam) ** 2 + m.weights_k4))
        + 6 * m.noise * m.signal
        + 3 * m.noise**2
    )
    other_y4 = (
        m.signal**2
        + 2 * mixed_h
        + m.inputs_k4 * float(np.sum(np.diag(lam) ** 2))
        + 2 * m.noise * m.signal
        + m.noise**2
    )  # E[y_j^2 y_k^2]

    trace = jnp.einsum("oabc,ab->oc", A, _constant(c, A), precision="highest")
    diagonal = jnp.einsum("oaac->oac", A)
    t_same = jnp.einsum("ojjc->ojc", t)
    t_sum = t_same.sum(1)
    t_square = jnp.sum(t_same**2, 1)
    t_other = t_sum**2 - t_square  # sum over j != k of t_jj t_kk

    white = _contract(_contract(A, root, 1), root, 2)
    spread = 2 * jnp.sum(white**2, (1, 2)) + m.inputs_k4 * jnp.sum(diagonal**2, 1)
    # E[x^T A x y_j^2] - tr(AC) E[y^2]
    coupling = 2 * jnp.einsum("oabc,ab->oc", A, _constant(clc, A), precision="highest")
    coupling += m.inputs_k4 * jnp.einsum(
        "oac,a->oc", diagonal, _constant(np.diag(lam), A), precision="highest"
    )
    # N^2 E[q]^2, then what N E[q^2 | W] + N (N - 1) E[q | W]^2 has beyond it
    mean = (n * (trace + power * t_sum)) ** 2
    beyond = n * (spread + 2 * t_sum * coupling)
    beyond += n * ((same_y4 - power**2) * t_square + (other_y4 - power**2) * t_other)
    beyond += n * (n - 1) * var_h * t_square

    # y_j y_k with j != k: odd in two rows, so it meets nothing but itself
    off = jnp.sum(t**2, (1, 2)) - t_square
    cross = 2 * (n * other_y4 + n * (n - 1) * mixed_h) * off
    return 0.5 * jnp.sum(mean + beyond + cross)


def _root(matrix: np.ndarray) -> np.ndarray:
    """`R` with `R R^T = matrix`, for a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0))


def _constant(array: np.ndarray, like: Array) -> Array:
    return jnp.asarray(array, like.dtype)


def _contract(array: Array, root: np.ndarray, axis: int) -> Array:
    """`sum_a array[.. a ..] root[a, k]`, in place of axis `axis`; a product where root is `r I`."""
    if np.array_equal(root, root[0, 0] * np.eye(len(root))):
        return array * float(root[0, 0])
    product = jnp.tensordot(array, _constant(root, array), (axis, 0), precision="highest")
    return jnp.moveaxis(product, -1, axis)
