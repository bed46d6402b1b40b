"""What every family offers; verification, fits, probes, ledger and command use nothing else.

A family is one algorithm three ways: `Construction.trace` is the algorithm as plain array code,
`Construction.compile` the hand-built transformer that runs it, `Construction.counterpart` the same
transformer class, trained. `verify` (in `constructions.certificate`) measures how far the second
equals the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from constructions.certificate import Certificate, Error, assert_exact, check_settings, verify
from constructions.claims import Claim, NearMiss
from constructions.core.compile import compile_program, config_of
from constructions.core.config import Config
from constructions.core.embedding import Gauge, Place, Stream, Tokens, make_stream
from constructions.core.program import Program
from constructions.core.transformer import Transformer, randomise
from constructions.inputs import (
    Input,
    as_arrays,
    check_inputs,
    check_prediction,
    converted,
    model_type,
)
from synthetic.guards import number
from synthetic.tasks.task import Task, checked

if TYPE_CHECKING:
    import synthetic.fitting.recipe
    import synthetic.fitting.train

__all__ = [
    "Certificate",
    "Claim",
    "Compiled",
    "Construction",
    "Counterpart",
    "Error",
    "Gauge",
    "NearMiss",
    "Place",
    "Stream",
    "Tokens",
    "assert_exact",
    "verify",
]


Made = TypeVar("Made")


def once(method: Callable[[Any], Made]) -> Callable[[Any], Made]:
    """A method without arguments that runs once per object and default float type of JAX.

    What it makes is kept in the object's `__dict__`, which frozen dataclasses have as well, and
    holds no tracers: where it is first asked for under a trace, it is made outside of it.
    """

    @wraps(method)
    def made(self: Any) -> Made:
        memo = self.__dict__.setdefault(_MADE, {})
        key = method.__qualname__, jnp.result_type(float)
        if key not in memo:
            traced = isinstance(jnp.zeros(()), Tracer)
            # nothing compiled outside of the block is used again inside of it
            with jax.ensure_compile_time_eval() if traced else nullcontext():
                memo[key] = method(self)
        return memo[key]

    return made


_MADE = "_made"


@dataclass(frozen=True)
class Counterpart:
    """How the trained model of a construction's class is made.

    Attributes:
        init: key -> Transformer, pure.
        task: what it is trained on.
        recipe: the settings of the fit.
        optimum: the lowest loss that the class can reach on the task, None where it is not known.
        metrics: model -> {name: scalar}, evaluated along the fit, pure.
        quick: settings for a demonstration.
        exact: model -> the population loss, less a constant, where a closed form is known: an
            objective without noise for `synthetic.fitting.train.minimize`.
        random: key -> an untrained model, a control, where `init` is more than that (the
            construction itself, to be trained further).
    """

    init: Callable[[Array], Transformer]
    task: Task
    recipe: synthetic.fitting.recipe.Recipe
    optimum: float | None = None
    metrics: Callable[[Transformer], dict[str, Array]] | None = None
    quick: synthetic.fitting.recipe.Recipe | None = None
    exact: Callable[[Transformer], Array] | None = None
    random: Callable[[Array], Transformer] | None = None

    def untrained(self, key: Array) -> Transformer:
        """A random model of the shape."""
        return (self.random or self.init)(key)


@dataclass(frozen=True)
class Compiled:
    """A compiled construction: the model, and on demand the certificate that it is right.

    The model is a `Transformer`; a family may put something of its own in the place of one that
    would be too large, which its `read` and `apply` take.
    """

    model: Any
    construction: Construction

    @cached_property
    def certificate(self) -> Certificate:
        """`verify(construction)`; computed once, when asked for."""
        return verify(self.construction)


class Construction(ABC):
    """One algorithm, its hand-built transformer and its trained counterpart.

    Subclasses are frozen dataclasses of hashable settings: jitted functions take them as static
    arguments. Every trace has an entry "prediction", which is
    what `task.loss` compares with the target; its other entries are named by the algorithm. Each
    of these has a place in the stream (`places`) or is declared to have none (`unplaced`).

    `program` and `counterpart` of a subclass run once per construction, as `reference` does.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        program, counterpart = (vars(cls).get(name) for name in ("program", "counterpart"))
        if isinstance(program, property) and program.fget is not None:
            cls.program = property(once(program.fget), doc=program.__doc__)  # type: ignore[method-assign]
        if counterpart is not None:
            cls.counterpart = once(counterpart)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """The settings, without what was made of them."""
        return {name: value for name, value in vars(self).items() if name != _MADE}

    @property
    @abstractmethod
    def program(self) -> Program:
        """The weights, as a tableau."""

    @property
    @abstractmethod
    def task(self) -> Task:
        """The task that the algorithm solves, at the construction's sizes."""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Statements about trained counterparts that the ledger decides."""
        return ()

    #: Settings that a fit of the counterpart sees as numbers of its task alone (the task's
    #: `NUMBERS`), or not at all: fits that differ in them share one compiled program.
    numbers: ClassVar[tuple[str, ...]] = ()

    @property
    def examples(self) -> int:
        """The most inputs that the ledger takes; less where a model is large or scatters little."""
        return 2**16

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Names in `trace` that no token holds, such as weights that act through what they write.

        `verify` compares all the others.
        """
        return ()

    @abstractmethod
    def trace(self, *inputs: Array) -> dict[str, Array]:
        """The algorithm itself, independent of any model: {name: [batch, ...]}."""

    @abstractmethod
    def embed(self, *inputs: Array) -> Sequence[Tokens]:
        """Inputs as tokens, one run of a kind after the other, by names of slots; pure."""

    def stream(self, model: Transformer, *inputs: Array) -> Stream:
        """The residual stream of these inputs as the model takes it; pure."""
        return make_stream(self.program, model, self.embed(*inputs))

    @abstractmethod
    def places(self, depth: int, *inputs: Array) -> dict[str, Place]:
        """Where a model of this class with `depth` layers keeps the named values.

        "prediction" is among them, unless `apply` is overridden.
        """

    def apply(self, model: Transformer, *inputs: Array) -> Array:
        """The model's prediction, computed at the tokens that hold it; pure and unchecked."""
        places = self.places(model.config.depth, *inputs)
        if "prediction" not in places:
            names = ", ".join(f"'{name}'" for name in places) or "nothing"
            raise ValueError(f"{type(self).__name__}.places has no 'prediction', only {names}")
        return places["prediction"].from_output(
            model, self.stream(model, *inputs), self.program.slots
        )

    @property
    def arguments(self) -> tuple[Input, ...]:
        """What `predict` takes, by name; nothing where a family does not say."""
        return ()

    def predict(self, model: Any, *inputs: Any) -> Array:
        """What the model predicts, `[batch, ...]`: `apply` on checked inputs.

        Args:
            model: the compiled construction, or a trained model of its class.
            inputs: lists or arrays, see `arguments`; numbers are computed in the widest floating
                point type of theirs and the model's. An empty batch has an empty prediction.

        Raises:
            ValueError: no model; a shape or a kind that does not fit; of concrete arrays, values
                out of the domain, or so large that the prediction overflows.
        """
        arrays = self.given(model_type(model, self.program.slots.width), *inputs)
        if arrays and not len(arrays[0]):  # nothing to run, and not every layer takes it
            one = (jnp.zeros((1, *a.shape[1:]), a.dtype) for a in arrays)
            like = jax.eval_shape(self.apply, model, *one)
            return jnp.zeros((0, *like.shape[1:]), like.dtype)
        found = self.apply(model, *arrays)
        check_prediction(found, model, self.arguments, arrays)
        return found

    def given(self, like: Any, *inputs: Any) -> tuple[Array, ...]:
        """Inputs as `apply` and `trace` take them: checked, numbers in `like`'s type or wider."""
        arrays = as_arrays(self.arguments, inputs)
        self.check(*arrays)
        return converted(self.arguments, arrays, like)

    def check(self, *inputs: Any) -> None:
        """ValueError for inputs that do not fit, or concrete ones that are out of the domain."""
        check_inputs(self.arguments, inputs)

    def sample(self, key: Array, batch: int) -> tuple[Array, ...]:
        """Inputs of the construction's task.

        Raises:
            ValueError: the task gives something else than a `synthetic.tasks.task.Batch`.
        """
        return checked(self.task, self.task.sample(key, batch)).inputs

    def context_size(self, *inputs: Any) -> int:
        """How many examples of the context can be left out one by one; see `subset`.

        Raises:
            ValueError: the inputs are not made of examples.
        """
        del inputs
        raise ValueError(f"{type(self).__name__}: its inputs have no examples to leave out")

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The same inputs with these examples of the context only, the others removed.

        Args:
            kept: numbers in 0..`context_size` - 1, ascending.
            inputs: as `sample` gives them.
        """
        del kept
        raise ValueError(f"{type(self).__name__}: its inputs have no examples to leave out")

    def outside_context(
        self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any
    ) -> Any:
        """The part of a prediction at positions outside the context; the rest is removed or 0.

        It has one shape for all subsets of the inputs, so that predictions can be compared.

        Args:
            prediction: for `subset(kept, *inputs)`.
            kept, inputs: as for `subset`.
        """
        del kept, inputs
        return prediction

    def read(self, model: Transformer, *inputs: Array) -> dict[str, Array]:
        """The values named in `trace`, as the model holds them; pure."""
        stream, slots = self.stream(model, *inputs), self.program.slots
        _, sites = model.run(stream.values, stream.groups, sites=("residual",))
        places = self.places(model.config.depth, *inputs)
        return {name: place.gather(sites["residual"], slots) for name, place in places.items()}

    def compile(self, dtype: Any = None) -> Compiled:
        """Compile the program; quick, raises only on what is static."""
        check_settings(self)
        return Compiled(compile_program(self.program, dtype), self)

    @property
    @once
    def reference(self) -> Any:
        """The compiled model in JAX's default float type, made once: edit what `compile` gives."""
        return self.compile().model

    @property
    def trained_shape(self) -> Config:
        """The shape in which papers train it: that of the program, heads as wide as the stream."""
        return config_of(self.program).wide

    def in_trained_shape(self, program: Program | None = None) -> Transformer:
        """A program, by default the construction's own, compiled in `trained_shape`."""
        return compile_program(program or self.program, config=self.trained_shape)

    def random_weights(
        self, std: float, base: Transformer | None = None
    ) -> Callable[[Array], Transformer]:
        """key -> a model of the shape of `base` with weights N(0, std^2); by default `reference`'s.

        The masks of its heads stay.
        """
        like = self.reference if base is None else base
        return lambda key: randomise(like, key, std)

    @once
    def counterpart(self) -> Counterpart:
        """The trained model of the same class; the default suits small regression models."""
        from synthetic.fitting.recipe import Recipe

        return Counterpart(self.random_weights(0.02), self.task, Recipe())

    def near_miss(self, other: Program | Construction, shape: Config | None = None) -> NearMiss:
        """Another program, or another construction's, whose claims are measured as this one's.

        Args:
            other: what is compiled.
            shape: compile into this one, such as `trained_shape`; None: into the smallest.
        """
        if isinstance(other, Construction) and shape is None:
            return NearMiss(other.compile().model, self)
        program = other.program if isinstance(other, Construction) else other
        return NearMiss(compile_program(program, config=shape), self)

    def whole(self, *names: str) -> None:
        """ValueError unless these settings are integers of at least 1."""
        for name in names:
            number(name, getattr(self, name), whole=True, least=1)

    def finite(self, *names: str, above: int | float | None = None) -> None:
        """These settings as floats; ValueError unless they are finite numbers, above a bound."""
        for name in names:
            object.__setattr__(self, name, number(name, getattr(self, name), above=above))

    def fit(self, *, init_std: float | None = None, **options: Any) -> synthetic.fitting.train.Fit:
        """Fit the counterpart; `options` of `synthetic.fitting.train.fit` override its settings.

        Args:
            init_std: standard deviation of the initial weights, above 0, in the place of the 0.02
                of the default counterpart. Too small a one leaves a fit on a plateau.
            options: of `synthetic.fitting.train.fit`.

        Raises:
            ValueError: init_std is out of range, or the family has initial weights of its own; an
                option is out of range.
        """
        from synthetic.fitting.train import fit

        counterpart = self.counterpart()
        if init_std is not None:
            if not (isinstance(init_std, float | int) and 0 < init_std < np.inf):
                raise ValueError(f"init_std is {init_std!r}, must be finite and above 0")
            if type(self).counterpart is not Construction.counterpart:
                who = type(self).__name__
                raise ValueError(
                    f"init_std is {init_std}, but {who}.counterpart draws its own initial weights"
                )
            counterpart = replace(counterpart, init=self.random_weights(init_std))
        settings = {
            "recipe": counterpart.recipe,
            "predict": self.apply,
            "metrics": counterpart.metrics,
            "optimum": counterpart.optimum,
        }
        return fit(counterpart.init, counterpart.task, **settings | options)

    def near_misses(self) -> dict[str, NearMiss]:
        """Models that are almost, but not quite, this construction, by name."""
        return {}

    def gauge(self) -> Gauge:
        """Which parts of the stream are read and which are free; here all of it."""
        identity = np.eye(self.program.slots.width)
        return Gauge(identity, identity)

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """What the certificate is claimed on: the task, and facts measured on its inputs."""
        return {"task": repr(self.task)}

    def tolerance(self, dtype: str) -> float:
        """Largest error, relative to the root mean square, that counts as rounding.

        A certificate promises 1e-2 or better: above that, it reads "not certified" in this dtype.
        """
        return {"float64": 1e-13, "float32": 5e-6}[dtype]

    def conditions(self, dtype: str) -> str:
        """What makes `tolerance` as large as it is, in numbers; said where it is too large."""
        del dtype
        return ""
