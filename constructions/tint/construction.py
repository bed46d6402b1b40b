"""TinT: one pass of a transformer that trains another on its input, then runs it again.

Panigrahi, Malladi, Xia, Arora 2023 (arXiv 2307.01189). The weights of an auxiliary decoder enter in
prefix tokens; each sequence of a batch trains a copy of its own. `tableau` has the heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from constructions.claims import Claim, NearMiss
from constructions.core.embedding import make_stream
from constructions.core.evaluate import SlotBySlot, evaluate
from constructions.core.inventory import counts
from constructions.core.program import Program
from constructions.core.slots import Slot
from constructions.core.transformer import Transformer
from constructions.family import Compiled, Construction, Counterpart, Place, Tokens
from constructions.inputs import INTEGERS, NUMBERS, Input, as_arrays, model_type
from constructions.interchange.decoder import (
    CHANGED,
    MATRICES,
    DecoderShape,
    TrainedAuxiliary,
    Weights,
    check_auxiliary,
    from_arrays,
    to_arrays,
)
from constructions.interchange.huggingface import load_auxiliary
from constructions.tint import algorithm
from constructions.tint.algorithm import MODES, Backward, check_mode, check_numbers, check_texts
from constructions.tint.layout import Layout, collect, contents, places, token_groups
from constructions.tint.paper import CLAIMS, counterpart, near_misses
from constructions.tint.tableau import Tableau
from synthetic.tasks.adaptation import AdaptationTask, exchanged
from synthetic.tasks.text import Corpus

#: Entries beyond which no dense weights are made: 0.8 GB in float32.
DENSE = 2 * 10**8
Model = Transformer | SlotBySlot


class Outcome(NamedTuple):
    """The outputs of a simulation.

    Attributes:
        logits_before, logits_after: of the auxiliary model before and after its training,
            `[batch, time, word]`.
        updated: its parameters afterwards, as `nnx.state(auxiliary, nnx.Param)` nests them, every
            leaf with an axis for the sequence in front; `nnx.update` takes one of them.
    """

    logits_before: Array
    logits_after: Array
    updated: Any


@dataclass(frozen=True, eq=False, repr=False)
class Tint(Construction):
    """The transformer that trains an auxiliary one.

    Attributes:
        auxiliary: a decoder (`constructions.interchange.decoder`), whose weights are copied; or
            settings of one that is fitted to a grammar, a `TrainedAuxiliary` or its JSON form; or
            the path of a folder in Hugging Face format.
        mode: "paper", "finite-difference", "exact", or a `Backward` (or its fields) that says
            how each part of the decoder is differentiated.
        steps: of gradient descent, at least 1.
        learning_rate: eta, on the summed loss.
        stack: rows of a square matrix in one prefix token, a divisor of the auxiliary's width.
        shards: pieces into which a matrix's columns are cut, a head each.
        embeddings: whether embeddings (and so the readout, which is tied) and positions are
            trained too.
        share: of the task: of its positions, how many are trained on.
        length: of the task: tokens of a text; None for the auxiliary's positions, 32 at most.
        text: of the task: a `Corpus`; None for text of the grammar that the auxiliary was fitted
            to, with its words exchanged, or random words where it comes from elsewhere.

    Raises:
        ValueError: one of these is something else; the message names what is allowed.
    """

    auxiliary: Any
    mode: Any = "exact"
    steps: int = 1
    learning_rate: float = 1e-3
    stack: int = 1
    shards: int = 1
    embeddings: bool = False
    share: float = 0.5
    length: int | None = None
    text: Any = None

    def __post_init__(self) -> None:
        given = self.auxiliary
        if isinstance(given, str | PathLike):
            given = load_auxiliary(given)
        elif isinstance(given, Mapping):
            given = TrainedAuxiliary.from_json(given)
        if isinstance(given, TrainedAuxiliary):
            if self.text is None:
                key = jax.random.key(given.seed + 2**20)
                object.__setattr__(self, "text", exchanged(given.text(key), key))
            given = given.model
        check_auxiliary(given)
        # training the given model later must not change what this one simulates
        object.__setattr__(self, "auxiliary", Transformer(given.config, given.arrays()))
        check_mode(self.mode)
        check_numbers(
            self.shape,
            steps=self.steps,
            stack=self.stack,
            shards=self.shards,
            learning_rate=self.learning_rate,
        )
        _ = self.backward, self.task

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"Tint({s.layers} layers of width {s.width}, {s.heads} heads, {s.hidden} hidden units, "
            f"{s.activation}, {s.words} words; mode={self.mode!r}, steps={self.steps}, "
            f"learning_rate={self.learning_rate})"
        )

    @cached_property
    def shape(self) -> DecoderShape:
        """The numbers of the auxiliary model."""
        return check_auxiliary(self.auxiliary)

    @cached_property
    def backward(self) -> Backward:
        """How each part of the decoder is differentiated."""
        if isinstance(self.mode, Backward):
            return self.mode
        return MODES[self.mode] if isinstance(self.mode, str) else Backward(**self.mode)

    @cached_property
    def _tableau(self) -> tuple[Tableau, Program]:
        layout = Layout(self.shape, self.stack)
        tableau = Tableau(
            layout, self.backward, self.steps, self.learning_rate, self.shards, self.embeddings
        )
        return tableau, tableau.program()

    @property
    def layout(self) -> Layout:
        """The slots and kinds of tokens of the program."""
        return self._tableau[0].layout

    @property
    def program(self) -> Program:
        """Forward, and `steps` times backward and forward."""
        return self._tableau[1]

    @property
    def weights(self) -> dict[str, Array]:
        """The auxiliary model's weights by their names in `constructions.interchange.decoder`."""
        return from_arrays(self.auxiliary.arrays())

    @cached_property
    def task(self) -> AdaptationTask:
        """Text of which the front part is trained on."""
        text, length = self.text, self.length
        if text is None:
            words = self.shape.words
            random = np.random.default_rng(0).integers(words, size=4096, dtype=np.int32)
            text = Corpus(random, tuple(map(str, range(words))))
        if len(text.vocabulary) > self.shape.words:
            raise ValueError(
                f"text has {len(text.vocabulary)} words, the auxiliary {self.shape.words}"
            )
        length = min(self.shape.positions, 32) if length is None else length
        if not 1 < length <= self.shape.positions:
            raise ValueError(f"length is {length}, must be 2 to {self.shape.positions}")
        return AdaptationTask(text, length, self.share)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that are trained."""
        kept = ("query", "key") if self.backward.attention == "value-only" else ()
        names = [name for name in MATRICES if name not in kept]
        names += ["gain"] if self.backward.gains else []
        return (*names, "offset", *(("embedding", "position") if self.embeddings else ()))

    @property
    def arguments(self) -> tuple[Input, ...]:
        """tokens and train_mask, `[batch, time]`; predictions are `[batch, time, word]`."""
        both = ("batch", "time")
        return (
            Input("tokens", both, INTEGERS, self.shape.words),
            Input("train_mask", both, NUMBERS),
        )

    def check(self, *inputs: Any) -> None:
        """ValueError for tokens or masks that are none, or texts that are too long."""
        check_texts(self.shape, *as_arrays(self.arguments, inputs))

    def context_size(self, *inputs: Any) -> int:
        """Positions of the text: what follows them can be left out of the training."""
        return inputs[0].shape[1]

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The same text, trained on what follows these positions only."""
        tokens, train_mask = inputs
        chosen = np.zeros(tokens.shape[1], bool)
        chosen[np.asarray(kept, int)] = True
        return tokens, jnp.asarray(train_mask, bool) & chosen

    def outside_context(
        self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any
    ) -> Any:
        """The predictions at positions that are not trained on; 0 elsewhere."""
        del kept
        return jnp.where(jnp.asarray(inputs[1], bool)[..., None], 0, prediction)

    def trace(self, tokens: Array, train_mask: Array) -> dict[str, Array]:
        """The algorithm, by autograd; tokens and mask are `[batch, time]`.

        Returns:
            logits_before, logits_after: `[batch, time, word]`; prediction: the softmax of the
                latter.
            query, key, value, output, hidden, back: how much [W b] was changed over the learning
                rate, minus the gradient where there is one step, `[batch, layer, rows, columns +
                1]`; gain, offset: the same of the norms, `[batch, 2 layers + 1, width]`; embedding,
                position: where they are trained, `[batch, word, width]`, `[batch, time, width]`.
        """
        weights = jax.tree.map(lambda a: jnp.asarray(a, float), self.weights)
        after = algorithm.descend(
            weights,
            tokens,
            train_mask,
            self.shape,
            steps=self.steps,
            rate=self.learning_rate,
            trained=self.trained,
            value_only=self.backward.attention == "value-only",
        )
        decode = partial(algorithm.decode, shape=self.shape)
        found = {
            "logits_before": jax.vmap(decode, (None, 0))(weights, tokens),
            "logits_after": jax.vmap(decode)(after, tokens),
        }
        names = CHANGED + (("embedding", "position") if self.embeddings else ())
        changes = {n: (after[n] - weights[n]) / self.learning_rate for n in names}
        if self.embeddings:
            changes["position"] = changes["position"][:, : tokens.shape[1]]
        return found | changes | {"prediction": jax.nn.softmax(found["logits_after"])}

    def embed(self, tokens: Array, train_mask: Array) -> list[Tokens]:
        """Prefix tokens with the auxiliary model's weights, then the text."""
        return self._embed(self.weights, jnp.asarray(tokens), jnp.asarray(train_mask))

    def _embed(self, weights: Weights, tokens: Array, train_mask: Array) -> list[Tokens]:
        return token_groups(self.layout, contents(self.layout, weights, tokens, train_mask), tokens)

    def places(self, depth: int, tokens: Array, train_mask: Array) -> dict[str, Place]:
        """The changes of the weights in their prefix tokens, and the last hidden states."""
        return places(
            self.layout, jnp.shape(tokens)[1], self._finals, 1 / self.learning_rate, depth
        )

    @property
    def _finals(self) -> tuple[Slot, Slot]:
        """The last hidden states, behind the final norm, of the first pass and of the last."""
        tapes, norm = self._tableau[0].tapes, 2 * self.shape.layers
        first, last = (tape("normed", self.shape.width, norm) for tape in (tapes[0], tapes[-1]))
        return first, last

    def apply(self, model: Model, tokens: Array, train_mask: Array) -> Array:
        """Probabilities of the next words after the training, `[batch, time, word]`; pure."""
        return self.read(model, tokens, train_mask)["prediction"]

    def read(self, model: Model, tokens: Array, train_mask: Array) -> dict[str, Array]:
        """The values of `trace`, as the model holds them; pure."""
        return self._read(model, self.weights, jnp.asarray(tokens), jnp.asarray(train_mask))

    def _read(
        self, model: Model, weights: Weights, tokens: Array, train_mask: Array
    ) -> dict[str, Array]:
        """The values of `trace` by either model, for an auxiliary model with these weights."""
        if isinstance(model, SlotBySlot):
            weights = jax.tree.map(lambda a: a.astype(model.dtype), weights)
            return simulate(self, weights, tokens, train_mask)
        stream = make_stream(self.program, model, self._embed(weights, tokens, train_mask))
        out, slots = model(stream.values, stream.groups), self.program.slots
        where = self.places(0, tokens, train_mask)
        found = {name: place.gather(out[None], slots) for name, place in where.items()}
        return self._outputs(found, weights)

    def _outputs(self, found: dict[str, Array], weights: Weights) -> dict[str, Array]:
        """The values of `trace`, from changes of weights and the last hidden states."""
        before = after = weights["embedding"]
        if self.embeddings:
            after = before + self.learning_rate * found["embedding"]
        logits = {
            "logits_before": _scores(found.pop("final_before"), before),
            "logits_after": _scores(found.pop("final_after"), after),
        }
        return found | logits | {"prediction": jax.nn.softmax(logits["logits_after"])}

    def compile(self, dtype: Any = None) -> Compiled:
        """Dense weights of the one transformer, where there are at most `DENSE` of them.

        In the place of more stands the program, which `run`, `read` and `apply` take as well and
        run slot by slot.
        """
        if counts(self.program).dense <= DENSE:
            return super().compile(dtype)
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        return Compiled(SlotBySlot(self.program, dtype), self)

    def run(self, model: Model | None, tokens: Any, train_mask: Any) -> Outcome:
        """Train the auxiliary model on each sequence, in one pass.

        Args:
            model: the compiled one; None for the program slot by slot, without dense weights,
                which is the faster way.
            tokens: `[batch, time]`, at most as many as the auxiliary model has positions.
            train_mask: `[batch, time]`, 0 or 1: the positions t whose loss, minus the log
                probability of token t + 1, is summed and trained on; the last never counts.

        Raises:
            ValueError: tokens, mask or model do not fit.
        """
        if model is not None:
            model_type(model, self.program.slots.width)
        tokens, train_mask = self.given(0.0, tokens, train_mask)
        weights = self.weights
        if model is None:
            found = simulate(self, weights, tokens, train_mask)
        else:
            found = _compiled(self, model, weights, tokens, train_mask)
        return Outcome(found["logits_before"], found["logits_after"], self._updated(found))

    def _updated(self, found: Mapping[str, Array]) -> Any:
        """The auxiliary model's parameters with the changes, for every sequence."""
        changes = {name: found[name] for name in self.weights if name in found}
        if "position" in changes:
            rest = self.shape.positions - changes["position"].shape[1]
            changes["position"] = jnp.pad(changes["position"], ((0, 0), (0, rest), (0, 0)))
        after = {
            name: weight + self.learning_rate * changes[name] if name in changes else weight
            for name, weight in self.weights.items()
        }
        batch = len(found["logits_after"])
        after = {
            name: jnp.broadcast_to(a, (batch, *self.weights[name].shape))
            for name, a in after.items()
        }
        model = nnx.eval_shape(lambda: Transformer(self.auxiliary.config, self.auxiliary.arrays()))
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, to_arrays(after, self.shape.heads))
        return state

    def counterpart(self) -> Counterpart:
        """The construction itself, trained further on the loss of the words outside `train_mask`.

        Only the simulator's own weights are trained; the auxiliary model comes in as before.

        Raises:
            ValueError: there would be more than `DENSE` of them.
        """
        self._be_dense()
        return counterpart(self)

    def near_misses(self) -> dict[str, NearMiss]:
        """Simulators with another step, or another gradient; ValueError as for `counterpart`."""
        self._be_dense()
        return near_misses(self)

    def _be_dense(self) -> None:
        entries = counts(self.program).dense
        if entries > DENSE:
            raise ValueError(
                f"auxiliary: its simulator would have {entries} dense weights, must be at most "
                f"{DENSE} for a counterpart or near-misses"
            )

    @property
    def examples(self) -> int:
        """Few: dense weights, nearly all zero, are slow."""
        return 64

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Whether it stays a simulator where it is trained further; for exact ones."""
        return CLAIMS if self.backward == MODES["exact"] and self.steps == 1 else ()

    def tolerance(self, dtype: str) -> float:
        """Largest error against autograd, entry by entry over the root mean square.

        Differences have an error of their own, and lose digits to rounding: no certificate.
        """
        if self.backward == replace(MODES["exact"], attention=self.backward.attention) and (
            self.backward.attention != "finite-difference"
        ):
            return {"float64": 1e-10, "float32": 1e-3}[dtype]
        return {"float64": 5e-2, "float32": 1e-1}[dtype]

    def conditions(self, dtype: str) -> str:
        """Which derivatives are approximated."""
        del dtype
        ways = {part: getattr(self.backward, part) for part in ("attention", "norm", "activation")}
        named = [f"{p} by {way}" for p, way in ways.items() if way not in ("exact", "value-only")]
        return f"derivatives are approximations ({', '.join(named)}), certified are exact ones"


def _scores(hidden: Array, embedding: Array) -> Array:
    each = "w" if embedding.ndim == 2 else "bw"
    return jnp.einsum(f"bth,{each}h->btw", hidden, embedding, precision="highest")


@partial(jax.jit, static_argnums=0)
def _compiled(
    c: Tint, model: Model, weights: Weights, tokens: Array, train_mask: Array
) -> dict[str, Array]:
    return c._read(model, weights, tokens, train_mask)


@partial(jax.jit, static_argnums=0)
def simulate(c: Tint, weights: Weights, tokens: Array, train_mask: Array) -> dict[str, Array]:
    """The named values of `Tint.trace` by the program, slot by slot; jitted and unchecked.

    Args:
        c: a construction.
        weights: of an auxiliary model of its shape, by their names in
            `constructions.interchange.decoder`.
        tokens, train_mask: `[batch, time]`.
    """
    at, time = c.layout, tokens.shape[1]
    out = evaluate(c.program, contents(at, weights, tokens, train_mask), at.kinds(time))
    found = collect(at, out, time, c._finals, 1 / c.learning_rate)
    return c._outputs(found, weights)
