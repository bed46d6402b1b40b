"""The ledger of claims: which hold on trained models, and which could have failed.

A claim counts only if its statistic can tell things apart. Every row is therefore decided on

    the compiled construction           must hold (the statistic works where the theory is exact)
    trained counterparts, several seeds what the claim is about
    a randomly initialised model        must fail
    the near-misses in `claim.catches`  must fail (a step size off by 10 %, one step too many, ...)

and the verdict is "holds", "refuted" (a trained model fails) or "void" (a control passes, or the
construction fails: the statistic, not the model, is at fault).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats

from constructions.canonical import canonical_distance, without_inert
from constructions.checks import ProgramError
from constructions.claims import Claim, Evidence, NearMiss
from constructions.compiler import compile_program
from constructions.family import Construction
from constructions.transformer import Transformer
from probes import interpolation, similarity
from probes.fourier import degree_weights
from probes.subsets import all_subsets
from synthetic.task import Batch

FRACTIONS = tuple(n / 10 for n in range(11))
CONSTRUCTION, TRAINED, RANDOM = "construction", "trained", "random init"


@partial(jax.jit, static_argnums=0)
def _weights(construction: Construction, model: Transformer, reference: Transformer) -> Array:
    return canonical_distance(model, reference, construction.gauge())


@partial(jax.jit, static_argnums=0)
def sensitivities(
    construction: Construction, model: Transformer, reference: Transformer, inputs: Any
) -> Array:
    """Mean cosine of the sensitivities of two models, jitted."""
    ours, theirs = (partial(construction.apply, m) for m in (model, reference))
    return similarity.sensitivity_cosine(ours, theirs, inputs)


@partial(jax.jit, static_argnums=0)
def between(
    construction: Construction, model: Transformer, reference: Transformer, examples: Batch
) -> Array:
    """Losses at `FRACTIONS` of the line from model to reference, jitted."""
    fractions = jnp.array(FRACTIONS)
    return interpolation.interpolate(construction, model, reference, examples, fractions)


def excess_loss(e: Evidence) -> float:
    """|loss of the model / loss of the construction - 1|, on the same examples."""
    return abs(e.loss(e.prediction) / e.loss(e.expected) - 1)


def prediction_distance(e: Evidence) -> float:
    """Root mean square difference of the predictions, over that of the construction's."""
    models = (lambda *_: e.prediction), (lambda *_: e.expected)
    return float(similarity.prediction_distance(*models, e.examples.inputs).relative)


def sensitivity_cosine(e: Evidence) -> float:
    """Mean cosine between d prediction / d query of model and construction; blind to scale."""
    inputs = jax.tree.map(lambda a: a[:1024], e.examples.inputs)
    return float(sensitivities(e.construction, e.model, e.reference, inputs))


def weight_distance(e: Evidence) -> float:
    """|T - T*| / |T*| of the canonical tensors: weights compared modulo their symmetries."""
    return float(_weights(e.construction, e.model, e.reference))


def interpolation_gap(e: Evidence) -> float:
    """Largest loss on the line between model and construction, over the smaller end, less 1."""
    losses = between(e.construction, e.model, e.reference, e.examples)
    return float(interpolation.interpolation_gap(losses))


@partial(jax.jit, static_argnums=0)
def _rolled(construction: Construction, model: Transformer, examples: Batch) -> Array:
    predictions = interpolation.roll_out(
        construction, model, *examples.inputs, depth=20, damping=0.75
    )
    # the median: in the mean, the few contexts that are nearly unstable drown all others
    return jax.vmap(lambda p: jnp.median(construction.task.loss(p, examples)))(predictions)


def roll_out_gap(e: Evidence) -> float:
    """Largest |log(loss / loss of the construction)| over 20 applications, damped by 0.75.

    Losses are medians over the examples.
    Inert weights are removed first: see `constructions.canonical.without_inert`.
    """
    examples = jax.tree.map(lambda a: a[:4096], e.examples)
    gauge = e.construction.gauge()

    def rolled(model: Transformer) -> Array:
        return _rolled(e.construction, without_inert(model, gauge), examples)

    theirs = e.once("roll-out", lambda: rolled(e.reference))
    return float(jnp.abs(jnp.log(rolled(e.model) / theirs)).max())


def _on_subsets(e: Evidence, model: Transformer) -> np.ndarray:
    """Answers for every subset of four examples, `[subset, batch, ...]`, less their mean."""
    inputs = jax.tree.map(lambda a: a[:512], e.examples.inputs)
    players = min(4, e.construction.context_size(*inputs))
    found = all_subsets(e.construction, model, inputs, players)
    return found - found.mean(0)


def subset_distance(e: Evidence) -> float:
    """Root mean square difference of what examples change, over all subsets of four of them."""
    theirs = e.once("subsets", lambda: _on_subsets(e, e.reference))
    return float(np.linalg.norm(_on_subsets(e, e.model) - theirs) / np.linalg.norm(theirs))


def degree_distance(e: Evidence) -> float:
    """|log of the share of degree 2 and above over the construction's|, in four examples.

    See `probes.fourier`; the share is what no linear datamodel has.
    """
    theirs = e.once("subsets", lambda: _on_subsets(e, e.reference))
    ours, theirs = (degree_weights(v) for v in (_on_subsets(e, e.model), theirs))
    return abs(float(np.log(ours[2:].sum() / ours.sum()) - np.log(theirs[2:].sum() / theirs.sum())))


STATISTICS: dict[str, Callable[[Evidence], float]] = {
    "excess_loss": excess_loss,
    "prediction_distance": prediction_distance,
    "sensitivity_cosine": sensitivity_cosine,
    "weight_distance": weight_distance,
    "interpolation_gap": interpolation_gap,
    "roll_out_gap": roll_out_gap,
    "subset_distance": subset_distance,
    "degree_distance": degree_distance,
}


def measure(claim: Claim, evidence: Evidence) -> float:
    """The claim's statistic, NaN where it is not defined for the model.

    Weights of a softmax or of another depth, for example, have no distance to the construction's.
    A statistic that is not defined for the construction itself makes its claim void.
    """
    statistic = claim.statistic
    function = STATISTICS[statistic] if isinstance(statistic, str) else statistic
    try:
        return float(function(evidence))
    except (TypeError, ValueError):
        return float("nan")


@dataclass(frozen=True)
class Row:
    """One claim, measured on every subject.

    Attributes:
        claim: the claim.
        values: value of the statistic on the construction and on every control.
        trained: values of the trained models, one a seed.
        interval: 95 % confidence interval of their mean (Student's t), None below two seeds.
        verdict: "holds", "refuted" or "void".
        reason: what decided a verdict other than "holds".
    """

    claim: Claim
    values: Mapping[str, float]
    trained: tuple[float, ...]
    interval: tuple[float, float] | None
    verdict: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that are not defined become None."""
        claim = asdict(self.claim)
        statistic = claim["statistic"]
        claim["statistic"] = statistic if isinstance(statistic, str) else statistic.__name__
        values = {name: v if np.isfinite(v) else None for name, v in self.values.items()}
        return {
            "claim": claim,
            "values": values,
            "trained": list(self.trained),
            "interval": self.interval,
            "verdict": self.verdict,
            "reason": self.reason,
        }


def decide(claim: Claim, values: Mapping[str, float], trained: Sequence[float]) -> Row:
    """The verdict on a claim from its measured values."""
    controls = [name for name in values if name == RANDOM or name in claim.catches]
    passing = [name for name in controls if claim.holds(values[name])]
    missing = [name for name in claim.catches if name not in values]
    failing = [seed for seed, value in enumerate(trained) if not claim.holds(value)]
    if not claim.holds(values[CONSTRUCTION]):
        verdict, reason = "void", "the construction itself fails"
    elif passing or missing:
        verdict, reason = "void", "not caught: " + ", ".join(passing + missing)
    elif failing:
        verdict, reason = "refuted", f"{len(failing)} of {len(trained)} trained models fail"
    else:
        verdict, reason = "holds", "" if trained else "no trained model was given"
    interval = None
    if len(trained) > 1 and np.isfinite(trained).all():
        half = stats.sem(trained) * stats.t.ppf(0.975, len(trained) - 1)
        interval = (float(np.mean(trained) - half), float(np.mean(trained) + half))
    return Row(claim, dict(values), tuple(trained), interval, verdict, reason)


def compiled_like(construction: Construction, model: Transformer) -> Transformer:
    """The construction in the shape of `model` where it fits, so that both share compilations."""
    try:
        return compile_program(construction.program, config=model.config)
    except ProgramError:
        return construction.compile().model


def ledger(
    construction: Construction,
    trained: Sequence[Transformer] = (),
    *,
    seed: int = 0,
    batch: int = 2**16,
    claims: Sequence[Claim] | None = None,
) -> list[Row]:
    """Measure the construction's claims on trained models and on every control.

    Args:
        construction: whose claims are decided.
        trained: counterparts, one a seed.
        seed: of the inputs and of the random model.
        batch: inputs per statistic, or what the construction has as its `examples` if that is less.
        claims: other claims than the construction's own.
    """
    key, random_key = jax.random.split(jax.random.key(seed))
    random = construction.counterpart().untrained(random_key)
    reference = compiled_like(construction, random)
    subjects = {
        CONSTRUCTION: NearMiss(reference, construction),
        RANDOM: NearMiss(random, construction),
        **construction.near_misses(),
        **{f"{TRAINED} {n}": NearMiss(model, construction) for n, model in enumerate(trained)},
    }
    bases = {s.construction for s in subjects.values()}
    examples = {base: base.task.sample(key, min(batch, base.examples)) for base in bases}
    references = {base: compiled_like(base, random) for base in bases}
    memos: dict[Construction, dict[Any, Any]] = {base: {} for base in bases}
    evidence = {
        name: Evidence(base, model, references[base], examples[base], key, memos[base])
        for name, (model, base) in subjects.items()
    }
    rows = []
    for claim in construction.claims if claims is None else claims:
        values = {name: measure(claim, e) for name, e in evidence.items()}
        results = [values.pop(f"{TRAINED} {n}") for n in range(len(trained))]
        rows.append(decide(claim, values, results))
    return rows
