"""How the parts of a decoder go back: as the paper has it, exactly, or by finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTENTION = ("value-only", "finite-difference", "exact")
DIFFERENCES = ("finite-difference", "exact")


@dataclass(frozen=True)
class Backward:
    """How each part of a decoder goes back, and what of it is trained.

    Attributes:
        attention: "value-only" (the scores count as constants: queries and keys are not trained),
            "finite-difference" (their derivative by central differences of softmax heads), "exact".
        norm, activation: "finite-difference" (one-sided, as in the paper) or "exact".
        gains: whether gains of LayerNorms are trained; offsets always are.
        step: of one-sided differences, the paper's by default; ten times it of central ones.

    Raises:
        ValueError: another way, or a step that is not above 0.
    """

    attention: str = "exact"
    norm: str = "exact"
    activation: str = "exact"
    gains: bool = True
    step: float = 1e-3

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTION),
            ("norm", DIFFERENCES),
            ("activation", DIFFERENCES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {allowed}")
        if not isinstance(self.gains, bool):
            raise ValueError(f"gains is {self.gains!r}, must be True or False")
        if not (isinstance(self.step, float | int) and 0 < self.step < np.inf):
            raise ValueError(f"step is {self.step!r}, must be finite and above 0")


#: The ways back by name; "paper" is that of Panigrahi et al.
MODES = {
    "paper": Backward("value-only", "finite-difference", "finite-difference", False),
    "finite-difference": Backward("finite-difference", "finite-difference", "finite-difference"),
    "exact": Backward(),
}
