"""Shared by the benchmarks: paired timing, the machine in words, results as JSON."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "platform": jax.devices()[0].client.platform_version.partition("\n")[0],
        "load": round(os.getloadavg()[0], 1),
    }


def paired(runs: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of every run, in turns so that all see the same machine; the first is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median and range of the ratios of paired timings."""
    ratios = np.asarray(slow) / np.asarray(fast)
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    return {"median": float(middle), "min": float(low), "max": float(high)}


def report(name: str, figures: dict[str, Any]) -> None:
    """Print figures and, with --save, keep them under `results/`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    text = json.dumps({"machine": machine(), **figures}, indent=2)
    print(text)
    if parser.parse_args().save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}_{jax.default_backend()}.json").write_text(text + "\n")
