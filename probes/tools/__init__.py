"""The tools of `orrery probe TOOL --run RUN`: name -> function of a run and a seed, to a table."""

from __future__ import annotations

from probes.tools import comparison, context, syntax, training, weights
from probes.tools.result import Result, Tool

TOOLS: dict[str, Tool] = {
    "linear": comparison.linear,
    "interchange": comparison.interchange,
    "similarity": comparison.functions,
    "interpolation": comparison.interpolation,
    "roll-out": comparison.roll_out,
    "training": comparison.training,
    "degrees": context.degrees,
    "saliency": context.maps,
    "graft": weights.graft,
    "npeff": weights.npeff,
    "fisher-merge": weights.fisher_merge,
    "averaging": weights.averaging,
    "kernel": training.kernel,
    "sharpness": training.sharpest,
    "zeroth-order": training.zeroth_order,
    "distillation": training.distillation,
    "arcs": syntax.arcs,
    "selectivity": syntax.units,
}

__all__ = ["TOOLS", "Result", "Tool", "find"]


def find(name: str) -> Tool:
    """The tool of that name; ValueError lists the known ones."""
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}, must be one of {', '.join(TOOLS)}")
    return TOOLS[name]
