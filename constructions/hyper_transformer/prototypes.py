r"""Class means by softmax attention, and the classifier of the nearest of them.

The algorithm, on examples e_j with labels y_j, one-hot, or guessed, y_j >= 0 with sum 1:

    mu_c = sum_j a_cj e_j,    a_cj ~ N_j exp(beta y_jc),    sum_j a_cj = 1,
    logit_c(q) = tau (mu_c . q - kappa |mu_c|^2 / 2).

N_j is the number of examples that token j stands for, 1 for a labelled one. A class token holds
the mean of the examples of its class that were seen before, and N_c is how many: it takes part as
one more example of its class, so that mu_c is the running mean over all tasks so far. What this
task shows of other classes leaves mu_c as it is.

With labels known, the tokens of other classes get together the weight

    w_c = (n - n_c) / (n_c e^beta + n - n_c)    =  (C - 1) / (e^beta + C - 1) for equal n_c,

where n_c counts the examples of class c, and mu_c - mean_c = w_c (mean of the others - mean_c): the
distance is at most w_c times the largest one between class means (`leak`).

kappa = 1 is the nearest prototype. With n_c examples of every class around Gaussian means, the
kappa and tau of `synthetic.tasks.classes` make the logits the exact posterior: no classifier is
better.

Examples without labels get theirs in a layer before, from labelled ones with like features,

    y_u = sum_i softmax_i(gamma e_u . e_i) y_i.

The construction (after Zhmoginov et al. 2022 and Vladymyrov et al. 2023, arXiv 2201.04182 and
2301.04584; the equations are ours) is one head of softmax attention from class tokens to examples
and class tokens, with l = log N, 0 at an example, far below 0 at a class token that has seen none,

    query (beta 1_c, 1),  key (y, l),  value e,  written to mu,

a gated MLP that writes -kappa |mu|^2 / 2 to a bias, and the classifier,

    query (q, 1),  key (mu, bias),  value 1_c,  linear, written to the logits with tau.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from constructions.claims import Claim, NearMiss
from constructions.core.program import Head, Layer, Mlp, Program
from constructions.core.slots import Slots, concatenate
from constructions.core.transformer import Transformer
from constructions.family import Place, Tokens
from constructions.hyper_transformer import unlearning
from constructions.hyper_transformer.episodes import GROUPS, FewShot
from constructions.hyper_transformer.paper import (
    PROTOTYPE_CLAIMS,
    SEMI_SUPERVISED_CLAIMS,
    gradient_step,
    mixture_of_examples,
    nearest_mean,
    posterior_guesses,
)
from constructions.inputs import (
    Input,
    as_arrays,
    check_inputs,
    check_prediction,
    model_type,
)
from synthetic.compilation import compile_once
from synthetic.tasks.classes import Labels, Logits, Queries, Support

#: Score of a class token that has seen nothing: its weight is 0 in float64.
FAR = 1000.0


class Memory(NamedTuple):
    """Memory of all tasks so far.

    Attributes:
        mean: mu_c, of all examples so far, `[batch, class, dim]`.
        count: N_c, how many they were, `[batch, class]` int32; 0 for a class not seen yet.
    """

    mean: Float[Array, "batch class dim"]
    count: Int[Array, "batch class"]


@dataclass(frozen=True)
class HyperPrototypes(FewShot):
    """Prototypes of the classes of an episode, or of a sequence of tasks.

    Attributes:
        dim, classes, shots, queries, unlabelled, spread, noise: of the task,
        `synthetic.tasks.classes`.
            Episodes of any size are allowed; examples without labels count only if
            `unlabelled` is not 0.
        sharpness: beta, above 0. From 40 on the leak is below the rounding of float64; at 80 a
            task leaves the bits of classes that it does not show. With guessed labels a lower one
            lets unsure examples count.
        similarity: gamma.
        scale, shrinkage: tau and kappa. None: those of the exact posterior, which is that of
            labelled examples only.

    Raises:
        ValueError: a setting out of range, named.
    """

    dim: int = 8
    classes: int = 5
    shots: int = 2
    queries: int = 5
    unlabelled: int = 0
    spread: float | int = 1.0
    noise: float | int = 1.0
    sharpness: float | int = 80.0
    similarity: float | int = 0.5
    scale: float | int | None = None
    shrinkage: float | int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        task = self.task
        exact = {"scale": task.shrinkage / task.predictive_variance, "shrinkage": task.shrinkage}
        for name, value in exact.items():
            if getattr(self, name) is None:
                if self.unlabelled:
                    raise ValueError(
                        f"{name} is None, must be given for unlabelled={self.unlabelled}"
                    )
                object.__setattr__(self, name, value)
        self.finite("similarity", "shrinkage")
        self.finite("sharpness", "scale", above=0)

    @property
    def program(self) -> Program:
        """The layer that guesses labels if there are any to guess, prototypes, classifier."""
        return self._program()

    def _program(
        self,
        guesses: bool = True,
        order: np.ndarray | None = None,
        mixer: str = "softmax",
    ) -> Program:
        """`guesses`: of labels; `order`: of the codes read out; `mixer`: of the prototypes."""
        assert self.scale is not None and self.shrinkage is not None
        slots, codes = Slots(), np.eye(self.classes)
        examples = ("labelled", "unlabelled")
        features = slots.add("features", self.dim, meaning="e_j; the mean so far; q")
        label = slots.add(
            "label",
            self.classes,
            token_groups=(*examples, "class"),
            accumulates=True,
            meaning="y_j; 1_c",
        )
        last = 3 if self.unlabelled else 2
        logits = slots.add(
            "logits", self.classes, token_groups="query", born=last, meaning="of the classes"
        )
        one = slots.add("constant", 1, token_groups=("class", "query"), meaning="1")
        count = slots.add("log_count", 1, token_groups=(*examples, "class"), meaning="log N, or 0")
        empty = slots.add(
            "empty", 1, token_groups=(*examples, "class"), meaning="1 where N = 0, else 0"
        )
        weights = slots.add(
            "weights", self.dim, token_groups="class", born=last - 1, meaning="mu_c"
        )
        bias = slots.add(
            "bias", 1, token_groups="class", born=last - 1, meaning="-kappa |mu_c|^2 / 2"
        )
        guess = Head(
            query=features,
            key=features,
            value=label,
            write={label: 1.0},
            mixer="softmax",
            scale=self.similarity,
            queries="unlabelled",
            keys="labelled",
            name="guess",
        )
        mean = Head(
            query=concatenate(self.sharpness * label, one),
            key=concatenate(label, count - FAR * empty),
            value=features,
            write={weights: 1.0},
            mixer=mixer,
            queries="class",
            keys=(*(examples if self.unlabelled else ("labelled",)), "class"),
            name="prototypes",
        )
        norm = Mlp(
            hidden=weights,
            gate=weights,
            write={bias: np.full((1, self.dim), -self.shrinkage / 2)},
            activation="identity",
            token_groups="class",
            name="norm",
        )
        read = Head(
            query=concatenate(features, one),
            key=concatenate(weights, bias),
            value=(codes if order is None else codes[order]) @ label,
            write={logits: self.scale},
            queries="query",
            keys="class",
            name="classify",
        )
        before = [Layer([guess] if guesses else [])] if self.unlabelled else []
        return Program(slots, [*before, Layer([mean], norm), Layer([read])], token_groups=GROUPS)

    def leak(self, labels: ArrayLike) -> Float[Array, "batch class"]:
        """w_c, the weight that examples of other classes get in a class's prototype.

        The prototype is as far from the class's mean as w_c times the distance between that and the
        mean of all other examples. 1 for a class without examples.

        Args:
            labels: of all examples, `[batch, labelled]`.
        """
        declared = [i for i in self.arguments if i.name == "labels"]
        check_inputs(declared, [labels])
        labels = jnp.asarray(labels)
        own = jax.nn.one_hot(labels, self.classes, dtype=jnp.result_type(float)).sum(1)
        others = (labels.shape[1] - own) * jnp.exp(-self.sharpness)
        return others / jnp.maximum(own + others, jnp.finfo(own.dtype).tiny)

    def predict(self, model: Any, *inputs: Any, memory: Memory | None = None) -> Logits:
        """Logits of the queries, `[batch, query, class]`; see `Construction.predict`.

        Args:
            model: the compiled construction or a model of the same class.
            inputs: support, labels, queries, and the memory if it is not named.
            memory: what `update` returned for the tasks before; with one the support may be empty.

        Raises:
            ValueError: as there, and for a class without an example, now or in the memory.
        """
        if len(inputs) == 4 and memory is None:
            inputs, memory = inputs[:3], inputs[3]
        arrays = self.given(model_type(model, self.program.slots.width), *inputs)
        found = self.apply(model, *arrays, *self._checked(arrays[0], arrays[1], memory))
        check_prediction(found, model, self.arguments, arrays)
        return found

    def update(
        self,
        model: Transformer,
        support: Any,
        labels: Any,
        memory: Memory | None = None,
    ) -> Memory:
        """The memory after one more task: the prototypes that the compiled model writes.

        Args:
            model: the compiled construction.
            support, labels: as for `predict`, every example with a label.
            memory: before the task; None before the first.

        Raises:
            ValueError: as for `predict`, but that classes may be missing.
        """
        support, labels = as_arrays(self.arguments[:2], (support, labels))
        if labels.shape != support.shape[:2]:
            raise ValueError(f"labels has shape {labels.shape}, must be {support.shape[:2]}")
        query = np.zeros((len(support), 1, self.dim), np.int32)  # leaves the type to the others
        like = model_type(model, self.program.slots.width)
        support, labels, query = self.given(like, support, labels, query)
        before = self._checked(support, labels, memory, complete=False)
        found = _weights(self, model, support, labels, query, *before)
        check_prediction(found, model, self.arguments[:1], (support,))
        count = (labels[..., None] == jnp.arange(self.classes)).sum(1).astype(jnp.int32)
        if before:
            count = count + before[1]
        # what a class without examples holds is the average of all others
        return Memory(jnp.where(count[..., None] > 0, found, 0), count)

    def _checked(
        self, support: Array, labels: Array, memory: Memory | None, complete: bool = True
    ) -> tuple[Array, ...]:
        """The memory's two arrays, none without one; ValueError if it, or a class, is missing."""
        shape = (len(support), self.classes)
        wanted = (Input("memory.mean", (*shape, self.dim)), Input("memory.count", shape))
        if memory is not None and not (isinstance(memory, tuple) and len(memory) == 2):
            raise ValueError(f"memory is a {type(memory).__name__}, must be a Memory or None")
        given = as_arrays(wanted, memory) if memory is not None else []
        if given:
            check_inputs(wanted, given)
            if not isinstance(given[1], Tracer) and (np.asarray(given[1]) < 0).any():
                raise ValueError(f"memory.count holds {given[1].min()}, must be at least 0")
        if complete and not any(isinstance(a, Tracer) for a in (labels, *given[1:])):
            labelled = (np.asarray(labels)[..., None] == np.arange(self.classes)).sum(1)
            if given:
                labelled = labelled + np.asarray(given[1])
            if not labelled.all():
                episode, missing = np.argwhere(labelled == 0)[0]
                raise ValueError(
                    f"labels of episode {episode} have no example of class {missing}, and no "
                    "memory of it was given: it has no prototype"
                )
        return tuple(jnp.asarray(a) for a in given)

    def _entering(self, support: Array, mean: Any, count: Any) -> tuple[Array, Array, Array]:
        """What class tokens begin with: mean, log N or 0, and whether N is 0."""
        batch, dtype = len(support), support.dtype
        if mean is None:
            mean = jnp.zeros((batch, self.classes, self.dim))
            count = jnp.zeros((batch, self.classes))
        count = jnp.asarray(count).astype(dtype)[..., None]
        return jnp.asarray(mean).astype(dtype), jnp.log(jnp.maximum(count, 1)), 1 - jnp.sign(count)

    def trace(
        self,
        support: ArrayLike,
        labels: ArrayLike,
        queries: ArrayLike,
        mean: Any = None,
        count: Any = None,
    ) -> dict[str, Array]:
        """The algorithm; arguments and errors as for `predict`, and the memory's two arrays.

        Returns:
            label: guessed labels, `[batch, unlabelled, class]`; none where there are none.
            weight: mu_c, `[batch, class, dim]`.
            bias: -kappa |mu_c|^2 / 2, `[batch, class, 1]`.
            prediction: logits, `[batch, query, class]`.
        """
        support, labels, queries = self.given(0.0, support, labels, queries)
        assert self.scale is not None and self.shrinkage is not None
        einsum = partial(jnp.einsum, precision="highest")
        known, found = labels.shape[1], {}
        examples, label = support[:, :known], self.one_hot(labels, support)
        if self.unlabelled:
            likeness = einsum("bud,bnd->bun", support[:, known:], examples)
            guess = einsum("bun,bnc->buc", jax.nn.softmax(self.similarity * likeness), label)
            examples, label = support, jnp.concatenate([label, guess], 1)
            found["label"] = guess
        mean, log_count, empty = self._entering(support, mean, count)
        codes = self.codes(support)
        tokens = jnp.concatenate([examples, mean], 1)
        log = jnp.pad((log_count - FAR * empty)[..., 0], [(0, 0), (examples.shape[1], 0)])
        score = self.sharpness * jnp.concatenate([label, codes], 1) + log[..., None]
        mu = einsum("bjc,bjd->bcd", jax.nn.softmax(score, 1), tokens)
        bias = -self.shrinkage / 2 * (mu**2).sum(-1, keepdims=True)
        logits = self.scale * (einsum("bcd,bqd->bqc", mu, queries) + jnp.swapaxes(bias, 1, 2))
        return found | {"weight": mu, "bias": bias, "prediction": logits}

    def embed(
        self,
        support: Support,
        labels: Labels,
        queries: Queries,
        mean: Any = None,
        count: Any = None,
    ) -> list[Tokens]:
        """Examples (e, y), class tokens (mean, 1_c, 1, log N, whether N = 0), queries (q, 1)."""
        known, one = labels.shape[1], {"constant": 1.0}
        shown, label = support[:, :known], self.one_hot(labels, support)
        before, log, none = self._entering(support, mean, count)
        state = {"features": before, "label": self.codes(support), "log_count": log, "empty": none}
        return [
            Tokens("labelled", {"features": shown, "label": label}),
            Tokens("unlabelled", {"features": support[:, known:]}),
            Tokens("class", state | one),
            Tokens("query", {"features": queries, **one}, read=True),
        ]

    def places(
        self, depth: int, support: Support, labels: Labels, queries: Queries, *memory: Any
    ) -> dict[str, Place]:
        """Guesses stand in the examples, prototypes in the class tokens, logits in the queries."""
        classes, asking = self.positions(support, queries)
        found = {
            "weight": Place.of("weights", classes, depth - 1),
            "bias": Place.of("bias", classes, depth - 1),
            "prediction": Place.of("logits", asking, depth),
        }
        if self.unlabelled:
            others = range(labels.shape[1], support.shape[1])
            found["label"] = Place.of("label", others, depth - 2)
        return found

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong scales, no norms, blunt means, codes exchanged, linear for softmax, no guesses.

        And rivals, as functions: see `paper.nearest_mean` and those after it.
        """
        assert self.scale is not None
        others: dict[str, Any] = {
            "scale + 20 %": replace(self, scale=1.2 * self.scale),
            "scale - 20 %": replace(self, scale=0.8 * self.scale),
            "no norm": replace(self, shrinkage=0.0),
            "sharpness 1": replace(self, sharpness=1.0),
            "codes exchanged": self._program(order=np.roll(np.arange(self.classes), 1)),
            "linear for softmax": self._program(mixer="linear"),
        }
        if self.unlabelled:
            others["no guesses"] = self._program(guesses=False)
        rivals: dict[str, Any] = {"nearest class mean": nearest_mean}
        if self.unlabelled:
            rivals |= {"posterior with guesses": posterior_guesses}
            rivals |= {"exact posterior": type(self.task).posterior}
        else:
            rivals |= {"mixture of examples": mixture_of_examples}
            rivals |= {"one gradient step": gradient_step}
        return {name: self.near_miss(other) for name, other in others.items()} | {
            name: NearMiss(compile_once(partial(rival, self.task)), self)
            for name, rival in rivals.items()
        }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Statements about trained counterparts, with examples without labels or none."""
        if self.unlabelled:
            return SEMI_SUPERVISED_CLAIMS
        return (*PROTOTYPE_CLAIMS, *unlearning.PROTOTYPE_CLAIMS)


@partial(jax.jit, static_argnums=0)
def _weights(construction: HyperPrototypes, model: Transformer, *inputs: Array) -> Array:
    return construction.read(model, *inputs)["weight"]
