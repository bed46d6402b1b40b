"""Everything that a report shows, as plain data: the ledger, and a probe for each section.

A section that does not apply to a family (weights of a model without a canonical form, say) is
left out; `Comparison.omitted` says why.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import jax

from constructions.core.program import Program
from constructions.family import Certificate
from constructions.measurement import Measurement, Remark, parted
from constructions.runs import Run
from probes import find
from probes.foreign import ForeignError
from probes.ledger import (
    CONSTRUCTION,
    HOLDS,
    NOT_APPLICABLE,
    REFUTED,
    TRAINED,
    VERDICTS,
    VOID,
    Row,
    ledger,
)
from probes.probe import NotApplicable, Result
from probes.report.index import FORMAT, VERSION
from probes.style import number, span
from synthetic.display import Mark, Table, Text, shown
from synthetic.files import plain


class Section(NamedTuple):
    """A probe on the page, the options that it is asked with, and whether it takes the `batch`."""

    probe: str
    options: Mapping[str, Any] = {}
    batch: bool = False


#: The page's sections, by their names in the data; in the order of the page. Values that the
#: construction keeps in its stream are probed for, in one trained model.
SECTIONS = {
    "curves": Section("losses", batch=True),
    "weights": Section("weights"),
    "paths": Section("paths"),
    "probes": Section("linear", {"placed": True, "models": 1}),
    "patches": Section("interchange"),
    "scale_curve": Section("scale"),
    "roll_out": Section("roll-out", {"batch": 1024}),
}


@dataclass(frozen=True)
class Comparison:
    """A construction beside its trained counterparts.

    Attributes:
        sections: name in `SECTIONS` -> what its probe gave.
        reproduce: commands, settings, seeds, versions and seconds.
        omitted: section -> why it is missing.
        program: of the construction, for its picture; None: there is none.
    """

    family: str
    about: str
    source: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    certificate: Certificate
    rows: list[Row]
    sections: dict[str, Result]
    measurements: list[Measurement | Remark]
    reproduce: dict[str, Any]
    omitted: dict[str, str] = field(default_factory=dict)
    program: Program | None = None

    @property
    def decided(self) -> list[Measurement]:
        """Numbers that decide a statement."""
        return parted(self.measurements)[0]

    @property
    def remarks(self) -> list[Remark]:
        """Numbers that nothing decides."""
        return parted(self.measurements)[1]

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
        if "curves" not in self.sections:
            return ""
        curves = self.sections["curves"].data
        if not curves.construction:
            return f", with losses {span(curves.trained, number)}, the construction's 0"
        apart = [100 * abs(loss / curves.construction - 1) for loss in curves.trained]
        shown = dict.fromkeys(number(a) for a in (min(apart), max(apart)))
        return f", with losses {' to '.join(shown)} % from the construction's"

    def __str__(self) -> str:
        """The verdict, then the claims."""
        return "\n".join([f"{self.family}: {self.verdict}", *map(str, self.rows)])

    def _repr_html_(self) -> str:
        columns = ("claim", "", "holds if", CONSTRUCTION, TRAINED) if self.rows else ()
        rows = [
            (
                r.claim.name, Mark(r.verdict), f"{r.claim.direction} {number(r.claim.threshold)}",
                *(value for _, value in r.cells[:2]),
            )
            for r in self.rows
        ]  # fmt: skip
        reasons = [Text(f"{r.claim.name}: {r.reason}") for r in self.rows if r.reason]
        verdict = Mark(self.certificate.verdict)
        return shown(f"{self.family}: {self.verdict}", verdict, Table(columns, rows), *reasons)

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that are not finite become None."""
        found = {name: result.data_json() for name, result in self.sections.items()}
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
                "measurements": [row.to_json() for row in self.decided],
                "remarks": [row.to_json() for row in self.remarks],
                **{name: found.get(name) for name in SECTIONS},
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
    measure: Callable[[], Iterable[Measurement | Remark]] = tuple,
    progress: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Compare the trained models of a run with their construction.

    Args:
        run: a fit of one or several seeds.
        about, source: of the family, for the heading.
        seed: of all inputs and controls.
        batch: inputs per statistic of the ledger, and for the levels of loss.
        commands: what to type to make this comparison again.
        measure: gives the published numbers that are measured apart from these models.
        progress: called with the name of each part.
    """
    construction = run.construction
    omitted: dict[str, str] = {}
    began = time.perf_counter()

    def section(name: str) -> Result | None:
        progress(name)
        asked = SECTIONS[name]
        options = {**asked.options, "batch": batch} if asked.batch else asked.options
        try:
            return find(asked.probe)(run, seed, **options)
        except (NotApplicable, ForeignError) as missing:
            omitted[name] = str(missing)
            return None

    def claims() -> list[Row]:
        progress("claims")
        return ledger(construction, run.models, seed=seed, batch=batch, claims=construction.claims)

    # one after the other: two programs of XLA that run at once on a CPU may wait for ever
    rows, measured = claims(), list(measure())
    certificate = construction.compile().certificate
    found = {name: section(name) for name in SECTIONS}
    seconds = {**run.seconds, "compare": time.perf_counter() - began}
    return Comparison(
        family=run.family,
        about=about,
        source=source,
        settings=run.settings,
        seeds=run.seeds,
        certificate=certificate,
        rows=rows,
        sections={name: result for name, result in found.items() if result is not None},
        measurements=measured,
        reproduce=_reproduce(run, seed, batch, commands, seconds),
        omitted={name: omitted[name] for name in SECTIONS if name in omitted},
        program=construction.program,
    )


def _reproduce(
    run: Run, seed: int, batch: int, commands: Sequence[str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    packages = ("orrery-transformers", "jax", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "commands": list(commands),
        "settings": run.settings,
        "recipe": {} if run.recipe is None else run.recipe.to_json(),
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
