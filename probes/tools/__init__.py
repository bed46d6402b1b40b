"""The tools of `orrery probe TOOL --run RUN`: name -> function of a run and a seed, to a table."""

from __future__ import annotations

from probes.tools import comparison, context, syntax, training, weights
from probes.tools.result import Result, Tool

TOOLS: dict[str, Tool] = {
    "linear": Tool(comparison.linear),
    "interchange": Tool(comparison.interchange),
    "similarity": Tool(comparison.functions),
    "interpolation": Tool(comparison.interpolation),
    "roll-out": Tool(comparison.roll_out),
    "training": Tool(comparison.training),
    "degrees": Tool(context.degrees),
    "saliency": Tool(context.maps),
    "graft": Tool(weights.graft, invariant=False, seeds=2),
    "npeff": Tool(weights.npeff, invariant=False, seeds=2),
    "fisher-merge": Tool(weights.fisher_merge, invariant=False),
    "averaging": Tool(weights.averaging, invariant=False),
    "kernel": Tool(training.kernel, invariant=False, seeds=2),
    "sharpness": Tool(training.sharpest, invariant=False, seeds=2),
    "zeroth-order": Tool(training.zeroth_order, invariant=False, seeds=2),
    "distillation": Tool(training.distillation, invariant=False, seeds=1),
    "arcs": Tool(syntax.arcs),
    "selectivity": Tool(syntax.units),
}

__all__ = ["TOOLS", "Result", "Tool", "find"]


def find(name: str) -> Tool:
    """The tool of that name; ValueError lists the known ones."""
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}, must be one of {', '.join(TOOLS)}")
    return TOOLS[name]
