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
import numpy as np
from jaxtyping import Array
from scipy import stats

from constructions.family import Claim, Construction, Evidence, NearMiss
from constructions.symmetries import canonical_distance
from constructions.transformer import Transformer, randomise
from probes import interpolation, similarity

CONSTRUCTION, TRAINED, RANDOM = "construction", "trained", "random init"


@partial(jax.jit, static_argnums=(0, 3))
def _loss(construction: Construction, model: Transformer, key: Array, batch: int) -> Array:
    drawn = construction.task.sample(key, batch)
    return construction.task.loss(construction.apply(model, *drawn.inputs), drawn).mean()


def mean_loss(evidence: Evidence) -> float:
    """Mean loss of the model on the task."""
    return float(_loss(evidence.construction, evidence.model, evidence.key, evidence.batch))


def excess_loss(evidence: Evidence) -> float:
    """|loss of the model / loss of the construction - 1|, on the same examples."""
    e = evidence
    ours, theirs = (_loss(e.construction, m, e.key, e.batch) for m in (e.model, e.reference))
    return abs(float(ours / theirs) - 1)


def prediction_distance(evidence: Evidence) -> float:
    """Root mean square difference of the predictions, over that of the construction's."""
    e = evidence
    inputs = e.construction.sample(e.key, e.batch)
    return float(similarity.relative_prediction_distance(e.construction, e.model, e.reference, inputs))


def sensitivity_cosine(evidence: Evidence) -> float:
    """Mean cosine between d prediction / d query of model and construction; blind to scale."""
    e = evidence
    inputs = e.construction.sample(e.key, min(e.batch, 1024))
    return float(similarity.sensitivity_cosine(e.construction, e.model, e.reference, inputs))


def weight_distance(evidence: Evidence) -> float:
    """|T - T*| / |T*| of the canonical tensors: weights compared modulo their symmetries."""
    e = evidence
    return float(canonical_distance(e.model, e.reference, e.construction.gauge()))


def interpolation_gap(evidence: Evidence) -> float:
    """Largest loss between the canonical forms of model and construction, over the smaller end."""
    e = evidence
    return float(interpolation.interpolation_gap(e.construction, e.model, e.reference, e.key, e.batch))


STATISTICS: dict[str, Callable[[Evidence], float]] = {
    "mean_loss": mean_loss,
    "excess_loss": excess_loss,
    "prediction_distance": prediction_distance,
    "sensitivity_cosine": sensitivity_cosine,
    "weight_distance": weight_distance,
    "interpolation_gap": interpolation_gap,
}


def measure(claim: Claim, evidence: Evidence) -> float:
    """The claim's statistic; NaN where it is not defined for the model (weights of a softmax, say)."""
    statistic = claim.statistic
    function = STATISTICS[statistic] if isinstance(statistic, str) else statistic
    try:
        return float(function(evidence))
    except TypeError as error:
        if "canonical" in str(error):
            return float("nan")
        raise


@dataclass(frozen=True)
class Row:
    """One claim, measured on every subject.

    Attributes:
        claim: the claim.
        values: subject -> value of the statistic; the trained subjects are "trained 0", ...
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


def ledger(
    construction: Construction,
    trained: Sequence[Transformer] = (),
    *,
    seed: int = 0,
    batch: int = 4096,
    claims: Sequence[Claim] | None = None,
) -> list[Row]:
    """Measure the construction's claims on trained models and on every control.

    Args:
        construction: whose claims are decided.
        trained: counterparts, one a seed.
        seed: of the inputs and of the random model.
        batch: inputs per statistic.
        claims: other claims than the construction's own.
    """
    key, random_key = jax.random.split(jax.random.key(seed))
    reference = construction.compile().model
    own = {
        CONSTRUCTION: NearMiss(reference, construction),
        RANDOM: NearMiss(construction.counterpart().init(random_key), construction),
    }
    subjects = own | construction.near_misses()
    rows = []
    for claim in construction.claims if claims is None else claims:
        values = {}
        for name, subject in subjects.items():
            base = reference if subject.construction == construction else None
            base = subject.construction.compile().model if base is None else base
            evidence = Evidence(subject.construction, subject.model, base, key, batch)
            values[name] = measure(claim, evidence)
        results = [
            measure(claim, Evidence(construction, model, reference, key, batch))
            for model in trained
        ]
        rows.append(decide(claim, values, results))
    return rows
