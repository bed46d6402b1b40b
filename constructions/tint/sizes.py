r"""How large a simulator is: ours, counted from its program, beside the paper's.

Nothing is allocated: a program of GPT-2's size is a few thousand heads whose maps are slices of the
identity, and the entries of dense weights follow from its shapes. Of the paper's allocation (slots
used again and again, weights carried past modules) the parameters are counted by its formula

    Q = 4 Q' + 3 T_sim D_sim / H_sim,    Q' = D_sim^2 / H_sim + H_sim D_sim,
    (21 Q + Q' + 6 D_sim H_sim) L

(Panigrahi et al. 2023, arXiv 2307.01189), with D_sim = 4 D and T_sim = T + D / S, to which what it
leaves out is added: 18 blocks of D / S prefix tokens a layer, of D_sim numbers each, and the tables
of words and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from constructions.counts import counts
from constructions.materials import materials
from constructions.tint.auxiliary import DecoderShape
from constructions.tint.backward import MODES
from constructions.tint.layout import Layout
from constructions.tint.tableau import Tableau

#: Published decoders, by numbers alone: (shape, the simulator's heads in the paper's formula).
PUBLISHED = {
    "GPT-2": (DecoderShape(50257, 1024, 12, 12, 768, 3072, "gelu", 1e-5), 12),
    "OPT-125M": (DecoderShape(50272, 2048, 12, 12, 768, 3072, "relu", 1e-5), 12),
    "OPT-350M": (DecoderShape(50272, 2048, 24, 16, 1024, 4096, "relu", 1e-5), 16),
    "OPT-1.3B": (DecoderShape(50272, 2048, 24, 32, 2048, 8192, "relu", 1e-5), 16),
    "OPT-2.7B": (DecoderShape(50272, 2048, 32, 32, 2560, 10240, "relu", 1e-5), 16),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of a simulator.

    Attributes:
        auxiliary: parameters of the model that is simulated.
        program: nonzero entries of the simulator's own maps.
        prefix: numbers in prefix tokens and tables: the auxiliary's parameters, once.
        tokens: prefix tokens; the text comes behind them.
        layers, heads, width: of the simulator.
        plain: share of its heads that a plain transformer has.
        dense: entries of its dense weights.
        formula: the paper's parameters by its formula.
        paper: the same with prefix tokens and tables.
    """

    auxiliary: int
    program: int
    prefix: int
    tokens: int
    layers: int
    heads: int
    width: int
    plain: float
    dense: int
    formula: int
    paper: int

    @property
    def stored(self) -> int:
        """All that our structured form stores."""
        return self.program + self.prefix

    @property
    def nonzero(self) -> float:
        """The share of the dense weights that is not zero."""
        return self.program / self.dense


def sizes(
    shape: DecoderShape,
    mode: str = "exact",
    *,
    steps: int = 1,
    stack: int = 1,
    sim_heads: int | None = None,
) -> Sizes:
    """Count a simulator.

    Args:
        shape: of the auxiliary model.
        mode: a name in `MODES`.
        steps: of gradient descent; the paper's count is that of one.
        stack: rows of a matrix in one prefix token; the paper's is 4.
        sim_heads: of the paper's simulator; as many as the auxiliary model has if None.
    """
    layout = Layout(shape, stack)
    program = Tableau(layout, MODES[mode], steps, 1e-3).program()
    found = counts(program)
    formula, extra = paper_parameters(shape, sim_heads or shape.heads)
    return Sizes(
        auxiliary=shape.parameters,
        program=found.stored,
        prefix=shape.parameters,
        tokens=sum(layout.count(group, 0) for group in layout.groups),
        layers=found.layers,
        heads=found.heads,
        width=found.width,
        plain=materials(program).plain,
        dense=found.dense,
        formula=formula,
        paper=formula + extra,
    )


def paper_parameters(shape: DecoderShape, sim_heads: int, stack: int = 4) -> tuple[int, int]:
    """(parameters by the paper's formula, what it leaves out); see the module."""
    width, prefix = 4 * shape.width, shape.width // stack
    split = width * width // sim_heads + sim_heads * width
    linear = 4 * split + 3 * (shape.positions + prefix) * width // sim_heads
    formula = (21 * linear + split + 6 * width * sim_heads) * shape.layers
    tables = (shape.words + shape.positions) * shape.width
    return formula, 18 * prefix * width * shape.layers + tables


def table(mode: str = "exact", names: Sequence[str] = tuple(PUBLISHED)) -> str:
    """Published decoders and their simulators, as text."""
    head = ("auxiliary", "parameters", "program", "stored", "formula", "paper", "dense")
    head += ("heads", "plain", "tokens", "width")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        shape, sim_heads = PUBLISHED[name]
        s = sizes(shape, mode, sim_heads=sim_heads)
        cells = [s.auxiliary, s.program, s.stored, s.formula, s.paper, s.dense]
        shown = [f"{n:.3g}" if n < 1e6 else f"{n / 1e6:,.4g} M" for n in cells]
        row = [name, *shown, f"{s.heads}", f"{s.plain:.2f}", f"{s.tokens}", f"{s.width}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
