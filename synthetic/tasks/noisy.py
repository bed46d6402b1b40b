"""In-context linear regression whose noise level changes from context to context.

    x_i, x_query, w ~ N(0, I),   sigma ~ levels,   y_i = w . x_i + sigma eps_i,   target w . x_query

(Vladymyrov, von Oswald, Sandler and Ge, 2024, section 2 and Table 1).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.regression import _apply
from synthetic.tasks.task import Batch, half_squared_error
from synthetic.threefry import normal_from_unit, unit_uniform


class NoisyTarget(NamedTuple):
    """What a prediction is compared with, and what only an oracle knows.

    Attributes:
        value: clean targets `w . x_query`, `[batch, queries, 1]`.
        noise: sigma of every context, `[batch]`.
        weight: w, `[batch, dim_x]`.
    """

    value: Array
    noise: Array
    weight: Array


class Moments(NamedTuple):
    """Moments of contexts, all that an algorithm with no basis of its own uses; contexts are last.

    In the eigenbasis of the Gram matrix `X^T X` of a context (`[examples, dim_x]`): whatever is
    built from `X^T X`, `X^T y` and `y^T y` alone turns with the basis, and for isotropic queries
    the expected loss `1/2 |w_hat - w|^2` is the same in every one.

    Attributes:
        values: eigenvalues of `X^T X`, ascending, `[dim_x, context]`.
        correlation: `X^T y`, `[dim_x, context]`.
        power: `y^T y`, `[context]`.
        weight: the true w, `[dim_x, context]`.
        noise: sigma, `[context]`.
    """

    values: Array
    correlation: Array
    power: Array
    weight: Array
    noise: Array


class Contexts(NamedTuple):
    """Contexts before their noise is scaled, in the eigenbasis of `X^T X`; contexts are last.

    Attributes:
        values: eigenvalues of `X^T X`, ascending, `[dim_x, context]`.
        weight: w, `[dim_x, context]`.
        noise_correlation: `X^T eps`, `[dim_x, context]`.
        noise_power: `eps^T eps`, `[context]`.
        level: a uniform number that picks the noise level, `[context]`.
    """

    values: Array
    weight: Array
    noise_correlation: Array
    noise_power: Array
    level: Array


@dataclass(frozen=True)
class NoisyRegressionTask:
    """Linear regression in context with a noise level of each context's own; a `Task`.

    Hashable, hence a static argument of `jit`. Arrays have JAX's default float.

    Attributes:
        dim_x: dimension of the inputs.
        num_examples: examples in the context, `N`.
        max_noise: sigma is uniform on `[0, max_noise)`.
        noise_levels: or uniform over these; then `max_noise` must be left at 0.
        queries: queries to each context.

    Raises:
        ValueError: a size is below 1, a noise is negative or not finite, or both kinds are given.
    """

    dim_x: int = 10
    num_examples: int = 20
    max_noise: float | int = 0.0
    noise_levels: tuple[float | int, ...] = ()
    queries: int = 1

    #: Fields that may be traced where they are above 0; see `synthetic.fitting.recipe.varied`.
    NUMBERS: ClassVar[tuple[str, ...]] = ("max_noise",)

    def __post_init__(self) -> None:
        for name in ("dim_x", "num_examples", "queries"):
            size = number(name, getattr(self, name), whole=True, least=1)
            object.__setattr__(self, name, size)
        object.__setattr__(self, "max_noise", _level("max_noise", self.max_noise))
        levels = tuple(_level("noise_levels", level) for level in self.noise_levels)
        object.__setattr__(self, "noise_levels", levels)
        if levels and self.max_noise:
            raise ValueError(
                f"give max_noise or noise_levels, got max_noise={self.max_noise} "
                f"and noise_levels={levels}"
            )

    @property
    def mean_square_noise(self) -> float:
        """`E sigma^2`: `max_noise^2 / 3`, or the mean square of the levels."""
        if self.noise_levels:
            return float(np.mean(np.square(self.noise_levels)))
        return float(self.max_noise) ** 2 / 3

    def noise_of(self, unit: Array) -> Array:
        """Noise levels from uniform numbers in `[0, 1)`."""
        if not self.noise_levels:
            return self.max_noise * unit
        levels = jnp.asarray(self.noise_levels, unit.dtype)
        return levels[jnp.floor(unit * len(self.noise_levels)).astype(int)]

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw independent contexts, at least 1.

        Returns:
            `inputs`: x `[batch, num_examples, dim_x]`, y `[batch, num_examples, 1]`, x_query
            `[batch, queries, dim_x]`; `target`: a `NoisyTarget`.
        """
        # one of several that share a program is traced, and no static argument
        draw = _draw.__wrapped__ if isinstance(self.max_noise, Array) else _draw
        return draw(self, key, number("batch", batch, whole=True, least=1))

    def loss(self, prediction: Float[Array, "..."], batch: Batch) -> Float[Array, " batch"]:
        """`half_squared_error` against the clean target."""
        return half_squared_error(prediction, batch.target.value)

    @compile_once(static_argnums=0)
    def moments(self, contexts: Contexts) -> Moments:
        """The same contexts at this task's noise.

        Raises:
            ValueError: the contexts have another dimension.
        """
        if len(contexts.values) != self.dim_x:
            raise ValueError(f"contexts have dim_x={len(contexts.values)}, the task {self.dim_x}")
        sigma = self.noise_of(contexts.level)
        clean = contexts.values * contexts.weight
        noisy = sigma * contexts.noise_correlation
        power = jnp.sum(contexts.weight * (clean + 2 * noisy), 0)
        power = power + sigma**2 * contexts.noise_power
        return Moments(contexts.values, clean + noisy, power, contexts.weight, sigma)


def _level(name: str, value: float | int) -> float:
    level = float(value)
    if not (np.isfinite(level) and level >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return level


@compile_once(static_argnums=(0, 2), often=many)
def _draw(task: NoisyRegressionTask, key: Array, batch: int) -> Batch:
    n, q, d = task.num_examples, task.queries, task.dim_x
    # Batch last, as in `regression`: one draw, and transposes that cancel against a model's.
    unit = unit_uniform(key, n * d + q * d + d + n + 1, batch)
    sigma, normal = task.noise_of(unit[-1]), normal_from_unit(unit[:-1])
    x, x_query, w, eps = jnp.split(normal, np.cumsum([n * d, q * d, d]))
    x, x_query, w = (part.reshape(-1, d, batch) for part in (x, x_query, w))
    y = _apply(w, x) + sigma * eps[:, None]
    x, y, x_query, value, w = (
        jnp.moveaxis(array, -1, 0) for array in (x, y, x_query, _apply(w, x_query), w[0])
    )
    return Batch(inputs=(x, y, x_query), target=NoisyTarget(value, sigma, w))


def draw_contexts(key: Array, dim_x: int, num_examples: int, count: int) -> Contexts:
    """Contexts to be used at several noise levels: `task.moments(contexts)`.

    One eigendecomposition a context, so that a table whose columns differ in their noise alone
    needs each only once, and compares its columns on the same inputs.

    Raises:
        ValueError: a size is below 1.
    """
    sizes = {"dim_x": dim_x, "num_examples": num_examples, "count": count}
    d, n, count = (number(name, n, whole=True, least=1) for name, n in sizes.items())
    blocks = -(-count // 4096)
    parts = jax.lax.map(
        partial(_contexts, d, n, -(-count // blocks)), jax.random.split(key, blocks)
    )
    return Contexts(
        *(jnp.moveaxis(p, 0, -2).reshape(*p.shape[1:-1], -1)[..., :count] for p in parts)
    )


def _contexts(d: int, n: int, count: int, key: Array) -> Contexts:
    unit = unit_uniform(key, n * d + d + n + 1, count)
    normal = normal_from_unit(unit[:-1])
    x = jnp.moveaxis(normal[: n * d].reshape(n, d, count), -1, 0)
    w, eps = normal[n * d : n * d + d].T, normal[n * d + d :].T
    gram = jnp.einsum("bni,bnj->bij", x, x, precision="highest")
    values, vectors = jnp.linalg.eigh(gram)
    correlation = jnp.einsum("bni,bn->bi", x, eps, precision="highest")
    w, correlation = (
        jnp.einsum("bij,bi->jb", vectors, v, precision="highest") for v in (w, correlation)
    )
    return Contexts(values.T, w, correlation, jnp.sum(eps**2, 1), unit[-1])
