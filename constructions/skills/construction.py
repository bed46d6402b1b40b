r"""Skills that a text names are applied one after the other, by one looped layer.

The algorithm, on a state x_0 and words w_1 .. w_T, with the maps M of `synthetic.tasks.skills`:

    x_t = M_{w_t} x_{t-1},    prediction x_T.

The construction (the equations are ours). Token 0 holds the state, token t the code of word t. In
every loop each word looks at the token before it and applies its own skill to what that holds: a
head copies, another erases what was there, and a gated MLP selects the map,

    value_t  =  sum_s [w_t = s] M_s value_{t-1},    hidden M_s incoming,  gate the code of s,

so that token t is right from loop t on. The same weights serve every skill at every place. Entries
are -1, 0 and 1, so that no floating point type rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from constructions.claims import Claim, NearMiss
from constructions.core.program import Head, Layer, Mlp, Program, erase
from constructions.core.slots import Slots, constant
from constructions.family import Construction, Counterpart, Place, Tokens
from constructions.inputs import INTEGERS, Input
from constructions.measurement import Measurement
from constructions.skills.paper import CLAIMS, MIX
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.skills import SkillTask

State: TypeAlias = Float[Array, "batch dim"]
Text: TypeAlias = Int[Array, "batch word"]


@dataclass(frozen=True)
class SkillComposition(Construction):
    """The skills that a text names, in order, in as many loops as the text has words.

    Attributes:
        dim, skills, named, slots, shown, seed: of the task, `synthetic.tasks.skills`; the
            counterpart is trained on the tuples that are shown.

    Raises:
        ValueError: a setting out of range, named.
    """

    dim: int = 4
    skills: int = 8
    named: int = 2
    slots: int = 2
    shown: float | int = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.task  # which has checks of its own

    @property
    def task(self) -> SkillTask:
        """All tuples, shown or held out."""
        sizes = self.dim, self.skills, self.named, self.slots
        return SkillTask(*sizes, self.shown, seed=self.seed)

    @property
    def arguments(self) -> tuple[Input, ...]:
        """State `[batch, dim]`, text `[batch, slots]` in 0..N; prediction `[batch, dim]`."""
        text = Input("text", ("batch", self.slots), INTEGERS, self.skills + 1)
        return Input("state", ("batch", self.dim)), text

    @property
    def program(self) -> Program:
        """Copy from the token before, erase, apply the skill; looped."""
        return self._program(self.task.maps)

    def _program(self, maps: np.ndarray) -> Program:
        slots, words, one = Slots(), len(maps), constant(1.0)
        value = slots.add("value", self.dim, accumulates=True, meaning="x_t")
        incoming = slots.add(
            "incoming", self.dim, token_groups="word", accumulates=True, meaning="x_{t-1}"
        )
        code = slots.add("code", words, token_groups="word", meaning="w_t, one-hot")
        copy = Head(one, one, value, {incoming: 1.0}, window=(-1, -1), queries="word", name="copy")
        clear = replace(erase(value, queries="word"), keys=("word",))
        apply = Mlp(
            hidden=maps.reshape(-1, self.dim) @ incoming,
            gate=np.repeat(np.eye(words), self.dim, 0) @ code,
            write={value: np.tile(np.eye(self.dim), words)},
            activation="identity",
            token_groups="word",
            name="skill",
        )
        layer = Layer([copy, erase(incoming), clear], apply)
        return Program(slots, [layer], loops=self.slots, token_groups=("state", "word"))

    def trace(self, state: State, text: Text) -> dict[str, Array]:
        """The algorithm: `state` x_0 .. x_T, `[batch, time, dim]`, and `prediction` x_T."""
        state, text = self.given(0.0, state, text)
        found = self.task.states(state, text)
        return {"state": found, "prediction": found[:, -1]}

    def embed(self, state: State, text: Text) -> list[Tokens]:
        """The state, then a token for each word."""
        code = {"code": jax.nn.one_hot(text, self.skills + 1, dtype=state.dtype)}
        return [Tokens("state", {"value": state[:, None]}), Tokens("word", code, read=True)]

    def places(self, depth: int, state: State, text: Text) -> dict[str, Place]:
        """x_t stands in token t from loop t on; the prediction in the last token."""
        time, last = np.arange(self.slots + 1), np.asarray(self.slots)
        return {
            "state": Place("value", time, np.minimum(time, depth)),
            "prediction": Place("value", last, np.asarray(depth)),
        }

    def counterpart(self) -> Counterpart:
        """The same looped layer, its heads as narrow, trained on the tuples that are shown."""
        recipe = Recipe(6000, 128, learning_rate=5e-3, schedule="cosine", warmup=100, clip=1.0)
        shown = replace(self.task, which="shown")
        quick = replace(recipe, steps=3000, batch=64)
        return Counterpart(self.random_weights(0.3), shown, recipe, quick=quick)

    def near_misses(self) -> dict[str, NearMiss]:
        """Two skills exchanged, two models that do not compose, and one that knows no order."""
        order = [1, 0, *range(2, self.skills + 1)]
        return {
            "skills exchanged": self.near_miss(self._program(self.task.maps[order])),
            "by heart": NearMiss(self.task.by_heart, self),
            "random table": NearMiss(replace(self.task, shown=0).by_heart, self),
            "bag of skills": NearMiss(self._by_number, self),
        }

    def _by_number(self, state: State, text: Text) -> Array:
        """What follows if the text were sorted: which skills it names, without their order."""
        return self.task.states(state, jnp.sort(text, axis=-1))[:, -1]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Statements about models trained on a share of the pairs."""
        return CLAIMS if (self.named, self.slots) == (2, 2) and 0 < self.shown < 1 else ()


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement]:
    """What is known by heart, beside its closed form."""
    c, batch = SkillComposition(), 2**12 if quick else 2**16
    inputs = c.task.sample(jax.random.key(seed), batch)
    right = np.asarray(c.task.accuracy(c.task.by_heart(*inputs.inputs), inputs), float)
    chance, cells = 2.0**-c.dim, 2**c.dim * c.skills**c.named  # the random table has so many
    table = (1 - float(c.shown)) * chance * (1 - chance) / cells
    yield Measurement(
        "accuracy of pairs by heart",
        "A model that does not compose is right on what it was shown, and by chance.",
        f"{MIX}; the closed form is ours",
        c.task.known_by_heart,
        float(right.mean()),
        float(np.sqrt(right.var() / batch + table)),
        tolerance=0.0,
        note="Published: the share of pairs that is shown, and a guess at the others.",
    )
