r"""The mesa-layer: ridge regression on the sequence so far, as one head.

From states up to t, with z_u = s_{u-1} and z_1 = 0, the next state is predicted by

    W_t  =  argmin_W  sum_{u<=t} |s_u - W z_u|^2 + rho |W|^2  =  G_t (H_t + rho I)^-1,
    G_t = sum_{u<=t} s_u z_u^T,     H_t = sum_{u<=t} z_u z_u^T,

and a mesa head with query s_t, key z_t and value s_t writes W_t s_t (von Oswald et al. 2023, arXiv
2309.05858, eq. 4-6, whose lambda is 1 / rho).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from constructions.certificate import LARGEST_TOLERANCE
from constructions.claims import Claim, NearMiss
from constructions.compiler import compile_program
from constructions.config import Config
from constructions.family import Counterpart
from constructions.mesa.claims import ONE_LAW, RIDGE_CLAIMS
from constructions.mesa.polynomial import best_coefficients
from constructions.mesa.tokens import (
    GROUPS,
    STATE,
    NextState,
    causal_sums,
    shifted,
    wide_config,
    wide_counterpart,
)
from constructions.program import CAUSAL, Head, Layer, Program
from constructions.regression import finite_number
from synthetic.dynamics import States
from synthetic.recipe import Recipe


@dataclass(frozen=True)
class MesaRidge(NextState):
    """In-context ridge regression from every state to the next, by one mesa head.

    Attributes:
        regularization: rho, above 0; noise^2 is the best for entries of W from N(0, 1), dim noise^2
            for orthogonal W.
    """

    regularization: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if finite_number("regularization", self.regularization) <= 0:
            raise ValueError(f"regularization is {self.regularization!r}, must be above 0")

    @property
    def program(self) -> Program:
        """A layer that binds each state to the one before, and the mesa layer."""
        return self._program()

    def _program(
        self, key: str = "previous", step: float | None = None, bos: bool = True
    ) -> Program:
        """With another key, a gradient step of this size, or nothing before the first state."""
        slots, _ = self.slots()
        state, ridge = slots["state"], float(self.regularization)
        last = Head(
            query=state,
            key=slots[key],
            value=state,
            write={slots["prediction"]: step or 1.0},
            mixer="linear" if step else "mesa",
            regularization=None if step else ridge,
            window=CAUSAL,
            queries=STATE,
            keys=STATE,
            name="ridge regression",
        )
        layers = [Layer([last], name="mesa")]
        if self.tokens == "raw":
            binding = self.binding(slots)
            binding = binding if bos else replace(binding, keys=STATE)
            layers.insert(0, Layer([binding], name="binding"))
        return Program(slots, layers, token_groups=GROUPS)

    def trace(self, states: States) -> dict[str, Array]:
        """The algorithm; states `[batch, time, dim]`.

        Returns:
            previous: z_t, `[batch, time, dim]`.
            prediction: W_t s_t, `[batch, time, dim]`.
        """
        previous = shifted(states)
        prediction = ridge_predictions(states, previous, states, self.regularization)
        return {"previous": previous, "prediction": prediction}

    def counterpart(self) -> Counterpart:
        """The same layers with heads as wide as the stream; regularisation starts at 1."""
        recipe = Recipe(
            steps=3000, batch=256, learning_rate=5e-3, schedule="cosine", warmup=100, clip=1.0
        )
        return wide_counterpart(self, recipe, quick=replace(recipe, steps=1500, batch=128))

    def conditions(self, dtype: str) -> str:
        """The regularisation, and the one that would do."""
        enough = self.regularization * self.tolerance(dtype) / LARGEST_TOLERANCE
        return f"regularization is {self.regularization:g}, at least {enough:.1g} is needed"

    def near_misses(self) -> dict[str, NearMiss]:
        """Ridge regression on the wrong pairs, or with the wrong regularisation, or none of it."""

        def of(program: Program, config: Config | None = None) -> NearMiss:
            return NearMiss(compile_program(program, config=config), self)

        wide = wide_config(self.program)  # shared with the counterpart, and its compilations
        heavy = replace(self, regularization=1e3 * self.regularization)
        (step,) = best_coefficients(self.task, 0, jax.random.key(0), 2**11)
        found = {
            "regularization x 1000": of(heavy.program, wide),
            "one gradient step": of(self._program(step=step)),
            "pairs a state with itself": of(self._program(key="state"), wide),
            ONE_LAW: self.one_law(),
        }
        if self.tokens == "raw":
            found["no BOS"] = of(self._program(bos=False), wide)
        return found

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Those on constructed tokens; from raw ones the published models are deeper."""
        return RIDGE_CLAIMS if self.tokens == "constructed" else ()

    def tolerance(self, dtype: str) -> float:
        """Rounding times an estimate of the condition of H_t + rho I, by the mean of tr H_t."""
        condition = 1 + self.length * self.dim / (3 * self.regularization)
        return float(jnp.finfo(dtype).eps) * condition


def ridge_predictions(query: Array, key: Array, value: Array, regularization: float) -> Array:
    """(sum v k^T) (sum k k^T + rho I)^-1 q at every time, each system solved by itself."""
    solved = preconditioned(query, key, regularization)
    return jnp.matmul(causal_sums(value, key), solved[..., None], precision="highest")[..., 0]


def preconditioned(query: Array, key: Array, regularization: float) -> Array:
    """(sum k k^T + rho I)^-1 q at every time, `[batch, time, dim]`."""
    gram = causal_sums(key, key) + regularization * jnp.eye(key.shape[-1], dtype=key.dtype)
    return jnp.linalg.solve(gram, query[..., None])[..., 0]
