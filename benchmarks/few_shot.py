"""What does a model of dynamics make of few-shot regression, and what do EOS and a prefix change?

Transformers of softmax attention are trained to predict the next state of linear systems. Then
they are frozen and given pairs (`synthetic.tasks.few_shot`): plain, with a tuned EOS, with a tuned
prefix, with both. Losses by pair stand beside those of exact ridge regression on the very same
tokens, of its expansion in closed form, and of least squares on the pairs alone. Sizes are those of
a CPU; the exact rows are also given at the paper's (10 dimensions, 68 pairs). Start it with one
core (`taskset -c 0`) to compare times.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report

from constructions.core.compile import untrained
from constructions.core.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.core.program import CAUSAL
from constructions.core.transformer import Transformer, randomise
from constructions.mesa.measurements import Prompt, Prompted, least_squares
from constructions.mesa.ridge import MesaRidge
from constructions.mesa.tokens import NextState
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import fit
from synthetic.tasks.few_shot import FewShotRegression

SEEDS = (0, 1, 2)
DIM, PAIRS, PREFIX = 4, 12, 6
LENGTH = PREFIX + 3 * PAIRS
TASK = FewShotRegression(DIM, PAIRS)
#: Embeds raw states and reads predictions of any model of that width; and ridge regression itself.
RAW = MesaRidge(DIM, LENGTH, tokens="raw")
RIDGE = MesaRidge(DIM, LENGTH, tokens="constructed")
LAYERS, HEADS, ROWS = 3, 4, 16
TRAINING = Recipe(steps=1200, batch=64, learning_rate=4e-3, schedule="cosine", warmup=200, clip=1.0)
TUNING = Recipe(steps=300, batch=64, learning_rate=2e-2, schedule="cosine")
KINDS = {"plain": (0, False), "EOS": (0, True), "prefix": (PREFIX, False), "both": (PREFIX, True)}


def shape() -> Config:
    """Softmax attention alone, as wide as the construction's stream."""
    layer = LayerConfig((HeadsConfig("softmax", HEADS, ROWS, ROWS),))
    program = RAW.program
    return Config(program.slots.width, (SegmentConfig((layer,), LAYERS),), program.token_groups)


def summary(task: FewShotRegression, by_pair: Any) -> dict[str, float]:
    """Mean losses of all pairs, and of the last."""
    by_pair = np.asarray(by_pair)
    return {"mean": float(by_pair.mean()), f"pair {task.pairs}": float(by_pair[:, -1].mean())}


def exact(task: FewShotRegression, count: int = 4096) -> dict[str, Any]:
    """Ridge regression on all tokens of the sequence, on the pairs alone, and the expansion."""
    with jax.enable_x64(True):
        batch = task.sample(jax.random.key(9), count)
        ridge = MesaRidge(task.dim, 3 * task.pairs, tokens="constructed")
        model = ridge.compile().model
        zero = Prompt(eos=jnp.zeros(task.dim))

        def losses(prediction: jax.Array) -> dict[str, float]:
            return summary(task, task.loss_by_pair(prediction, batch))

        found: dict[str, Any] = {
            "ridge on all tokens": losses(Prompted(ridge, model, Prompt())(*batch.inputs)),
            "ridge on all tokens, EOS = 0": losses(Prompted(ridge, model, zero)(*batch.inputs)),
            "least squares on the pairs": losses(least_squares(*batch.inputs, 1e-3)),
        }
    before = task.pairs - 1
    return found | {
        "expansion": task.expansion(before, eos=False),
        "expansion, EOS = 0": task.expansion(before, eos=True),
        "limit of many pairs": task.limit(),
        "noise floor": task.noise_floor,
    }


def few_shot(construction: NextState, model: Transformer, seed: int) -> dict[str, Any]:
    """Losses by kind of prompt, tuned where there is something to tune, on fresh pairs."""
    batch = TASK.sample(jax.random.key(99), 1024)
    found: dict[str, Any] = {}
    for kind, (count, eos) in KINDS.items():
        prompt = Prompt.draw(jax.random.key(seed), DIM, count, eos)
        subject = Prompted(construction, model, prompt)
        began = time.perf_counter()
        if kind != "plain":
            subject = fit(subject, TASK, TUNING, seed=seed).model
        seconds = time.perf_counter() - began
        by_pair = jax.jit(lambda s: TASK.loss_by_pair(s(*batch.inputs), batch))(subject)
        found[kind] = summary(TASK, by_pair) | {"seconds": round(seconds, 1)}
        found[kind]["by pair"] = np.asarray(by_pair, float).mean(0).round(4).tolist()
        if subject.prompt.eos is not None:
            found[kind]["length of EOS"] = float(jnp.linalg.norm(subject.prompt.eos[...]))
    return found


def main() -> None:
    began = time.perf_counter()
    base = untrained(shape(), CAUSAL)
    trained = fit(
        lambda key: randomise(base, key, 0.1),
        RAW.task,
        TRAINING,
        predict=RAW.apply,
        seeds=SEEDS,
    )
    seconds = time.perf_counter() - began
    held_out = RAW.task.sample(jax.random.key(98), 1024)

    def loss(model: Transformer | None) -> float:
        states = held_out.inputs[0]
        prediction = RAW.trace(states)["prediction"] if model is None else RAW.apply(model, states)
        return float(RAW.task.loss(prediction, held_out).mean())

    report(
        "few_shot",
        {
            "layers, heads, rows, width": [LAYERS, HEADS, ROWS, base.config.width],
            "training": {
                "task": repr(RAW.task),
                "steps": TRAINING.steps,
                "seconds, three seeds": seconds,
                "loss by seed": [loss(model) for model in trained.models],
                "loss of ridge regression": loss(None),
            },
            "few-shot task": repr(TASK),
            "exact": exact(TASK),
            "exact, sizes of the paper": exact(FewShotRegression(), 1024),
            "tuning steps": TUNING.steps,
            "exact ridge regression": few_shot(RIDGE, RIDGE.compile().model, 0),
            "trained, by seed": {
                seed: few_shot(RAW, model, seed)
                for seed, model in zip(SEEDS, trained.models, strict=True)
            },
        },
    )


if __name__ == "__main__":
    main()
