r"""What the mesa constructions share: raw states in, a prediction of the next state at each out.

Token t of the raw sequence holds s_t alone; what is predicted from what must first be bound into
one token. A softmax head copies the previous state,

    query  sharpness R_{-1} p_t,   key  p_t,   value  s_t,    written to z_t = s_{t-1},

where p_t are sines and cosines of t at several frequencies and R_{-1} turns each pair back by one
step, so that the score of t and j is sharpness sum_f cos(w_f (t - 1 - j)), largest at j = t - 1. A
first token BOS whose state is 0 is what t = 1 finds; without it s_1 would be paired with itself.
(von Oswald et al. 2023, arXiv 2309.05858: trained models build the same tokens, section 4.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from constructions.claims import NearMiss
from constructions.core.program import CAUSAL, SELF, Head, Layer, Program
from constructions.core.slots import Slot, Slots, constant
from constructions.family import Construction, Counterpart, Gauge, Place, Tokens
from constructions.inputs import Input
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.dynamics import LinearDynamics, States

#: Token groups.
BOS, STATE = GROUPS = ("bos", "state")
TOKENS = ("raw", "constructed")
#: Sines and cosines of the positional code, and the base of its frequencies: its wave lengths over
#: 2 pi go from 1 to BASE^(38/40).
CODE, BASE = 40, 1e4
#: Least lead of the copied token's score over any other: each gets at most exp(-GAP) of its weight.
GAP = 45.0
#: Bound on the stream of deep linear attention, that of von Oswald et al. 2023.
CLIP = 4.0
#: Largest state: what is made of two of them, and sums of that, is still a number in float32.
LARGEST = 1e15


@dataclass(frozen=True)
class NextState(Construction):
    """A construction that predicts the next state at every state of a sequence.

    Attributes:
        dim: of the states.
        length: states of the longest sequence, and of the task's.
        tokens: "raw": a token holds its state, and a first layer binds it to the one before;
            "constructed": the embedding puts both there, as the paper does for its linear models.
        noise: of the task, the standard deviation of each coordinate at every step.
    """

    dim: int = 10
    length: int = 50
    tokens: str = "raw"
    noise: float = 0.01

    def __post_init__(self) -> None:
        self.whole("dim", "length")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens is {self.tokens!r}, must be one of {TOKENS}")
        _ = self.task  # checks its numbers

    @property
    def task(self) -> LinearDynamics:
        """Linear systems with orthogonal laws."""
        return LinearDynamics(self.dim, self.length, self.noise)

    @property
    def arguments(self) -> tuple[Input, ...]:
        """Sequences of states, `[batch, time, dim]`, time from 1 to `length`.

        Entry t of the predictions, `[batch, time, dim]`, is of state t + 1, from those up to t.
        """
        return (Input("states", ("batch", "time", self.dim), least=0),)

    def check(self, *inputs: Any) -> None:
        """As the base class has it, and lengths that there are position codes for."""
        super().check(*inputs)
        shape = jnp.shape(inputs[0])
        if not 1 <= shape[1] <= self.length:
            raise ValueError(
                f"states has shape {shape}, must be [batch, time, {self.dim}] with time from 1 to "
                f"{self.length}, the construction's length"
            )
        if isinstance(inputs[0], Tracer):
            return
        largest = float(np.max(np.abs(np.asarray(inputs[0], np.float64)), initial=0.0))
        if largest > LARGEST:
            raise ValueError(
                f"states has {largest:.3g}, every entry must be from -{LARGEST:.0e} to "
                f"{LARGEST:.0e}"
            )

    def context_size(self, *inputs: Any) -> int:
        """All states but the last."""
        return inputs[0].shape[1] - 1

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The sequence of these states and the last one; zeros follow, which no answer sees."""
        (states,) = inputs
        left = states[:, np.append(np.asarray(kept, int), states.shape[1] - 1)]
        return (jnp.pad(left, [(0, 0), (0, states.shape[1] - left.shape[1]), (0, 0)]),)

    def outside_context(
        self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any
    ) -> Any:
        """What is predicted from the last state, `[batch, dim]`."""
        del inputs
        return prediction[:, len(kept)]

    def embed(self, states: States) -> list[Tokens]:
        """BOS, then a token a state; constructed tokens need no BOS, the first has z = 0."""
        if self.tokens == "constructed":
            return [Tokens(STATE, {"state": states, "previous": shifted(states)}, read=True)]
        code = jnp.asarray(positional_code(states.shape[1] + 1), states.dtype)[None]
        return [
            Tokens(BOS, {"code": code[:, :1]}),
            Tokens(STATE, {"state": states, "code": code[:, 1:]}, read=True),
        ]

    def gauge(self) -> Gauge:
        """Only predictions are read; constructed tokens hold s_t and s_{t-1}, 0 elsewhere."""
        slots = self.program.slots
        read = slots["prediction"]
        if self.tokens == "raw":
            return Gauge(read.matrix(slots.width), np.eye(slots.width))
        state, previous = np.split(np.eye(2 * self.dim), 2)
        return Gauge.of(slots, 1.0 * read, self._entering(state, previous))

    def _entering(self, state: np.ndarray, previous: np.ndarray) -> dict[str, np.ndarray]:
        """What the slots of constructed tokens hold of s_t and s_{t-1}."""
        return {"state": state, "previous": previous}

    def at_states(self, time: int) -> range:
        """Numbers of the tokens that hold states."""
        raw = self.tokens == "raw"
        return range(raw, time + raw)

    def places(self, depth: int, states: States) -> dict[str, Place]:
        """Slots of the tokens that hold states."""
        tokens = self.at_states(states.shape[1])
        return {name: Place.of(name, tokens, depth) for name in ("previous", "prediction")}

    def wide_counterpart(self, recipe: Recipe, quick: Recipe) -> Counterpart:
        """The same layers in `trained_shape`, with the same masks."""
        base = self.in_trained_shape()
        std = 0.1 if base.config.clip is None else 0.05  # deep linear attention starts small
        return Counterpart(self.random_weights(std, base), self.task, recipe, quick=quick)

    def slots(self) -> tuple[Slots, int]:
        """Slots of states, their predecessors and predictions; and the first layer that is free."""
        slots, first = Slots(), 2 if self.tokens == "raw" else 1
        slots.add("state", self.dim, meaning="s_t")
        if self.tokens == "raw":
            slots.add("code", CODE, meaning="p_t")
        slots.add("previous", self.dim, token_groups=STATE, born=first - 1, meaning="z_t = s_{t-1}")
        slots.add(
            "prediction",
            self.dim,
            token_groups=STATE,
            born=first,
            accumulates=True,
            meaning="of s_{t+1}",
        )
        return slots, first

    def one_law(self) -> NearMiss:
        """Predicts by a law in its weights and learns nothing from the sequence.

        What training on sequences with a single law ends in: the negative control.
        """
        slots, first = self.program.slots, self.slots()[1]
        law = np.asarray(jax.random.orthogonal(jax.random.key(0), self.dim), float)
        one, write = constant(1.0), {slots["prediction"]: 1.0}
        head = Head(one, one, law @ slots["state"], write, window=SELF, queries=STATE, keys=STATE)
        layers = [Layer([self.binding(slots)])] if first > 1 else []
        program = Program(slots, [*layers, Layer([head])], token_groups=GROUPS)
        return self.near_miss(program)

    def binding(self, slots: Slots) -> Head:
        """The head that copies the state before."""
        code = slots["code"]
        return Head(
            query=sharpness(self.length + 1) * (turned_back() @ code),
            key=code,
            value=slots["state"],
            write={slots["previous"]: 1.0},
            mixer="softmax",
            window=CAUSAL,
            queries=STATE,
            name="previous state",
        )


def shifted(states: States) -> States:
    """The state before each, 0 before the first."""
    return jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def causal_sums(value: Array, key: Array) -> Array:
    """sum_{u<=t} v_u k_u^T at every time, `[batch, time, value dim, key dim]`."""
    return jnp.cumsum(value[..., :, None] * key[..., None, :], axis=1)


def copy(source: Slot, target: Slot) -> Head:
    """A value of each token, copied within the token."""
    one = constant(1.0)
    name = f"copy to {target.name}"
    return Head(one, one, source, {target: 1.0}, window=SELF, queries=STATE, keys=STATE, name=name)


def frequencies() -> np.ndarray:
    """w_f, `[CODE / 2]`."""
    return BASE ** (-2 * np.arange(CODE // 2) / CODE)


def positional_code(tokens: int) -> np.ndarray:
    """p_t of tokens 0, 1, .., `[tokens, CODE]`: sines, then cosines."""
    angles = np.arange(tokens)[:, None] * frequencies()
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def turned_back() -> np.ndarray:
    """R_{-1} with R_{-1} p_t = p_{t-1}, `[CODE, CODE]`."""
    cos, sin = np.diag(np.cos(frequencies())), np.diag(np.sin(frequencies()))
    return np.block([[cos, -sin], [sin, cos]])


def sharpness(tokens: int) -> float:
    """Factor on the scores that sets the right key apart from every other by `GAP`."""
    offsets = np.array([-1, *range(1, tokens)])[:, None]  # of the key that is looked for
    return GAP / float((1 - np.cos(offsets * frequencies())).sum(1).min())
