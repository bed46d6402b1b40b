"""What the constructions on in-context regression share: three arrays in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from constructions.family import Construction
from constructions.inputs import Input

Inputs = Float[Array, "batch context dim_x"]
Outputs = Float[Array, "batch context dim_y"]
Queries = Float[Array, "batch query dim_x"]


class Regression(Construction):
    """A construction whose inputs are x, y and x_query, of `dim_x` and `dim_y` columns."""

    dim_x: int
    dim_y: int

    @property
    def arguments(self) -> tuple[Input, ...]:
        """Pairs x `[batch, context, dim_x]` and y `[batch, context, dim_y]`, and queries.

        Queries are `[batch, query, dim_x]`, predictions for them `[batch, query, dim_y]`.
        """
        return (
            Input("x", ("batch", "context", self.dim_x)),
            Input("y", ("batch", "context", self.dim_y)),
            Input("x_query", ("batch", "query", self.dim_x)),
        )

    def context_size(self, *inputs: Any) -> int:
        """N, the number of pairs."""
        return inputs[0].shape[1]

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """These pairs (x_i, y_i) only; the queries stay."""
        x, y, x_query = inputs
        index = np.asarray(kept, int)
        return x[:, index], y[:, index], x_query
