"""How near is a simulated step to gradient descent, and what is it worth on text?

Auxiliary models are fitted to text of the English-like grammar and adapted to text with its words
exchanged; three seeds each, two of the deep ones. Reported are the loss of the words that are not
trained on, as the model is, after gradient descent by autograd at the same rate, and as the
simulator predicts them, by the share of the text and by steps; the error of its updates, one
approximation at a time, by depth, for fitted models and random ones; how hard attention is and what
value-only attention drops; and classification by tuning on labels. Rates are chosen on other
sequences, by gradient descent. Means come with their standard errors over sequences.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from common import report

from constructions.core.transformer import Transformer, randomise
from constructions.interchange.decoder import TrainedAuxiliary, from_arrays
from constructions.tint.algorithm import MODES
from constructions.tint.construction import Tint
from constructions.tint.experiments import fitted, hardness, label_accuracy
from constructions.tint.measurements import (
    ABLATION,
    Adaptation,
    UpdateError,
    ablation,
    adaptation,
    by_matrix,
    descent_logits,
    gradient_update,
    mean,
    simulated_update,
)
from synthetic.tasks.adaptation import AdaptationTask, WordLabels
from synthetic.tasks.task import Batch
from synthetic.tasks.text import Corpus

SEEDS, SEQUENCES = (0, 1, 2), 256
SHARES, STEPS = (0.3, 0.5, 0.7, 0.9), (1, 2, 4)
#: Number of fitted models by their layers.
DEPTHS = {1: 3, 2: 3, 4: 2, 6: 2}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 3e-1, 5e-1, 1.0)
#: Words that are exchanged in a milder shift.
FEW = 20
#: A rate at which a step is nearly linear, beside the best one.
SMALL = 1e-2
RANDOM_STD = 0.02


def auxiliary(layers: int, seed: int) -> TrainedAuxiliary:
    """Settings of a fitted model."""
    return TrainedAuxiliary(
        "english", layers=layers, heads=4, width=24, length=32, learning_rate=1e-2, seed=seed
    )


def shifted(settings: TrainedAuxiliary, few: bool = False) -> AdaptationTask:
    """Text of the model's grammar with all words but the stop exchanged, or a few of them."""
    if not few:
        return AdaptationTask(Tint(settings).text, settings.length)
    text = settings.text(jax.random.key(2**20 + settings.seed))
    rng = np.random.default_rng(settings.seed)
    chosen = rng.choice(len(text.vocabulary) - 1, FEW, replace=False)
    order = np.arange(len(text.vocabulary), dtype=text.tokens.dtype)
    order[chosen] = np.roll(chosen, 1)
    return AdaptationTask(Corpus(order[text.tokens], text.vocabulary), settings.length)


def weights_of(model: Transformer) -> dict[str, jax.Array]:
    return from_arrays(model.arrays())


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Adaptation


def best_rate(task: AdaptationTask, c: Tint, models: Sequence[Mapping], tasks: Sequence) -> Any:
    """Means of the change of loss by rate, on sequences of their own."""
    found = {}
    for rate in RATES:
        changes = []
        for weights, own in zip(models, tasks, strict=True):
            batch = own.sample(jax.random.key(1), SEQUENCES)
            tokens, train = batch.inputs
            scores = [
                descent_logits(weights, tokens, train, r, c.shape, c.steps, c.trained)
                for r in (0.0, rate)
            ]
            before, after = (task.loss(jax.nn.softmax(s), batch) for s in scores)
            changes.append(np.asarray(after - before))
        found[rate] = mean(np.concatenate(changes)).mean
    return min(found, key=lambda rate: found[rate]), found


def adapted(few: bool = False, all_steps: Sequence[int] = STEPS) -> dict[str, Any]:
    """Losses by mode, steps and share of the text."""
    settings = [auxiliary(2, seed) for seed in SEEDS]
    tasks = [shifted(s, few) for s in settings]
    models = [s.model for s in settings]
    weights = [weights_of(m) for m in models]
    found: dict[str, Any] = {"settings": settings[0].to_json()}
    found["loss on the grammar's own text"] = [
        mean(_own_loss(s, w)) for s, w in zip(settings, weights, strict=True)
    ]
    for steps in all_steps:
        rate, rates = best_rate(tasks[0], Tint(models[0], steps=steps), weights, tasks)
        found[f"{steps} steps"] = {
            "change of loss by rate": rates,
            "best rate": {"rate": rate, **_by_mode(models, weights, tasks, steps, rate)},
        }
        if steps == 1:
            small = _by_mode(models, weights, tasks, steps, SMALL)
            found[f"{steps} steps"]["small rate"] = {"rate": SMALL, **small}
    return found


def _by_mode(
    models: Sequence[Transformer],
    weights: Sequence[Mapping],
    tasks: Sequence[AdaptationTask],
    steps: int,
    rate: float,
) -> dict[str, Any]:
    """Losses by mode and share."""
    rows: dict[str, Any] = {mode: {} for mode in MODES}
    for mode in MODES:
        c = Tint(models[0], mode, steps, rate)
        for share in SHARES:
            each = []
            for w, task in zip(weights, tasks, strict=True):
                batch = replace(task, share=share).sample(jax.random.key(2), SEQUENCES)
                each.append(adaptation(c, batch, w))
            pooled = Adaptation(*map(np.concatenate, zip(*each, strict=True)))
            rows[mode][f"share {share}"] = {
                "all seeds": pooled.summary(),
                "simulated less before, by seed": [
                    float((a.simulated - a.before).mean()) for a in each
                ],
            }
        note(f"{steps} steps, {mode}, rate {rate}: {rows[mode]['share 0.5']['all seeds']}")
    return rows


def _own_loss(settings: TrainedAuxiliary, weights: Mapping) -> np.ndarray:
    task = AdaptationTask(settings.text(jax.random.key(77)), settings.length)
    batch = task.sample(jax.random.key(78), SEQUENCES)
    tokens, train = batch.inputs
    scores = descent_logits(weights, tokens, train, 0.0, settings.shape, 1, ())
    return np.asarray(task.loss(jax.nn.softmax(scores), batch))


# Errors of the updates


def faithful(layers: int, approximations: Mapping[str, Any] = ABLATION) -> dict[str, Any]:
    """The ablation, fitted and random; the paper's mode by matrix."""
    settings = [auxiliary(layers, seed) for seed in SEEDS[: DEPTHS[layers]]]
    models = [s.model for s in settings]
    weights = {f"fitted {n}": weights_of(m) for n, m in enumerate(models)}
    for seed in SEEDS:
        drawn = randomise(models[0], jax.random.key(100 + seed), RANDOM_STD)
        weights[f"random {seed}"] = weights_of(drawn)
    tokens, train = shifted(settings[0]).sample(jax.random.key(3), 64).inputs
    rows = ablation(models[0], tokens, train, weights, approximations)
    table = {
        way: {kind: _pooled(found, kind) for kind in ("fitted", "random")}
        for way, found in rows.items()
    }
    note(f"{layers} layers: {table}")
    return table


def _pooled(found: Mapping[str, UpdateError], kind: str) -> dict[str, Any]:
    each = [f for name, f in found.items() if name.startswith(kind)]
    return {
        "cosine": mean(np.concatenate([f.cosine for f in each])),
        "relative": mean(np.concatenate([f.relative for f in each])),
        "cosine by seed": [float(f.cosine.mean()) for f in each],
        "relative by seed": [float(f.relative.mean()) for f in each],
    }


def inside(layers: int) -> dict[str, Any]:
    """The paper's mode by matrix and layer, shares of the gradient, and hardness."""
    settings = auxiliary(layers, 0)
    model = settings.model
    tokens, train = shifted(settings).sample(jax.random.key(3), 64).inputs
    found: dict[str, Any] = {}
    random = randomise(model, jax.random.key(100), RANDOM_STD)
    paper, exact = Tint(model, "paper"), Tint(model, "exact")
    for kind, weights in (("fitted", weights_of(model)), ("random", weights_of(random))):
        wanted = gradient_update(weights, tokens, train, exact.shape)
        parts = by_matrix(simulated_update(paper, tokens, train, weights), wanted)
        square = {
            name: np.square(np.asarray(a)).reshape(len(a), -1).sum(1) for name, a in wanted.items()
        }
        total = sum(square.values())
        h = hardness(exact, tokens, train, weights)
        found[kind] = {
            "cosine by matrix, layer by layer": {
                name: f.cosine.mean(1).tolist() for name, f in parts.items()
            },
            "share of the squared gradient": {
                name: float((a / total).mean()) for name, a in square.items()
            },
            "hardness": _hardness(*map(np.asarray, h)),
        }
    return found


def _hardness(softness: np.ndarray, dropped: np.ndarray, bound: np.ndarray) -> dict[str, Any]:
    """Quantiles of softness, and of the dropped gradient by softness; where there is a gradient."""
    there = bound > 1e-9 * bound.max()
    eps, size, most = softness[there], dropped[there], bound[there]
    edges = (0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1)
    bins = {}
    for low, high in zip(edges, edges[1:], strict=False):
        chosen = (eps >= low) & (eps < high)
        if chosen.any():
            bins[f"{low} to {high}"] = {
                "points": int(chosen.sum()),
                "median dropped": float(np.median(size[chosen])),
                "median bound": float(np.median(most[chosen])),
            }
    first, second = (np.argsort(np.argsort(a)) for a in (eps, size))
    return {
        "points": int(there.sum()),
        "above the bound": int((size > most * (1 + 1e-4)).sum()),
        "softness, 10 50 90 %": np.quantile(eps, (0.1, 0.5, 0.9)).tolist(),
        "softness by layer, median": [
            float(np.median(softness[:, n][there[:, n]])) for n in range(softness.shape[1])
        ],
        "dropped over bound, 10 50 90 % and most": np.quantile(
            size / most, (0.1, 0.5, 0.9, 1)
        ).tolist(),
        "rank correlation of softness and dropped": _correlation(first, second),
        "by softness": bins,
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()))


# Labels


def labelled() -> dict[str, Any]:
    """Accuracies where the assignment is never the usual one more often than by chance."""
    task = WordLabels()
    models = [fitted(task, seed=seed) for seed in SEEDS]
    weights = [weights_of(m) for m in models]
    found: dict[str, Any] = {}
    test = replace(task, usual=0.0)
    for steps in (1, 4):
        exact = Tint(models[0], steps=steps)
        rates = {rate: _descent_accuracy(exact, task, test, weights, rate) for rate in RATES}
        rate = max(rates, key=lambda r: rates[r])
        rows: dict[str, Any] = {"rate": rate, "accuracy of descent by rate": rates}
        for mode in ("exact", "paper"):
            c = Tint(models[0], mode, steps, rate)
            for everywhere in (False, True):
                each = [
                    label_accuracy(
                        c, task, test.sample(jax.random.key(5), 2 * SEQUENCES), w, everywhere
                    )
                    for w in weights
                ]
                name = f"{mode}, trained on {'every word' if everywhere else 'labels'}"
                rows[name] = {
                    key: mean(np.concatenate([a[key] for a in each])) for key in each[0]
                } | {"simulated, by seed": [float(a["simulated"].mean()) for a in each]}
                note(f"{steps} steps, {name}: {rows[name]}")
        found[f"{steps} steps"] = rows
    return found


def _descent_accuracy(
    c: Tint, task: WordLabels, test: WordLabels, models: Sequence[Mapping], rate: float
) -> float:
    batch: Batch = test.sample(jax.random.key(6), SEQUENCES)
    (tokens,), wanted = batch.inputs, batch.target[:, -1] - task.labels.start
    train, right = task.before_labels(tokens), []
    for weights in models:
        scores = descent_logits(weights, tokens, train, rate, c.shape, c.steps, c.trained)
        right.append(np.asarray(scores[:, -1, task.labels].argmax(-1) == wanted).mean())
    return float(np.mean(right))


def main() -> None:
    exact = {name: ABLATION[name] for name in ("none", "attention by differences", "all (paper)")}
    with jax.enable_x64(True):
        wide = faithful(2, exact)
    report(
        "tint_models",
        {
            "adaptation, all words exchanged": adapted(),
            f"adaptation, {FEW} words exchanged": adapted(few=True, all_steps=(1,)),
            "labels": labelled(),
            "ablation, float32": {f"{n} layers": faithful(n) for n in DEPTHS},
            "ablation, float64": {"2 layers": wide},
            "inside": {f"{n} layers": inside(n) for n in (2, 6)},
        },
    )


if __name__ == "__main__":
    main()
