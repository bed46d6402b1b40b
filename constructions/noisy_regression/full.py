"""FULL layers fitted from where the best DIAG layers stand, and what that gains.

A FULL layer adds `sum_k P_k G Q_k e_i` to every token, `P_k, Q_k` `[d + 1, d + 1]` of any entries.
The task looks the same in every basis, and DIAG layers are those that do too; hence the gradient
at the best DIAG layers vanishes for FULL ones as well. They may still be a saddle: a fit leaves it
from a small push of all entries, and the losses of both on the same contexts show what was gained.

Given its context and sigma, w has the oracle's ridge weights as its mean. So the loss less the
oracle's is, in expectation, `1/2 |w^L - w_oracle|^2`, which is what is fitted and reported: w
itself would only add noise, many times what there is to be gained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from constructions.noisy_regression.fitting import blocked, pool_sample, weights_of
from synthetic.tasks.noisy import Contexts, Moments, NoisyRegressionTask, draw_contexts
from synthetic.theory.ridge import oracle_weight
from synthetic.theory.spectral import Estimate, estimate
from synthetic.threefry import normal_from_unit, unit_uniform

_ROUNDS = 3
# What the loss on enlarged contexts counts, against 1 for the others.
_GUARD = 1e-4


class Turned(NamedTuple):
    """Contexts in bases of their own; contexts are last.

    Attributes:
        gram: `sum_i e_i e_i^T`, `[d + 1, d + 1, context]`.
        oracle: the weights of ridge regression that knows sigma, `[d, context]`.
    """

    gram: Array
    oracle: Array


@dataclass(frozen=True, eq=False)
class FullLayers:
    """Fitted FULL layers beside the DIAG layers that they started from.

    Attributes:
        P: `[layer, 2, d + 1, d + 1]` float64.
        Q: likewise.
        loss: adjusted loss on held-out contexts.
        diag_loss: of the start, on the same contexts.
        gain: `diag_loss` less `loss`, with the paired standard error.
    """

    P: np.ndarray
    Q: np.ndarray
    loss: Estimate
    diag_loss: Estimate
    gain: Estimate

    @property
    def better(self) -> bool:
        """Whether the gain exceeds two standard errors; where not, FULL = DIAG is the finding."""
        return self.gain.mean > 2 * self.gain.standard_error

    @property
    def finding(self) -> str:
        """The gain in words."""
        gain = f"{self.gain.mean:.2g} +- {self.gain.standard_error:.1g}"
        if self.better:
            return f"fitted; better than the DIAG layers it started from by {gain}"
        return f"FULL = DIAG: a fit from the DIAG layers gained {gain}"


def full_layers(diag: ArrayLike, dim_x: int) -> tuple[np.ndarray, np.ndarray]:
    """DIAG layers written as FULL ones of two heads, one that compares x and one that compares y.

    `P_1 = diag(w_xx I, w_yx), Q_1 = diag(I, 0), P_2 = diag(w_xy I, w_yy), Q_2 = diag(0, 1)`.

    Args:
        diag: `[layer, 4]`.
        dim_x: `d`.

    Returns:
        P and Q, `[layer, 2, d + 1, d + 1]` float64.

    Raises:
        ValueError: `diag` has another shape.
    """
    table = np.asarray(diag, np.float64)
    if table.ndim != 2 or not len(table) or table.shape[1] != 4:
        raise ValueError(f"diag must have shape [layer, 4], got {table.shape}")
    label = np.zeros((dim_x + 1, dim_x + 1))
    label[-1, -1] = 1
    inputs = np.eye(dim_x + 1) - label
    P = [[xx * inputs + yx * label, xy * inputs + yy * label] for xx, xy, yx, yy in table]
    return np.array(P), np.array([[inputs, label]] * len(table))


def fit_full(
    task: NoisyRegressionTask,
    start: Sequence[Sequence[float]] | ArrayLike,
    *,
    pool: Contexts | None = None,
    held_out: Contexts | None = None,
    seed: int = 0,
    steps: int = 9000,
    sample: int = 65_536,
    learning_rate: float = 6e-3,
    push: float = 0.01,
) -> FullLayers:
    """FULL layers of two heads, fitted by Adam from DIAG layers and a push that breaks symmetry.

    Three rounds of batches of 1024 contexts. In each the pool is turned into fresh bases and a
    sample is taken, often of contexts that the layers of the round before were bad at. Trained in
    float32, measured in float64.

    Args:
        task: which contexts.
        start: DIAG layers, `[layer, 4]`; the best ones, or the gain is not that of FULL layers.
        pool: contexts to fit on; default 262144 of `seed`.
        held_out: to measure on; default 65536 of `seed`.
        seed: of contexts, bases, batches and the push.
        steps: of Adam, in all rounds together.
        sample: contexts in a round, at most the pool's.
        learning_rate: at the start of the first round, for numbers of order 1 (`_Units`); halved
            from round to round, and in each taken to 0 along a cosine.
        push: standard deviation of what is added to every entry, in the same units.

    Raises:
        ValueError: `start` has another shape, a number is not positive, or the contexts have
            another dimension than the task.
        FloatingPointError: the fitted layers are not finite.
    """
    numbers = {"steps": steps, "sample": sample, "learning_rate": learning_rate, "push": push}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    table, units = np.asarray(start, np.float64), _Units(task)
    layers = units.inside(*full_layers(table, task.dim_x))
    random = np.random.default_rng(seed)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 3 + _ROUNDS)
        d, n = task.dim_x, task.num_examples
        pool = draw_contexts(keys[0], d, n, 262_144) if pool is None else pool
        held_out = draw_contexts(keys[1], d, n, 65_536) if held_out is None else held_out
        moments = task.moments(pool)
        known = [_diag_losses(table, moments), np.asarray(moments.power)]

        layers = [a + push * random.normal(size=a.shape) for a in layers]
        layers[0][-1, :, :-1] = 0  # what the last layer does to x, nothing reads
        for number in range(_ROUNDS):
            turned = _single(units.turned(turn(keys[3 + number], _single(moments))))
            scores = [np.nan_to_num(_losses(_single(layers), turned), nan=np.inf), *known]
            # in place of their levels, where the chosen contexts are in the pool
            places = pool._replace(level=jnp.arange(len(pool.level)))
            chosen = pool_sample(places, min(sample, len(pool.level)), seed + number, scores)
            picked = Turned(*(part[..., chosen.contexts.level] for part in turned))
            data, blocks = _batches(*_guarded(picked, chosen.share, random))
            count = max(1, steps // _ROUNDS)
            epochs = [random.permutation(blocks) for _ in range(-(-count // blocks))]
            rate = learning_rate / 2**number
            layers = _train(_single(layers), data, np.concatenate(epochs)[:count], rate)
        layers = [np.asarray(a, np.float64) for a in layers]
        if not all(np.isfinite(a).all() for a in layers):
            raise FloatingPointError("the fitted FULL layers are not finite")
        moments = task.moments(held_out)
        loss = _losses(layers, units.turned(turn(keys[2], moments))) / units.label**2
        diag_loss = _diag_losses(table, moments)
    P, Q = units.outside(*layers)
    return FullLayers(P, Q, estimate(loss), estimate(diag_loss), estimate(diag_loss - loss))


class _Units:
    """Tokens scaled by `D = diag(I, label)`, a Gram matrix divided by N: numbers of order 1."""

    def __init__(self, task: NoisyRegressionTask) -> None:
        self.label = float((task.dim_x + task.mean_square_noise) ** -0.5)
        self.examples = task.num_examples
        self.scale = np.append(np.ones(task.dim_x), self.label)

    def turned(self, turned: Turned) -> Turned:
        """Contexts in these units; a loss comes out as `label^2` times what it is."""
        square = jnp.asarray(np.outer(self.scale, self.scale) / self.examples)
        return Turned(turned.gram * square[..., None], turned.oracle * self.label)

    def inside(self, P: np.ndarray, Q: np.ndarray) -> list[np.ndarray]:
        """Layers in these units, `N D P D^-1` and `D^-1 Q D^-1`; a head's P as large as its Q."""
        P = self.examples * P * self.scale[:, None] / self.scale
        Q = Q / np.outer(self.scale, self.scale)
        largest = [np.abs(a).max((-1, -2), keepdims=True) for a in (P, Q)]
        ratio = np.sqrt(np.where(largest[0] > 0, largest[0], 1) / largest[1])
        return [P / ratio, Q * ratio]

    def outside(self, P: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Layers in the task's own units: the inverse of `inside`."""
        outer = np.outer(self.scale, self.scale)
        return P / self.scale[:, None] * self.scale / self.examples, Q * outer


@jax.jit
def _train(layers: list[Array], data: Any, order: ArrayLike, rate: ArrayLike) -> list[Array]:
    order = jnp.asarray(order)
    schedule = optax.cosine_decay_schedule(1.0, len(order))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.scale_by_schedule(schedule),
    )

    def loss(layers: list[Array], block: tuple[Turned, Array]) -> Array:
        turned, share = block
        error = full_weight(layers[0], layers[1], turned.gram) - turned.oracle
        return jnp.mean(share * _half_square(error))

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        layers, state = carry
        gradient = jax.grad(loss)(layers, jax.tree.map(lambda a: a[number], data))
        update, state = optimizer.update(gradient, state)
        return (
            jax.tree.map(lambda a, u: a - (rate * u).astype(a.dtype), layers, update),
            state,
        ), None

    return jax.lax.scan(step, (layers, optimizer.init(layers)), order)[0][0]


def _guarded(turned: Turned, share: Array, random: np.random.Generator) -> tuple[Turned, Array]:
    """A sample and larger copies of a quarter of it, shuffled; weights with mean 1 and `_GUARD`.

    A fit of hundreds of numbers explodes on contexts that are one in 10^5: too rare to be learnt
    from, not to be paid for. Copies with x up to 1.2 times and y up to 1.5 times as large stand in
    for them.
    """
    count = len(share)
    copies = np.arange(count)[: count // 4]
    x = random.uniform(1, 1.2, len(copies))
    y = x * random.uniform(1, 1.25, len(copies))
    scale = np.concatenate([np.repeat(x[None], len(turned.gram) - 1, 0), y[None]])
    grams = turned.gram[..., copies] * jnp.asarray(scale[:, None] * scale, jnp.float32)
    oracles = turned.oracle[..., copies] * jnp.asarray(y / x, jnp.float32)
    order = random.permutation(count + len(copies))
    weights = np.concatenate(
        [np.asarray(share) * count, np.full(len(copies), _GUARD * count / max(1, len(copies)))]
    )
    return (
        Turned(
            jnp.concatenate([turned.gram, grams], -1)[..., order],
            jnp.concatenate([turned.oracle, oracles], -1)[..., order],
        ),
        jnp.asarray(weights[order], jnp.float32),
    )


def _batches(turned: Turned, share: Array) -> tuple[tuple[Turned, Array], int]:
    """Both in blocks along a leading axis, and how many blocks."""
    blocks = blocked((turned, share), even=True)
    return blocks, len(blocks[1])


def _diag_losses(table: np.ndarray, moments: Moments) -> np.ndarray:
    """`1/2 |w^L - w_oracle|^2` of DIAG layers, `[context]`."""
    error = weights_of(jnp.asarray(table), moments) - oracle_weight(moments)
    return np.asarray(_half_square(error))


def _losses(layers: Sequence[ArrayLike], turned: Turned) -> np.ndarray:
    """Losses of FULL layers, in the units of their inputs."""
    return np.asarray(_losses_of(*(jnp.asarray(a) for a in layers), turned))


@jax.jit
def _losses_of(P: Array, Q: Array, turned: Turned) -> Array:
    count = turned.gram.shape[-1]
    error = jax.lax.map(
        lambda t: _half_square(full_weight(P, Q, t.gram) - t.oracle), blocked(turned, even=True)
    )
    return error.ravel()[:count]


def _single(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def _half_square(error: Array) -> Array:
    return 0.5 * jnp.sum(error**2, 0)


@jax.jit
def turn(key: Array, moments: Moments) -> Turned:
    """Every context in a basis of its own, uniform over the orthogonal group.

    A context is as likely in one basis as in any other, whatever its eigenvalues, so that these
    are fresh contexts. `moments` are in the eigenbasis.
    """
    count = moments.power.shape[0]
    parts = blocked(moments, even=True)
    keys = jax.random.split(key, len(parts.power))
    parts = jax.lax.map(lambda part: _turn(*part), (keys, parts))
    return Turned(*(jnp.moveaxis(p, 0, -2).reshape(*p.shape[1:-1], -1)[..., :count] for p in parts))


def _turn(key: Array, moments: Moments) -> Turned:
    d, count = moments.values.shape
    normal = normal_from_unit(unit_uniform(key, d * d, count)).T.reshape(count, d, d)
    basis, upper = jnp.linalg.qr(normal.astype(moments.values.dtype))
    # signs that make the decomposition unique, and with it the distribution uniform
    basis = basis * jnp.sign(jnp.diagonal(upper, axis1=-2, axis2=-1))[:, None, :]
    einsum = partial(jnp.einsum, precision="highest")
    sigma = einsum("bij,jb,bkj->ikb", basis, moments.values, basis)
    alpha = einsum("bij,jb->ib", basis, moments.correlation)
    top = jnp.concatenate([sigma, alpha[:, None]], 1)
    last = jnp.concatenate([alpha, moments.power[None]], 0)
    oracle = einsum("bij,jb->ib", basis, oracle_weight(moments))
    return Turned(jnp.concatenate([top, last[None]], 0), oracle)


def full_weight(
    P: Float[Array, "layer heads width width"],
    Q: Float[Array, "layer heads width width"],
    gram: Float[Array, "width width context"],
) -> Float[Array, "d context"]:
    """`w` after all FULL layers: minus the last row of `T`, less its last entry.

    The layers before the last are matrices `T' = (I + sum_k P_k T G T^T Q_k) T`, whose update is
    one product of a `[width^2, width^2]` matrix with all contexts; of the last only a row is read.

    Args:
        P: `width = d + 1`.
        Q: of the same shape.
        gram: of the contexts, contexts last.
    """
    width = len(gram)
    eye = jnp.eye(width, dtype=gram.dtype)[..., None]
    T = None
    for p, q in zip(P[:-1], Q[:-1], strict=True):
        now = gram if T is None else _product(_product(T, gram), T.swapaxes(0, 1))
        both = jnp.einsum("kop,kqr->orpq", p, q, precision="highest").reshape(width**2, -1)
        update = jnp.matmul(both, now.reshape(width**2, -1), precision="highest")
        update = update.reshape(now.shape)
        T = eye + update if T is None else T + _product(update, T)
    T = jnp.broadcast_to(eye, gram.shape) if T is None else T
    rows = jnp.einsum("kp,pqb->kqb", P[-1, :, -1], T, precision="highest")
    rows = _product(_product(rows, gram), T.swapaxes(0, 1))
    row = jnp.einsum("kqb,kqr->rb", rows, Q[-1], precision="highest") + eye[-1]
    return -_product(row[None], T)[0, :-1]


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """`[i, j, context]` times `[j, k, context]`, summed over j in a loop.

    Each turn is a broadcast product along the contexts; written as one expression, XLA would
    compute a product anew for every entry of the next that reads it.
    """

    def add(j: Array, total: Array) -> Array:
        return total + a[:, j, None] * b[None, j]

    shape = (a.shape[0], *b.shape[1:])
    return jax.lax.fori_loop(0, len(b), add, jnp.zeros(shape, a.dtype))


def _product_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(a, b), (a, b)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    return _product(g, b.swapaxes(0, 1)), _product(a.swapaxes(0, 1), g)


_product.defvjp(_product_forward, _product_backward)
