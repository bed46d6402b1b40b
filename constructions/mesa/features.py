r"""Ridge regression on features of the states: what one mesa head does behind an MLP.

Where s_{t+1} = W phi(s_t) with a known map phi (`synthetic.nonlinear_dynamics`), the next state is
predicted by

    W_t  =  argmin_W  sum_{u<=t} |s_u - W psi_u|^2 + rho |W|^2,     psi_u = phi(s_{u-1}), psi_1 = 0,

and W_t phi(s_t). Layer 1 has the network of phi as its MLP, the norm of layer 2 divides by its
length, the head of layer 2 copies the features of the token before (`tokens`), and a mesa head with
query phi(s_t), key psi_t and value s_t writes the prediction.

(von Oswald et al. 2023, arXiv 2309.05858: deep transformers on nonlinear dynamics are
compared with least squares on MLP*.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Array

from constructions.claims import NearMiss
from constructions.compiler import compile_program
from constructions.family import Counterpart, Place
from constructions.mesa.ridge import TOLERANCE, ridge_predictions
from constructions.mesa.tokens import (
    CODE,
    GROUPS,
    STATE,
    NextState,
    shifted,
    wide_config,
    wide_counterpart,
)
from constructions.program import CAUSAL, Head, Layer, Mlp, Norm, Program
from constructions.regression import finite_number
from constructions.slots import Slots
from synthetic.dynamics import States
from synthetic.nonlinear_dynamics import EPS, NonlinearDynamics
from synthetic.recipe import Recipe


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
        if finite_number("regularization", self.regularization) <= 0:
            raise ValueError(f"regularization is {self.regularization!r}, must be above 0")

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
        slots.add("previous", self.dim, tokens=STATE, born=2, meaning="phi(s_{t-1})")
        slots.add("prediction", self.dim, tokens=STATE, born=3, meaning="of s_{t+1}")
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
        slot, tokens = self.program.slots["features"], self.at_states(states.shape[1])
        features = Place.of(slot, tokens, depth, scale=self.dim**-0.5)
        return {**super().places(depth, states), "features": features}

    def counterpart(self) -> Counterpart:
        """The same layers with heads as wide as the stream; regularisation starts at 1."""
        recipe = Recipe(
            steps=6000, batch=256, learning_rate=5e-3, schedule="cosine", warmup=100, clip=1.0
        )
        return wide_counterpart(self, recipe, quick=replace(recipe, steps=1500, batch=128))

    def near_misses(self) -> dict[str, NearMiss]:
        """Ridge regression on other features, with the wrong regularisation, or on a false pair."""
        heavy = replace(self, regularization=1e3 * self.regularization)
        programs = {
            "ridge on states": self._program(features=False),
            "features of another network": replace(self, seed=self.seed + 2).program,
            "regularization x 1000": heavy.program,
            "no BOS": self._program(bos=False),
        }
        wide = wide_config(self.program)  # shared with the counterpart, and its compilations
        return {n: NearMiss(compile_program(p, config=wide), self) for n, p in programs.items()}

    def tolerance(self, dtype: str) -> float:
        """What `mesa` promises of its output, at any regularization."""
        del self
        return TOLERANCE[dtype]
