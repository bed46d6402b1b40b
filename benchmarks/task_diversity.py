"""From how many tasks on does in-context regression learn the law of tasks, not the tasks?

A transformer is trained on a pool of M regression tasks, w_1 .. w_M ~ N(0, I), and asked about
fresh ones (Raventos et al. 2023, arXiv 2306.15063). Two estimators are exact and stand beside it:

    pool    the posterior mean under the uniform prior on the pool,
            w_hat = sum_i p_i w_i,  p ~ softmax_i(-|y - X w_i|^2 / 2 sigma^2)
    ridge   the posterior mean under N(0, I),  w_hat = (X^T X + sigma^2 I)^-1 X^T y

The best predictor of the data it is trained on is the pool's at every M. One that goes over to
ridge as M grows does better on fresh tasks than that: the figure shows where the two distances
cross, on fresh tasks. At the size of a CPU: d = 3, N = 8, sigma = 0.5, two layers of softmax heads
and MLPs. After 1500 steps the distances cross at a pool of 17 tasks; fits are then short of both
estimators (a loss of 0.17 on fresh tasks at M = 1024, where ridge has 0.08), so that the place of
the crossing is that of this training, not of the class.

    python benchmarks/task_diversity.py --out reports/task_diversity --save

A sweep of a family and a probe of this file; the command asks the same:

    cd benchmarks; orrery sweep task_diversity:DiscretePool --grid pool=2,8,32,128,1024 \
        --measure loss,probe:task_diversity:ESTIMATORS --out sweep
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.compile import untrained
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
)
from constructions.core.transformer import randomise
from constructions.family import Counterpart
from constructions.gradient_descent.construction import GradientDescent
from probes.probe import Probe, Result, table
from probes.style import GREEN, VERMILION, figure_of, png
from probes.sweep import Sweep
from probes.sweep.results import mean_and_half
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.regression import Gaussian
from synthetic.tasks.task import Batch
from synthetic.theory.ridge import ridge

POOLS = (2, 8, 32, 128, 1024)
LARGEST = 4096
NAME = "probe:task_diversity:ESTIMATORS"
RESULTS = Path(__file__).parent / "results"


def pool_weights(dim: int) -> Array:
    """w_1 .. w_4096, `[task, dim]`; a pool of M tasks is the first M of them."""
    return jax.random.normal(jax.random.key(2306), (LARGEST, dim))


@dataclass(frozen=True)
class PoolTask:
    """Contexts of the first `pool` tasks, all of them where it is 0 or less of fresh ones.

    `inputs`: x `[batch, num_examples, dim_x]`, y with noise, x_query `[batch, queries, dim_x]`;
    `target`: w . x_query, `[batch, queries, 1]`.
    """

    dim_x: int = 3
    num_examples: int = 8
    pool: float = 8.0
    noise: float = 0.5
    queries: int = 8

    NUMBERS: ClassVar[tuple[str, ...]] = ("pool",)

    def sample(self, key: Array, batch: int) -> Batch:
        which, inputs, noise = jax.random.split(key, 3)
        index = jnp.floor(jax.random.uniform(which, (batch,)) * self.pool).astype(int)
        return self.of(pool_weights(self.dim_x)[index], inputs, noise)

    def fresh(self, key: Array, batch: int) -> Batch:
        """Contexts of tasks from N(0, I)."""
        which, inputs, noise = jax.random.split(key, 3)
        return self.of(jax.random.normal(which, (batch, self.dim_x)), inputs, noise)

    def of(self, w: Array, inputs: Array, noise: Array) -> Batch:
        x = jax.random.normal(inputs, (len(w), self.num_examples + self.queries, self.dim_x))
        clean = jnp.einsum("bnd,bd->bn", x, w, precision="highest")[..., None]
        n = self.num_examples
        y = clean[:, :n] + self.noise * jax.random.normal(noise, (len(w), n, 1))
        return Batch((x[:, :n], y, x[:, n:]), clean[:, n:])

    def loss(self, prediction: Array, batch: Batch) -> Array:
        return 0.5 * jnp.square(prediction - batch.target).sum(-1).mean(-1)


def pool_estimate(x: Array, y: Array, x_query: Array, pool: Array, noise: float) -> Array:
    """The posterior mean under the uniform prior on a pool `[task, dim]`, `[batch, query, 1]`."""
    residual = y - jnp.einsum("bnd,md->bnm", x, pool, precision="highest")
    p = jax.nn.softmax(-jnp.square(residual).sum(1) / (2 * noise**2), axis=-1)
    return jnp.einsum("bm,md,bqd->bq", p, pool, x_query, precision="highest")[..., None]


@dataclass(frozen=True)
class DiscretePool(GradientDescent):
    """A step of gradient descent, whose counterpart is a transformer trained on a pool of tasks."""

    dim_x: int = 3
    num_examples: int = 8
    noise: float | int = 0.5
    inputs: Any = Gaussian()
    pool: float | int = 8
    width: int = 32
    layers: int = 2
    numbers: ClassVar[tuple[str, ...]] = ("pool",)

    @property
    def task(self) -> Any:
        return PoolTask(self.dim_x, self.num_examples, float(self.pool), float(self.noise))

    def counterpart(self) -> Counterpart:
        norm = NormConfig(affine=True)
        heads = HeadsConfig("softmax", 4, self.width // 4, self.width // 4)
        layer = LayerConfig((heads,), MlpConfig(2 * self.width, "gelu", bias=True), norm, norm)
        config = Config(
            self.width,
            (SegmentConfig((layer,), self.layers),),
            token_groups=self.program.token_groups,
            precision="default",
        )
        base = untrained(config, keys=("context",))
        recipe = Recipe(
            steps=1500, batch=32, learning_rate=3e-3, schedule="cosine", warmup=200, clip=1.0,
            checkpoint_every=500,
        )  # fmt: skip
        return Counterpart(lambda key: randomise(base, key, self.width**-0.5), self.task, recipe)


def measure(run: Any, seed: int) -> Result:
    """Losses, and mean squared distances to both estimators, on fresh tasks and on the pool's."""
    construction, (model,) = run.construction, run.models
    task: PoolTask = construction.task
    pool = pool_weights(task.dim_x)[: round(task.pool)]
    rows = []
    for number, draw in enumerate((task.fresh, task.sample)):
        batch = draw(jax.random.fold_in(jax.random.key(seed), 7 + number), 2048)
        x, y, x_query = batch.inputs
        trained = construction.apply(model, x, y, x_query)
        by_pool = pool_estimate(x, y, x_query, pool, task.noise)
        by_ridge = ridge(x, y, x_query, task.noise**2)
        losses = [float(task.loss(p, batch).mean()) for p in (trained, by_pool, by_ridge)]
        near = [float(jnp.square(trained - p).mean()) for p in (by_pool, by_ridge)]
        rows.append([*losses, *near])
    columns = ["trained", "pool", "ridge", "trained to pool", "trained to ridge"]
    return table("losses and distances", columns, ["fresh tasks", "tasks of the pool"], rows)


ESTIMATORS = Probe(
    "estimators",
    "is the model nearer to the posterior of its pool of tasks, or to ridge?",
    "the pool is so large that the two estimators are one",
    measure,
)


def crossing(pools: Sequence[float], to_pool: Sequence[float], to_ridge: Sequence[float]) -> Any:
    """M at which the distances are equal, between the two pools where their order turns."""
    gap = np.log(np.asarray(to_ridge) / np.asarray(to_pool))
    turns = np.flatnonzero((gap[:-1] > 0) & (gap[1:] <= 0))
    if not len(turns):
        return None
    n = int(turns[0])
    share = gap[n] / (gap[n] - gap[n + 1])
    return float(np.exp(np.log(pools[n]) + share * np.log(pools[n + 1] / pools[n])))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table by the size of the pool, means over seeds, and where the distances cross."""
    pools = sorted({row["pool"] for row in rows if not row["failed"]})
    found: dict[str, Any] = {"pool": pools}
    for name in (name for name in rows[0] if name.startswith(NAME)):
        short = name.removeprefix(NAME).strip(" []")
        each = [[row[name] for row in rows if row["pool"] == pool] for pool in pools]
        found[short] = [mean_and_half(values)[0] for values in each]
    near = (found[f"fresh tasks, trained to {name}"] for name in ("pool", "ridge"))
    return found | {"crossing": crossing(pools, *near)}


def figure(found: dict[str, Any]) -> bytes:
    """Losses on fresh tasks beside both estimators; distances to them, and where they cross."""
    drawing, (left, right) = figure_of(9.6, 3.6, 2)
    pools = found["pool"]
    for name, style in (("trained", {"marker": "o"}), ("pool", {"ls": "--", "color": VERMILION}),
                        ("ridge", {"ls": "--", "color": GREEN})):  # fmt: skip
        left.plot(pools, found[f"fresh tasks, {name}"], label=name, **style)
    for name, color in (("pool", VERMILION), ("ridge", GREEN)):
        right.plot(pools, found[f"fresh tasks, trained to {name}"], marker="o", color=color,
                   label=f"to the estimator: {name}")  # fmt: skip
    if found["crossing"]:
        right.axvline(found["crossing"], color="black", ls=":", label="crossing")
    left.set(xlabel="tasks in the pool", ylabel="loss on fresh tasks", xscale="log", yscale="log")
    right.set(xlabel="tasks in the pool", ylabel="mean squared distance", xscale="log",
              yscale="log")  # fmt: skip
    left.legend()
    right.legend()
    return png(drawing)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("reports/task_diversity"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep figures in results/")
    given = parser.parse_args()
    sweep = Sweep(
        "task_diversity:DiscretePool",
        {"pool": POOLS},
        seeds=range(given.seeds),
        measures=("loss", NAME),
        settings={"recipe.steps": given.steps},
    )
    found = summary(sweep.run(given.out, progress=print))
    found = {"steps": given.steps, "seeds": given.seeds, **found}
    print(json.dumps(found, indent=1))
    if given.save:
        (RESULTS / "task_diversity.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "task_diversity.png").write_bytes(figure(found))


if __name__ == "__main__":
    main()
