r"""Preconditioned gradient descent by linear attention alone, with any polynomial.

With G_t and H_t as in `ridge`, one gradient step from W = 0 predicts eta G_t s_t; the ridge
solution G_t (H_t + rho I)^-1 s_t is that step on a preconditioned input. Linear attention can
apply any polynomial p(H_t) in place of the inverse. Tokens carry (y, x, s, z), x = s at first, and
each of L layers has two heads with query x and key z:

    x  <-  (I - a H_t) x         value z, written to x with -a
    y  <-  y + eta_l G_t x       value s, written to y with eta_l

so that y = G_t p(H_t) s_t with p(h) = sum_l eta_l (1 - a h)^l, which for a != 0 is any polynomial
of degree L - 1. L = 1 is one step of gradient descent.

The idea is that of von Oswald et al. 2023 (arXiv 2309.05858, Prop. 2 and eq. 9); as printed there,
its recursion lacks the constant term of the series and is not normalised, and diverges. Two numbers
a layer and no map within a token are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.polynomial import Chebyshev, Polynomial

from constructions.claims import Claim, NearMiss
from constructions.core.config import Config
from constructions.core.program import CAUSAL, Head, Layer, Program
from constructions.family import Counterpart, Place, Tokens
from constructions.mesa.paper import COPY, DEEP_CLAIMS, ONE_LAW, ONE_STEP_CLAIMS, last_state
from constructions.mesa.tokens import (
    CLIP,
    GROUPS,
    STATE,
    NextState,
    causal_sums,
    copy,
    shifted,
)
from synthetic.fitting.recipe import Recipe
from synthetic.guards import number
from synthetic.tasks.dynamics import LinearDynamics, States


@dataclass(frozen=True)
class MesaPolynomial(NextState):
    """y = G_t p(H_t) s_t, one layer for each coefficient of p.

    Attributes:
        coefficients: c_0, c_1, .. of p(h) = sum_k c_k h^k; the default is the best single step for
            the default task.
        step: a above, not 0; any gives the same polynomial, up to rounding, which is least where
            |1 - a h| is below 1 for all eigenvalues h (2 / h for the largest, say). None takes that
            of the truncated Neumann series with the same first two coefficients, or 1 / length.
    """

    coefficients: tuple[float, ...] = (0.0323,)
    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = np.atleast_1d(np.asarray(self.coefficients, object)).tolist()
        numbers = tuple(number(f"coefficients[{k}]", c) for k, c in enumerate(given))
        if not numbers:
            raise ValueError("coefficients is empty, must hold at least one number")
        object.__setattr__(self, "coefficients", numbers)
        if self.step is not None and number("step", self.step) == 0:
            raise ValueError("step is 0, must not be")
        try:
            _ = self.rates
        except OverflowError:
            raise ValueError(
                f"step is {self.contraction}, too small for these coefficients: powers of its "
                "inverse overflow"
            ) from None

    @property
    def contraction(self) -> float:
        """a of x <- (I - a H_t) x: `step`, or if that is None one that suits the coefficients."""
        if self.step is not None:
            return float(self.step)
        c = self.coefficients
        # alpha sum_{k<L} (1 - alpha h)^k has c_1 / c_0 = -alpha (L - 1) / 2
        neumann = -2 * c[1] / (c[0] * (len(c) - 1)) if len(c) > 1 and c[0] else 0.0
        return neumann if 1e-9 < abs(neumann) < 1e9 else 1 / self.length

    @property
    def rates(self) -> np.ndarray:
        """eta_l, the coefficients of p in powers of 1 - a h; exact but for the last rounding."""
        c, a = [Fraction(x) for x in self.coefficients], Fraction(self.contraction)
        # h^k = a^-k (1 - u)^k
        terms = [[x / a**k * comb(k, n) for k, x in enumerate(c)] for n in range(len(c))]
        return np.array([float((-1) ** n * sum(row)) for n, row in enumerate(terms)])

    @property
    def depth(self) -> int:
        """L, the number of coefficients."""
        return len(self.coefficients)

    @property
    def program(self) -> Program:
        """L layers of two heads, behind one that binds tokens where they are raw."""
        return self._program()

    def _program(self, key: str = "previous", turn: np.ndarray | None = None) -> Program:
        """With another key, or values that are turned before they are written."""
        slots, first = self.slots()
        state, previous, y = slots["state"], slots["previous"], slots["prediction"]
        x = state
        if self.depth > 1:
            x = slots.add("x", self.dim, token_groups=STATE, born=first - 1, accumulates=True,
                          meaning="(I - a H_t)^l s_t")  # fmt: skip
        common = {"query": x, "key": slots[key], "window": CAUSAL, "queries": STATE, "keys": STATE}
        layers = []
        if self.tokens == "raw":
            copies = [copy(state, x)] if self.depth > 1 else []
            layers.append(Layer([self.binding(slots), *copies], name="binding"))
        for power, rate in enumerate(self.rates):
            value = state if turn is None else turn @ state
            heads = [Head(value=value, write={y: rate}, name="step", **common)]
            if power < self.depth - 1:
                write = {x: -self.contraction}
                heads.append(Head(value=previous, write=write, name="preconditioner", **common))
            layers.append(Layer(heads, name=f"power {power}"))
        return Program(slots, layers, token_groups=GROUPS)

    def trace(self, states: States) -> dict[str, Array]:
        """The algorithm by Horner's rule in I - a H_t; states `[batch, time, dim]`.

        Returns:
            previous: z_t, `[batch, time, dim]`.
            preconditioned: (I - a H_t)^(L - 1) s_t, `[batch, time, dim]`.
            prediction: G_t p(H_t) s_t, `[batch, time, dim]`.
        """
        previous = shifted(states)
        gram, moment = grams(states)

        def product(matrix: Array, vector: Array) -> Array:
            return jnp.einsum("btij,btj->bti", matrix, vector, precision="highest")

        found = jnp.zeros_like(states)
        for rate in self.rates[::-1]:
            found = found - self.contraction * product(gram, found) + rate * states
        x = states
        for _ in range(self.depth - 1):
            x = x - self.contraction * product(gram, x)
        return {
            "previous": previous,
            "preconditioned": x,
            "prediction": product(moment, found),
        }

    def embed(self, states: States) -> list[Tokens]:
        """Constructed tokens hold x = s_t from the start; one step needs no x beside s_t."""
        *before, tokens = super().embed(states)
        if self.tokens == "constructed" and self.depth > 1:
            tokens = replace(tokens, values={**tokens.values, "x": states})
        return [*before, tokens]

    def _entering(self, state: np.ndarray, previous: np.ndarray) -> dict[str, np.ndarray]:
        """Constructed tokens enter with x = s_t, too."""
        entering = super()._entering(state, previous)
        return entering | {"x": state} if self.depth > 1 else entering

    def places(self, depth: int, states: States) -> dict[str, Place]:
        """Those of every model of next states, and x."""
        slot, tokens = "x" if self.depth > 1 else "state", self.at_states(states.shape[1])
        return super().places(depth, states) | {"preconditioned": Place.of(slot, tokens, depth)}

    @property
    def trained_shape(self) -> Config:
        """As the base class has it; that of several layers bounds its stream."""
        return replace(super().trained_shape, clip=CLIP if self.depth > 1 else None)

    def counterpart(self) -> Counterpart:
        """The same layers with heads as wide as the stream; deep ones with a bounded stream."""
        recipe = Recipe(
            steps=3000, batch=256, learning_rate=2e-3, schedule="cosine", warmup=100, clip=1.0
        )
        quick = replace(recipe, steps=1500, batch=128, learning_rate=5e-3)
        if self.depth > 1:
            recipe = replace(recipe, batch=128, learning_rate=1e-3, warmup=300)
            quick = replace(recipe, steps=1500)
        return self.wide_counterpart(recipe, quick)

    def near_misses(self) -> dict[str, NearMiss]:
        """Steps that are too long or too short, on the wrong pairs, turned, or none at all."""

        def of(program: Program) -> NearMiss:  # shares the counterpart's compilations
            return self.near_miss(program, self.trained_shape)

        def scaled(factor: float) -> NearMiss:
            coefficients = tuple(factor * c for c in self.coefficients)
            return of(replace(self, coefficients=coefficients).program)

        turn = np.asarray(jax.random.orthogonal(jax.random.key(0), self.dim), float)
        return {
            "step size + 20 %": scaled(1.2),
            "step size - 20 %": scaled(0.8),
            "pairs a state with itself": of(self._program(key="state")),
            "values turned": of(self._program(turn=turn)),
            ONE_LAW: self.one_law(),
            COPY: NearMiss(last_state, self),
        }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Those on constructed tokens, as the paper trains them, on one layer and on several."""
        if self.tokens == "raw":
            return ()
        return ONE_STEP_CLAIMS if self.depth == 1 else DEEP_CLAIMS

    def tolerance(self, dtype: str) -> float:
        """Rounding; sums of powers cancel where the polynomial is of high degree."""
        return {"float64": 1e-13, "float32": 1e-4}[dtype] * self.depth

    def conditions(self, dtype: str) -> str:
        """The number of layers."""
        return f"{self.tolerance(dtype) / self.depth:.0e} for each of {self.depth} layers"


def grams(states: States) -> tuple[Array, Array]:
    """H_t = sum_{u<=t} z_u z_u^T and G_t = sum_{u<=t} s_u z_u^T, `[batch, time, dim, dim]`."""
    previous = shifted(states)
    return causal_sums(previous, previous), causal_sums(states, previous)


def neumann(degree: int, step: float) -> tuple[float, ...]:
    """Coefficients of step sum_{k<=degree} (1 - step h)^k: `degree` + 1 steps of descent to 1/h.

    ValueError for a degree below 0 or a step of 0.
    """
    if degree < 0 or step == 0:
        raise ValueError(f"degree is {degree}, step {step}: must be at least 0, and not 0")
    total = sum((Polynomial([1.0, -step]) ** k for k in range(degree + 1)), Polynomial([0.0]))
    return tuple((step * total).coef.tolist())


def chebyshev(degree: int, lowest: float, highest: float) -> tuple[float, ...]:
    """Coefficients of the polynomial p of this degree with the least max |1 - h p(h)|.

    1 - h p(h) = T(m(h)) / T(m(0)) with T the Chebyshev polynomial of degree + 1 and m the map of
    [lowest, highest] to [-1, 1]; for 1 / (h + rho) give bounds of h + rho and shift.

    Raises:
        ValueError: the bounds are not 0 < lowest < highest, or the degree is below 0.
    """
    if not 0 < lowest < highest < np.inf or degree < 0:
        raise ValueError(
            f"degree {degree}, bounds [{lowest}, {highest}]: must be at least 0 and "
            "0 < lowest < highest"
        )
    t = Chebyshev.basis(degree + 1, domain=[lowest, highest])
    residual = (t / t(0.0)).convert(kind=Polynomial)
    return tuple((-residual.coef[1:]).tolist())


def best_coefficients(
    task: LinearDynamics, degree: int, key: Array, batch: int = 2**13
) -> tuple[float, ...]:
    """The polynomial of this degree with the least mean loss on sampled sequences.

    The prediction is linear in the coefficients, so that these solve normal equations, here with
    powers of H_t over its typical size and always in float64. Exact up to the choice of the
    sequences.

    ValueError for a degree below 0 or no sequences.
    """
    if degree < 0 or batch < 1:
        raise ValueError(f"degree is {degree}, batch {batch}: must be at least 0 and at least 1")
    scale = task.length / 2

    @jax.jit
    def moments(states: Array, target: Array) -> tuple[Array, Array]:
        gram, moment = grams(states)

        def power(x: Array, _: None) -> tuple[Array, Array]:
            below = jnp.einsum("btij,btj->bti", gram, x, precision="highest") / scale
            return below, jnp.einsum("btij,btj->bti", moment, x, precision="highest") / scale

        _, features = jax.lax.scan(power, states, length=degree + 1)
        return (
            jnp.einsum("kbti,lbti->kl", features, features, precision="highest"),
            jnp.einsum("kbti,bti->k", features, target, precision="highest"),
        )

    with jax.enable_x64(True):
        sequences = task.sample(key, batch)
        normal, right = (np.asarray(a) for a in moments(sequences.inputs[0], sequences.target))
    # columns of like size before the solve, whose condition grows with the degree
    size = np.sqrt(np.diag(normal))
    solved = np.linalg.lstsq(normal / np.outer(size, size), right / size, rcond=None)[0] / size
    return tuple((solved / scale ** np.arange(1, degree + 2)).tolist())


def predictions(coefficients: Sequence[float], states: States) -> States:
    """G_t p(H_t) s_t of a polynomial, without a model."""
    return MesaPolynomial(states.shape[2], states.shape[1], coefficients=tuple(coefficients)).trace(
        states
    )["prediction"]
