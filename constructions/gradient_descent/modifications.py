r"""Which modification of the transformer matters? A grid of shapes, one task, one closed form.

One layer of linear attention, trained on in-context regression, is a gradient step: its loss is the
least that such a layer has, which is known. Every entry of `GRID` changes one thing about the layer
(Narang et al. 2021, arXiv 2102.11972) and is trained by the same recipe. `Modified` has the claims
of the step, so that a ledger says which of them live, and the grid is a sweep:

    orrery sweep constructions.gradient_descent.modifications:Modified --seeds 5 --out sweep
        --grid modification=none,bias,softmax,mesa

Two numbers are asked of all of them: by how much the loss differs from that of the step, and how
far predictions are from the step's (`outcomes`).

Whether a difference is more than that of seeds is decided by an exact permutation test: of the
C(2 n, n) ways to call n of the 2 n values "modified", those whose means are at least as far apart
as the real ones,

    p = #{|difference of a split| >= |difference|} / C(2 n, n),        P(p <= alpha) <= alpha,

whatever the distribution of the values, with equality at multiples of 2 / C(2 n, n) where there are
no ties. Several modifications at once are judged by Holm's rule. A "modification" that is only
another seed must be found to matter at the nominal rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions.core.compile import untrained
from constructions.core.config import (
    Config,
    MlpConfig,
    NormConfig,
)
from constructions.core.program import CAUSAL, EVERYWHERE
from constructions.core.transformer import Transformer, randomise
from constructions.family import Counterpart
from constructions.gradient_descent.construction import GradientDescent
from constructions.measurement import Measurement, Remark
from synthetic.fitting.recipe import Recipe

_PAPER = "Narang et al. 2021, arXiv 2102.11972"
#: Name -> changes of the layer ("heads": of its heads), or of how layers follow one another.
GRID: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"heads": {"bias": True}},
    "two heads": {"heads": {"heads": 2}},
    "softmax": {"heads": {"mixer": "softmax"}},
    "mesa": {"heads": {"mixer": "mesa"}},
    "layer norm": {"norm": NormConfig("layer", affine=True)},
    "RMS norm": {"norm": NormConfig("rms", affine=True)},
    "ReLU MLP": {"mlp": MlpConfig(16, "relu", bias=True)},
    "GELU MLP": {"mlp": MlpConfig(16, "gelu", bias=True)},
    "gated MLP": {"mlp": MlpConfig(16, "gelu", gated=True, bias=True)},
    "two layers": {"repeats": 2},
    "two layers, tied": {"repeats": 2, "tied": True},
}
_SEEDS, _STEPS, _EXAMPLES = 6, 1500, 2**13


def modified(base: Config, changes: Mapping[str, Any]) -> Transformer:
    """An untrained model of one layer's shape with the changes of an entry of `GRID`."""
    (segment,) = base.segments
    (layer,) = segment.pattern
    (heads,) = layer.heads
    heads = replace(heads, **changes.get("heads", {}))
    fields = {name: changes[name] for name in ("norm", "mlp") if name in changes}
    layer = replace(layer, heads=(heads,), **fields)
    order = {name: changes[name] for name in ("repeats", "tied") if name in changes}
    config = replace(base, segments=(replace(segment, pattern=(layer,), **order),))
    # queries come last, so that a causal head sees every example
    window = CAUSAL if heads.mixer == "mesa" else EVERYWHERE
    return untrained(config, window, keys=("context",))


@dataclass(frozen=True)
class Modified(GradientDescent):
    """One step of gradient descent, whose trained counterpart is a modified layer.

    Attributes:
        modification: an entry of `GRID`.

    Raises:
        ValueError: another modification; with a counterpart, more than one step.
    """

    dim_x: int = 3
    num_examples: int = 6
    modification: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modification not in GRID:
            raise ValueError(f"modification is {self.modification!r}, must be one of {[*GRID]}")

    def counterpart(self) -> Counterpart:
        """All of them by one recipe, with which every seed of the plain layer finds the step."""
        if self.steps != 1:
            raise ValueError(f"steps is {self.steps}, must be 1: it is one layer that is modified")
        base = modified(self.in_trained_shape().config, GRID[self.modification])
        recipe = Recipe(
            _STEPS, 256, learning_rate=1e-2, schedule="linear", clip=1.0, average_tail=0.6,
            chunk=_STEPS,
        )  # fmt: skip
        init, quick = partial(randomise, base, std=0.4), replace(recipe, steps=_STEPS // 4)
        return Counterpart(init, self.task, recipe, self.optimal_loss, quick=quick)


def outcomes(c: Modified, models: Sequence[Any]) -> dict[str, np.ndarray]:
    """Of trained models, `[seed]`: "loss", over the step's and less 1, and "distance".

    The distance is the root mean square difference of predictions over that of the step's.
    """
    batch = c.task.sample(jax.random.key(10**6), _EXAMPLES)
    step = jax.jit(c.trace)(*batch.inputs)["prediction"]
    least = float(c.task.loss(step, batch).mean())
    predict = jax.jit(c.apply)
    predictions = [predict(model, *batch.inputs) for model in models]
    losses = np.array([float(c.task.loss(p, batch).mean()) for p in predictions])
    distances = [
        float(jnp.sqrt(jnp.mean((p - step) ** 2) / jnp.mean(step**2))) for p in predictions
    ]
    return {"loss": losses / least - 1, "distance": np.array(distances)}


def permutation_test(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Exact two-sided p-values of a difference of means, `[...]`.

    Args:
        first, second: `[..., n]` and `[..., m]`, independent values; at most 20 together.
    """
    n, both = first.shape[-1], np.concatenate([first, second], -1)
    size = both.shape[-1]
    if size > 20 or not 0 < n < size:
        raise ValueError(f"there are {n} and {size - n} values, must be some of each, 20 together")
    picked = np.zeros((comb(size, n), size))
    for row, chosen in enumerate(combinations(range(size), n)):
        picked[row, list(chosen)] = 1
    sums = both @ picked.T
    gaps = np.abs(sums / n - (both.sum(-1, keepdims=True) - sums) / (size - n))
    real = gaps[..., :1]  # the first split is the real one
    # rounding: the same values added in another order
    return np.asarray((gaps >= real - 1e-9 * np.abs(both).max(-1, keepdims=True)).mean(-1))


def holm(p: Mapping[str, float], alpha: float = 0.05) -> dict[str, bool]:
    """Which of several hypotheses are refuted, at most one of them wrongly by chance `alpha`."""
    found, refuting = {}, True
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        refuting = refuting and value <= alpha / (len(p) - rank)
        found[name] = refuting
    return found


def false_positives(values: np.ndarray, size: int, alpha: float, seed: int) -> np.ndarray:
    """Share of tests of seeds against seeds with p <= alpha, of `[shuffle]` of disjoint pairs."""
    rng = np.random.default_rng(seed)
    count = len(values) // (2 * size)
    rates = []
    for _ in range(50):
        groups = rng.permutation(values)[: 2 * size * count].reshape(count, 2, size)
        rates.append((permutation_test(groups[:, 0], groups[:, 1]) <= alpha).mean())
    return np.array(rates)


def rows(seed: int, seeds: int = _SEEDS) -> Iterator[Measurement | Remark]:
    """The grid, one row a modification, then how often another seed is found to matter."""

    def found(name: str, seeds: range, **options: Any) -> dict[str, np.ndarray]:
        c = Modified(modification=name)
        return outcomes(c, c.fit(seeds=seeds, **options).models)

    base = found("none", range(seed, seed + seeds))
    after = {name: found(name, range(seed + seeds, seed + 2 * seeds)) for name in GRID}
    p = {name: float(permutation_test(f["loss"], base["loss"])) for name, f in after.items()}
    matters = holm({name: value for name, value in p.items() if name != "none"})
    for name, values in after.items():
        gap = values["loss"].mean() - base["loss"].mean()
        spread = np.sqrt((values["loss"].var(ddof=1) + base["loss"].var(ddof=1)) / seeds)
        said: dict[str, Any] = {
            "name": f"modification: {name}",
            "statement": "What a change of the layer adds to the loss of a gradient step.",
            "source": f"{_PAPER} (most modifications change little)",
            "measured": float(gap),
            "error": float(spread),
            "note": f"p = {p[name]:.2g}, {'matters' if matters.get(name) else 'does not matter'} "
            f"by Holm's rule at 5 %; predictions are {values['distance'].mean():.2f} from the "
            f"step's, of the layer as it is {base['distance'].mean():.2f}; {seeds} seeds each."
            + (" Other seeds of the same layer." if name == "none" else ""),
        }
        yield Measurement(published=0.0, **said) if name == "none" else Remark(**said)
    yield Measurement(
        "share of modifications that matter",
        "Most modifications change little: at most half of them matter by Holm's rule at 5 %.",
        f"{_PAPER} (most modifications change little)",
        None,
        float(np.mean([*matters.values()])),
        note=f"Of {len(matters)}: {', '.join(name for name in matters if matters[name])}.",
        at_most=0.5,
    )
    many = found("none", range(seed + 100, seed + 420), recipe=Modified().counterpart().quick)
    rates = false_positives(many["loss"], 5, 0.05, seed)
    yield Measurement(
        "another seed is found to matter",
        "At p <= 5 % five seeds against five other ones differ as often as they should.",
        "permutation test; 12 of 252 splits",
        12 / 252,
        float(rates.mean()),
        float(np.sqrt(0.05 * 0.95 / 32)),
        tolerance=0.0,
        note="32 disjoint pairs of groups of 320 seeds, shuffled 50 times.",
    )
