"""How the parts of a decoder go back: as the paper has it, exactly, or by finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTENTION = ("value-only", "finite-difference", "exact")
NORM = ("finite-difference", "central", "exact")
ACTIVATION = ("finite-difference", "exact")


@dataclass(frozen=True)
class Backward:
    """How each part of a decoder goes back, and what of it is trained.

    Attributes:
        attention: "value-only" (the scores count as constants: queries and keys are not trained),
            "finite-difference" (their derivative by central differences of softmax heads), "exact".
        norm: "finite-difference" (one-sided, as in the paper), "central" differences, or "exact".
        activation: "finite-difference" (one-sided) or "exact".
        gains: whether gains of LayerNorms are trained; offsets always are.
        step: of one-sided differences. The paper has 1e-3, which truncates by up to 1e-3 of a
            parameter's update; a smaller one loses as much to rounding in float32.
        central: of central differences of attention, a tenth of it of those of norms; both go
            along directions of unit size, so that gradients of any size have the same digits.

    Raises:
        ValueError: another way, or a step that is not above 0.
    """

    attention: str = "exact"
    norm: str = "exact"
    activation: str = "exact"
    gains: bool = True
    step: float = 7e-4
    central: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTION),
            ("norm", NORM),
            ("activation", ACTIVATION),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {allowed}")
        if not isinstance(self.gains, bool):
            raise ValueError(f"gains is {self.gains!r}, must be True or False")
        for name in ("step", "central"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and 0 < value < np.inf):
                raise ValueError(f"{name} is {value!r}, must be finite and above 0")


#: The ways back by name; "paper" is that of Panigrahi et al.
MODES = {
    "paper": Backward("value-only", "finite-difference", "finite-difference", False),
    "finite-difference": Backward("finite-difference", "central", "finite-difference"),
    "exact": Backward(),
}
