"""Set-up shared by all tests: types checked at run time, fixed seeds, no display, float64."""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Before jax or matplotlib is imported; the commands that tests start inherit both.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two workers share a GPU
# Tests compile far more than they run, and compile faster without optimisation. A flag that XLA
# does not know stops the process, so each is set only for versions that are known to have it.
os.environ.setdefault(
    "XLA_FLAGS",
    {
        "0.10": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true",
        "0.12": "--xla_backend_optimization_level=0",
    }.get(version("jaxlib")[:4], ""),
)

# Compiled programs are kept from run to run, and shared by the workers and the commands they start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jaxtyping
import pytest

# Every annotation of ours, shapes included, is checked at each call. Must come before any import
# of the three packages.
jaxtyping.install_import_hook(["constructions", "synthetic", "probes"], "beartype.beartype")

# The first example of a property compiles, so a deadline would measure XLA.
hypothesis.settings.register_profile(
    "orrery", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("orrery")


def pytest_configure(config: pytest.Config) -> None:
    """Programs that were not used for longest make room, once for all workers."""
    if not hasattr(config, "workerinput"):
        from synthetic.compilation import clear_up

        clear_up(Path(__file__).parents[1] / ".pytest_cache" / "programs", 512 * 2**20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: begun last, the longest of them would leave the other workers idle."""
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


def pytest_collection_finish() -> None:
    """Garbage is looked for less often, and never among the million objects imported."""
    gc.collect()
    gc.freeze()
    from synthetic.compilation import collect_rarely

    collect_rarely()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops compiled programs now and then, file by file.

    Each takes some places in the process's table of memory maps, which Linux limits to 65530: XLA
    crashes in the middle of a suite that has as many tests as this one.
    """
    maps = Path("/proc/self/maps")
    if nextitem is None or nextitem.path == item.path or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in float64: JAX's default float is double for its length."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def nltk_data() -> Path:
    """The folder with nltk's data (`corpora/treebank`), named by ORRERY_NLTK_DATA."""
    named = os.environ.get("ORRERY_NLTK_DATA")
    if not named:
        pytest.skip("ORRERY_NLTK_DATA does not name a folder that holds nltk's corpora/treebank")
    folder = Path(named)
    if not (folder / "corpora" / "treebank").is_dir():
        pytest.fail(f"ORRERY_NLTK_DATA={named} holds no corpora/treebank")
    return folder
