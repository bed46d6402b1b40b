"""Compiled programs that an earlier command kept, found again without tracing them.

JAX's own cache is asked with the text of a lowered program, so that every command traces and lowers
all of them anew, which takes several times longer than running them. Here a program is named by
what it is made of: the function, the values of its static arguments and of whatever it closes over,
shapes and dtypes of the others, JAX's settings, the compiler's options, every source file of our
packages, and the versions of the others. The same name is the same program.

What cannot be named like this (a class of another package, whose source is not read here) is
compiled as ever and not kept. So is everything where there is more than one device. A file that is
damaged counts as none. Loading a program runs machine code: see `synthetic.compilation` for who can
write to the folder.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
import threading
import types
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from inspect import getattr_static, signature
from pathlib import Path
from typing import Any

#: The packages whose source is part of every name.
OURS = ("constructions", "synthetic", "probes")
#: Those whose version is.
OTHERS = ("jax", "jaxlib", "flax", "optax", "numpy")
_MODULES = {*OURS, *OTHERS, *sys.stdlib_module_names} - {"__main__"}


class Kept:
    """Where programs are kept, and those that this process has.

    Attributes:
        folder: None where nothing is kept.
        found: programs of this process, by what JAX tells programs apart.
    """

    folder: Path | None = None
    found: dict[Any, Callable[..., Any]] = {}


def free_programs() -> None:
    """Give back the memory of all programs of this process; what was kept is read again."""
    import jax

    Kept.found.clear()
    jax.clear_caches()


class NoName(Exception):
    """A value that a program depends on cannot be written down."""


def call_kept(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    often: bool,
    compiler: Callable[..., Mapping[str, Any]],
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
) -> Any:
    """`jax.jit(function, ...)(*args, **kwargs)`, by a kept program where there is one.

    Args:
        function: what `jit` takes.
        args, kwargs: what it is called with.
        often: how well it is to be compiled.
        compiler: `often` -> the compiler's options.
        static_argnums, static_argnames: those of `jit`.
    """
    import jax

    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    positions = [*signature(function).parameters]
    numbers = {*numbers, *(positions.index(name) for name in names)}
    fixed = {n: args[n] for n in sorted(numbers) if n < len(args)}
    named = {name: kwargs[name] for name in sorted(kwargs) if name in names}
    given = [a for n, a in enumerate(args) if n not in fixed]
    given_by_name = {name: a for name, a in kwargs.items() if name not in named}
    leaves, tree = jax.tree.flatten((given, given_by_name))
    shapes = tuple(map(_shape, leaves))
    settings = (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    same = (function, often, *fixed.items(), *named.items(), tree, shapes, settings)
    if same not in Kept.found:
        identity = (function, fixed, named, _Shapes((given, given_by_name)))

        def flat(*leaves: Any) -> Any:
            dynamic, by_name = jax.tree.unflatten(tree, leaves)
            rest = iter(dynamic)
            full = [fixed[n] if n in fixed else next(rest) for n in range(len(args))]
            return function(*full, **named, **by_name)

        flat.__name__ = function.__name__
        Kept.found[same] = compile_kept(
            flat, identity, leaves, compiler_options=dict(compiler(often=often)) or None
        )
    return Kept.found[same](*leaves)


def compile_kept(
    function: Callable[..., Any], identity: Any, args: Iterable[Any], **options: Any
) -> Callable[..., Any]:
    """`jax.jit(function, **options).lower(*args).compile()`, or what an earlier command kept.

    Args:
        function: what to compile.
        identity: all that it closes over, as values that say what they are.
        args: of the program, as trees of arrays; the result takes arguments of these shapes.
        options: of `jax.jit`.
    """
    import jax

    args = tuple(args)
    path = None
    if Kept.folder is not None and len(jax.devices()) == 1:
        with suppress(NoName):
            name = _digest(sources(), _settings(), options, identity, _Shapes(args))
            path = Kept.folder / f"{function.__name__.strip('<>')}-{name}.program"
            with suppress(Exception):  # missing, cut off, or of another kind: compiled again
                return _read(path)
            function = _renamed(function, f"{path.stem[:-24]}")
    _listen()
    _Here.loaded = False
    program = jax.jit(function, **options).lower(*args).compile()
    # what JAX's own cache gave lacks the machine code that would have to be written
    if path is not None and not _Here.loaded:
        with suppress(Exception):  # no program is lost by it
            _write(path, program)
    return program


class _Local(threading.local):
    """Whether JAX's own cache gave this thread a program since it was last asked."""

    loaded = False


_Here = _Local()


@cache
def _listen() -> None:
    import jax

    def notice(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _Here.loaded = True

    jax.monitoring.register_event_listener(notice)


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under a name that JAX's own cache has no other program by."""

    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__name__ = name.replace("-", "_")
    return renamed


def _read(path: Path) -> Callable[..., Any]:
    from jax.experimental.serialize_executable import deserialize_and_load

    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError(f"{path}: cut off")
    found = deserialize_and_load(*pickle.loads(zlib.decompress(data[32:])))
    os.utime(path)  # those that were not used for longest make room
    return found


def _write(path: Path, program: Any) -> None:
    from jax.experimental.serialize_executable import serialize

    data = zlib.compress(pickle.dumps(serialize(program)), 1)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(data).digest() + data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _shape(leaf: Any) -> tuple[Any, ...]:
    """What of an argument a program depends on; ValueError for what is no array or number."""
    import jax

    aval: Any = jax.typeof(leaf)
    return aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))


class _Shapes:
    """A value of whose arrays only shapes and dtypes count; all else of it does, numbers too."""

    def __init__(self, value: Any) -> None:
        self.value = value


@cache
def sources() -> str:
    """Our source files and the versions of the packages below them."""
    found = hashlib.sha256(sys.version.encode())
    root = Path(__file__).parents[1]
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    for package in OTHERS:
        with suppress(PackageNotFoundError):
            found.update(f"{package} {version(package)}\0".encode())
    return found.hexdigest()


def _settings() -> list[str]:
    """JAX's settings, as they are in this thread, and those of XLA."""
    import jax

    names = [n for n in jax.config.values if "cache" not in n and "log" not in n]
    told = os.environ.get("XLA_FLAGS", "")
    return [told, *(f"{name}={getattr(jax.config, name, None)!r}" for name in sorted(names))]


def _digest(*values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        _say(found.update, value, arrays=True)
    return found.hexdigest()[:40]


def _say(tell: Callable[[bytes], object], value: Any, arrays: bool) -> None:
    """Tells all that a value is, so that different values never tell the same.

    Raises:
        NoName: it is of a kind that is not known here, or of a module of someone else's.
    """
    import jax
    import numpy as np

    def begin(kind: str, size: int) -> None:
        tell(f"\1{kind}\2{size}\3".encode())

    def each(kind: str, items: Iterable[Any]) -> None:
        items = list(items)
        begin(kind, len(items))
        for item in items:
            _say(tell, item, arrays)

    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        text = value if isinstance(value, bytes) else repr(value).encode()
        begin(f"{type(value).__name__}", len(text))
        tell(text)
    elif isinstance(value, _Shapes):
        _say(tell, value.value, arrays=False)
    elif isinstance(value, np.ndarray | np.generic | jax.Array) and not arrays:
        each("shape", map(str, _shape(value)))
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.extended) or value.dtype.hasobject:
            raise NoName
        array = np.asarray(value)
        each("array", [array.shape, str(array.dtype), array.tobytes()])
    elif isinstance(value, np.dtype):
        each("dtype", [str(value)])
    elif isinstance(value, tuple | list):
        each(_place(type(value)), value)
    elif isinstance(value, Mapping):
        each(_place(type(value)), (part for item in value.items() for part in item))
    elif isinstance(value, set | frozenset):
        each(type(value).__name__, sorted(map(_digest, value)))
    elif isinstance(value, Path):
        each("path", [str(value)])
    elif isinstance(value, type):
        each("type", [_place(value)])
    elif isinstance(value, partial):
        each("partial", [value.func, value.args, value.keywords])
    elif isinstance(value, types.MethodType):
        each("method", [value.__self__, value.__func__])
    elif isinstance(value, types.FunctionType):
        each("function", [_place(value), *_closed_over(value)])
    elif isinstance(value, types.BuiltinFunctionType) and value.__self__ is sys.modules.get(
        value.__module__
    ):
        each("function", [_place(value)])
    elif is_dataclass(value) or isinstance(value, _nnx("Module")):
        each(_place(type(value)), _attributes(value).items())
    elif isinstance(value, _nnx("Variable")):
        variable: Any = value
        each(_place(type(value)), [variable.get_value(), variable.get_metadata()])
    elif callable(wrapped := getattr(value, "__wrapped__", None)):  # a function under `jax.jit`
        each("wrapped", [_place(type(value)), wrapped])
    else:
        raise NoName


def _nnx(name: str) -> Any:
    """A class of `flax.nnx`; where that is not imported there are no objects of it."""
    return getattr(sys.modules.get("flax.nnx"), name, ())


def _place(value: Any) -> str:
    """Module and name of a class or function whose source is known."""
    module = getattr(value, "__module__", None) or ""
    if module.partition(".")[0] not in _MODULES:
        raise NoName
    code = getattr(value, "__code__", None)
    return f"{module}:{value.__qualname__}:{code.co_firstlineno if code else ''}"


def _closed_over(function: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [cells, function.__defaults__, function.__kwdefaults__]


def _attributes(value: Any) -> dict[str, Any]:
    """What an object was made of: its fields, and what else it holds that is not made of them."""
    named = {f.name for f in fields(value)} if is_dataclass(value) else set()
    found = {name: getattr(value, name) for name in sorted(named)}
    for name, held in sorted(getattr(value, "__dict__", {}).items()):
        made = isinstance(getattr_static(type(value), name, None), cached_property)
        if name not in named and not made and not name.startswith(("_made", "_pytree", "_object")):
            found[name] = held
    return found
