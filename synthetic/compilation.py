"""How hard XLA works on a program, and where compiled programs are kept.

Most programs of a report, a certificate or a probe run once, and XLA takes a hundred times longer
to compile them than they take to run. `compile_once` is `jax.jit` for those; `jax.jit` itself is
for training loops, benchmarks and what users call. Nothing else decides how a program is compiled.

`keep_programs` lets the command find again what it compiled before. It imports no JAX.
"""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial, wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])
Often = bool | Callable[..., bool]

# Compiler options of XLA on CPUs. One that a jaxlib does not know is an error, so they are given to
# the versions on which they were tried, by the first two numbers of the version.
#
# Measured on predictions, samples, roll-outs and sensitivities of `gradient-descent` (2^14 inputs):
# the first group halves the time of compilation and leaves the speed as it is, both groups together
# divide the time by 7 to 10, and the program is 3 to 6 times slower.
_FREE = {
    "0.10": {
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    },
    "0.12": {
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_parallel_codegen_split_count": 1,
    },
}
_SLOWER = {"xla_backend_optimization_level": 0}
_FULLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

#: What is kept takes at most so many bytes on disk when a command begins. The report of a family
#: adds about 300 programs of 10 kB.
LARGEST_CACHE = 256 * 2**20


@overload
def compile_once(function: F, /, *, often: Often = False, **options: Any) -> F: ...


@overload
def compile_once(*, often: Often = False, **options: Any) -> Callable[[F], F]: ...


def compile_once(function: Any = None, /, *, often: Often = False, **options: Any) -> Any:
    """`jax.jit` for a program that runs a few times: it is compiled quickly, and runs more slowly.

    On accelerators, on versions of jaxlib that were not tried, and where it is part of a larger
    program (under `jit`, `grad`, `vmap`), it is `jax.jit` and nothing else. Results are those of
    `jax.jit` up to the order of rounding.

    Args:
        function: what to compile; without it, a decorator is returned.
        often: it runs about ten times or more for every shape of its inputs, or on large ones:
            leave out only what costs no speed. A function of its arguments says so for each call.
        **options: those of `jax.jit`, such as static_argnums and static_argnames.
    """
    if function is None:
        return partial(compile_once, often=often, **options)

    @cache
    def compiled(low_effort: bool, often: bool) -> Callable[..., Any]:
        import jax

        chosen = compiler_options(often=often) if low_effort else {}
        return jax.jit(function, compiler_options=chosen or None, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _within_a_program(args, kwargs):
            return compiled(False, False)(*args, **kwargs)
        many = often(*args, **kwargs) if callable(often) else often
        return compiled(True, bool(many))(*args, **kwargs)

    def cache_size() -> int:
        ways = ((False, False), (True, False), (True, True))
        return sum(compiled(*way)._cache_size() for way in ways)

    call.__dict__["_cache_size"] = cache_size  # how often it was compiled, as `jax.jit` has it
    return call


def compiler_options(*, often: bool = False) -> dict[str, bool | int]:
    """What `compile_once` tells XLA, by the back end and the version of jaxlib."""
    import jax

    known = _FREE.get(_jaxlib())
    if known is None or jax.default_backend() != "cpu":
        return {}
    return full_effort() | known if often else known | _SLOWER


def full_effort() -> dict[str, Any]:
    """What to tell XLA of a program that runs for long, after `compile_quickly`; else nothing."""
    import jax

    return dict(_FULLY) if jax.config.read("jax_disable_most_optimizations") else {}


def compile_quickly() -> None:
    """Let XLA compile quickly what does not say how it is compiled, such as single operations.

    For commands that only look; nothing where XLA_FLAGS says how, where JAX could use an
    accelerator, or on versions of jaxlib that were not tried.
    """
    accelerators = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    if (
        _jaxlib() in _FREE
        and "optimization_level" not in os.environ.get("XLA_FLAGS", "")
        and not any(find_spec(name) for name in accelerators)
    ):
        _configure(jax_disable_most_optimizations=True)


def _jaxlib() -> str:
    return ".".join(version("jaxlib").split(".")[:2])


def _within_a_program(args: Any, kwargs: Any) -> bool:
    """Whether a call is traced: JAX takes compiler options of the outermost program alone."""
    import jax
    import jax.numpy as jnp
    from jax.core import Tracer

    given = (isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
    return any(given) or isinstance(jnp.zeros(()), Tracer)  # all may be constants


def keep_programs() -> Path | None:
    """Let JAX find the programs that earlier commands compiled, and keep those of this one.

    They lie in `$XDG_CACHE_HOME/orrery`, or `~/.cache/orrery`, in a folder for each version of JAX
    and each kind of processor: machine code that was loaded on a processor without its instructions
    would end the process. JAX's own key holds the program, its options and jaxlib.

    Nothing is kept, and nothing said, where ORRERY_NO_CACHE is set (and not empty or 0), where the
    folder cannot be written, is not the user's alone or its disk is nearly full. Where
    JAX_COMPILATION_CACHE_DIR names a folder, JAX keeps them there, as it was told.

    Returns:
        The folder, or None.
    """
    if os.environ.get("ORRERY_NO_CACHE", "0") not in ("", "0"):
        forget_programs()
        return None
    # what is damaged, or vanishes because another command clears up, is compiled again
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    folder = _own_folder()
    if folder is not None:
        _configure(
            jax_compilation_cache_dir=str(folder),
            jax_persistent_cache_min_compile_time_secs=0,
            jax_persistent_cache_min_entry_size_bytes=-1,
        )
    return folder


def collect_rarely() -> None:
    """Let Python look for garbage less often: tracing makes many objects and few cycles.

    It took 7 % of the time of a report.
    """
    gc.set_threshold(50_000, 20, 20)


def many(task: Any, key: Any, batch: int) -> bool:
    """For `often` of a draw: are so many inputs asked for that speed pays for compiling well?"""
    del task, key
    return batch > 4096


def forget_programs() -> None:
    """Let JAX compile everything anew, whatever is kept."""
    _configure(jax_enable_compilation_cache=False)


def _configure(**options: Any) -> None:
    """Options of JAX: by its variables as long as it is not imported, so that it need not be."""
    if jax := sys.modules.get("jax"):
        for name, value in options.items():
            jax.config.update(name, value)
    else:
        os.environ |= {name.upper(): str(value) for name, value in options.items()}


def _own_folder() -> Path | None:
    """The folder for this JAX on this machine, made and tried; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "orrery"
        machine = hashlib.sha256(processor().encode()).hexdigest()[:12]
        folder = home / f"jax-{version('jax')}-jaxlib-{version('jaxlib')}-{machine}"
        home.parent.mkdir(parents=True, exist_ok=True)
        for path in (home, folder):
            path.mkdir(exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (home, folder):  # what another user puts there would be run
            found = path.stat()
            if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
                return None
        if shutil.disk_usage(folder).free < 2 * LARGEST_CACHE:
            return None
        clear_up(home, LARGEST_CACHE)
    except (OSError, RuntimeError):  # the latter: there is no home
        return None
    return folder


@cache
def processor() -> str:
    """What machine code may depend on: the processor's instructions, or the machine's name."""
    from synthetic.files import TextError, read_text, split_lines

    with suppress(OSError, TextError):
        names = ("flags", "Features", "model name", "CPU part")
        lines = split_lines(read_text("/proc/cpuinfo"))
        found = sorted({line for line in lines if line.startswith(names)})
        if found:
            return "\n".join((platform.machine(), *found))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def clear_up(folder: Path, limit: int) -> None:
    """Remove what was not used for longest until the files below take at most `limit` bytes.

    And files that a process left empty when it was killed. Two commands may do this at once.
    """
    files: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            found = path.lstat()
            if path.is_dir() and not path.is_symlink():
                continue
            if found.st_size:
                files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
            else:
                path.unlink()
    taken = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if taken <= limit:
            break
        with suppress(OSError):
            path.unlink()
        taken -= size
