"""In-context linear regression: a context of examples of one linear map, and queries to it.

    x_i, x_query ~ inputs,   rows of W ~ weights,   y_i = W x_i + noise eps_i,   target W x_query

(von Oswald et al., 2023, section 3; Garg et al., 2022; Ahn et al., 2023 for covariances).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.task import Batch, half_squared_error
from synthetic.threefry import normal_from_unit, unit_uniform

# Up to this dimension a product with W is written term by term: XLA's CPU back end is several
# times slower at a batch of small matrix products whose batch is the fast axis.
_UNROLL = 64


@dataclass(frozen=True)
class Uniform:
    """Independent coordinates, uniform on `[low, high)`.

    Raises:
        ValueError: a bound is not finite, or `low >= high`.
    """

    low: float | int = -0.5
    high: float | int = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"Uniform needs finite low < high, got low={self.low}, high={self.high}"
            )

    @property
    def mean(self) -> float:
        """`(low + high) / 2`; the closed forms of `theory` need 0."""
        return (self.low + self.high) / 2

    @property
    def variance(self) -> float:
        """`(high - low)^2 / 12`."""
        return (self.high - self.low) ** 2 / 12

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance, 9/5."""
        return 9 / 5

    def covariance_matrix(self, dim: int) -> np.ndarray:
        """`variance I`, `[dim, dim]` float64."""
        return self.variance * np.eye(dim)

    def to_json(self) -> dict[str, list[float]]:
        """As plain data, which `distribution` reads."""
        return {"uniform": [self.low, self.high]}

    def scaled(self, factor: float | int) -> "Uniform":
        """The distribution of `factor x`; the factor is positive."""
        return Uniform(self.low * factor, self.high * factor)

    def transform(self, unit: Float[Array, "... dim batch"]) -> Float[Array, "... dim batch"]:
        """Samples from uniform numbers in `[0, 1)` of the same shape."""
        return self.low + (self.high - self.low) * unit


@dataclass(frozen=True)
class Gaussian:
    """Mean 0 and a covariance: `None` is the identity, a float a multiple of it, or a matrix.

    A matrix `[dim, dim]` (anything array-like) is kept as a tuple of tuples, so that the
    distribution is hashable and a static argument of `jit`. It may be singular.

    Raises:
        ValueError: the covariance is not finite, not positive (float) or not square, symmetric
            and positive semidefinite with positive trace (matrix).
    """

    covariance: float | int | Sequence[Sequence[float | int]] | np.ndarray | Array | None = None

    def __post_init__(self) -> None:
        if self.covariance is None:
            return
        matrix = np.asarray(self.covariance, np.float64)
        if matrix.ndim == 0:
            if not (np.isfinite(matrix) and matrix > 0):
                raise ValueError(f"covariance must be positive and finite, got {matrix}")
            object.__setattr__(self, "covariance", float(matrix))
            return
        _check_covariance(matrix)
        object.__setattr__(self, "covariance", tuple(map(tuple, matrix.tolist())))

    @property
    def mean(self) -> float:
        """The mean of every coordinate: 0."""
        return 0.0

    @property
    def kurtosis(self) -> float:
        """The kurtosis of every coordinate: 3."""
        return 3.0

    def covariance_matrix(self, dim: int) -> np.ndarray:
        """The covariance, `[dim, dim]` float64; ValueError where it has another dimension."""
        if self.covariance is None or isinstance(self.covariance, float):
            return (1.0 if self.covariance is None else self.covariance) * np.eye(dim)
        matrix = np.asarray(self.covariance, np.float64)
        if matrix.shape != (dim, dim):
            raise ValueError(f"covariance must have shape {(dim, dim)}, got {matrix.shape}")
        return matrix

    def to_json(self) -> str | dict[str, Any]:
        """As plain data, which `distribution` reads."""
        return "gaussian" if self.covariance is None else {"gaussian": self.covariance}

    def scaled(self, factor: float | int) -> "Gaussian":
        """The distribution of `factor x`; the factor is positive."""
        if self.covariance is None or isinstance(self.covariance, float):
            return Gaussian(factor**2 * (1.0 if self.covariance is None else self.covariance))
        return Gaussian(factor**2 * np.asarray(self.covariance, np.float64))

    def transform(self, unit: Float[Array, "... dim batch"]) -> Float[Array, "... dim batch"]:
        """Samples from uniform numbers in `[0, 1)` of the same shape."""
        normal = normal_from_unit(unit)
        if self.covariance is None:
            return normal
        if isinstance(self.covariance, float):
            return float(np.sqrt(self.covariance)) * normal
        values, vectors = np.linalg.eigh(np.asarray(self.covariance, np.float64))
        root = jnp.asarray(vectors * np.sqrt(np.maximum(values, 0)), unit.dtype)
        return jnp.einsum("dk,...kb->...db", root, normal, precision="highest")


def distribution(name: str, given: object) -> Uniform | Gaussian:
    """A distribution from plain data, as settings and files have it.

    Args:
        name: what the message of the error calls it.
        given: "uniform", on [-1/2, 1/2); "gaussian", N(0, I); {"uniform": [low, high]};
            {"gaussian": c} with a number or a matrix c, the covariance; or one of the classes.

    Raises:
        ValueError: anything else.
    """
    if isinstance(given, Uniform | Gaussian):
        return given
    if given in ("uniform", "gaussian"):
        return Uniform() if given == "uniform" else Gaussian()
    try:
        ((kind, value),) = given.items()  # type: ignore[attr-defined]
        if kind == "uniform":
            low, high = value
            return Uniform(low, high)
        if kind == "gaussian":
            return Gaussian(value)
        reason = ""
    except (AttributeError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(given, Mapping) else ""
    raise ValueError(
        f"{name} is {given!r}, must be 'uniform', 'gaussian', {{'uniform': [low, high]}} or "
        f"{{'gaussian': covariance}}{reason}"
    )


def _check_covariance(matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"covariance must be a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("covariance must be finite, got a matrix with NaN or infinity")
    # float32 covariances are symmetric and semidefinite only to their rounding
    slack = 1e-6 * np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > slack:
        raise ValueError(f"covariance must be symmetric, got a difference of {asymmetry:g}")
    smallest = np.linalg.eigvalsh(matrix)[0]
    if smallest < -slack or np.trace(matrix) <= 0:
        raise ValueError(
            "covariance must be positive semidefinite with positive trace, "
            f"got smallest eigenvalue {smallest:g}, trace {np.trace(matrix):g}"
        )


@dataclass(frozen=True)
class RegressionTask:
    """In-context linear regression, as the module's equation; a `Task`.

    Hashable, hence a static argument of `jit`. Arrays have JAX's default float.

    Attributes:
        dim_x: dimension of the inputs.
        num_examples: examples in the context, `N`.
        dim_y: dimension of the outputs; the rows of `W` are independent.
        queries: queries to each context, independent given `W`.
        inputs: distribution of `x_i` and `x_query`.
        weights: distribution of each row of `W`.
        noise: standard deviation of the Gaussian noise on the context's outputs; the target has
            none.

    Raises:
        ValueError: a size is below 1, the noise is negative or not finite, or a covariance does
            not fit `dim_x`.
        TypeError: a distribution is of another class.
    """

    dim_x: int = 10
    num_examples: int = 10
    dim_y: int = 1
    queries: int = 1
    inputs: Uniform | Gaussian = Uniform()
    weights: Uniform | Gaussian = Gaussian()
    noise: float | int = 0.0

    #: Fields that may be traced where they are above 0; see `synthetic.fitting.recipe.varied`.
    NUMBERS: ClassVar[tuple[str, ...]] = ("noise",)

    def __post_init__(self) -> None:
        for name in ("dim_x", "num_examples", "dim_y", "queries"):
            size = number(name, getattr(self, name), whole=True, least=1)
            object.__setattr__(self, name, size)
        object.__setattr__(self, "noise", float(self.noise))
        if not (np.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise must be finite and at least 0, got {self.noise}")
        for name in ("inputs", "weights"):
            distribution = getattr(self, name)
            if not isinstance(distribution, (Uniform, Gaussian)):
                raise TypeError(f"{name} must be a Uniform or a Gaussian, got {distribution!r}")
            try:
                distribution.covariance_matrix(self.dim_x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def with_inputs(self, inputs: Uniform | Gaussian) -> "RegressionTask":
        """The same task with other inputs."""
        return replace(self, inputs=inputs)

    def scaled_inputs(self, factor: float | int) -> "RegressionTask":
        """The same task with inputs `factor x`; ValueError unless the factor is positive."""
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"factor must be positive and finite, got {factor}")
        return self.with_inputs(self.inputs.scaled(float(factor)))

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw independent contexts, at least 1.

        Returns:
            `inputs`: x `[batch, num_examples, dim_x]`, y `[batch, num_examples, dim_y]`,
            x_query `[batch, queries, dim_x]`; `target`: `W x_query`, `[batch, queries, dim_y]`.
        """
        size = number("batch", batch, whole=True, least=1)
        if isinstance(self.noise, Array):  # one of several that share a program
            return _draw.__wrapped__(self, key, size, noisy=True)
        return _draw(self, key, size)

    def loss(self, prediction: Float[Array, "..."], batch: Batch) -> Float[Array, " batch"]:
        """`half_squared_error` of predictions `[batch, queries, dim_y]`."""
        return half_squared_error(prediction, batch.target)


@compile_once(static_argnums=(0, 2), often=many)
def _draw(task: RegressionTask, key: Array, batch: int, noisy: bool = False) -> Batch:
    n, q, dx, dy = task.num_examples, task.queries, task.dim_x, task.dim_y
    noisy = noisy or task.noise > 0
    # One draw for everything, with the batch as the fast axis; the transposes at the end cancel
    # against those of a model that works in the same layout.
    shapes = [(n, dx), (q, dx), (dy, dx)] + ([(n, dy)] if noisy else [])
    sizes = [rows * columns for rows, columns in shapes]
    unit = unit_uniform(key, sum(sizes), batch)
    parts = [
        part.reshape(*shape, batch)
        for part, shape in zip(jnp.split(unit, np.cumsum(sizes)[:-1]), shapes, strict=True)
    ]
    x, x_query = task.inputs.transform(parts[0]), task.inputs.transform(parts[1])
    w = task.weights.transform(parts[2])
    y, target = _apply(w, x), _apply(w, x_query)
    if noisy:
        y = y + task.noise * normal_from_unit(parts[3])
    x, y, x_query, target = (jnp.moveaxis(array, -1, 0) for array in (x, y, x_query, target))
    return Batch(inputs=(x, y, x_query), target=target)


def _apply(
    w: Float[Array, "dim_y dim_x batch"], x: Float[Array, "token dim_x batch"]
) -> Float[Array, "token dim_y batch"]:
    """`W x` for every token of every context."""
    if x.shape[1] > _UNROLL:
        return jnp.einsum("odb,ndb->nob", w, x, precision="highest")
    total = x[:, None, 0] * w[None, :, 0]
    for i in range(1, x.shape[1]):
        total = total + x[:, None, i] * w[None, :, i]
    return total


@dataclass(frozen=True)
class ShiftedTasks:
    """Linear regression, half of the time with weights of mean `shift` in the place of 0.

    Attributes:
        base: the task whose weights have mean 0, with one output.
        shift: the other's mean, `[dim_x]`.
    """

    base: RegressionTask
    shift: tuple[float, ...]

    def sample(self, key: Array, batch: int) -> Batch:
        """Inputs x, y, x_query and `new`, `[batch]` of bool; the target for x_query."""
        flags, rest = jax.random.split(key)
        (x, y, x_query), target = self.base.sample(rest, batch)
        new = jax.random.bernoulli(flags, 0.5, (batch,))
        mean = jnp.where(new[:, None], jnp.asarray(self.shift, x.dtype), 0)
        more = [jnp.einsum("bni,bi->bn", a, mean, precision="highest") for a in (x, x_query)]
        return Batch((x, y + more[0][..., None], x_query, new), target + more[1][..., None])

    def loss(self, prediction: Array, batch: Batch) -> Array:
        """As for linear regression."""
        return self.base.loss(prediction, batch)


@dataclass(frozen=True)
class ScaledTasks:
    """Linear regression whose contexts differ in the scale of their inputs, and not in y.

    x = s u and w = v / s, with s drawn from the scales for each context, u and v as in the base.
    A step of gradient descent on s is s^2 steps on 1.

    Attributes:
        base: the task of scale 1.
        scales: s, all equally likely.
    """

    base: RegressionTask
    scales: tuple[float, ...]

    def sample(self, key: Array, batch: int) -> Batch:
        """As `RegressionTask.sample`."""
        first, rest = jax.random.split(key)
        (x, y, x_query), target = self.base.sample(rest, batch)
        drawn = jax.random.randint(first, (batch, 1, 1), 0, len(self.scales))
        scale = jnp.asarray(self.scales, x.dtype)[drawn]
        return Batch((scale * x, y, scale * x_query), target)

    def loss(self, prediction: Array, batch: Batch) -> Array:
        """As for linear regression."""
        return self.base.loss(prediction, batch)
