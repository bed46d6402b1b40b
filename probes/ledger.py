"""The ledger of claims: which hold on trained models, and which could have failed.

A claim counts only if its statistic can tell things apart. Every row is therefore decided on

    the compiled construction           must hold (the statistic works where the theory is exact)
    trained counterparts, several seeds what the claim is about
    a randomly initialised model        must fail
    the near-misses in `claim.catches`  must fail (a step size off by 10 %, one step too many, ...)

and the verdict is

    holds           every trained model satisfies it
    refuted         a trained model fails
    void            a control passes, or the construction fails: the statistic, not the model, is at
                    fault
    not applicable  the settings, or the trained models, lack what the claim needs: it is about
                    other ones, and nothing is said of these

The last is decided beforehand, from what claim and statistic declare (`probes.statistics.lacks`). A
trained model may be a function from inputs to predictions: claims on weights do not apply to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
from scipy import stats

from constructions.claims import Claim, Evidence, NearMiss, is_function
from constructions.core.transformer import Transformer
from constructions.family import Construction
from probes.probe import compiled_like
from probes.similarity import OPPOSITE, compared
from probes.statistics import lacks, statistic_of, value_of
from synthetic.display import Mark, Table, Text, number, shown

CONSTRUCTION, TRAINED, RANDOM = "construction", "trained", "random init"
HOLDS, REFUTED, VOID, NOT_APPLICABLE = "holds", "refuted", "void", "not applicable"
VERDICTS = (HOLDS, REFUTED, VOID, NOT_APPLICABLE)


@dataclass(frozen=True)
class Row:
    """One claim, measured on every subject.

    Attributes:
        claim: the claim.
        values: value of the statistic on the construction and on every control.
        trained: values of the trained models, one a seed.
        interval: 95 % confidence interval of their mean (Student's t), None below two seeds.
        verdict: one of `VERDICTS`.
        reason: what decided a verdict other than "holds".
        lacking: for every subject that the claim does not apply to ("trained 0" is the first
            trained model), what it lacks; its value is NaN.
        note: a hint at what may lie behind a verdict.
    """

    claim: Claim
    values: Mapping[str, float]
    trained: tuple[float, ...]
    interval: tuple[float, float] | None
    verdict: str
    reason: str = ""
    lacking: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Name and value of what was measured, the trained models as one."""
        found = [(CONSTRUCTION, number(self.values.get(CONSTRUCTION)))]
        if self.trained:
            ends = "" if self.interval is None else f" {number(list(self.interval))}"
            found.append((TRAINED, number(float(np.mean(self.trained))) + ends))
        others = {n: v for n, v in self.values.items() if n != CONSTRUCTION}
        return found + [(name, number(value)) for name, value in others.items()]

    def __str__(self) -> str:
        """The verdict, and what decided it."""
        claim = self.claim
        lines = [f"{claim.name}: {self.verdict} ({claim.direction} {number(claim.threshold)})"]
        lines += [f"  {name}: {value}" for name, value in self.cells]
        return "\n".join([*lines, *(f"  {said}" for said in (self.reason, self.note) if said)])

    def _repr_html_(self) -> str:
        claim = self.claim
        holds = ("holds if", f"{claim.direction} {number(claim.threshold)}")
        below = [Text(said) for said in (self.reason, self.note) if said]
        rows = [holds, *self.cells]
        return shown(claim.name, Mark(self.verdict), Text(claim.statement), Table((), rows), *below)

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that are not defined become None."""
        claim = asdict(self.claim)
        statistic = claim["statistic"]
        claim["statistic"] = statistic if isinstance(statistic, str) else _name(statistic)
        claim["needs"] = [_name(need) for need in self.claim.needs]
        values = {name: v if np.isfinite(v) else None for name, v in self.values.items()}
        return {
            "claim": claim,
            "values": values,
            "trained": [v if np.isfinite(v) else None for v in self.trained],
            "interval": self.interval,
            "verdict": self.verdict,
            "reason": self.reason,
            "lacking": dict(self.lacking),
            "note": self.note,
        }


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _trained(number: int) -> str:
    return f"{TRAINED} {number}"


def decide(
    claim: Claim,
    values: Mapping[str, float],
    trained: Sequence[float],
    lacking: Mapping[str, str] | None = None,
    note: str = "",
) -> Row:
    """The verdict on a claim from its measured values.

    Args:
        claim: the claim.
        values: of the construction and of every control.
        trained: of every trained model.
        lacking: subject -> what it lacks, for those that the claim does not apply to.
        note: a hint, kept with a refutation.
    """
    lacking = dict(lacking or {})
    controls = [name for name in values if name == RANDOM or name in claim.catches]
    unasked = [f"{name} ({lacking[name]})" for name in controls if name in lacking]
    passing = [name for name in controls if claim.holds(values[name])]
    missing = [name for name in claim.catches if name not in values]
    foreign = [lacking[_trained(n)] for n in range(len(trained)) if _trained(n) in lacking]
    failing = [
        n
        for n, value in enumerate(trained)
        if _trained(n) not in lacking and not claim.holds(value)
    ]
    if CONSTRUCTION in lacking:
        verdict, reason = NOT_APPLICABLE, lacking[CONSTRUCTION]
    elif foreign and len(foreign) == len(trained):
        verdict, reason = NOT_APPLICABLE, "; ".join(dict.fromkeys(foreign))
    elif not claim.holds(values[CONSTRUCTION]):
        verdict, reason = VOID, "the construction itself fails"
    elif passing or missing or unasked:
        verdict, reason = VOID, "not caught: " + ", ".join(passing + missing + unasked)
    elif failing:
        verdict, reason = REFUTED, f"{len(failing)} of {len(trained)} trained models fail"
    elif foreign:
        said = "; ".join(dict.fromkeys(foreign))
        verdict, reason = NOT_APPLICABLE, f"{len(foreign)} of {len(trained)} trained models: {said}"
    else:
        verdict, reason = HOLDS, "" if trained else "no trained model was given"
    interval = None
    if len(trained) > 1 and np.isfinite(trained).all():
        half = stats.sem(trained) * stats.t.ppf(0.975, len(trained) - 1)
        interval = (float(np.mean(trained) - half), float(np.mean(trained) + half))
    note = note if verdict == REFUTED else ""
    return Row(claim, dict(values), tuple(trained), interval, verdict, reason, lacking, note)


def check_claims(claims: Sequence[Claim], near_misses: Mapping[str, Any]) -> None:
    """ValueError, in one line, for claims and near-misses that do not fit each other."""
    reserved = (CONSTRUCTION, RANDOM)
    for name, near in near_misses.items():
        if name in reserved or name.startswith(f"{TRAINED} "):
            raise ValueError(f"near-miss {name!r}: the name is taken, must be another")
        if not isinstance(near, NearMiss):
            raise ValueError(
                f"near-miss {name!r} is a {type(near).__name__}, must be NearMiss(model, "
                "construction)"
            )
        if not isinstance(near.construction, Construction):
            found = type(near.construction).__name__
            raise ValueError(
                f"near-miss {name!r} has a {found} as its construction, must be a Construction"
            )
    names: set[str] = set()
    for claim in claims:
        if not isinstance(claim, Claim):
            raise ValueError(f"claims hold a {type(claim).__name__}, must hold Claims")
        if claim.name in names:
            raise ValueError(f"claim {claim.name!r} is there twice, must have a name of its own")
        names.add(claim.name)
        statistic_of(claim)
        if isinstance(claim.catches, str):
            raise ValueError(
                f"claim {claim.name!r}: catches is {claim.catches!r}, must be a tuple of names, "
                f"({claim.catches!r},)"
            )
        for caught in claim.catches:
            if caught not in near_misses:
                known = ", ".join(map(repr, near_misses)) or "nothing: there are no near-misses"
                raise ValueError(
                    f"claim {claim.name!r}: catches has {caught!r}, must name near-misses: {known}"
                )


def _opposite(evidence: Evidence) -> bool:
    """Whether predictions point against the construction's, all of them together."""
    ours, theirs = (
        np.asarray(compared(evidence.construction, p), float).ravel()
        for p in (evidence.prediction, evidence.expected)
    )
    return bool(ours @ theirs < OPPOSITE * np.linalg.norm(ours) * np.linalg.norm(theirs))


def _hint(claim: Claim, opposite: Sequence[str], results: Mapping[str, float]) -> str:
    against = [*opposite]
    if claim.statistic == "sensitivity_cosine":
        against += [n for n, v in results.items() if v < OPPOSITE and n not in against]
    if not against:
        return ""
    return f"{', '.join(against)}: nearly minus the construction's. The sign of the read-out?"


def ledger(
    construction: Construction,
    trained: Sequence[Any] = (),
    *,
    seed: int = 0,
    batch: int = 2**16,
    claims: Sequence[Claim] | None = None,
) -> list[Row]:
    """Measure the construction's claims on trained models and on every control.

    Args:
        construction: whose claims are decided.
        trained: counterparts, one a seed; or functions from inputs to predictions.
        seed: of the inputs and of the random model.
        batch: inputs per statistic, or what the construction has as its `examples` if that is less.
        claims: other claims than the construction's own.

    Returns:
        A row for each claim, in their order. Where the construction claims nothing at its settings
        there is none, with a warning.

    Raises:
        ValueError: a claim names no statistic or near-miss, a near-miss is none, a trained model is
            neither model nor function, or its predictions are of another shape.
        Exception: what a statistic raises.
    """
    if claims is None:
        claims = construction.claims
        if not claims:
            warnings.warn(
                f"{type(construction).__name__} claims nothing at these settings, so nothing was "
                f"decided: {construction!r}",
                stacklevel=2,
            )
            return []
    near_misses = construction.near_misses()
    check_claims(claims, near_misses)
    for n, model in enumerate(trained):
        if not isinstance(model, Transformer) and not is_function(model):
            raise ValueError(
                f"{_trained(n)} is a {type(model).__name__}, must be a Transformer or a "
                "function from inputs to predictions"
            )
    key, random_key = jax.random.split(jax.random.key(seed))
    random = construction.counterpart().untrained(random_key)
    reference = compiled_like(construction, random)
    subjects = {
        CONSTRUCTION: NearMiss(reference, construction),
        RANDOM: NearMiss(random, construction),
        **near_misses,
        **{_trained(n): NearMiss(model, construction) for n, model in enumerate(trained)},
    }
    bases = {s.construction for s in subjects.values()}
    examples = {base: base.task.sample(key, min(batch, base.examples)) for base in bases}
    references = {base: compiled_like(base, random) for base in bases}
    memos: dict[Construction, dict[Any, Any]] = {base: {} for base in bases}
    evidence = {
        name: Evidence(base, model, references[base], examples[base], key, memos[base])
        for name, (model, base) in subjects.items()
    }
    names = [_trained(n) for n in range(len(trained))]
    for name in names:
        ours, theirs = (_shape(evidence[name], p) for p in ("prediction", "expected"))
        if ours != theirs:
            raise ValueError(f"predictions of {name} have shape {ours}, must be {theirs}")
    opposite = [name for name in names if _opposite(evidence[name])]
    rows = []
    for claim in claims:
        lacking = {name: found for name, e in evidence.items() if (found := lacks(claim, e))}
        values = {
            name: float("nan") if name in lacking else value_of(claim, e)
            for name, e in evidence.items()
        }
        results = {name: values.pop(name) for name in names}
        note = _hint(claim, opposite, results)
        rows.append(decide(claim, values, list(results.values()), lacking, note))
    return rows


def _shape(evidence: Evidence, of: str) -> tuple[int, ...]:
    return getattr(evidence, of).shape
