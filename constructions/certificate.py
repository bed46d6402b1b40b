"""How far a compiled model is from its algorithm: certificates, and `verify`, which makes them.

A certificate compares every named value of `Construction.trace` that a model keeps, and lists
which those are. Its tolerance is a promise of at most `LARGEST_TOLERANCE`; where rounding alone may
exceed it, the certificate reads "not certified" in that dtype and gives the reason.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, ArrayLike

from synthetic.compilation import compile_once

#: Above this relative error a certificate would be worthless, whatever the rounding error is.
LARGEST_TOLERANCE = 1e-2
#: Sizes of the batches that are compared besides the one asked for.
SMALL_BATCHES = (1, 7)
DTYPES = ("float64", "float32")

Verdict = Literal["passed", "failed", "not certified"]


@dataclass(frozen=True)
class Error:
    """How far a compiled model is from its algorithm, in one dtype.

    Attributes:
        dtype: "float64" or "float32".
        max_abs_error, max_rel_error: see `Certificate`.
        tolerance: of the relative error.
        worst: the named value that has the largest relative error.
        batch: the size of the batch in which it has.
        reason: why this dtype cannot be certified; empty where it can.
    """

    dtype: str
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    worst: str
    batch: int = 0
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """ "passed", "failed" (also for NaN), or "not certified" where there is a reason."""
        if self.reason or not self.tolerance <= LARGEST_TOLERANCE:
            return "not certified"
        return "passed" if self.max_rel_error <= self.tolerance else "failed"

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance; NaN is not."""
        return self.verdict == "passed"

    def __str__(self) -> str:
        line = f"{self.dtype} {self.verdict}: "
        if not self.worst:
            return f"{line}not run"
        return line + (
            f"relative error {self.max_rel_error:.1e} in {self.worst}, "
            f"tolerance {self.tolerance:.1e}"
        )


@dataclass(frozen=True, repr=False)
class Certificate:
    """Errors of a compiled model against `trace` on fresh inputs, per dtype, and their domain.

    `max_rel_error` is the largest absolute error of a named value over the root mean square of
    that value (over batch, steps and entries; over 1 where the value is 0 throughout).

    Attributes:
        construction: as text.
        errors: one a dtype.
        domain: what the inputs were, see `Construction.domain`.
        compared: the named values that were compared.
        unplaced: those that no token holds, see `Construction.unplaced`.
        batches: the sizes of the batches, in order.
    """

    construction: str
    errors: tuple[Error, ...]
    domain: Mapping[str, float | str] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    unplaced: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """ "failed" if a dtype failed, else "passed" if one passed, else "not certified"."""
        verdicts = {error.verdict for error in self.errors}
        if "failed" in verdicts:
            return "failed"
        return "passed" if "passed" in verdicts else "not certified"

    @property
    def passed(self) -> bool:
        """Whether some dtype passed and none failed."""
        return self.verdict == "passed"

    def to_json(self) -> dict[str, Any]:
        """As plain data: one entry a dtype."""
        return {
            "construction": self.construction,
            "verdict": self.verdict,
            "passed": self.passed,
            "compared": list(self.compared),
            "unplaced": list(self.unplaced),
            "batches": list(self.batches),
            "domain": dict(self.domain),
            "dtypes": {
                e.dtype: asdict(e) | {"verdict": e.verdict, "passed": e.passed} for e in self.errors
            },
        }

    def _repr_html_(self) -> str:
        from synthetic.display import Mark, Table, Text, shown

        columns = ("dtype", "relative error", "tolerance", "absolute error", "worst value", "")
        rows = [
            (
                e.dtype, e.max_rel_error, e.tolerance, e.max_abs_error, e.worst or "not run",
                Mark(e.verdict),
            )
            for e in self.errors
        ]  # fmt: skip
        facts = [("compared", ", ".join(self.compared))]
        facts += [("held by no token", ", ".join(self.unplaced))] if self.unplaced else []
        facts += [("batches of", ", ".join(map(str, self.batches))), *self.domain.items()]
        reasons = [Text(f"{e.dtype}: {e.reason}.") for e in self.errors if e.reason]
        title = f"Certificate of {self.construction}"
        return shown(title, Mark(self.verdict), Table(columns, rows), *reasons, Table((), facts))

    def __repr__(self) -> str:
        each = ", ".join(f"{e.dtype} {e.verdict} ({e.max_rel_error:.0e})" for e in self.errors)
        return f"<Certificate of {self.construction.split('(')[0]}: {each}>"

    def __str__(self) -> str:
        lines = [f"{textwrap.shorten(self.construction, 90)}: {self.verdict}"]
        for error in self.errors:
            lines.append(f"  {error}")
            if error.reason:
                lines.append(f"    {error.reason}")
        lines.append(f"  compared: {', '.join(self.compared)}")
        if self.unplaced:
            lines.append(f"  held by no token: {', '.join(self.unplaced)}")
        lines.append(f"  batches of {', '.join(map(str, self.batches))}")
        for name, fact in self.domain.items():
            lines.append(f"  {name}: {fact if isinstance(fact, str) else f'{fact:.4g}'}")
        return "\n".join(lines)


def verify(
    construction: Any,
    *,
    dtypes: Iterable[str] = DTYPES,
    batch: int = 256,
    seed: int = 0,
    model: Callable[[str], Any] | None = None,
) -> Certificate:
    """Compare a construction with its algorithm on fresh inputs of its task.

    The reference is always `trace` in float64, on the same inputs. All of its values are compared
    with `read` except those in `Construction.unplaced`, and "prediction" with `apply` as well. In
    one dtype batches of `SMALL_BATCHES` are compared too, so that nothing can depend on how
    many inputs there are.

    Args:
        construction: any object of that protocol.
        dtypes: "float64" and "float32", or one of them.
        batch: number of inputs, at least 1.
        seed: of the inputs.
        model: dtype -> model to test instead of the compiled one.

    Raises:
        ValueError: an argument is out of range; a setting of the construction is not hashable; the
            named values of trace, places and `unplaced` do not fit each other.
    """
    dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"dtypes is {dtypes!r}, must be one or both of {', '.join(DTYPES)}")
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise ValueError(f"batch is {batch!r}, must be an integer of at least 1")
    check_settings(construction)
    errors: list[Error] = []
    domain: Mapping[str, float | str] = {}
    compared: tuple[str, ...] = ()
    small = tuple(n for n in SMALL_BATCHES if n != batch)
    for name in dtypes:
        pairs: list[tuple[dict[str, Any], dict[str, list[Any]]]] = []
        tolerance = _tolerance(construction, name)
        if tolerance == np.inf:  # what cannot be represented is not run
            nothing = float("nan")
            reason = _reason(construction, name, tolerance)
            errors.append(Error(name, nothing, nothing, tolerance, "", batch, reason))
            continue
        subject: Any = None
        for size in (batch, *(() if compared else small)):
            with jax.enable_x64(True):
                # both sides see inputs that the narrower dtype can hold
                inputs = tuple(_through(a, name) for a in _inputs(construction, seed, batch, size))
                expected = jax.device_get(_trace(construction, *inputs))
                _check_trace(construction, expected)
                domain = domain or construction.domain(*map(jax.device_put, inputs))
            with jax.enable_x64(name == "float64"):
                given = tuple(_narrow(a, name) for a in inputs)
                if subject is None:
                    subject = construction.compile(name).model if model is None else model(name)
                read, prediction = jax.device_get(_values(construction, subject, *given))
            compared = _check_names(construction, expected, read)
            found = {n: [read[n]] if n in read else [] for n in compared}
            found["prediction"].append(prediction)
            pairs.append((expected, found))
        errors.append(_error(construction, name, compared, pairs, tolerance))
    return Certificate(
        construction=repr(construction),
        errors=tuple(errors),
        domain=domain,
        compared=compared,
        unplaced=tuple(construction.unplaced),
        batches=(batch, *small),
    )


def assert_exact(construction: Any, **options: Any) -> Certificate:
    """`verify` for a test: the certificate, or an error that shows it.

        def test_my_construction():
            assert_exact(MyConstruction(dim=3))

    Args:
        construction, **options: of `verify`.

    Raises:
        AssertionError: a dtype failed, or none passed.
        ValueError: as `verify`.
    """
    certificate = verify(construction, **options)
    if not certificate.passed:
        raise AssertionError(str(certificate))
    return certificate


def check_settings(construction: Any) -> None:
    """Raise ValueError unless the construction can be a static argument of jitted functions."""
    try:
        hash(construction)
    except TypeError as error:
        kind = type(construction).__name__
        settings = getattr(construction, "__dataclass_fields__", {})
        for name in settings or getattr(construction, "__dict__", {}):
            value = getattr(construction, name)
            try:
                hash(value)
            except TypeError:
                shown = textwrap.shorten(repr(value), 60)
                raise ValueError(
                    f"{kind}.{name} is {shown}, of type {type(value).__name__}: settings must be "
                    "hashable, such as numbers, strings and tuples of them"
                ) from error
        raise ValueError(f"{kind} is not hashable, must be a frozen dataclass") from error


@compile_once(static_argnums=0)
def _trace(construction: Any, *inputs: ArrayLike) -> Any:
    return construction.trace(*inputs)


@compile_once(static_argnums=0)
def _values(construction: Any, model: Any, *inputs: ArrayLike) -> tuple[dict[str, Array], Array]:
    """All that is read, and the prediction as users get it, of the tokens that are read alone."""
    return construction.read(model, *inputs), construction.apply(model, *inputs)


def _inputs(construction: Any, seed: int, batch: int, size: int) -> tuple[np.ndarray, ...]:
    """`sample(seed, batch)`, or the first `size` inputs of another draw, as large where it can."""
    key = jax.random.key(seed)
    if size == batch:
        return tuple(map(np.asarray, construction.sample(key, batch)))
    drawn = construction.sample(jax.random.fold_in(key, size), max(batch, size))
    return tuple(np.asarray(a)[:size] for a in drawn)


def _through(a: np.ndarray, dtype: str) -> np.ndarray:
    return a.astype(dtype).astype(a.dtype) if np.issubdtype(a.dtype, np.floating) else a


def _narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(dtype)
    return array.astype(np.int32) if array.dtype == np.int64 and dtype == "float32" else array


def _tolerance(construction: Any, dtype: str) -> float:
    tolerance = float(construction.tolerance(dtype))
    if not tolerance >= 0:
        who = type(construction).__name__
        raise ValueError(f"{who}.tolerance({dtype!r}) is {tolerance}, must be at least 0")
    return tolerance


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _check_trace(construction: Any, expected: Any) -> None:
    who = type(construction).__name__
    if not isinstance(expected, Mapping):
        raise ValueError(
            f"{who}.trace gives a {type(expected).__name__}, must give {{name: array}}"
        )
    if "prediction" not in expected:
        raise ValueError(f"{who}.trace has no 'prediction', only {_listed(expected)}")
    for name, value in expected.items():
        if not value.size:
            raise ValueError(
                f"{who}.trace: '{name}' is empty, of shape {value.shape}: there is nothing to "
                "compare"
            )


def _check_names(
    construction: Any, expected: Mapping[str, Any], read: Mapping[str, Any]
) -> tuple[str, ...]:
    """The names that are compared; ValueError unless every value is either placed or unplaced."""
    who, unplaced = type(construction).__name__, construction.unplaced
    if isinstance(unplaced, str):
        raise ValueError(f"{who}.unplaced is {unplaced!r}, must be a tuple of names")
    for where, names in (("places", read), ("unplaced", unplaced)):
        for name in names:
            if name not in expected:
                raise ValueError(
                    f"{who}.{where}: '{name}' is no value of the trace, which has "
                    f"{_listed(expected)}"
                )
    for name in unplaced:
        if name in read or name == "prediction":
            raise ValueError(f"{who}.unplaced: '{name}' is a value that the model holds")
    for name in expected:
        if name not in read and name not in unplaced and name != "prediction":
            raise ValueError(
                f"{who}.trace: '{name}' has no place in the stream, which holds {_listed(read)}; "
                "give it one in `places`, or name it in `unplaced`"
            )
    return tuple(name for name in expected if name not in unplaced)


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def _root_mean_square(values: list[np.ndarray]) -> float:
    """Over all entries; of large and small values too, whose squares would over- or underflow."""
    flat = np.concatenate([np.abs(v).ravel() for v in values])
    largest = float(flat.max())
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.mean((flat / largest) ** 2)))


def _error(
    construction: Any,
    dtype: str,
    compared: Iterable[str],
    pairs: list[tuple[dict[str, Any], dict[str, list[Any]]]],
    tolerance: float,
) -> Error:
    worst, largest, absolute, size = "", -1.0, 0.0, 0
    reason, limit = "", float(np.finfo(dtype).max)
    for name in compared:
        values = [_wide(expected[name]) for expected, _ in pairs]
        scale = _root_mean_square(values) or 1.0
        wrong = sum(int((~np.isfinite(v)).sum()) for v in values)
        entries = sum(v.size for v in values)
        reach = max(float(np.abs(v).max()) for v in values)
        if wrong:
            reason = reason or (
                f"the algorithm's own '{name}' is not finite at {wrong} of {entries} entries"
            )
        elif reach > limit:
            reason = reason or f"'{name}' reaches {reach:.1e}, {dtype} holds at most {limit:.1e}"
        for wanted, (_, found) in zip(values, pairs, strict=True):
            for value in found[name]:
                if value.shape != wanted.shape:
                    raise ValueError(
                        f"'{name}' has shape {value.shape} in the model and {wanted.shape} in the "
                        "trace"
                    )
                with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN
                    error = float(np.max(np.abs(_wide(value) - wanted)))
                    relative = error / scale
                if np.isnan(largest):  # NaN takes the place, and keeps it
                    continue
                if not relative <= largest:
                    worst, largest, absolute, size = name, relative, error, len(wanted)
    reason = reason or _reason(construction, dtype, tolerance)
    return Error(dtype, absolute, largest, tolerance, worst, size, reason)


def _reason(construction: Any, dtype: str, tolerance: float) -> str:
    """Why a tolerance is too large to promise anything; empty where it is not."""
    if tolerance <= LARGEST_TOLERANCE:
        return ""
    condition = construction.conditions(dtype)
    bound = f"the error may reach {tolerance:.2g}, more than {LARGEST_TOLERANCE:g}"
    return bound + (f": {condition}" if condition else "")
