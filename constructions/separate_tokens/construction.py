r"""Gradient descent where inputs and outputs are tokens of their own: copy, erase, then descend.

The tokens are x_1, y_1, ..., x_N, y_N, the queries, and a dump token, T in all; x and y stand in
the same columns, the content c_t, and token t knows its place by a one-hot code p_t, which the
queries, that nothing looks for, share. The algorithm is gradient descent on 1/(2N) sum_i |W x_i -
y_i|^2 from W_0 = 0,

    W_{k+1} = W_k - (eta / N) sum_i (W_k x_i - y_i) x_i^T.

The construction (von Oswald et al. 2022, arXiv 2212.07677, Prop. 3, in a form of our own) needs a
layer before the K layers of gradient descent. By position codes alone, without masks,

    copy    query A p,  key p,  value c,   to the buffer;  A p_t = p_{t+1} at x_i, else p_dump,
    erase   query B p,  key p,  value -c,  to the content; B p_t = p_t     at y_i, else p_dump.

Codes are orthonormal: as scores of linear attention they are 0 or 1, and both heads are exact; the
dump token carries nothing and takes nothing. Softmax heads with scores beta leave a leak: all wrong
tokens together get the weight

    (T - 1) e^-beta / (1 + (T - 1) e^-beta),

so that a token with nothing to fetch must look somewhere, and the dump token is where. From then on
token x_i holds (x_i, y_i), y_i holds nothing, and Prop. 1 of the paper makes the steps,

    query c,  key c,  value -buffer,  written to the buffer with eta / N.

One step would not need the second head: a y_i that is not erased is a key whose value is 0. Further
steps do, as every layer writes W_k c into the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from constructions.certificate import LARGEST_TOLERANCE
from constructions.claims import predict
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Affine, Slots
from constructions.core.transformer import Transformer, randomise
from constructions.core.weights import Part
from constructions.family import Claim, Counterpart, NearMiss, Place, Tokens
from constructions.measurement import Measurement
from constructions.regression import (
    Inputs,
    LinearRegression,
    Outputs,
    Queries,
    kernel_smoother,
    least_squares,
)
from constructions.separate_tokens.paper import claims
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import Fit
from synthetic.tasks.regression import RegressionTask

_GROUPS = ("context", "query", "dump")


@dataclass(frozen=True)
class SeparateTokens(LinearRegression):
    """`steps` steps of gradient descent on pairs whose halves are separate tokens.

    There are position codes for `num_examples` pairs: inputs may have fewer, and any number of
    queries.

    Attributes:
        dim_x, dim_y: dimensions of inputs and outputs.
        num_examples: N, the number of context pairs.
        queries: how many queries of each context the task draws.
        steps: K, at least 1; the model has K + 1 layers.
        step_size: eta. None: the best one for a single step on the task; more steps need it given.
        mixer: of the copying layer, "softmax" or "linear"; the other layers are linear.
        score_scale: beta, the score of a token that a softmax head looks for; others have 0.
            From about 40 on the leak is below the rounding of float64. Linear heads need none.
        attends: what the trained counterpart's first layer may look for, "position" as here, or
            "anything": heads that also see contents go below the loss of one step.
    """

    dim_x: int = 10
    dim_y: int = 1
    num_examples: int = 10
    queries: int = 1
    steps: int = 1
    step_size: float | None = None
    mixer: str = "softmax"
    score_scale: float = 40.0
    attends: str = "position"

    def __post_init__(self) -> None:
        self.whole("dim_x", "dim_y", "num_examples", "queries", "steps")
        self.check_distributions()
        if self.step_size is None and self.steps > 1:
            raise ValueError(f"step_size is None, must be given for steps={self.steps}")
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.best_step_size())
        self.finite("step_size")
        self.finite("score_scale", above=0)
        if self.mixer not in ("softmax", "linear"):
            raise ValueError(f"mixer is {self.mixer!r}, must be 'softmax' or 'linear'")
        if self.attends not in ("position", "anything"):
            raise ValueError(f"attends is {self.attends!r}, must be 'position' or 'anything'")

    @property
    def task(self) -> RegressionTask:
        """Linear regression with these inputs, weights and noise."""
        return self.regression_task(self.num_examples, self.queries)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about two trained layers; none for more."""
        return claims(self.mixer, self.attends) if self.steps == 1 else ()

    @property
    def eta(self) -> float:
        """The step size, as a number."""
        assert self.step_size is not None  # filled in when it is not given
        return self.step_size

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens on the task: two a pair, the queries, the dump token."""
        return 2 * self.num_examples + self.queries + 1

    @property
    def codes(self) -> int:
        """How many position codes there are: two a pair, one of all queries, the dump token's."""
        return 2 * self.num_examples + 2

    @property
    def program(self) -> Program:
        """A layer that copies and erases, then K layers of one head."""
        return self._program()

    def _program(
        self,
        fetched: int = 1,
        erases: bool = True,
        keys: Sequence[str] | None = None,
        descent: str = "linear",
    ) -> Program:
        """`fetched`: offset of the token that x_i copies; `keys`: of the copying layer."""
        slots, size = Slots(), max(self.dim_x, self.dim_y)
        content = slots.add("content", size, accumulates=True, meaning="x_i; y_i until erased")
        buffer = slots.add("buffer", self.dim_y, accumulates=True, meaning="y_i - W_k x_i")
        place = slots.add("place", self.codes, meaning="one-hot position code p_t")

        def look(name: str, targets: np.ndarray, value: Affine, write: Any) -> Head:
            """A head at which token t attends to token targets[t]."""
            code = np.eye(self.codes)[:, targets]  # p_t -> p_targets[t]
            scale = self.score_scale if self.mixer == "softmax" else 1.0
            return Head(
                query=code @ place,
                key=place,
                value=value,
                write=write,
                mixer=self.mixer,
                scale=scale,
                keys=keys,
                name=name,
            )

        token = np.arange(self.codes)
        pair, dump = token < 2 * self.num_examples, self.codes - 1
        copied = np.where(pair & (token % 2 == 0), (token + fetched) % self.codes, dump)
        erased = np.where(pair & (token % 2 == 1), token, dump)
        heads = [look("copy", copied, content[: self.dim_y], {buffer: 1.0})]
        if erases:
            heads.append(look("erase", erased, -content, {content: 1.0}))
        step = Head(
            query=content,
            key=content,
            value=-buffer,
            write={buffer: self.eta / self.num_examples},
            keys="context",
            mixer=descent,
            name="descend",
        )
        layers = [Layer(heads, name="copy and erase"), *[Layer([step])] * self.steps]
        return Program(slots, layers, token_groups=_GROUPS)

    def check(self, *inputs: Any) -> None:
        """Shapes, finite values where they are concrete, and a length that there are codes for.

        Raises:
            ValueError: naming the argument.
        """
        super().check(*inputs)
        found = jnp.shape(inputs[0])[1]
        if found > self.num_examples:
            raise ValueError(
                f"x has {found} tokens, must have at most num_examples={self.num_examples}: there "
                "are no position codes for more"
            )

    @property
    def unplaced(self) -> tuple[str, ...]:
        """W_k, which acts through what it writes."""
        return ("weight",)

    def trace(self, x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> dict[str, Array]:
        """The algorithm, in weight space; arguments and errors as for `predict`.

        Returns:
            weight: W_k, `[batch, step, dim_y, dim_x]`, k = 0..K.
            residual: y_i - W_k x_i, `[batch, step, context, dim_y]`.
            estimate: W_k x for the queries, `[batch, step, query, dim_y]`.
            content: what the tokens x_1, y_1, ..., queries hold before any layer and after each,
                `[batch, 1 + layer, token, max(dim_x, dim_y)]`: of y_i nothing from layer 1 on.
            prediction: W_K x, `[batch, query, dim_y]`.
        """
        x, y, x_query = self.given(0.0, x, y, x_query)
        einsum = partial(jnp.einsum, precision="highest")
        rate = self.eta / self.num_examples

        def step(weight: Array, _: None) -> tuple[Array, Array]:
            error = einsum("boi,bni->bno", weight, x) - y
            return weight - rate * einsum("bno,bni->boi", error, x), weight

        first = jnp.zeros((x.shape[0], self.dim_y, self.dim_x), x.dtype)
        last, before = jax.lax.scan(step, first, None, length=self.steps)
        weight = jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, 1)
        estimate = einsum("bkoi,bqi->bkqo", weight, x_query)
        given, erased = self._content(x, y, x_query), self._content(x, 0 * y, x_query)
        return {
            "weight": weight,
            "residual": y[:, None] - einsum("bkoi,bni->bkno", weight, x),
            "estimate": estimate,
            "content": jnp.stack([given] + [erased] * (self.steps + 1), axis=1),
            "prediction": estimate[:, -1],
        }

    def _content(self, x: Array, y: Array, x_query: Array) -> Float[Array, "batch token content"]:
        size = max(self.dim_x, self.dim_y)
        x, y, x_query = (
            jnp.pad(a, [(0, 0), (0, 0), (0, size - a.shape[-1])]) for a in (x, y, x_query)
        )
        pairs = jnp.stack([x, y], axis=2).reshape(len(x), 2 * x.shape[1], size)
        return jnp.concatenate([pairs, x_query], axis=1)

    def embed(self, x: Inputs, y: Outputs, x_query: Queries) -> list[Tokens]:
        """Tokens x_1, y_1, ..., x_N, y_N, the queries, the dump: content, empty buffer, code."""
        content, pairs = self._content(x, y, x_query), 2 * x.shape[1]
        code = jnp.eye(self.codes, dtype=x.dtype)[None]
        return [
            Tokens("context", {"content": content[:, :pairs], "place": code[:, :pairs]}),
            Tokens("query", {"content": content[:, pairs:], "place": code[:, -2:-1]}, read=True),
            Tokens("dump", {"place": code[:, -1:]}),
        ]

    def places(self, depth: int, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Place]:
        """Every value but the weights themselves stands in a slot; steps count from layer 1."""
        steps, pairs = range(1, depth + 1), 2 * x.shape[1]
        queries = range(pairs, pairs + x_query.shape[1])
        return {
            "residual": Place.of("buffer", range(0, pairs, 2), steps),
            "estimate": Place.of("buffer", queries, steps, scale=-1.0),
            "content": Place.of("content", range(queries.stop), range(depth + 1)),
            "prediction": Place.of("buffer", queries, depth, scale=-1.0),
        }

    @property
    def leak(self) -> float:
        """Weight that a softmax head of the copying layer gives to all wrong tokens together."""
        if self.mixer == "linear":
            return 0.0
        wrong = (self.num_tokens - 1) * np.exp(-self.score_scale)
        return float(wrong / (1 + wrong))

    def tolerance(self, dtype: str) -> float:
        """Rounding, and 16 (K + 1) times the leak; see `leak`.

        To first order in the leak L, layer 1 holds c + L (mean of others - c) in place of c. For a
        step size that is stable each step adds as much once through its keys and once through its
        queries. The factor 16 stands for the largest value of a sample over the root mean square.
        """
        return super().tolerance(dtype) + 16 * (self.steps + 1) * self.leak

    def conditions(self, dtype: str) -> str:
        """The leak, and the score scale that would do."""
        room = LARGEST_TOLERANCE - super().tolerance(dtype)
        enough = np.ceil(np.log(16 * (self.steps + 1) * (self.num_tokens - 1) / room))
        return (
            f"score_scale is {self.score_scale:g}, with a leak of {self.leak:.1e} to wrong tokens; "
            f"at least {enough:.0f} is needed"
        )

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong step sizes, a step too many, centred attention, and layers that copy wrongly.

        Two of them exist only for softmax heads: linear ones need neither a dump token nor a
        scale. What is not erased shows from the second step on. And rivals, as functions: see
        `constructions.regression`.
        """

        def of(construction: SeparateTokens, **changes: Any) -> NearMiss:
            return self.near_miss(construction._program(**changes))

        found = {
            "step size + 10 %": of(replace(self, step_size=1.1 * self.eta)),
            "step size - 10 %": of(replace(self, step_size=0.9 * self.eta)),
            "one step too many": of(replace(self, steps=self.steps + 1)),
            "centred attention": of(self, descent="centred"),
            "copy from the previous token": of(self, fetched=-1),
            "least squares": NearMiss(least_squares, self),
            "kernel smoother": NearMiss(partial(kernel_smoother, scale=self.eta), self),
        }
        if self.steps > 1:
            found["no erase head"] = of(self, erases=False)
        if self.mixer == "softmax":
            found["no dump token"] = of(self, keys=("context", "query"))
            found["score scale 5"] = of(replace(self, score_scale=5.0))
        return found

    def counterpart(self) -> Counterpart:
        """Heads as wide as the stream, trained with Adam; their scores have no factor beta.

        With attends="position" the first layer's heads have no weights on what tokens hold, only
        on where they stand, and get none in `fit`.
        """
        base = self.in_trained_shape(replace(self, score_scale=1.0).program)

        def init(key: Array) -> Transformer:
            model = randomise(base, key, 0.2)
            return self._by_position(model) if self.attends == "position" else model

        recipe = Recipe(steps=5000, batch=128, learning_rate=5e-3, schedule="cosine")
        return Counterpart(init, self.task, recipe, quick=replace(recipe, steps=2000, batch=64))

    def fit(self, **options: Any) -> Fit:
        """Fit the counterpart; see `Construction.fit`."""

        def by_position(model: Transformer, *inputs: Array) -> Array:
            return self.apply(self._by_position(model), *inputs)

        restricted: dict[str, Any] = {"predict": by_position} if self.attends == "position" else {}
        return super().fit(**(restricted | options))

    def _by_position(self, model: Transformer) -> Transformer:
        """The model without the weights by which the first layer's heads look for contents.

        As part of the loss it leaves them no gradient: where they start at zero they stay there.
        """
        visible = jnp.zeros(model.config.width).at[self.program.slots["place"].columns].set(1)

        def by_place(part: Part) -> dict[str, Array]:
            w = part.weights
            if part.kind != "heads" or (part.segment, part.position) != (0, 0):
                return w
            return w | {name: w[name] * visible.astype(w[name].dtype) for name in ("query", "key")}

        return model.map_parts(by_place)


def loss_ratios(construction: SeparateTokens, seed: int, seeds: int) -> np.ndarray:
    """Loss of trained counterparts over that of the gradient step, `[seed]`, at quick settings."""
    fitted = construction.fit(
        recipe=construction.counterpart().quick, seeds=range(seed, seed + seeds)
    )
    examples = construction.task.sample(jax.random.key(seed), 2**15)
    loss, *losses = (
        float(construction.task.loss(predict(construction, m, *examples.inputs), examples).mean())
        for m in (construction.reference, *fitted.models)
    )
    return np.array(losses) / loss


def measure(
    quick: bool = False, seed: int = 0, seeds: int = 5, **sizes: int
) -> Iterator[Measurement]:
    """Measures, one row after the other, what first layers without constraint are trained to.

    Args:
        quick: no rows; each of them takes `seeds` fits.
        seed, seeds: of the first fit, and how many.
        sizes: of `SeparateTokens`.
    """
    if quick:
        return
    sizes = {"dim_x": 3, "num_examples": 6, "queries": 6} | sizes
    for mixer, statement, published, note in (
        (
            "softmax",
            "Trained layers, the first of softmax heads, have the loss of one gradient step.",
            1.0,
            "Heads that may attend by content as well go on to a lower loss, at the paper's sizes "
            "too; by position alone they end at one step, see the claims. ",
        ),
        (
            "linear",
            "With linear heads in the first layer they have more, as the paper says: linear heads "
            "do not get there.",
            None,
            "The construction is exact with linear heads, so that this is about training. ",
        ),
    ):
        c = SeparateTokens(mixer=mixer, attends="anything", **dict[str, Any](sizes))
        ratios = loss_ratios(c, seed, seeds)
        each = ", ".join(f"{ratio:.2f}" for ratio in np.sort(ratios))
        yield Measurement(
            f"loss over one step's, {mixer} heads that see contents",
            statement,
            "von Oswald et al. 2022, arXiv 2212.07677, fig. 5",
            published,
            float(np.median(ratios)),
            # of a median, where seeds scatter as a Gaussian does
            error=float(1.25 * ratios.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else 0.0,
            tolerance=0.05,
            better="<=" if published is not None else "",
            at_least=1.0 if published is None else None,
            note=f"{note}Median of {seeds} seeds: {each}; N = {c.num_examples}, d = {c.dim_x}.",
        )
