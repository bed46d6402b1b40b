"""The families of subjects: cheap settings, inputs, and models trained until they match."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions import CATALOGUE
from constructions.core.canonical import canonical_distance
from constructions.core.compile import compile_program, config_of
from constructions.core.config import Config
from constructions.core.embedding import Place
from constructions.core.program import Program
from constructions.core.slots import Slot
from constructions.core.transformer import Transformer, randomise
from constructions.core.weights import Part
from constructions.family import Construction
from constructions.gradient_descent.memory_token import MemoryToken
from constructions.inside_outside.construction import InsideOutside
from probes.bench.disguises import (
    FAR,
    unrolled,
    with_backup,
    with_distractors,
    with_shared_heads,
    with_sharp_heads,
)
from synthetic.compilation import compile_once
from synthetic.fitting.train import fit
from synthetic.grammar.grammar import Grammar

#: A grammar with few symbols: every nonterminal is a head in every layer.
_GRAMMAR = """
%start S
S -> S S [0.25] | 'a' S [0.2] | 'b' S [0.15] | 'a' [0.15] | 'b' [0.1] | 'c' [0.15]
"""
#: Family -> settings that are cheap. All contexts of memory-token are of the new task and all
#: sentences of inside-outside of one length, so that tokens are of the same kinds on every input.
#: Not there is tint: 28 layers and 76 slots are thousands of places in a stream of 323 columns, and
#: its norms see the basis.
FAMILIES: dict[str, dict[str, Any]] = {
    "gradient-descent": {"dim_x": 3, "dim_y": 1, "num_examples": 6, "steps": 2, "step_size": 0.6},
    "gd-plus-plus": {},
    "memory-token": {"dim_x": 3, "num_examples": 6},
    "hedge": {},
    "separate-tokens": {},
    "kernel-descent": {},
    "noisy-regression": {},
    "mesa-ridge": {"dim": 3, "length": 8, "tokens": "constructed"},
    "mesa-polynomial": {
        "dim": 3, "length": 8, "tokens": "constructed", "coefficients": (0.2, -0.02),
    },
    "hyper-gradient": {},
    "hyper-prototypes": {},
    "hyper-semi-supervised": {},
    "skill-composition": {},
    "inside-outside": {"grammar": Grammar.from_text(_GRAMMAR), "max_length": 3, "masking": 0.3},
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Family:
    """What all disguises of a family share: its program, and a shape with room for all but one."""

    construction: Construction
    program: Program
    main: Slot
    config: Config

    def inputs(self, key: Array, batch: int) -> tuple[Any, ...]:
        """Inputs of the task, tokens of the same kinds on each."""
        sample = compile_once(self.construction.sample, static_argnums=1)
        if isinstance(self.construction, MemoryToken):
            return *sample(key, batch)[:3], jnp.ones(batch, bool)
        if isinstance(self.construction, InsideOutside):
            tokens, lengths, mask = (np.asarray(a) for a in sample(key, 64 * batch))
            kept = np.flatnonzero(lengths == tokens.shape[1])[:batch]
            if len(kept) < batch:
                longest = f"{len(kept)} of {len(tokens)} sentences have {tokens.shape[1]} words"
                raise ValueError(f"batch is {batch}: {longest}")
            return tuple(jnp.asarray(a[kept]) for a in (tokens, lengths, mask))
        return sample(key, batch)

    def place(self, *inputs: Any) -> Place:
        """Where the prediction is read; of inside-outside, what is around each word."""
        places = self.construction.places(self.program.depth, *inputs)
        return places["prediction" if "prediction" in places else "around"]


@lru_cache(maxsize=32)
def base_of(family: str, trained: bool = False) -> Family:
    """Its program and shape; of what is trained, without room for distractors."""
    entry = CATALOGUE.find(family)
    chosen = TRAINED[family] if trained else {}
    construction = entry(**(entry.example() | FAMILIES.get(family, {}) | chosen))
    program = unrolled(construction.program)
    if trained:
        config = config_of(with_shared_heads(with_shared_heads(program)))
        return Family(construction, program, program.slots["y"], config)
    inputs = construction.sample(jax.random.key(0), 2)
    places = construction.places(program.depth, *inputs)
    slot = places["prediction" if "prediction" in places else "around"].slot
    # the input that varies most obviously: the widest slot that the embedding writes
    born = [s for s in program.slots if s.born == 0 and s.name != slot]
    main = max(born or list(program.slots), key=lambda s: (s.name in _INPUTS, s.size))
    return Family(
        construction, program, main, config_of(with_shared_heads(with_distractors(program, main)))
    )


_INPUTS = ("x", "features", "previous", "value", "content")
#: Families whose trained heads match the construction, and the settings with which they do.
TRAINED: dict[str, dict[str, Any]] = {"gradient-descent": {"steps": 1, "step_size": None}}


def supports(family: str, disguise: str) -> str:
    """Why a family has no subject in this disguise, in one phrase; "" where it has one."""
    if disguise == "backup" and with_backup(base_of(family).program) is None:
        return "every layer with heads has an MLP already"
    if disguise == "sharp" and with_sharp_heads(base_of(family).program) is None:
        return "no head has a softmax"
    if disguise == "trained" and family not in TRAINED:
        return "its weights, trained, are not known to match"
    return ""


@lru_cache(maxsize=64)
def trained(family: Family, seed: int) -> tuple[Transformer, dict[str, float]]:
    """The construction's heads trained from random weights, those that are zero being left so.

    A head of zeros has no gradient. The model, and its "distance" (`canonical_distance`).

    ValueError where the fit ends further than `FAR` from the construction.
    """
    construction = family.construction
    clean = compile_program(family.program, config=family.config)

    def drawn(key: Array) -> Transformer:
        random = iter(randomise(clean, key, 0.2).parts())

        def of_busy_heads(part: Part) -> dict[str, Array]:
            other, new = next(random), dict(part.weights)
            if part.kind == "heads":
                busy = np.any(np.asarray(part.weights["output"]), (2, 3))[:, :, None, None]
                for name in ("query", "key", "value", "output"):
                    new[name] = other.weights[name] * busy
            return new

        return clean.map_parts(of_busy_heads)

    counterpart = construction.counterpart()
    model = fit(
        drawn, counterpart.task, counterpart.quick, predict=construction.apply, seed=seed
    ).model
    distance = float(canonical_distance(model, clean, construction.gauge()))
    if distance > FAR:
        raise ValueError(f"trained with seed {seed}, it is {distance:.2g} away, at most {FAR}")
    return model, {"distance": distance}
