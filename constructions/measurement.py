"""Numbers of ours beside what is stated of them: decided measurements, and remarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

#: The verdict on what is better than a published value that a poorer optimum of ours reproduces.
LOCAL = "better: the published optimum is local"


@dataclass(frozen=True)
class Remark:
    """A number that nothing decides: it is told beside the measurements, and asserts nothing.

    Attributes:
        name: short and unique within a family, among its measurements too.
        statement: what the number is, one sentence.
        source: paper, figure or table that it has to do with.
        measured: ours.
        error: one standard error of it, 0 where it is exact.
        note: what a reader should know.
    """

    name: str
    statement: str
    source: str
    measured: float
    error: float = 0.0
    note: str = ""

    verdict: ClassVar[str] = "remark"

    def _repr_html_(self) -> str:
        from synthetic.display import Table, Text, shown

        rows = [("measured", self.measured)]
        rows += [("standard error", self.error)] if self.error else []
        said = Text(f"{self.statement} {self.source}.")
        return shown(self.name, said, Table((), rows), Text(self.note))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """A statement that a number of ours decides: against a published one, or within bounds.

    Attributes:
        name: short and unique within a family.
        statement: what the number is, or what it shows, one sentence.
        source: paper, figure or table.
        published: the paper's value, or that of a closed form; None where bounds decide.
        measured: ours.
        error: one standard error of `measured`, 0 where it is exact.
        tolerance: relative; how far from the published value still counts as reproduced.
        better: "<=" where a lower value than the published one is as good (a loss), else "".
        note: where paper and code differ, which was used; what a reader should know.
        at_least, at_most: what the number must be for the statement to hold, where nothing is
            published.
        local: value of a poorer local optimum that a search of ours ends in as well.

    Raises:
        ValueError: nothing decides it, or both a published value and bounds would.
    """

    name: str
    statement: str
    source: str
    published: float | None
    measured: float
    error: float = 0.0
    tolerance: float = 0.03
    better: str = ""
    note: str = ""
    at_least: float | None = None
    at_most: float | None = None
    local: float | None = None

    def __post_init__(self) -> None:
        if self.better not in ("", "<="):
            raise ValueError(f"better is {self.better!r}, must be '' or '<='")
        bounds = [b for b in (self.at_least, self.at_most) if b is not None]
        if (self.published is None) != bool(bounds):
            raise ValueError(
                f"measurement {self.name!r}: published is {self.published}, at_least "
                f"{self.at_least}, at_most {self.at_most}, must be a value or bounds; a number "
                "that nothing decides is a Remark"
            )

    @property
    def verdict(self) -> str:
        """What was found.

        Of a published value: "reproduced", `LOCAL`, "better" or "differs". Two standard errors are
        granted on top of the tolerance; `LOCAL` says that it is better and that the published
        value is reproduced by the poorer optimum `local`.

        Of bounds: "holds" or "refuted" by a margin of two standard errors, else "undecided".
        """
        if self.published is None:
            gaps = [] if self.at_least is None else [self.at_least - self.measured]
            gaps += [] if self.at_most is None else [self.measured - self.at_most]
            if all(gap <= -2 * self.error for gap in gaps):
                return "holds"
            inside = all(gap <= 2 * self.error for gap in gaps)  # NaN is nowhere
            return "undecided" if inside else "refuted"
        slack = self.tolerance * abs(self.published) + 2 * self.error
        if abs(self.measured - self.published) <= slack:
            return "reproduced"
        if not self.better or not self.measured < self.published:
            return "differs"
        found = self.local is not None and abs(self.local - self.published) <= slack
        return LOCAL if found else "better"

    @property
    def criterion(self) -> str:
        """What decides it, in words."""
        if self.published is not None:
            return f"within {100 * self.tolerance:g} %"
        ends = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{word} {end:.4g}" for word, end in ends if end is not None)

    def _repr_html_(self) -> str:
        from synthetic.display import Mark, Table, Text, shown

        rows = [("published", self.published)] if self.published is not None else []
        rows += [("measured", self.measured), ("decided by", self.criterion)]
        rows += [("standard error", self.error)] if self.error else []
        said = [Text(f"{self.statement} {self.source}."), Text(self.note)]
        return shown(self.name, Mark(self.verdict), said[0], Table((), rows), said[1])

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def parted(rows: Iterable[Measurement | Remark]) -> tuple[list[Measurement], list[Remark]]:
    """What numbers decide, and what nothing does."""
    rows = list(rows)
    decided = [row for row in rows if isinstance(row, Measurement)]
    return decided, [row for row in rows if isinstance(row, Remark)]
