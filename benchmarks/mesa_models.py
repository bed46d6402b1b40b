"""How near do trained models of next states come to ridge regression, and what is inside them?

Linear systems with orthogonal laws, 10 dimensions, 50 states, as in von Oswald et al. 2023. Linear
attention of 1, 2, 4, 6 layers, once with every weight free and once with a number for each block of
its products; softmax attention and the hybrid (softmax, then mesa) from raw states. Reported are
losses (means, and medians over sequences, as rare sequences dominate means), by position; what is
left of the free models when their products are reduced to block scalars, and half-way; and probes
for the preconditioned input, held out and in sample.
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report

from constructions.core.transformer import Transformer, randomise
from constructions.mesa.models import (
    CLIP,
    between,
    compressed,
    drawn_scalars,
    scalar_predictions,
    sequence_model,
    unexplained,
)
from constructions.mesa.polynomial import MesaPolynomial
from constructions.mesa.ridge import MesaRidge, preconditioned, ridge_predictions
from constructions.mesa.tokens import NextState, shifted
from probes.positions import position_probes
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import fit

DIM, LENGTH, RIDGE = 10, 50, 1e-3
POSITIONS = (1, 10, 11, 15, 20, 30, 50)
#: Four channels (s, z, y, x): any polynomial of two coefficients reads and writes these.
CONSTRUCTED = MesaPolynomial(DIM, LENGTH, tokens="constructed", coefficients=(0.01, 0.01))
RAW = MesaRidge(DIM, LENGTH)
RECIPE = Recipe(batch=64, schedule="cosine", warmup=300, clip=1.0, chunk=200)
#: Steps and seeds by number of layers.
SCALARS = {1: (2000, 5), 2: (4000, 3), 4: (6000, 1), 6: (8000, 5)}
LINEAR = {1: 3000, 2: 5000, 4: 6000, 6: 8000}
FROM_RAW = {
    "softmax 3 layers": (("softmax",) * 3, 6000),
    "hybrid": (("softmax", "mesa"), 6000),
}


class Test:
    """Held-out sequences, and ridge regression on them."""

    def __init__(self, size: int) -> None:
        self.batch = CONSTRUCTED.task.sample(jax.random.key(99), size)
        self.states = self.batch.inputs[0]
        with jax.enable_x64(True):
            wide = jnp.asarray(np.asarray(self.states, float))
            before = shifted(wide)
            found = ridge_predictions(wide, before, wide, RIDGE)
            exact = preconditioned(wide, before, RIDGE)
            smooth = preconditioned(wide, before, 1.0)
        self.ridge = np.asarray(found)
        self.targets = {
            "(H + .001 I)^-1 s": np.asarray(exact, np.float32),
            "(H + I)^-1 s": np.asarray(smooth, np.float32),
            "next state": np.asarray(self.batch.target),
        }
        self.losses = self.by_position(self.ridge)

    def by_position(self, prediction: Any) -> np.ndarray:
        """`[sequence, position]`."""
        return np.square(np.asarray(prediction) - np.asarray(self.batch.target)).sum(-1) / 2

    def summary(self, prediction: Any) -> dict[str, Any]:
        """Means and medians, beside those of ridge regression."""
        each = self.by_position(prediction)
        at = [p - 1 for p in POSITIONS]
        return {
            "mean loss": float(each.mean()),
            "median loss over ridge's": float(
                np.median(each.mean(1)) / np.median(self.losses.mean(1))
            ),
            "mean by position": each.mean(0)[at].tolist(),
            "median by position": np.median(each, 0)[at].tolist(),
        }


def trained(init: Any, predict: Any, steps: int, seed: int, rate: float) -> tuple[Any, float]:
    """A fitted model and the seconds that it took."""
    began = time.perf_counter()
    recipe = {"steps": steps, "learning_rate": rate}
    found = fit(init, CONSTRUCTED.task, RECIPE, predict=predict, seed=seed, **recipe)
    print(f"{steps} steps, seed {seed}: loss {found.history[-1]['loss']:.4f}", file=sys.stderr)
    return found.model, round(time.perf_counter() - began, 1)


def scalars(test: Test, layers: int, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Every seed's losses."""
    predict = scalar_predictions(CONSTRUCTED)
    rows = []
    for seed in range(seeds):
        model, seconds = trained(lambda key: drawn_scalars(key, layers), predict, steps, seed, 3e-3)
        rows.append({"seconds": seconds, **test.summary(jax.jit(predict)(model, test.states))})
    return rows


def linear(test: Test, layers: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Free weights; then their block scalars, the middle between both, and probes."""
    base = sequence_model(CONSTRUCTED, ("linear",) * layers, heads=2, rows=4 * DIM, clip=CLIP)
    model, seconds = trained(
        lambda key: randomise(base, key, 0.05), CONSTRUCTED.apply, steps, seed, 1e-3
    )
    few = compressed(model, DIM).expanded(DIM, CLIP)
    return {
        "seconds": seconds,
        **_summary(test, CONSTRUCTED, model),
        "share of the products that block scalars do not hold": unexplained(model, DIM).tolist(),
        "compressed": _summary(test, CONSTRUCTED, few),
        "half-way": _summary(test, CONSTRUCTED, between(model, few, 0.5)),
        "probes": probes(test, CONSTRUCTED, model, randomise(base, jax.random.key(7), 0.05)),
    }


def from_raw(test: Test, mixers: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Softmax and hybrid models."""
    base = sequence_model(RAW, mixers)
    model, seconds = trained(lambda key: randomise(base, key, 0.1), RAW.apply, steps, 0, 1e-3)
    return {
        "seconds": seconds,
        **_summary(test, RAW, model),
        "probes": probes(test, RAW, model, randomise(base, jax.random.key(7), 0.1)),
    }


def _summary(test: Test, construction: NextState, model: Transformer) -> dict[str, Any]:
    return test.summary(jax.jit(construction.apply)(model, test.states))


def probes(
    test: Test, construction: NextState, model: Transformer, initial: Transformer
) -> dict[str, Any]:
    """Held-out and in-sample R^2 by layer, at two positions."""
    found = {}
    for position in (20, 50):
        scores = position_probes(
            construction,
            {"trained": model, "random init": initial},
            {name: jnp.asarray(a) for name, a in test.targets.items()},
            (test.states,),
            position - 1,
            jax.random.key(3),
        )
        found[f"after {position} states"] = {
            column: {
                target: {
                    "held out": scores.held_out[column][row].round(3).tolist(),
                    "in sample": scores.in_sample[column][row].round(3).tolist(),
                }
                for row, target in enumerate(scores.targets)
            }
            for column in scores.held_out
        }
    return found


def main() -> None:
    test = Test(4096)
    floor = CONSTRUCTED.task.noise_floor
    report(
        "mesa_models",
        {
            "positions": POSITIONS,
            "noise floor": floor,
            "ridge regression": test.summary(test.ridge),
            "block scalars": {f"{n} layers": scalars(test, n, *s) for n, s in SCALARS.items()},
            "linear attention": {f"{n} layers": linear(test, n, s) for n, s in LINEAR.items()},
            "from raw states": {name: from_raw(test, *s) for name, s in FROM_RAW.items()},
        },
    )


if __name__ == "__main__":
    main()
