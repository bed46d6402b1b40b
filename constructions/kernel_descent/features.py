r"""Features as the weights of an MLP: sine and cosine written by hand, or any given one.

For sine waves m interpolates (sin, cos) linearly between `knots`
equally spaced points t_0 < t_1 < ..., with hinges that open away from the point c in the middle,

    m(x) = m(c) relu(1) + sum_{t_j >= c} b_j relu(x - t_j) + sum_{t_j <= c} b'_j relu(t_j - x),

b_j and b'_j the changes of slope on the way out from slope 0 at c; beyond the ends the slope is 0
again. The spacing h bounds the error, h^2 / 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from synthetic.sine import sine_and_cosine


class MlpWeights(NamedTuple):
    """m(x) = output act(hidden x + bias): `[hidden, dim_x]`, `[hidden]`, `[features, hidden]`."""

    hidden: np.ndarray
    bias: np.ndarray
    output: np.ndarray


def interpolant(points: np.ndarray) -> MlpWeights:
    """ReLU units for the interpolant of (sin, cos) between increasing points, at least 2."""
    values = sine_and_cosine(points)
    slopes = np.diff(values, axis=0) / np.diff(points)[:, None]
    centre = len(points) // 2
    right = np.diff(slopes[centre:], axis=0, prepend=0, append=0)
    left = np.diff(slopes[:centre], axis=0, prepend=0, append=0)
    # the last unit sees no input: relu(1) = 1 carries the value at the centre
    signs = np.repeat([1.0, -1.0, 0.0], [len(right), len(left), 1])
    hinges = np.concatenate([points[centre:], points[: centre + 1], [0.0]])
    bends = np.concatenate([right, left, values[centre : centre + 1]])
    bias = np.where(signs == 0, 1.0, -signs * hinges)
    return MlpWeights(signs[:, None], bias, bends.T)


def given_mlp(given: Any, dim_x: int) -> tuple[Any, ...]:
    """The MLP as nested tuples, which keep settings hashable and JSON-ready; ValueError if bad."""
    must = f"must be hidden weights [h, {dim_x}], hidden biases [h], output weights [f, h]"
    try:
        parts = [np.asarray(part, float) for part in given]
    except (TypeError, ValueError):
        raise ValueError(f"features is {given!r}, {must}") from None
    shapes = [part.shape for part in parts]
    fits = [len(shape) for shape in shapes] == [2, 1, 2]
    h = len(parts[0]) if fits else 0
    if not fits or h == 0 or shapes != [(h, dim_x), (h,), (len(parts[2]), h)] or not len(parts[2]):
        raise ValueError(f"features has shapes {shapes}, {must}")
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"features holds NaN or infinite values, {must}")
    rows = [tuple(tuple(row) for row in part.tolist()) for part in (parts[0], parts[2])]
    return (rows[0], tuple(parts[1].tolist()), rows[1])
