"""What settings and arguments may be, said in one line where they are not. Imports no numpy."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def number(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    least: float | int | None = None,
    most: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
) -> Any:
    """A setting that is one number: an int (`whole`), else a float.

    Args:
        name, value: of the setting.
        whole: whether it must be an integer.
        least, most: the smallest and the largest value that are allowed.
        above, below: what all values must exceed, or stay below.

    Raises:
        ValueError: it is something else, NaN, infinite or out of range.
    """
    numbers: Any = Integral if whole else Real  # numpy's are registered as such
    right = isinstance(value, numbers) and not isinstance(value, bool)
    right = right and (whole or _finite(value))
    if right and not (
        (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        return int(value) if whole else float(value)
    if least is not None and most is not None:
        limits = [f"from {least} to {most}"]
    else:
        ends = ("of at least", least), ("above", above), ("at most", most), ("below", below)
        limits = [f"{word} {end}" for word, end in ends if end is not None]
    kind = "an integer" if whole else "a finite number"
    # a number that is out of range, and nothing else, needs no word on its kind
    bare = right and not whole and least is None and limits
    must = " and ".join(limits) if bare else " ".join([kind, " and ".join(limits)]).strip()
    raise ValueError(f"{name} is {value!r}, must be {must}")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
