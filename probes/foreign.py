"""Models that were made elsewhere, behind functions: a `Subject` of any library.

A `Subject` predicts. If it can, it also says what it holds at named sites, and what it would have
said had it held something else there; each probe asks for what it needs, and is left out with one
phrase where a subject has not got it. Nothing here knows how the model works.

Sites are arrays `[layer, batch, token, feature]`; tokens are those of the construction, in its
order. The site "residual" is the stream: one entry before every layer and one after the last.

Foreign code runs in one thread at a time, and only where its owner named it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from constructions import CATALOGUE
from constructions.catalogue import resolve
from constructions.claims import is_function
from constructions.core.transformer import Edit
from constructions.family import Construction
from constructions.runs import Run, construct_exactly, plain_settings

#: Of all foreign code: hooks, caches and random states of other libraries belong to the process.
_ALONE = threading.RLock()


class ForeignError(ValueError):
    """Foreign code failed; one line with what it raised, which is the cause."""


@contextmanager
def _foreign() -> Iterator[None]:
    """Foreign code alone, and what it raises as a `ForeignError`."""
    with _ALONE:
        try:
            yield
        except Exception as error:  # whatever it is
            raise ForeignError(f"the model fails: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An exception in one line."""
    error = error.__cause__ if isinstance(error, ForeignError) and error.__cause__ else error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model behind functions; whatever takes a function in the place of a model takes it.

    What the functions raise becomes a `ForeignError`, a ValueError.

    Attributes:
        predict: inputs, as `construction.sample` gives them, -> predictions `[batch, ...]`.
        activations: inputs -> {site: `[layer, batch, token, feature]`}; None: nothing is known of
            what it holds.
        edit: {site: `Edit(where, value)`} and inputs -> (predictions, activations) of a run in
            which a site holds `value` where `where` is True; both have the whole site's shape.
            What lies behind an edited value is computed from it. None: nothing can be edited.
        derivative: inputs -> d prediction_t / d last input_t, `[batch, token, dim_out, dim_in]`, or
            None where it has none. Without it JAX differentiates, where it can trace `predict`, or
            finite differences do.
        name: for tables.
    """

    predict: Callable[..., Any]
    activations: Callable[..., Mapping[str, Any]] | None = None
    edit: Callable[..., tuple[Any, Mapping[str, Any]]] | None = None
    derivative: Callable[..., Any] | None = None
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for part in ("predict", "activations", "edit", "derivative"):
            found = getattr(self, part)
            if not callable(found) and (found is not None or part == "predict"):
                kind = type(found).__name__
                raise ValueError(f"{part} is a {kind}, must be a function of a model's inputs")

    def __call__(self, *inputs: Any) -> Any:
        """The predictions."""
        with _foreign():
            return jnp.asarray(self.predict(*inputs))

    def read(self, *inputs: Any) -> dict[str, np.ndarray]:
        """What the model holds, by site.

        Raises:
            ValueError: it does not say.
        """
        if self.activations is None:
            raise ValueError(NO_ACTIVATIONS)
        with _foreign():
            return {site: np.asarray(a) for site, a in self.activations(*inputs).items()}

    def run(self, edits: Mapping[str, Edit], *inputs: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """Predictions and activations of a run with edits.

        Raises:
            ValueError: the model takes none.
        """
        if self.edit is None:
            raise ValueError(NO_EDITS)
        with _foreign():
            prediction, found = self.edit(edits, *inputs)
            return jnp.asarray(prediction), {site: np.asarray(a) for site, a in found.items()}

    def differentiate(self, *inputs: Any) -> np.ndarray | None:
        """`derivative` of these inputs, None where there is none."""
        if self.derivative is None:
            return None
        with _foreign():
            found = self.derivative(*inputs)
        return None if found is None else np.asarray(found)


NO_ACTIVATIONS = "the model gives no activations: Subject(activations=...) would"
NO_EDITS = "nothing in the model can be edited: Subject(edit=...) would say how"


def functions(run: Run) -> list[Any]:
    """The models of a run that are functions."""
    return [model for model in run.models if is_function(model)]


def lacking(run: Run, ask: Callable[[Construction, Any], str]) -> str:
    """What the first function of a run lacks that lacks anything, in one phrase; "" if none does.

    Args:
        run: whose models are asked.
        ask: `no_site`, `no_edits` or `no_fewer_examples`.
    """
    said = (ask(run.construction, model) for model in functions(run))
    return next(filter(None, said), "")


def fails(model: Any, inputs: Sequence[Any], on: str) -> str:
    """Whether a function fails on inputs, in one phrase with what it says; "" where it does not."""
    try:
        model(*inputs)
    except Exception as error:  # whatever foreign code raises
        return f"the model fails on {on}: {_said(error)}"
    return ""


def no_site(construction: Construction, model: Any, site: str = "residual") -> str:
    """Why a function has no such site with the construction's tokens, in one phrase; "" if it has.

    A function that is no `Subject` says nothing of what it holds.
    """
    if not isinstance(model, Subject) or model.activations is None:
        return NO_ACTIVATIONS
    inputs = construction.sample(jax.random.key(0), 2)
    stream = construction.stream(construction.reference, *inputs).values
    found = model.read(*inputs)
    if site not in found:
        return f"the model's activations hold {sorted(found)}, must hold '{site}'"
    shape = found[site].shape
    if len(shape) != 4 or shape[1:3] != stream.shape[:2]:
        return (
            f"'{site}' of the model has shape {list(shape)}, must be [layer, batch, token, "
            f"feature] with {stream.shape[1]} tokens"
        )
    return ""


def no_edits(construction: Construction, model: Any, site: str = "residual") -> str:
    """Why nothing can be put into that site of a function, in one phrase; "" where it can."""
    if missing := no_site(construction, model, site):
        return missing
    return NO_EDITS if model.edit is None else ""


def no_fewer_examples(construction: Construction, model: Any) -> str:
    """Why a function takes no inputs with fewer examples, in one phrase; "" where it does."""
    if not is_function(model):
        return ""
    inputs = tuple(np.asarray(a) for a in construction.sample(jax.random.key(0), 2))
    kept = np.arange(construction.context_size(*inputs) - 1)
    return fails(model, construction.subset(kept, *inputs), "contexts with an example less")


def foreign_run(
    name: str, models: Any | Sequence[Any], settings: Mapping[str, Any] | None = None
) -> Run:
    """Models behind functions as a run of a family, which `compare` and the probes take.

    Args:
        name: of the family, in the catalogue, or "module:attribute".
        models: a `Subject`, a function from inputs to predictions, or a `Transformer`; or several.
        settings: of the construction, in place of its example settings.

    Raises:
        ValueError: a model is none, fails on the family's inputs, or predicts something of another
            shape, or not finite.
    """
    given = {**CATALOGUE.find(name).example(), **(settings or {})}
    construction = construct_exactly(name, given)
    every = tuple(models) if isinstance(models, list | tuple) else (models,)
    checked = tuple(_checked(construction, model, n) for n, model in enumerate(every))
    return Run(
        family=name,
        settings=plain_settings(name, given),
        construction=construction,
        models=checked,
        seeds=tuple(range(len(checked))),
        history=[],
        recipe=None,
        optimum=construction.counterpart().optimum,
    )


def _checked(construction: Construction, model: Any, number: int) -> Any:
    """A model as the probes take it."""
    if isinstance(model, nnx.Module):
        return model
    who = f"model {number}"
    if "torch" in type(model).__module__ or hasattr(model, "state_dict"):
        raise ValueError(f"{who} is a module of torch's: from_torch(module, inputs=...) wraps it")
    if not callable(model):
        kind = type(model).__name__
        raise ValueError(f"{who} is a {kind}, must be a Subject or a function of the inputs")
    subject = model if isinstance(model, Subject) else Subject(model)
    inputs = construction.sample(jax.random.key(0), 3)
    if missing := fails(subject, inputs, "inputs of the family"):
        raise ValueError(f"{who}: {missing}")
    found = subject(*inputs)
    wanted = jax.eval_shape(lambda *i: construction.apply(construction.reference, *i), *inputs)
    if found.shape != wanted.shape:
        raise ValueError(
            f"{who}: predictions have shape {list(found.shape)}, must be {list(wanted.shape)}"
        )
    if not bool(jnp.isfinite(found).all()):
        raise ValueError(f"{who}: predictions hold NaN or infinite numbers")
    return subject


def named_model(reference: str) -> Any:
    """The model that "package.module:attribute" names: a `Subject`, or a function of inputs.

    A function without arguments makes one; it is called.

    Raises:
        ValueError: it cannot be imported, fails, or is something else.
    """
    found = resolve(reference)
    if isinstance(found, Subject) or not callable(found) or isinstance(found, nnx.Module):
        return found
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of a function that is not of Python
        return found
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters):
        return found
    if missing := fails(found, (), "being made"):
        raise ValueError(f"{reference}: {missing}")
    return found()
