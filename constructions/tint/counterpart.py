"""What TinT is beside: itself, trained further, and simulators that are nearly right."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array

from constructions.claims import NearMiss
from constructions.compiler import compile_program
from constructions.family import Counterpart
from constructions.tint.claims import alignment
from constructions.transformer import Transformer, randomise
from synthetic.train import Recipe

if TYPE_CHECKING:
    from constructions.tint.construction import Tint

# each entry of a hand-built stack of dozens of layers moves all that is behind it
RECIPE = Recipe(
    steps=600,
    batch=16,
    learning_rate=1e-6,
    schedule="cosine",
    warmup=20,
    clip=1.0,
    chunk=50,
)
QUICK = replace(RECIPE, steps=60, batch=8, chunk=20)


def counterpart(c: Tint) -> Counterpart:
    """`Tint.counterpart` where its weights are dense."""
    base = c.compile().model
    std = base.config.width**-0.5
    inputs = c.task.sample(jax.random.key(2**20), 32).inputs
    wanted = jax.jit(c.trace)(*inputs)

    def measure(model: Transformer) -> dict[str, Array]:
        return alignment(c.read(model, *inputs), wanted)._asdict()

    return Counterpart(
        lambda key: base,
        c.task,
        RECIPE,
        metrics=measure,
        quick=QUICK,
        random=lambda key: randomise(base, key, std),
    )


def near_misses(c: Tint) -> dict[str, NearMiss]:
    """`Tint.near_misses` where its weights are dense."""

    def other(**changes: Any) -> NearMiss:
        return NearMiss(replace(c, **changes).compile().model, c)

    def without(*names: str) -> NearMiss:
        """No head whose name begins like this says anything."""
        layers = [
            replace(
                layer,
                heads=[
                    replace(head, write={slot: 0 * m for slot, m in head.write.items()})
                    if head.name.startswith(names)
                    else head
                    for head in layer.single_heads
                ],
            )
            for layer in c.program.layers
        ]
        return NearMiss(compile_program(replace(c.program, layers=layers)), c)

    return {
        "up the gradient": other(learning_rate=-c.learning_rate),
        "half the step": other(learning_rate=c.learning_rate / 2),
        "attention does not go back": without("d value", "d query", "d key"),
        "value-only attention": without("d query", "d key"),
    }
