r"""Few-shot regression, written as a sequence for a model that predicts the next state.

    x_1  y_1  x_2  y_2  ..  x_n,        y_i = W x_i + noise eps_i,    x_i uniform in [-1, 1)^dim,

with W orthogonal and drawn anew for each sequence. Only the predictions at the x_i count. A model
of dynamics takes every token for the successor of the one before, hence every y_i for the
predecessor of x_{i+1}. A token EOS after every pair keeps the two apart, and a prefix of further
tokens can mark in front which kind it is. Both are vectors to be tuned, the model is not.

(von Oswald et al. 2023, arXiv 2309.05858; the settings of the paper's code: 10 dimensions, noise
.01, 68 pairs, a prefix of 20.)

Least squares on all successive tokens. With c = 1/3 the variance of each x and n pairs so far, the
Gram matrix of all predecessors is the sum over x and over y and tends to 2 n c I, but only half of
it is about W: the prediction tends to W x / 2, with or without EOS. What EOS = 0 removes is the sum
of x_{i+1} y_i^T, an error of variance 1 / 4n in each entry of the estimate of W. With kurtosis
k = 9/5 and no noise, the mean loss is, up to terms in 1 / n^2,

    c dim / 8  +  c (dim - 1) (dim + k - 1) / 16 n  (+ c dim^2 / 8 n  without EOS).

The first term comes from W / 2, the second from the Gram matrices of x and y, which differ. EOS = e
adds n e e^T to the Gram matrix, hence is best at 0 (`limit`). The derivation is ours; the two tuned
EOS that come with the paper's code, drawn from N(0, I), ended at lengths .0096 and .0078.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.dynamics import half_squared_distance, product
from synthetic.tasks.regression import Uniform
from synthetic.tasks.task import Batch

Pairs = Float[Array, "batch pair dim"]
INPUTS = Uniform(-1.0, 1.0)


@dataclass(frozen=True)
class FewShotRegression:
    """Pairs of one orthogonal map a sequence; a `Task`. Hashable.

    Attributes:
        dim: of x and y.
        pairs: in a sequence.
        noise: standard deviation of each coordinate of y.

    Raises:
        ValueError: a number out of range.
    """

    dim: int = 10
    pairs: int = 68
    noise: float = 0.01

    def __post_init__(self) -> None:
        number("dim", self.dim, whole=True, least=1)
        number("pairs", self.pairs, whole=True, least=1)
        number("noise", self.noise, least=0)

    @property
    def noise_floor(self) -> float:
        """Loss of whoever knows W: dim noise^2 / 2."""
        return self.dim * self.noise**2 / 2

    @compile_once(static_argnums=(0, 2), often=many)
    def sample(self, key: Array, batch: int) -> Batch:
        """Draw sequences of pairs.

        Returns:
            `inputs`: x and y, `[batch, pairs, dim]`; `target`: y.
        """
        law_key, x_key, noise_key = jax.random.split(key, 3)
        law = jax.random.orthogonal(law_key, self.dim, (batch,))
        shape = (batch, self.pairs, self.dim)
        x = jax.random.uniform(x_key, shape, minval=INPUTS.low, maxval=INPUTS.high)
        noise = self.noise * jax.random.normal(noise_key, shape)
        y = product(x, jnp.swapaxes(law, 1, 2)) + noise
        return Batch((x, y), y)

    def loss(self, prediction: Pairs, batch: Batch) -> Array:
        """Half the squared distance from y, its mean over pairs, `[batch]`."""
        return self.loss_by_pair(prediction, batch).mean(-1)

    def loss_by_pair(self, prediction: Pairs, batch: Batch) -> Float[Array, "batch pair"]:
        """The same of every pair; entry i is about y_i, from the i - 1 pairs before and x_i."""
        return half_squared_distance(prediction, batch.target)

    def limit(self, eos: float | None = None) -> float:
        """Mean loss of least squares on all successive tokens after very many pairs.

        Args:
            eos: the length of EOS, None for none, which is as good as 0.
        """
        c, both = INPUTS.variance, 2 * INPUTS.variance + self.noise**2
        along = both + (eos or 0.0) ** 2
        shrunk = (self.dim - 1) * (1 - c / both) ** 2 + (1 - c / along) ** 2
        return c * shrunk / 2 + self.noise_floor

    def expansion(self, pairs: int, eos: bool) -> float:
        """The same after so many pairs, to first order in 1 / pairs; EOS is 0 where there is one.

        The noise enters the limit alone.
        """
        c, d, kurtosis = INPUTS.variance, self.dim, INPUTS.kurtosis
        unequal = c * (d - 1) * (d + kurtosis - 1) / (16 * pairs)
        crossed = 0.0 if eos else c * d**2 / (8 * pairs)
        return self.limit() + unequal + crossed


def interleave(
    x: ArrayLike, y: ArrayLike, eos: ArrayLike | None = None, prefix: ArrayLike | None = None
) -> tuple[Float[Array, "batch token dim"], slice]:
    """The sequence: prefix, then x_1 y_1 (eos) x_2 y_2 (eos) .. up to the last x.

    Args:
        x, y: `[batch, pair, dim]`.
        eos: `[dim]`, or None for none.
        prefix: `[count, dim]`, or None for none.

    Returns:
        the tokens, and the places of the x among them.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, y {y.shape}, must be [batch, pair, dim] both")
    batch, _, dim = x.shape
    rows = [x, y]
    if eos is not None:
        if jnp.shape(eos) != (dim,):
            raise ValueError(f"eos has shape {jnp.shape(eos)}, must be ({dim},)")
        rows.append(jnp.broadcast_to(eos, x.shape))
    period = len(rows)
    tokens = jnp.stack(rows, 2).reshape(batch, -1, dim)[:, : 1 - period]
    if prefix is None:
        return tokens, slice(0, None, period)
    prefix = jnp.asarray(prefix)
    if prefix.ndim != 2 or prefix.shape[1] != dim:
        raise ValueError(f"prefix has shape {prefix.shape}, must be [count, {dim}]")
    before = jnp.broadcast_to(prefix, (batch, *prefix.shape))
    return jnp.concatenate([before, tokens], 1), slice(len(prefix), None, period)
