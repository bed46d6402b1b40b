"""What becomes of the statements of von Oswald et al. 2022 when the first layer is another one."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from constructions.claims import predict
from constructions.measurement import Measurement
from constructions.separate_tokens.construction import SeparateTokens

_PAPER = "von Oswald et al. 2022, arXiv 2212.07677, fig. 5"
_SEEDS = 5
_EXAMPLES = 2**15


def loss_ratios(construction: SeparateTokens, seed: int, seeds: int) -> np.ndarray:
    """Loss of trained counterparts over that of the gradient step, `[seed]`, at quick settings."""
    fitted = construction.fit(
        recipe=construction.counterpart().quick, seeds=range(seed, seed + seeds)
    )
    examples = construction.task.sample(jax.random.key(seed), _EXAMPLES)
    loss, *losses = (
        float(construction.task.loss(predict(construction, m, *examples.inputs), examples).mean())
        for m in (construction.reference, *fitted.models)
    )
    return np.array(losses) / loss


def measure(
    quick: bool = False, seed: int = 0, seeds: int = _SEEDS, **sizes: int
) -> Iterator[Measurement]:
    """Measures, one row after the other, what first layers without constraint are trained to.

    Args:
        quick: no rows; each of them takes `seeds` fits.
        seed, seeds: of the first fit, and how many.
        sizes: of `SeparateTokens`.
    """
    if quick:
        return
    sizes = {"dim_x": 3, "num_examples": 6, "queries": 6} | sizes
    for mixer, statement, published, note in (
        (
            "softmax",
            "Trained layers, the first of softmax heads, have the loss of one gradient step.",
            1.0,
            "Heads that may attend by content as well go on to a lower loss, at the paper's sizes "
            "too; by position alone they end at one step, see the claims. ",
        ),
        (
            "linear",
            "With linear heads in the first layer they have more, as the paper says: linear heads "
            "do not get there.",
            None,
            "The construction is exact with linear heads, so that this is about training. ",
        ),
    ):
        c = SeparateTokens(mixer=mixer, attends="anything", **dict[str, Any](sizes))
        ratios = loss_ratios(c, seed, seeds)
        each = ", ".join(f"{ratio:.2f}" for ratio in np.sort(ratios))
        yield Measurement(
            f"loss over one step's, {mixer} heads that see contents",
            statement,
            _PAPER,
            published,
            float(np.median(ratios)),
            # of a median, where seeds scatter as a Gaussian does
            error=float(1.25 * ratios.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else 0.0,
            tolerance=0.05,
            better="<=" if published is not None else "",
            at_least=1.0 if published is None else None,
            note=f"{note}Median of {seeds} seeds: {each}; N = {c.num_examples}, d = {c.dim_x}.",
        )
