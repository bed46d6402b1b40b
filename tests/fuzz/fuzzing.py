"""Properties of random inputs: a few examples in the suite, thousands with ORRERY_FUZZ set.

    @fuzz(quick=20, share=0.25, problem=problems())
    def test_something(problem): ...

In the suite a property sees the same `quick` examples every time. With ORRERY_FUZZ=N it sees
share x N new ones, in rounds of hypothesis; what fails is shrunk, kept once for each place in the
code that it fails at, and the rounds go on. ORRERY_FUZZ_SEED repeats a run. `COUNTS` is printed at
the end (see `tests/conftest.py`).
"""

import functools
import gc
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies
from hypothesis.internal.conjecture import engine

ROUND = 100
engine.MAX_SHRINKING_SECONDS = 30  # five minutes by default, which one processor does not have
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
COUNTS: Counter[str] = Counter()
SECONDS: Counter[str] = Counter()


@functools.cache
def examples() -> int:
    """N of ORRERY_FUZZ, 0 for the few of the suite."""
    text = os.environ.get("ORRERY_FUZZ", "").strip() or "0"
    if not text.isdecimal():
        raise pytest.UsageError(f"ORRERY_FUZZ={text}: must be a number of examples")
    return int(text)


@functools.cache
def seed() -> int:
    """The seed of a long run: ORRERY_FUZZ_SEED, else another one every time."""
    return int(os.environ.get("ORRERY_FUZZ_SEED") or random.SystemRandom().randrange(10**6))


def fuzz(*, quick: int, share: float, **drawn: Any) -> Callable:
    """A test of a property of what the strategies draw; see the module."""

    def decorate(prop: Callable) -> Callable:
        name = prop.__name__.removeprefix("test_")

        @functools.wraps(prop)
        def counted(**own: Any) -> None:
            COUNTS[name] += 1
            prop(**own)

        def tried(**own: Any) -> None:
            own = {"deadline": None, "database": None, "phases": PHASES, **own}
            own["suppress_health_check"] = list(HealthCheck)
            settings(**own)(given(**drawn)(counted))()

        def test() -> None:
            start = time.process_time()
            try:
                if not examples():
                    tried(max_examples=quick, derandomize=True)
                else:
                    _rounds(name, max(1, round(share * examples())), counted, drawn)
            finally:
                SECONDS[name] += time.process_time() - start

        test.__name__, test.__doc__, test.__module__ = prop.__name__, prop.__doc__, prop.__module__
        return test

    return decorate


def _rounds(name: str, wanted: int, prop: Callable, drawn: Any) -> None:
    """Rounds of new examples; fails at the end with all that was found."""
    found: dict[str, str] = {}
    print(f"\n{name}: {wanted} examples, seed {seed()}", flush=True)
    for number in range(-(-wanted // ROUND)):
        own = settings(
            max_examples=min(ROUND, wanted - number * ROUND),
            deadline=None, database=None, derandomize=False, phases=PHASES,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=True,
        )  # fmt: skip
        run = hypothesis.seed(seed() * 10_000 + number)(own(given(**drawn)(prop)))
        try:
            run()
        except Exception as error:
            for one in error.exceptions if isinstance(error, ExceptionGroup) else [error]:
                place = _place(one)
                if place not in found:
                    found[place] = _described(one)
                    print(f"\n{name}, round {number}: {place}\n{found[place]}", flush=True)
                COUNTS[f"{name}: {place}"] += 1
        _forget()
    if found:
        pytest.fail(f"{len(found)} kinds of failure\n" + "\n\n".join(found.values()), pytrace=False)


def _place(error: BaseException) -> str:
    """Where an error was raised: its class, and the last line of the project on the way."""
    root = str(Path(__file__).parents[2])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    frames = [f for f in frames if ".venv" not in f.filename]
    last = frames[-1] if frames else None
    where = "" if last is None else f"{last.filename.removeprefix(root + '/')}:{last.lineno}"
    return f"{type(error).__name__} at {where}"


def _described(error: BaseException) -> str:
    """The message and the example that hypothesis adds to it."""
    notes = "\n".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {str(error)[:2000]}\n{notes}"


def _forget() -> None:
    """Drops compiled programs now and then: each takes places in the table of memory maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


def built(draw_one: Callable) -> Callable:
    """As `hypothesis.strategies.composite`, where our own classes are made on the way.

    Type checks at run time draw random numbers, which hypothesis forbids strategies to do.
    """

    @functools.wraps(draw_one)
    def draw_it(draw: Any, *arguments: Any, **settings: Any) -> Any:
        state = random.getstate()
        try:
            return draw_one(draw, *arguments, **settings)
        finally:
            random.setstate(state)

    return strategies.composite(draw_it)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Quarters between -1 and 1, zeros among them."""
    return np.random.default_rng(seed).integers(-4, 5, shape) / 4


def summary() -> list[str]:
    """Examples of every property so far, for the end of the report."""
    if not COUNTS:
        return []
    lines = [f"seed {seed()}" if examples() else "the examples of the suite; more with `make fuzz`"]
    for name, count in sorted(COUNTS.items()):
        took = f" in {SECONDS[name]:.1f} s of processor time" if name in SECONDS else ""
        lines.append(f"{count:7d} {name}{took}")
    return lines
