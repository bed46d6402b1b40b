"""Findings of other people's benchmarks, each with its number on these subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
#: Families with softmax heads.
SOFTMAX = ("hedge", "separate-tokens", "hyper-prototypes", "hyper-semi-supervised")


def findings(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Known findings, each with its number on these subjects; without subjects it is left out."""
    found: list[tuple[str, str]] = []

    def entries(method: str, task: str, *disguises: str) -> list[tuple[Record, Any]]:
        return [
            (r, r["methods"][method][task])
            for r in records
            if task in r["methods"].get(method, {})
            and (not disguises or r["disguise"] in disguises)
        ]

    def said(title: str, values: Any, text: str) -> None:
        if len(values):
            found.append((title, text.format(np.mean(values), len(values))))

    apart: list[float] = []
    for record, entry in entries("attribution patching", "heads"):
        exact = record["methods"].get("activation patching", {}).get("heads")
        if exact is not None:
            a, b = np.array(entry["answer"], float), np.array(exact["answer"], float)
            seen = b > max(0.01 * b.max(), 1e-9)
            apart += (a[seen] / b[seen]).tolist()
    ratios = np.array(apart)
    off = (ratios < 0.5) | (ratios > 2)
    text = "beyond a factor of 2 from the exact effect in {:.2f} of {} heads that have one; "
    text += f"under a tenth of it in {np.mean(ratios < 0.1) if apart else 0:.2f}"
    said("attribution patching is a first-order estimate", off, text)
    unused = [
        value
        for r, e in entries("linear probe", "sites")
        for value, used in zip(e["answer"], r["truth"]["sites"]["true"], strict=True)
        if not used
    ]
    said("probes find what is not used", unused, "R² {:.2f} on {} values that nobody uses")
    for method in ("zero ablation", "resample ablation"):
        missed = [e["scores"]["missed"] for _, e in entries(method, "heads", "backup")]
        said(f"a backup hides heads from {method}", missed,
             "{:.2f} of the heads with a job have no effect, in {} subjects")  # fmt: skip
    means: dict[tuple[str, int], dict[str, float]] = {}
    for r, e in entries("zero ablation", "heads", "bare", "shared"):
        own = np.array(e["answer"], float)[np.array(r["truth"]["heads"]["roles"]) == "used"]
        means.setdefault((r["family"], r["seed"]), {})[r["disguise"]] = float(own.mean())
    halves = [m["shared"] / m["bare"] for m in means.values() if len(m) == 2 and m["bare"] > 0]
    said("two heads that share a job hide one another from zero ablation", halves,
         "each shows {:.2f} of the effect of the one, in {} pairs of subjects")  # fmt: skip
    for disguise in ("bare", "sharp"):
        off = _off(entries("attribution patching", "sites", disguise))
        everything = [value for values in off.values() for value in values]
        shares = ", ".join(f"{family} {np.mean(values):.2f}" for family, values in off.items())
        text = "beyond a factor of 2 from the exact effect for {:.2f} of {} values that have one, "
        text += f"in families with softmax heads: {shares}"
        said(f"attribution patching where softmax saturates, {disguise}", everything, text)
    fits, angles = [], []
    for record, entry in entries("alignment search", "sites"):
        slots = record["truth"]["sites"]["slots"]
        for slot, value, own in zip(slots, entry["answer"], entry["overlap"], strict=True):
            if slot == "copy":
                fits.append(value > 0.5)
                angles += [np.degrees(np.arccos(min(1.0, own) ** 0.5))] if value > 0.5 else []
    text = "accuracy above a half in {:.2f} of {} places of copies that nobody reads, by subspaces "
    text += f"at {np.mean(angles) if angles else 0:.0f}° to the copy's own"
    said("alignment search finds a neighbour", fits, text)
    false = [v for _, e in entries("alignment search", "sites") for v in e.get("control", [])]
    text = f"accuracy {np.mean(np.clip(false, 0, 1)) if false else 0:.2f}, above a half for "
    text += "{:.2f} of {}: the value searched for is another one of the same algorithm"
    said("alignment search fits hypotheses that are false", np.array(false) > 0.5, text)
    leaks = [
        value
        for r, e in entries("true subspace", "sites", "superposed")
        for value, used in zip(e["answer"], r["truth"]["sites"]["true"], strict=True)
        if not used
    ]
    said("in superposition even the true subspace is not the value's alone", leaks,
         "exchanging what nobody uses moves the prediction by {:.2f} of the distance of two "
         "inputs, in {} places")  # fmt: skip
    gaps = []
    for record, entry in entries("edge attribution", "edges"):
        exact = record["methods"].get("path patching", {}).get("edges")
        if exact is not None:
            a, b = np.array(entry["answer"], float), np.array(exact["answer"], float)
            seen = b > max(0.01 * b.max(initial=0), 1e-9)
            gaps += ((a[seen] < b[seen] / 2) | (a[seen] > 2 * b[seen])).tolist()
    text = "beyond a factor of 2 from path patching for {:.2f} of {} edges that have an effect"
    said("edge attribution is a first-order estimate", gaps, text)
    return found


def _off(entries: Sequence[tuple[Record, Any]]) -> dict[str, list[bool]]:
    """Whether the estimate is beyond a factor of 2, by family, of the values that move anything."""
    found: dict[str, list[bool]] = {}
    for record, entry in entries:
        if record["family"] in SOFTMAX and "exact" in entry:
            a, b = np.array(entry["answer"], float), np.array(entry["exact"], float)
            seen = b > max(0.001 * b.max(initial=0), 1e-9)
            off = (a[seen] < b[seen] / 2) | (a[seen] > 2 * b[seen])
            found.setdefault(record["family"], []).extend(off.tolist())
    return {family: values for family, values in found.items() if values}
