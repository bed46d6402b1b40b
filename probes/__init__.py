"""How alike are a construction and a trained model? Every probe says when it misleads.

probe              what a probe is: its question, its measurement, its result
subject            what is probed: named values of a model, its weights as one vector
foreign            models of others behind functions: `Subject`
torch_hooks        a torch module as one
regression         held-out linear and logistic probes, with control tasks
linear, positions  what can be read off the stream, at all places or at one of a sequence
patching           exchanged values: the machinery, their first-order estimate, single paths
interchange        which values a model uses
similarity         predictions, sensitivities, activations; at the end of a fit and along it
losses             levels of the loss, on and off the task
weights, paths     matrices up to their symmetries; which slots heads read and write
interpolation      lines between what the layers of two models do
roll_out           a layer that is applied again and again
context            what a prediction makes of the examples in its context
grafting, npeff    which weights carry a skill, which examples are treated alike
merging            merging models by Fisher information, averages of checkpoints
descent            full-batch descent; descent without gradients, or with a teacher
kernels            empirical kernels
sharpness          curvature, and how large a step weights bear
selectivity        units that follow classes
syntax             sentences: heads along arcs, spans, trees, constituents passed on as one thing
statistics         what claims are decided by
ledger             claims, their controls, their verdicts
report             a page of probes and the ledger
sweep              fits over a grid of settings: a table, figures, a page
bench              how well methods find mechanisms that are known: subjects in disguise, a card
style              how numbers and figures look
coverage           what the ledger holds of each paper
cli, options       the command, and what its subcommands share
listing            its subcommands that show families and programs

`PROBES` maps the name of every probe to where it is, "module:attribute", so that names can be
listed before anything heavy is imported; `find` gives the probe. A package of somebody else adds
its own through the entry points `orrery.probes`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from constructions.catalogue import resolve

if TYPE_CHECKING:
    from probes.probe import Probe

GROUP = "orrery.probes"

#: The probes of this package, in the order of docs/probes.md.
PROBES: dict[str, str] = {
    "losses": "probes.losses:LOSSES",
    "scale": "probes.losses:SCALE",
    "similarity": "probes.similarity:SIMILARITY",
    "training": "probes.similarity:TRAINING",
    "weights": "probes.weights:WEIGHTS",
    "paths": "probes.paths:PATHS",
    "interpolation": "probes.interpolation:INTERPOLATION",
    "roll-out": "probes.roll_out:ROLL_OUT",
    "linear": "probes.linear:LINEAR",
    "positions": "probes.positions:POSITIONS",
    "interchange": "probes.interchange:INTERCHANGE",
    "degrees": "probes.context:DEGREES",
    "saliency": "probes.context:SALIENCY",
    "arcs": "probes.syntax.arcs:ARCS",
    "spans": "probes.syntax.constituents:SPANS",
    "trees": "probes.syntax.constituents:TREES",
    "span-interchange": "probes.syntax.span_interchange:SPAN_INTERCHANGE",
    "selectivity": "probes.selectivity:SELECTIVITY",
    "graft": "probes.grafting:GRAFT",
    "npeff": "probes.npeff:NPEFF",
    "fisher-merge": "probes.merging:FISHER_MERGE",
    "averaging": "probes.merging:AVERAGING",
    "kernel": "probes.kernels:KERNEL",
    "sharpness": "probes.sharpness:SHARPNESS",
    "zeroth-order": "probes.descent:ZEROTH_ORDER",
    "distillation": "probes.descent:DISTILLATION",
}

__all__ = ["GROUP", "PROBES", "check_name", "find", "places", "probe_table"]


def places() -> dict[str, str]:
    """Name -> "module:attribute" of our probes and those of installed packages.

    ValueError for a probe of a package that is named as another one is.
    """
    found = dict(PROBES)
    for entry in entry_points(group=GROUP):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise ValueError(
                f"entry point {entry.name!r} = {entry.value!r} of {GROUP}: the name is that of "
                f"{found[entry.name]!r}, must be another"
            )
    return found


def check_name(name: str) -> dict[str, str]:
    """`places()`; ValueError lists the names where this is none of them, nor "module:attribute"."""
    known = places()
    if name not in known and ":" not in name:
        raise ValueError(
            f"unknown probe {name!r}, must be one of {', '.join(known)}, or module:attribute"
        )
    return known


def find(name: str) -> Probe:
    """The probe of that name, or the one at "module:attribute".

    ValueError, in one line, for a name that is not known, or leads to no probe.
    """
    known = check_name(name)
    from probes.probe import Probe

    try:
        found = resolve(known.get(name, name))
    except ValueError as error:
        raise ValueError(f"probe {error}") from error
    if not isinstance(found, Probe):
        raise ValueError(f"probe {name!r}: is a {type(found).__name__}, must be a Probe")
    return found


def probe_table() -> str:
    """The table of our probes, as docs/probes.md has it."""
    lines = ["| probe | the question | it misleads when |", "|---|---|---|"]
    for probe in map(find, PROBES):
        lines.append(f"| `{probe.name}` | {probe.question} | {probe.misleads} |")
    return "\n".join(lines)
