"""Families by name and their settings as plain data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from constructions import CATALOGUE
from constructions.family import Construction, Family


def construct(name: str, settings: Mapping[str, Any] | None = None) -> Construction:
    """The construction of a family: its example settings, with these in their place.

    Raises:
        ValueError: unknown family or setting, or a setting out of range.
    """
    return construct_exactly(name, {**family_of(name).example(), **(settings or {})})


def family_of(name: str) -> Family:
    """The family of that name; ValueError lists the known ones."""
    if name not in CATALOGUE:
        raise ValueError(f"unknown family {name!r}, must be one of {', '.join(sorted(CATALOGUE))}")
    return CATALOGUE[name]


def construct_exactly(name: str, settings: Mapping[str, Any]) -> Construction:
    """The construction with these settings and no others; errors as in `construct`."""
    family = family_of(name)
    known = inspect.signature(family.construct).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for setting in settings:
        if setting not in known and not free:
            raise ValueError(
                f"unknown setting {setting!r} of {name}, must be one of {', '.join(known)}"
            )
    try:
        return family(**settings)
    except TypeError as error:  # a string where a number is wanted, say
        raise ValueError(f"settings {dict(settings)} of {name}: {error}") from error


def plain_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: arrays and tuples become lists."""

    def one(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return np.asarray(value).tolist()
        raise ValueError(f"settings of {name}: {value!r} cannot be written as JSON")

    return json.loads(json.dumps(dict(settings), default=one, allow_nan=False))
