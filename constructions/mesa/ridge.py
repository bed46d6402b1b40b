r"""The mesa-layer: ridge regression on the sequence so far, as one head.

From states up to t, with z_u = s_{u-1} and z_1 = 0, the next state is predicted by

    W_t  =  argmin_W  sum_{u<=t} |s_u - W z_u|^2 + rho |W|^2  =  G_t (H_t + rho I)^-1,
    G_t = sum_{u<=t} s_u z_u^T,     H_t = sum_{u<=t} z_u z_u^T,

and a mesa head with query s_t, key z_t and value s_t writes W_t s_t (von Oswald et al. 2023, arXiv
2309.05858, eq. 4-6, whose lambda is 1 / rho).

Behind an MLP the same head does it on features of the states. Where s_{t+1} = W phi(s_t) with a
known map phi (`synthetic.tasks.dynamics`), the next state is predicted by

    W_t  =  argmin_W  sum_{u<=t} |s_u - W psi_u|^2 + rho |W|^2,     psi_u = phi(s_{u-1}), psi_1 = 0,

and W_t phi(s_t). Layer 1 has the network of phi as its MLP, the norm of layer 2 divides by its
length, the head of layer 2 copies the features of the token before (`tokens`), and a mesa head with
query phi(s_t), key psi_t and value s_t writes the prediction. (The paper compares deep transformers
on nonlinear dynamics with this.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

from constructions.claims import Claim, NearMiss
from constructions.core.program import CAUSAL, Head, Layer, Mlp, Norm, Program
from constructions.core.slots import Slots
from constructions.family import Counterpart, Place
from constructions.mesa.paper import COPY, ONE_LAW, RIDGE_CLAIMS, last_state
from constructions.mesa.polynomial import best_coefficients
from constructions.mesa.tokens import (
    CODE,
    GROUPS,
    STATE,
    NextState,
    causal_sums,
    shifted,
)
from synthetic.compilation import compile_once
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.dynamics import EPS, NonlinearDynamics, States

#: Errors of ridge regression that count as rounding, in parts of the root mean square.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


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
        self.finite("regularization", above=0)

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
        return self.wide_counterpart(recipe, quick=replace(recipe, steps=900, batch=128))

    def near_misses(self) -> dict[str, NearMiss]:
        """Ridge regression on the wrong pairs, or with the wrong regularisation, or none of it."""

        wide = self.trained_shape  # the counterpart's, whose compilations they share
        heavy = replace(self, regularization=1e3 * self.regularization)
        (step,) = best_coefficients(self.task, 0, jax.random.key(0), 2**11)
        found = {
            "regularization x 1000": self.near_miss(heavy, wide),
            "one gradient step": self.near_miss(self._program(step=step)),
            "pairs a state with itself": self.near_miss(self._program(key="state"), wide),
            ONE_LAW: self.one_law(),
            COPY: NearMiss(last_state, self),
        }
        if self.tokens == "raw":
            found["no BOS"] = self.near_miss(self._program(bos=False), wide)
        return found

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Those on constructed tokens; from raw ones the published models are deeper."""
        return RIDGE_CLAIMS if self.tokens == "constructed" else ()

    def tolerance(self, dtype: str) -> float:
        """What `mesa` promises of its output, at any regularization."""
        del self
        return TOLERANCE[dtype]


@compile_once
def ridge_predictions(
    query: Array, key: Array, value: Array, regularization: float | Array
) -> Array:
    """(sum v k^T) (sum k k^T + rho I)^-1 q at every time, by orthogonal factors of the data.

    [K; sqrt(rho) I] = Q R and Z = Q^T [V; 0] give Z^T R^-T q. Products of the data with themselves
    would need twice the digits. The newest pair stands on top: large rows first.
    """
    batch, _, dim = key.shape
    root = jnp.broadcast_to(regularization**0.5 * jnp.eye(dim, dtype=key.dtype), (batch, dim, dim))
    rotated = jnp.zeros((batch, dim, value.shape[-1]), key.dtype)

    def step(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple:
        q, k, v = xs
        rows, values = (
            jnp.concatenate([x[:, None], y], 1) for x, y in zip((k, v), carry, strict=True)
        )
        orthogonal, root = jnp.linalg.qr(rows)
        rotated = jnp.matmul(orthogonal.mT, values, precision="highest")
        u = solve_triangular(root, q[..., None], trans=1)
        return (root, rotated), jnp.matmul(rotated.mT, u, precision="highest")[..., 0]

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    return jnp.moveaxis(lax.scan(step, (root, rotated), xs)[1], 0, 1)


def preconditioned(query: Array, key: Array, regularization: float) -> Array:
    """(sum k k^T + rho I)^-1 q at every time, `[batch, time, dim]`."""
    gram = causal_sums(key, key) + regularization * jnp.eye(key.shape[-1], dtype=key.dtype)
    return jnp.linalg.solve(gram, query[..., None])[..., 0]


@dataclass(frozen=True)
class MesaFeatures(NextState):
    """In-context ridge regression from features of every state to the next, by one mesa head.

    Attributes:
        dim, length, noise: as in `NextState`.
        tokens: "raw" is the only kind: a token holds its state.
        regularization: rho, above 0; dim noise^2 is the best for orthogonal W.
        hidden, scale, seed: of the network, as in `NonlinearDynamics`.

    Raises:
        ValueError: a setting out of range.
    """

    regularization: float = 1e-3
    hidden: int = 40
    scale: float = 1.1
    seed: int = 421

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens != "raw":
            raise ValueError(f"tokens is {self.tokens!r}, must be 'raw'")
        self.finite("regularization", above=0)

    @property
    def task(self) -> NonlinearDynamics:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Systems that are linear in the features."""
        return NonlinearDynamics(
            self.dim, self.length, self.noise, self.hidden, self.scale, seed=self.seed
        )

    @property
    def program(self) -> Program:
        """The network; its norm and the copy of the token before; the mesa layer."""
        return self._program()

    def _program(self, features: bool = True, bos: bool = True) -> Program:
        """With states in place of their features, or nothing before the first state."""
        slots = Slots()
        state = slots.add("state", self.dim, meaning="s_t")
        slots.add("code", CODE, meaning="p_t")
        # at all tokens: BOS holds the state 0, whose features are 0
        output = slots.add("output", self.dim, born=1, meaning="f(s_t)")
        normed = slots.add("features", self.dim, born=2, meaning="phi(s_t) sqrt(dim)")
        slots.add("previous", self.dim, token_groups=STATE, born=2, meaning="phi(s_{t-1})")
        slots.add("prediction", self.dim, token_groups=STATE, born=3, meaning="of s_{t+1}")
        read, write = self.task.network
        phi = self.dim**-0.5 * normed if features else 1.0 * state
        binding = replace(self.binding(slots), value=phi)
        ridge = Head(
            query=phi,
            key=slots["previous"],
            value=state,
            write={slots["prediction"]: 1.0},
            mixer="mesa",
            regularization=float(self.regularization),
            window=CAUSAL,
            queries=STATE,
            keys=STATE,
            name="ridge regression",
        )
        layers = [
            Layer(mlp=Mlp(read @ state, {output: write}, activation="gelu"), name="network"),
            Layer(
                [binding if bos else replace(binding, keys=STATE)],
                norm=Norm(output, normed, kind="rms", eps=EPS / self.dim),
                name="binding",
            ),
            Layer([ridge], name="mesa"),
        ]
        return Program(slots, layers, token_groups=GROUPS)

    def trace(self, states: States) -> dict[str, Array]:
        """The algorithm; states `[batch, time, dim]`.

        Returns:
            features: phi(s_t), `[batch, time, dim]`.
            previous: phi(s_{t-1}), 0 at first, `[batch, time, dim]`.
            prediction: W_t phi(s_t), `[batch, time, dim]`.
        """
        features = self.task.features(states)
        previous = shifted(features)
        prediction = ridge_predictions(features, previous, states, self.regularization)
        return {"features": features, "previous": previous, "prediction": prediction}

    def places(self, depth: int, states: States) -> dict[str, Place]:
        """Those of every model of next states, and the features, which the norm scales."""
        tokens = self.at_states(states.shape[1])
        features = Place.of("features", tokens, depth, scale=self.dim**-0.5)
        return super().places(depth, states) | {"features": features}

    def counterpart(self) -> Counterpart:
        """The same layers with heads as wide as the stream; regularisation starts at 1."""
        recipe = Recipe(
            steps=6000, batch=256, learning_rate=5e-3, schedule="cosine", warmup=100, clip=1.0
        )
        return self.wide_counterpart(recipe, quick=replace(recipe, steps=1500, batch=128))

    def near_misses(self) -> dict[str, NearMiss]:
        """Ridge regression on other features, with the wrong regularisation, or on a false pair."""
        heavy = replace(self, regularization=1e3 * self.regularization)
        programs = {
            "ridge on states": self._program(features=False),
            "features of another network": replace(self, seed=self.seed + 2).program,
            "regularization x 1000": heavy.program,
            "no BOS": self._program(bos=False),
        }
        # in the counterpart's shape, whose compilations they share
        return {n: self.near_miss(p, self.trained_shape) for n, p in programs.items()}

    def tolerance(self, dtype: str) -> float:
        """What `mesa` promises of its output, at any regularization."""
        del self
        return TOLERANCE[dtype]
