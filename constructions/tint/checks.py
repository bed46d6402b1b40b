"""Settings and inputs that TinT takes; ValueError for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from constructions.tint.auxiliary import DecoderShape
from constructions.tint.backward import MODES, Backward


def check_mode(mode: Any) -> None:
    """A name in `MODES`, a `Backward`, or a mapping with some of its fields."""
    known = isinstance(mode, str) and mode in MODES
    names = [f.name for f in fields(Backward)]
    if isinstance(mode, Mapping):
        known = set(mode) <= set(names)
    if not (known or isinstance(mode, Backward)):
        raise ValueError(
            f"mode is {mode!r}, must be one of {list(MODES)}, a Backward, or some of its fields, "
            f"{', '.join(names)}"
        )


def check_numbers(
    shape: DecoderShape, *, steps: int, stack: int, shards: int, learning_rate: float
) -> None:
    """The numbers of a `Tint` whose auxiliary model has this shape."""
    for name, value in (("steps", steps), ("stack", stack), ("shards", shards)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, must be a whole number of at least 1")
    width, hidden = shape.width, shape.hidden
    fits = [n for n in range(1, width + 1) if width % n == 0 == hidden % (width // n)]
    if stack not in fits:
        raise ValueError(
            f"stack is {stack}, must divide the auxiliary's width, {width}, into tokens that its "
            f"{hidden} hidden units fill as well: {' or '.join(map(str, fits))}"
        )
    if shards > shape.width:
        raise ValueError(f"shards is {shards}, must be at most the width, {shape.width}")
    if not (np.isfinite(learning_rate) and learning_rate):
        raise ValueError(f"learning_rate is {learning_rate!r}, must be finite and not 0")


def check_texts(shape: DecoderShape, tokens: Any, train_mask: Any) -> None:
    """`[batch, time]` numbers of words, and as many marks of what is trained on.

    Of traced arrays the shapes only. The batch may be empty.
    """
    if (
        len(tokens.shape) != 2
        or not jnp.issubdtype(tokens.dtype, np.integer)
        or not tokens.shape[1]
    ):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, must be [batch, time] "
            "integers"
        )
    if tokens.shape[1] > shape.positions:
        raise ValueError(f"tokens has {tokens.shape[1]} positions, the auxiliary {shape.positions}")
    if not isinstance(tokens, Tracer) and len(tokens):
        tokens = np.asarray(tokens)
        if tokens.min() < 0 or tokens.max() >= shape.words:
            raise ValueError(
                f"tokens are {tokens.min()} to {tokens.max()}, must be 0 to {shape.words - 1}"
            )
    if train_mask.shape != tokens.shape:
        raise ValueError(
            f"train_mask has shape {train_mask.shape}, must be that of tokens, {tokens.shape}"
        )
    if not isinstance(train_mask, Tracer) and not np.isin(np.asarray(train_mask), (0, 1)).all():
        raise ValueError("train_mask must be 0 or 1 (or bool) everywhere")
