"""Everything that a report shows, as plain data: one call a section, none of them family-specific.

A section that does not apply to a family (weights of a model without a canonical form, say) is
left out; `Comparison.omitted` says why.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import jax

from constructions.claims import Measurement
from constructions.family import Certificate
from constructions.runs import Run
from probes import losses, sections
from probes.ledger import (
    HOLDS,
    NOT_APPLICABLE,
    REFUTED,
    VERDICTS,
    VOID,
    Row,
    compiled_like,
    ledger,
)
from probes.losses import Curves, RollOut, ScaleCurve
from probes.sections import NotApplicable, Patches, Weights
from probes.style import number
from probes.table import ProbeTable
from synthetic.files import plain

FORMAT, VERSION = "orrery-report", 1
#: Trained models that the probe table has a column for.
PROBED = 1
#: Inputs of the curves beyond the training distribution.
FEWER = 1024


@dataclass(frozen=True)
class Comparison:
    """A construction beside its trained counterparts; see the classes of its parts.

    Attributes:
        reproduce: commands, settings, seeds, versions and seconds.
        omitted: section -> why it is missing.
    """

    family: str
    about: str
    source: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    certificate: Certificate
    rows: list[Row]
    curves: Curves | None
    weights: list[Weights] | None
    probes: ProbeTable | None
    patches: Patches | None
    scale_curve: ScaleCurve | None
    roll_out: RollOut | None
    measurements: list[Measurement]
    reproduce: dict[str, Any]
    omitted: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        verdicts = [row.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}

    @property
    def confirmed(self) -> bool:
        """Whether something was claimed and held, nothing failed, and the certificate is right.

        Claims that are not applicable count neither way.
        """
        counts = self.counts
        failed = counts[REFUTED] + counts[VOID]
        return bool(counts[HOLDS]) and not failed and self.certificate.passed

    @property
    def verdict(self) -> str:
        """The comparison in one sentence."""
        models = f"{len(self.seeds)} trained model" + ("s" if len(self.seeds) != 1 else "")
        counts = self.counts
        applicable = len(self.rows) - counts[NOT_APPLICABLE]
        if applicable:
            claims = "claim holds" if applicable == 1 else "claims hold"
            first = f"{counts[HOLDS]} of {applicable} {claims} on {models}"
            if counts[NOT_APPLICABLE]:
                first += f", {counts[NOT_APPLICABLE]} not applicable"
        else:
            first = f"Nothing was claimed at these settings; {models} fitted"
            if self.rows:
                first = f"None of {len(self.rows)} claims is applicable; {models} fitted"
            first += self._losses
        if self.certificate.verdict == "failed":
            return f"{first}; the construction FAILS its certificate"
        if not self.certificate.passed:
            return f"{first}; the construction is not certified at these settings"
        certified = [e for e in self.certificate.errors if e.passed]
        exact = max(certified, key=lambda e: e.dtype)
        return f"{first}; construction exact to {exact.max_rel_error:.0e} in {exact.dtype}"

    @property
    def _losses(self) -> str:
        """What was measured where nothing was claimed."""
        if self.curves is None:
            return ""
        level = self.curves.construction
        apart = [100 * abs(loss / level - 1) for loss in self.curves.trained]
        said = [number(a) for a in (min(apart), max(apart))]
        said = " to ".join(dict.fromkeys(said))
        return f", with losses {said} % from the construction's"

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that are not finite become None."""
        parts = {
            name: None if part is None else asdict(part)
            for name, part in (
                ("curves", self.curves),
                ("patches", self.patches),
                ("scale_curve", self.scale_curve),
                ("roll_out", self.roll_out),
            )
        }
        weights = None if self.weights is None else [asdict(w) for w in self.weights]
        return plain(
            {
                "format": FORMAT,
                "version": VERSION,
                "family": self.family,
                "settings": self.settings,
                "seeds": list(self.seeds),
                "verdict": self.verdict,
                "counts": self.counts,
                "certificate": self.certificate.to_json(),
                "claims": [row.to_json() for row in self.rows],
                "measurements": [row.to_json() for row in self.measurements],
                **parts,
                "weights": weights,
                "probes": None if self.probes is None else self.probes.to_json(),
                "omitted": self.omitted,
                "reproduce": self.reproduce,
            }
        )


def compare(
    run: Run,
    *,
    about: str = "",
    source: str = "",
    seed: int = 0,
    batch: int = 2**16,
    commands: Sequence[str] = (),
    measure: Callable[[], Iterable[Measurement]] = tuple,
    progress: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Compare the trained models of a run with their construction.

    Args:
        run: a fit of one or several seeds.
        about, source: of the family, for the heading.
        seed: of all inputs and controls.
        batch: inputs per statistic of the ledger.
        commands: what to type to make this comparison again.
        measure: gives the published numbers that are measured apart from these models.
        progress: called with the name of each section.
    """
    construction, models = run.construction, run.models
    reference = compiled_like(construction, models[0])
    omitted: dict[str, str] = {}
    began = time.perf_counter()

    named = {f"trained {s}": m for s, m in zip(run.seeds[:PROBED], models, strict=False)}
    work: dict[str, Callable[[], Any]] = {
        "claims": lambda: ledger(
            construction, models, seed=seed, batch=batch, claims=construction.claims
        ),
        "measurements": lambda: list(measure()),
        "certificate": lambda: construction.compile().certificate,
        "curves": lambda: losses.curves(run, reference, seed),
        "weights": lambda: sections.weights(construction, models, reference),
        "probes": lambda: sections.probes(construction, named, seed),
        "patches": lambda: sections.patches(construction, models, reference, seed),
        "scale_curve": lambda: losses.scale_curve(construction, models, reference, seed, FEWER),
        "roll_out": lambda: losses.roll_out(construction, models, reference, seed, FEWER),
    }

    def section(name: str) -> Any:
        progress(name)
        try:
            return work[name]()
        except NotApplicable as error:
            omitted[name] = str(error)
            return None

    # most of the time is compilation, which threads share out over the cores
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = dict(zip(work, pool.map(section, work), strict=True))
    certificate, rows = parts.pop("certificate"), parts.pop("claims")
    seconds = {**run.seconds, "compare": time.perf_counter() - began}
    return Comparison(
        family=run.family,
        about=about,
        source=source,
        settings=run.settings,
        seeds=run.seeds,
        certificate=certificate,
        rows=rows,
        reproduce=_reproduce(run, seed, batch, commands, seconds),
        omitted=omitted,
        **parts,
    )


def _reproduce(
    run: Run, seed: int, batch: int, commands: Sequence[str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    packages = ("orrery-transformers", "jax", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "commands": list(commands),
        "settings": run.settings,
        "recipe": run.recipe.to_json(),
        "seeds": list(run.seeds),
        "seed of inputs and controls": seed,
        "inputs per statistic": batch,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
