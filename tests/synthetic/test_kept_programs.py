"""What names a program tells apart, and that a kept one is found without tracing."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from synthetic import kept_programs
from synthetic.compilation import compile_once
from synthetic.kept_programs import Kept, NoName, _digest, _Shapes, compile_kept

X = np.linspace(-1, 1, 5, dtype=np.float32)
traced: list[Any] = []


@dataclass(frozen=True)
class Setting:
    size: Any
    other: Any = None

    @cached_property
    def derived(self) -> int:
        return 1

    def method(self) -> None: ...


class Pair(NamedTuple):
    a: Any
    b: Any


class Linear(nnx.Module):
    def __init__(self, size: int, kind: str = "a") -> None:
        self.kind, self.weights = kind, nnx.Param(jnp.ones(size))


class Opaque:
    pass


def closure(value: Any) -> Any:
    return lambda: value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    """Programs are kept, and the classes of this file count as ours."""
    known = {*kept_programs._MODULES, __name__.partition(".")[0]}
    monkeypatch.setattr(kept_programs, "_MODULES", known)
    monkeypatch.setattr(Kept, "folder", tmp_path)
    monkeypatch.setattr(Kept, "found", {})
    traced.clear()
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    own_cache(None)
    yield tmp_path
    own_cache(before)


def own_cache(place: str | None) -> None:
    """Where JAX's own cache is, which must not know the programs of these tests."""
    jax.config.update("jax_compilation_cache_dir", place)
    compilation_cache.reset_cache()


def different() -> list[Any]:
    return [
        None, False, 0, 0.0, -0.0, 1, 1.0, True, "1", b"1", 1j, (), [], {}, (1,), [1], (1, 1),
        ((1,), 1), {"a": 1}, {"a": 2}, {"b": 1}, {1}, {2}, Pair(1, 2), Pair(2, 1), (1, 2),
        np.arange(3), np.arange(3.0), np.arange(4), np.arange(3)[None], np.dtype("f4"), int, float,
        Setting(1), Setting(2), Setting(1, 1), Setting(Setting(1)), partial(max, 1),
        partial(max, 2), partial(min, 1), closure(1), closure(2), lambda: 1, Setting(1).method,
        Setting(2).method, Linear(2), Linear(3), Linear(2, "b"), _Shapes(np.arange(3)),
        _Shapes(np.arange(4)), _Shapes(np.arange(3.0)), _Shapes(np.float32(1)),
        Path("a"), "a", jnp.tanh, jnp.sin,
    ]  # fmt: skip


def test_different_values_have_different_names(folder: Path) -> None:
    names = [_digest(value) for value in different()]
    assert len(set(names)) == len(names)
    assert names == [_digest(value) for value in different()]  # made anew


def test_what_is_derived_and_what_a_shape_holds_count_for_nothing(folder: Path) -> None:
    used = Setting(1)
    assert used.derived and _digest(used) == _digest(Setting(1))
    assert _digest(_Shapes(X)) == _digest(_Shapes(2 * jnp.asarray(X)))
    attached = Setting(1)
    object.__setattr__(attached, "read_from_a_file", np.ones(2))
    assert _digest(attached) != _digest(Setting(1))


def test_what_has_no_name(folder: Path, monkeypatch: Any) -> None:
    for value in (Opaque(), [Opaque()], closure(Opaque()), jax.random.key(0), iter(())):
        with pytest.raises(NoName):
            _digest(value)
    monkeypatch.undo()  # of a package whose source is not read
    for value in (Setting(1), closure(1), Setting):
        with pytest.raises(NoName):
            _digest(value)


def power(number: int, x: Any, *, plus: Any = 0, name: str = "") -> dict[str, Any]:
    traced.append((number, name))
    return {"sum": (jnp.asarray(x) ** number).sum() + plus, "x": x}


compiled = compile_once(power, static_argnums=0, static_argnames="name")


def test_a_program_is_found_without_tracing(folder: Path) -> None:
    def ask(number: int, x: Any, **options: Any) -> None:
        found = compiled(number, x, **options)
        wanted = (np.asarray(x, float) ** number).sum() + options.get("plus", 0)
        assert float(found["sum"]) == pytest.approx(float(wanted), abs=1e-5)
        np.testing.assert_array_equal(found["x"], x)

    asked: list[Any] = [((2, X), {}), ((3, X), {}), ((2, X[:3]), {}), ((2, X), {"plus": 1.0})]
    asked += [((2, X), {"name": "b"}), ((2, X.astype(int)), {}), ((2, jnp.asarray(X)), {})]
    for args, options in asked:
        ask(*args, **options)
    programs = len(traced)
    assert programs == len(list(folder.iterdir())) == len(asked) - 1  # the last is the first
    Kept.found.clear()  # as in the next command
    for args, options in asked:
        ask(*args, **options)
    assert len(traced) == programs
    with jax.enable_x64(not jax.config.jax_enable_x64):  # type: ignore[attr-defined]
        ask(2, X)
    assert len(traced) == programs + 1


def test_damaged_and_foreign_files_are_none(folder: Path, monkeypatch: Any) -> None:
    assert float(compiled(2, X)["sum"]) == pytest.approx((X**2).sum())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-5], whole[:40], whole[:100] + b"\0" + whole[101:]):
        file.write_bytes(damaged)
        Kept.found.clear()
        assert float(compiled(2, X)["sum"]) == pytest.approx((X**2).sum())
        assert len(file.read_bytes()) > 100 and file.read_bytes() != damaged  # written anew
    # other sources, other versions: another name
    Kept.found.clear()
    monkeypatch.setattr(kept_programs, "sources", lambda: "changed")
    compiled(2, X)
    assert len(list(folder.iterdir())) == 2
    # a folder that cannot be written to costs nothing but time
    Kept.found.clear()
    monkeypatch.setattr(Kept, "folder", folder / "gone")
    assert float(compiled(3, X)["sum"]) == pytest.approx((X**3).sum(), abs=1e-6)


def test_what_jax_itself_kept_is_not_written(folder: Path, tmp_path_factory: Any) -> None:
    """A program from JAX's cache runs, but would lack its machine code if it were written again."""
    own_cache(str(tmp_path_factory.mktemp("own")))
    for first in (True, False, False):
        assert float(compiled(4, X)["sum"]) == pytest.approx((X**4).sum())
        assert len(list(folder.iterdir())) == first
        for file in folder.iterdir():
            file.unlink()
        Kept.found.clear()


def test_errors_and_what_is_given_away(folder: Path) -> None:
    @compile_once
    def wrong(x: Any) -> Any:
        raise ValueError("out of range")

    with pytest.raises(ValueError, match="out of range"):
        wrong(X)
    for _ in range(2):
        run = compile_kept(lambda s, y: (s + y, y), "add", (X, 1.0), donate_argnums=0)
        state = jax.device_put(X, may_alias=False)
        np.testing.assert_allclose(run(state, 1.0)[0], X + 1)
        assert state.is_deleted()
        Kept.found.clear()
    assert len(list(folder.iterdir())) == 1
