"""What Vladymyrov et al. 2024 state of trained linear transformers, as claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.claims import Claim, Evidence, masks_alike
from constructions.core.canonical import layer_tensors
from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once
from synthetic.theory.ridge import adaptive_ridge, ridge

_ridge = compile_once(ridge)

_PAPER = "Vladymyrov et al. 2024, arXiv 2402.14180"


def _ridges(e: Evidence) -> tuple[Array, Array]:
    """Predictions of ridge regression that knows the noise, and of one that has E sigma^2."""
    noise = e.examples.target.noise
    constant = jnp.full_like(noise, e.construction.task.mean_square_noise)

    def both() -> tuple[Array, Array]:
        x, y, x_query = e.examples.inputs
        return _ridge(x, y, x_query, noise**2), _ridge(x, y, x_query, constant)

    return e.once("ridges", both)


def adjusted_loss(e: Evidence) -> float:
    """Expected loss less that of ridge regression with the true noise.

    That ridge is the posterior mean, so that this is half the mean square distance from it, which
    scatters less than the difference of two losses on the same examples.
    """
    oracle, _ = _ridges(e)
    return float(jnp.square(e.prediction - oracle).mean() / 2)


def against_constant_ridge(e: Evidence) -> float:
    """Adjusted loss over that of ridge regression with E sigma^2, the limit of GD++."""
    oracle, constant = _ridges(e)
    return adjusted_loss(e) / float(jnp.square(constant - oracle).mean() / 2)


def shrinkage(e: Evidence) -> float:
    """Slope of predictions on targets at low noise less that at high noise (below, above E sigma).

    Slopes are relative to those of a constant ridge, which are equal but for chance, and for as
    little chance the posterior means stand for the targets. 0 in expectation for every method
    that is linear in the labels.
    """
    noise = np.asarray(e.examples.target.noise)
    oracle, constant = (np.asarray(a) for a in _ridges(e))
    product = np.asarray(e.prediction) * oracle
    low = noise < noise.mean()
    slopes = (product[part].mean() / (constant * oracle)[part].mean() for part in (low, ~low))
    return float(np.subtract(*slopes))


#: The four numbers of a layer, w_xx, w_xy, w_yx and w_yy, by what they do.
NUMBERS = ("curvature", "momentum", "step size", "rescaling")


@compile_once(static_argnums=0, often=True)
def _numbers(construction: Any, model: Transformer, parts: Sequence[Transformer]) -> Array:
    """The four numbers of every layer, `[layer, number]`; 0 where a number changes nothing."""
    gauge = construction.gauge()
    ours, *units = (layer_tensors(m, gauge) for m in (model, *parts))

    def number(layer: int, unit: tuple[Array, ...]) -> Array:
        size = jnp.vdot(unit[layer], unit[layer])
        return jnp.vdot(unit[layer], ours[layer]) / jnp.where(size > 0, size, 1)

    return jnp.stack([jnp.stack([number(n, u) for u in units]) for n in range(len(ours))])


def numbers(e: Evidence) -> np.ndarray:
    """(w_xx, w_xy, w_yx, w_yy) nearest to the canonical tensor of every layer, `[layer, 4]`.

    The least-squares projection on the layers that have one of them alone; these are orthogonal.
    In the last layer, of which y alone is read, w_xx and w_xy are 0.
    """
    depth, c = len(e.construction.layers), e.construction
    parts = [replace(c, layers=[tuple(row)] * depth).reference for row in np.eye(4)]
    return np.asarray(_numbers(c, e.model, tuple(parts)))


def number_error(e: Evidence, which: int) -> float:
    """Largest |w' / w - 1| over the layers, of one of the four numbers, where w is not 0."""
    given = np.asarray(e.construction.layers)[:, which]
    found = numbers(e)[:, which]
    if which < 2:  # nothing reads what the last layer does to x
        given, found = given[:-1], found[:-1]
    return float(np.abs(found[given != 0] / given[given != 0] - 1).max())


def curvature_error(e: Evidence) -> float:
    """`number_error` of w_xx, minus gamma of GD++."""
    return number_error(e, 0)


def momentum_error(e: Evidence) -> float:
    """`number_error` of w_xy."""
    return number_error(e, 1)


def step_size_error(e: Evidence) -> float:
    """`number_error` of w_yx, minus the step size."""
    return number_error(e, 2)


def rescaling_error(e: Evidence) -> float:
    """`number_error` of w_yy."""
    return number_error(e, 3)


MEAN_NOISE, RESIDUALS, NO_NOISE = (
    "ridge with the mean noise",
    "ridge with the noise of the residuals",
    "least squares",
)


def rivals(construction: Any) -> dict[str, Callable[..., Array]]:
    """Ridge regressions, each with another idea of the noise, and no layers.

    One for all contexts (E sigma^2, the best constant), sigma_hat^2 = RSS / (N - d), where there
    are residuals to tell it, and none.
    """
    found: dict[str, Callable[..., Array]] = {
        MEAN_NOISE: partial(_ridge, penalty=construction.task.mean_square_noise),
        NO_NOISE: partial(_ridge, penalty=0.0),
    }
    if construction.num_examples > construction.dim_x:
        found[RESIDUALS] = adaptive_ridge
    return found


_PARTS = ("no rescaling", "no momentum")
_RIVALS = (MEAN_NOISE, RESIDUALS, NO_NOISE)

#: Of two layers and more, where the noise changes from context to context.
CLAIMS = (
    Claim(
        "equal loss",
        "Full matrices P and Q have the loss of the best four numbers a layer.",
        "excess_loss",
        0.006,
        "<=",
        f"{_PAPER}, Table 1 (DIAG and FULL)",
        catches=(*_PARTS, "step size + 10 %", "step size - 10 %", "centred attention", *_RIVALS),
        note="Of the whole loss, whose larger part no one can avoid.",
    ),
    Claim(
        "equal predictions",
        "Its predictions are those of these four numbers a layer.",
        "prediction_distance",
        0.1,
        "<=",
        f"{_PAPER}, section 6",
        catches=("no rescaling", "centred attention", *_RIVALS),
        note="Near, not equal: the best full matrices are better than the best four numbers a "
        "layer, and 5 % of the predictions away. So a step size off by 10 %, at 6 to 7 %, passes.",
    ),
    Claim(
        "better than any constant ridge",
        "It is nearer to the ridge that knows the noise than a ridge of constant strength is, "
        "which bounds GD++ of any depth.",
        against_constant_ridge,
        0.98,
        "<=",
        f"{_PAPER}, Table 1 (ConstRR)",
        catches=("GD++ part", "no rescaling", MEAN_NOISE, NO_NOISE),
        note="By 2 %: the threshold was 1, which that ridge attains itself, until it became a "
        "control. Ridge regression with the noise of the residuals is at 0.24 and passes: equal "
        "loss and equal predictions tell it apart. At two layers the rescaling of labels alone, "
        "without momentum, ends level with it.",
    ),
    Claim(
        "adapts to the noise",
        "It shrinks its predictions more where the context is noisier.",
        shrinkage,
        0.06,
        ">=",
        f"{_PAPER}, Theorem 5.2 and section 6",
        catches=("GD++ part", MEAN_NOISE, NO_NOISE),
        note="Exactly 0 in expectation for all that is linear in the labels, GD++ and a constant "
        "ridge among them. Whatever estimates the noise passes, by residuals too.",
    ),
)


def _number(
    name: str, statistic: Any, threshold: float, catches: tuple[str, ...], note: str = ""
) -> Claim:
    return Claim(
        f"equal {name}",
        f"Read off full P and Q, the {name} of every layer is that of the best four numbers.",
        statistic,
        threshold,
        "<=",
        f"{_PAPER}, section 6 and fig. 4",
        catches=catches,
        gauge="invariant: read off the canonical tensor",
        needs=(masks_alike,),
        note=note,
    )


#: Of the four numbers; of the last layer those that are read.
NUMBER_CLAIMS = (
    _number("curvature", curvature_error, 0.25, ("no curvature",)),
    _number(
        "momentum",
        momentum_error,
        0.25,
        ("no momentum", "GD++ part"),
        "Three seeds at quick settings are 11 to 25 % below.",
    ),
    _number(
        "step size",
        step_size_error,
        0.08,
        ("step size + 10 %", "step size - 10 %"),
        "Refuted: at the same loss trained models take 11 to 14 % less in the first step, 1 to 4 % "
        "in the second. The optimum of full matrices is another than that of four numbers.",
    ),
    _number(
        "rescaling",
        rescaling_error,
        0.25,
        ("no rescaling", "GD++ part"),
        "Refuted: trained models shrink labels 1.2 times as much in the first layer, and 1.8 to 2 "
        "times in the last.",
    ),
)

#: Of two layers, N = 20, d = 10 and sigma in {1, 3} only.
PUBLISHED = Claim(
    "published loss",
    "Its adjusted loss is that of the paper's two layers, or lower.",
    adjusted_loss,
    1.1 * 0.202,
    "<=",
    f"{_PAPER}, Table 1 (FULL, 2 layers, sigma in {{1, 3}})",
    catches=("GD++ part", "no rescaling", NO_NOISE),
    published=0.202,
    note="A ridge with the mean noise has 0.219 and passes, as does whatever is better than two "
    "layers: it takes the other claims to tell what attains it.",
)


def claims_of(construction: Any) -> tuple[Claim, ...]:
    """The claims that the paper makes at these settings."""
    task, depth = construction.task, len(construction.layers)
    changes = task.max_noise > 0 or len({*task.noise_levels}) > 1
    if depth < 2 or not changes or not all(w[1] or w[3] for w in construction.layers):
        return ()
    sizes = (construction.dim_x, construction.num_examples, depth, task.noise_levels)
    first = construction.layers[0]
    read = NUMBER_CLAIMS if all(first) else ()
    claims = (*CLAIMS, *read, *([PUBLISHED] if sizes == (10, 20, 2, (1.0, 3.0)) else []))
    known = {*rivals(construction)}  # no residuals tell the noise where N is at most d
    return tuple(
        replace(c, catches=tuple(n for n in c.catches if n not in _RIVALS or n in known))
        for c in claims
    )
