"""A probe: one question to a run of a family, and the table that answers it.

A file of `probes` holds the science of one question and, at its end, the `Probe` that asks it of a
run. `probes.PROBES` lists them; the command, the report, the table of docs/probes.md and the tests
are made from that list.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import wraps
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from constructions.claims import is_function, one_mask, with_masks_of
from constructions.core.checks import ProgramError
from constructions.core.compile import compile_program
from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.runs import UNKNOWN_START, Run, load_checkpoints
from probes.style import WIDTH, Picture, headed_table, number, png
from probes.subject import ParameterVector, no_weights
from synthetic.display import Table, Text, shown
from synthetic.files import plain

#: Weights of a model beyond which probes that fit it, or take its gradients one by one, refuse it.
MOST_WEIGHTS = 2**18

OF_ONE_BASIS = "the same function in another basis of the weights has other numbers"


class NotApplicable(ValueError):
    """A run lacks what a probe needs; the message is that phrase."""


@dataclass(frozen=True)
class Result:
    """A table of numbers, None where one is not defined.

    It prints, becomes JSON, draws itself, and shows itself in a notebook.

    Attributes:
        title: what the numbers are.
        columns, rows: names.
        values: `[row][column]`.
        note: what a reader should know, one line; empty where there is nothing.
        data: what was measured, where that is more than the table: a dataclass, or a list of them.
        picture: makes the probe's own figure; None: a figure of the table.
    """

    title: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    note: str = ""
    data: Any = field(default=None, repr=False, compare=False)
    picture: Callable[[], Picture] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        names = ("title", "columns", "rows", "values", "note")
        shown = {name: getattr(self, name) for name in names}
        return shown if self.data is None else {**shown, "data": self.data_json()}

    def data_json(self) -> Any:
        """`data` as plain data; numbers that are not finite become None."""

        def one(value: Any) -> Any:
            if hasattr(value, "to_json"):
                return value.to_json()
            return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value

        many = isinstance(self.data, list)
        return plain([one(value) for value in self.data] if many else one(self.data))

    def draw(self) -> bytes:
        """The probe's own figure, else the table as a heat map; PNG."""
        if self.picture is not None:
            return self.picture().png
        from matplotlib.figure import Figure

        shown = np.array(self.values, float)
        width, height = 4 + 0.7 * len(self.columns), 4 + 0.3 * len(self.rows)
        figure = Figure(figsize=(min(width, 16), min(height, 14)), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shown, aspect="auto", cmap="cividis")
        axis.set_xticks(range(len(self.columns)), self.columns, rotation=90)
        axis.set_yticks(range(len(self.rows)), self.rows)
        axis.set_title(self.title, fontsize=9, wrap=True)
        figure.colorbar(image, ax=axis)
        return png(figure)

    def __rich__(self) -> Any:
        """A table for `rich`, which fits it to its console."""
        from rich.markup import escape

        # names such as "T[o, a, b, c]" are no markup
        found = headed_table(escape(self.title), "", *map(escape, self.columns))
        for name, values in zip(self.rows, self.values, strict=True):
            found.add_row(escape(name), *map(number, values))
        return found

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console

        shown, text = self.__rich__(), io.StringIO()
        shown.box = box.ASCII2
        console = Console(file=text, highlight=False, width=10 * WIDTH)
        console.print(shown, width=max(WIDTH, console.measure(shown).maximum), crop=False)
        lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
        return "\n".join([*lines, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        rows = [
            (name, *map(number, values))
            for name, values in zip(self.rows, self.values, strict=True)
        ]
        return shown("", Table(("", *self.columns), rows, self.title), Text(self.note))


def anything(run: Run) -> str:
    """What a probe needs that any run fits."""
    del run
    return ""


@dataclass(frozen=True)
class Probe:
    """A question to a run, how it is answered, and when the answer misleads.

    Attributes:
        name: as it is typed.
        question, misleads: a row of the table in docs/probes.md, each without its mark at the end.
        measure: of a run and a seed (of inputs and controls), and of options that the probe itself
            may have, to the result.
        needs: of a run, why it does not fit, in one phrase; "" if it does. Asked before measuring.
        invariant: whether a model in another basis of its keys and values, which is the same
            function, has the same numbers. Where it has not, the note of the result says so.
        seeds: how many of the run's seeds it looks at, None for all: rows of more say the same.
        functions: whether it takes models that are functions (`probes.foreign.Subject`), and asks
            for no more than these offer; `needs` then says what one lacks.
    """

    name: str
    question: str
    misleads: str
    measure: Callable[..., Result]
    needs: Callable[[Run], str] = anything
    invariant: bool = True
    seeds: int | None = None
    functions: bool = False

    def __call__(self, run: Run, seed: int = 0, **options: Any) -> Result:
        """The result of a run.

        Raises:
            NotApplicable: the run does not fit, as `needs` says; or as only the measurement shows
                (a fit that gained nothing has nothing to graft).
        """
        few = replace(run, models=run.models[: self.seeds], seeds=run.seeds[: self.seeds])
        if not self.functions and any(map(is_function, few.models)):
            raise NotApplicable("the model is a function, whose weights are not known")
        if missing := self.needs(few):
            raise NotApplicable(missing)
        found = self.measure(few, seed, **options)
        if self.invariant:
            return found
        return replace(found, note="; ".join(filter(None, [found.note, OF_ONE_BASIS])))


def table(title: str, columns: Any, rows: Any, values: Any, note: str = "", **more: Any) -> Result:
    """A `Result` from anything array-like; numbers that are not finite become None."""
    array = np.asarray(values, float)
    finite = [[float(v) if np.isfinite(v) else None for v in row] for row in array]
    return Result(title, [str(c) for c in columns], [str(r) for r in rows], finite, note, **more)


def checkpoints_of(run: Run) -> list[tuple[int, tuple[Transformer, ...]]]:
    """The run's checkpoints by step, none where it was not kept."""
    return load_checkpoints(run.path) if run.path is not None else []


def seed_names(run: Run) -> list[str]:
    """A row for each trained model of a run."""
    return [f"seed {seed}" for seed in run.seeds]


def compiled_like(construction: Construction, model: Any) -> Transformer:
    """The construction in the shape of `model` where it fits, so that both share compilations."""
    if not isinstance(model, Transformer):
        return construction.reference
    try:
        found = compile_program(construction.program, config=model.config)
    except ProgramError:
        return construction.compile().model
    reference = construction.reference
    if found.config.max_heads > reference.config.max_heads and one_mask(reference, found):
        return with_masks_of(found, reference)  # heads without weights see what the others do
    return found


def own_near_misses(construction: Construction) -> dict[str, Transformer]:
    """The construction's near-misses, by name, in the shape of its counterpart.

    For figures: what they would look like if the model ran another algorithm.
    """
    return {
        name: model
        for name, (model, base) in construction.near_misses().items()
        if isinstance(model, Transformer)
        and base == construction
        and model.config == construction.trained_shape
    }


def too_many_weights(run: Run, probe: str, most: int | None = None) -> str:
    """Why models have too many weights for a probe, in one phrase; "" where they have not."""
    model = run.models[0]
    if missing := no_weights(model):
        return missing
    most = MOST_WEIGHTS if most is None else most
    weights = ParameterVector(run.construction, model).theta.size
    if weights > most:
        return f"the model has {weights} weights, {probe} takes at most {most}"
    return ""


def unknown_fit(run: Run) -> str:
    """Why a run says nothing of its fit, in one phrase; "" where it does."""
    return UNKNOWN_START if run.recipe is None else ""


def in_its_precision(measure: Callable[[Run, int], Result]) -> Callable[[Run, int], Result]:
    """A measurement in the precision that the run was fitted in: weights are drawn again in it."""

    @wraps(measure)
    def inside(run: Run, seed: int) -> Result:
        theta = ParameterVector(run.construction, run.models[0]).theta
        with jax.enable_x64(str(theta.dtype) == "float64"):
            return measure(run, seed)

    return inside


def batch_size(flat: ParameterVector, most: int, passes: int = 16) -> int:
    """As many examples as there is time for: fewer of large models, and of long predictions.

    `passes` is small where the batch is taken often.
    """
    one = flat.construction.task.sample(jax.random.key(0), 1)
    long = 16 * most // flat.outcomes(one)
    return int(np.clip(min(2**21 * passes // flat.theta.size, long), 16, most))


#: Standard errors by which a difference is more than chance.
SURE = 3


def larger(first: Array, second: Array) -> bool:
    """Whether losses of the same examples are larger in the mean, by `SURE` standard errors."""
    gap = np.asarray(first, float) - np.asarray(second, float)
    return bool(gap.mean() > SURE * gap.std(ddof=1) / np.sqrt(len(gap)))
