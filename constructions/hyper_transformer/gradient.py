r"""A gradient step on softmax cross-entropy by linear attention: attention writes a classifier.

The algorithm, on examples (e_i, y_i), i <= n, whose features e_i end in a constant 1, from W_0 = 0:

    W_{k+1,c} = W_kc + (eta / n) sum_i (y_ic - p_ic) e_i,    p_i = softmax(W_k e_i),

gradient descent on the mean cross-entropy -(1/n) sum_i log p_{i, y_i}. At W_0 all p_ic are 1/C.

The construction (after Zhmoginov et al. 2022, arXiv 2201.04182; the equations are ours). Example
tokens hold (e_i, y_i), with y_i one-hot, class tokens (W_c, 1_c), and query tokens (e, logits).
The first step is one head of linear attention from class tokens to examples,

    query 1_c - 1/C,  key y,  value e,  written to W with eta / n,

since (1_c - 1/C) . y_i = y_ic - 1/C. Every further step takes two layers. In the softmax of
attention from examples to class tokens stands that of the cross-entropy,

    query e,  key W,  value 1_c,  softmax, written to p;
    query 1_c,  key y - p,  value e,  linear, written to W with eta / n.

The last layer applies the classifier, query e, key W, value 1_c, to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.claims import Claim, NearMiss
from constructions.core.program import Head, Layer, Program, erase
from constructions.core.slots import Slots, concatenate
from constructions.family import Place, Tokens
from constructions.hyper_transformer import unlearning
from constructions.hyper_transformer.episodes import GROUPS, FewShot
from constructions.hyper_transformer.paper import GRADIENT_CLAIMS, nearest_mean
from synthetic.tasks.classes import Labels, Queries, Support


@dataclass(frozen=True)
class HyperGradient(FewShot):
    """`steps` steps of gradient descent on the mean cross-entropy of labelled examples.

    Episodes of any size are allowed: eta / n stays what it is on the task, n = classes * shots.
    Examples without labels are not attended to.

    Attributes:
        dim: of the features, without the constant.
        classes: C, at least 2.
        shots: labelled examples of each class in the task.
        steps: K, at least 1; the model has 2 K layers.
        step_size: eta. None: the best one for a single step on the task; more steps need it given.
        queries, spread, noise: of the task, see `synthetic.tasks.classes`.

    Raises:
        ValueError: a setting out of range, named.
    """

    dim: int = 8
    classes: int = 5
    shots: int = 2
    steps: int = 1
    step_size: float | int | None = None
    queries: int = 5
    spread: float | int = 1.0
    noise: float | int = 1.0

    unlabelled = 0

    def __post_init__(self) -> None:
        self._check_sizes()
        self.whole("steps")
        if self.step_size is None and self.steps > 1:
            raise ValueError(f"step_size is None, must be given for steps={self.steps}")
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.task.step_size())
        self.finite("step_size")

    @property
    def rate(self) -> float:
        """eta / n."""
        assert self.step_size is not None  # __post_init__ has filled it in
        return self.step_size / self.task.labelled

    @property
    def program(self) -> Program:
        """The step from zero, K - 1 times softmax and step, then the classifier."""
        return self._program()

    def _program(
        self,
        centre: bool = True,
        mixer: str = "linear",
        order: np.ndarray | None = None,
        without: int | None = None,
        mixed: np.ndarray | None = None,
    ) -> Program:
        """`centre`: with the 1/C; `mixer`: of the step from zero; `order`: of codes read out;
        `without`: a feature that is not written; `mixed`: A, of one step, for A W in the tokens.
        """
        slots, codes = Slots(), np.eye(self.classes)
        shown = ("labelled", "unlabelled", "query")
        features = slots.add("features", self.dim, token_groups=shown, meaning="e_i, e")
        one = slots.add("constant", 1, token_groups=shown, meaning="1")
        weights = slots.add(
            "weights",
            self.dim + 1,
            token_groups="class",
            accumulates=True,
            meaning="W_c, bias last",
        )
        label = slots.add(
            "label", self.classes, token_groups=("labelled", "class"), meaning="y_i; the code 1_c"
        )
        logits = slots.add(
            "logits", self.classes, token_groups="query", born=2 * self.steps, meaning="W_c e"
        )
        example = concatenate(features, one)
        zero = codes - centre / self.classes
        if mixed is not None:
            zero, codes = zero @ mixed.T, np.linalg.inv(mixed)
        written = np.eye(self.dim + 1) * (np.arange(self.dim + 1) != without)
        first = Head(
            query=zero @ label,
            key=label,
            value=example,
            write={weights: self.rate * written},
            mixer=mixer,
            queries="class",
            keys="labelled",
            name="step from zero",
        )
        layers = [Layer([first])]
        if self.steps > 1:
            guess = slots.add(
                "guess", self.classes, token_groups="labelled", accumulates=True, meaning="p_i"
            )
            softmax = Head(
                query=example,
                key=weights,
                value=label,
                write={guess: 1.0},
                mixer="softmax",
                queries="labelled",
                keys="class",
                name="softmax",
            )
            step = replace(first, query=label, key=label - guess, mixer="linear", name="step")
            further = [Layer([softmax, erase(guess)]), Layer([step])]
            layers += further * (self.steps - 1)
        read = Head(
            query=example,
            key=weights,
            value=(codes if order is None else codes[order]) @ label,
            write={logits: 1.0},
            queries="query",
            keys="class",
            name="classify",
        )
        return Program(slots, [*layers, Layer([read])], token_groups=GROUPS)

    def trace(self, support: ArrayLike, labels: ArrayLike, queries: ArrayLike) -> dict[str, Array]:
        """The algorithm, in weight space; arguments and errors as for `predict`.

        Returns:
            weight: W_k, `[batch, step, class, dim + 1]`, k = 0..K, the bias last.
            guess: p_i at W_1..W_{K-1}, `[batch, step, labelled, class]`; none for a single step.
            prediction: logits W_K e, `[batch, query, class]`.
        """
        support, labels, queries = self.given(0.0, support, labels, queries)
        einsum = partial(jnp.einsum, precision="highest")
        shown = self.one_hot(labels, support)
        e, q = (jnp.pad(a, [(0, 0), (0, 0), (0, 1)], constant_values=1) for a in (support, queries))
        e = e[:, : labels.shape[1]]
        weights, guesses = [jnp.zeros((len(e), self.classes, self.dim + 1), e.dtype)], []
        for _ in range(self.steps):
            guesses.append(jax.nn.softmax(einsum("bcd,bnd->bnc", weights[-1], e)))
            step = einsum("bnc,bnd->bcd", shown - guesses[-1], e)
            weights.append(weights[-1] + self.rate * step)
        found = {"weight": jnp.stack(weights, 1)}
        if self.steps > 1:
            found["guess"] = jnp.stack(guesses[1:], 1)
        return found | {"prediction": einsum("bcd,bqd->bqc", weights[-1], q)}

    def embed(self, support: Support, labels: Labels, queries: Queries) -> list[Tokens]:
        """Examples (e_i, 1, y_i), class tokens (0, 0, 1_c), queries (e, 1, 0)."""
        known, one = labels.shape[1], {"constant": 1.0}
        shown, label = support[:, :known], self.one_hot(labels, support)
        return [
            Tokens("labelled", {"features": shown, "label": label, **one}),
            Tokens("unlabelled", {"features": support[:, known:], **one}),
            Tokens("class", {"label": self.codes(support)}),
            Tokens("query", {"features": queries, **one}, read=True),
        ]

    def places(
        self, depth: int, support: Support, labels: Labels, queries: Queries
    ) -> dict[str, Place]:
        """Weights stand in the class tokens, guesses in the examples, logits in the queries.

        ValueError for an odd depth: K steps have 2 K layers.
        """
        if depth % 2:
            raise ValueError(f"depth is {depth}, must be even: a step and what reads it by turns")
        classes, asking = self.positions(support, queries)
        found = {
            "weight": Place.of("weights", classes, [0, *range(1, depth, 2)]),
            "prediction": Place.of("logits", asking, depth),
        }
        if self.steps > 1:
            found["guess"] = Place.of("guess", range(labels.shape[1]), range(2, depth - 1, 2))
        return found

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong step sizes, a step too many, and a head that is not quite the one of the step."""
        eta = self.rate * self.task.labelled
        others: dict[str, Any] = {
            "step size + 10 %": replace(self, step_size=1.1 * eta),
            "step size - 10 %": replace(self, step_size=0.9 * eta),
            "one step too many": replace(self, steps=self.steps + 1, step_size=eta),
        }
        order = np.roll(np.arange(self.classes), 1)
        others |= {
            "codes exchanged": self._program(order=order),
            "1/C left out": self._program(centre=False),
            "softmax for linear": self._program(mixer="softmax"),
            "a feature left out": self._program(without=0),
        }
        if self.steps == 1:  # tokens of neighbouring classes mixed, and unmixed where they are read
            mixed = np.eye(self.classes) + np.roll(np.eye(self.classes), 1, 1) / 2
            others["classes mixed"] = self._program(mixed=mixed)
        return {name: self.near_miss(other) for name, other in others.items()} | {
            "exact posterior": NearMiss(self.task.posterior, self),
            "nearest class mean": NearMiss(partial(nearest_mean, self.task), self),
        }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Statements about two trained layers; none for more steps."""
        return (*GRADIENT_CLAIMS, *unlearning.GRADIENT_CLAIMS) if self.steps == 1 else ()
