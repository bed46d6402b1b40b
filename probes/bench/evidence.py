"""A subject as a method sees it, what a method is, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from probes.bench.patches import (
    Arguments,
    Probe,
    fit_probe,
    gradients,
    patch_heads,
    patch_sites,
    run_sites,
)
from probes.bench.subjects import Subject


class Evidence:
    """A subject, and what several methods need of it, computed once.

    `runs` counts what the method that is being asked has cost so far.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.runs = subject, 0.0
        self.random = np.random.default_rng(subject.seed + 1)

    @cached_property
    def arguments(self) -> Arguments:
        """What every compiled function begins with."""
        s = self.subject
        return s.model, s.stream, s.groups, jnp.asarray(s.read_tokens), s.read_matrix

    @cached_property
    def clean(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The prediction, and the sites."""
        s = self.subject
        output, sites = run_sites(s.model, s.stream, s.groups)
        read = np.asarray(output)[:, s.read_tokens] @ np.asarray(s.read_matrix)
        return read, {name: np.asarray(a) for name, a in sites.items()}

    @property
    def prediction(self) -> np.ndarray:
        """Of the base inputs, `[batch, token, entry]`."""
        return self.clean[0]

    @property
    def way(self) -> np.ndarray:
        """p(source) - p(base)."""
        return np.roll(self.prediction, -1, 0) - self.prediction

    def site(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A site on the base inputs and on the sources, `[layer, batch, ...]`."""
        values = self.clean[1][name]
        return values, np.roll(values, -1, 1)

    def moved(self, patched: np.ndarray, along: bool = False) -> np.ndarray:
        """Movement of predictions `[patch, batch, ...]`, in units of |way|."""
        movement = patched - self.prediction
        size = float(np.sum(self.way**2))
        if along:
            return np.abs(np.sum(movement * self.way, (1, 2, 3))) / size
        return np.sqrt(np.sum(movement**2, (1, 2, 3)) / size)

    def with_heads(self, value: np.ndarray, along: bool = False) -> np.ndarray:
        """Movement with every head's output in turn from `value`, `[layer, head]`."""
        found = np.asarray(patch_heads(*self.arguments, jnp.asarray(value)))
        self.runs += 1 + len(found)
        return self.moved(found, along).reshape(value.shape[0], value.shape[3])

    def with_sites(self, bases: list[np.ndarray], along: bool = False) -> np.ndarray:
        """Movement with every site's subspace in turn from the source, `[site]`."""
        self.runs += 1 + len(bases)
        sites = [(s.layer, s.tokens) for s in self.subject.sites]
        found = patch_sites(self.arguments, self.site("residual"), sites, bases)
        return self.moved(found, along)

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """Site -> gradient at the base and on the line, times source less base."""
        found = {}
        for name in ("head_output", "residual") if self.subject.sites else ("head_output",):
            here, there = self.site(name)
            way = jnp.asarray(self.way)
            g = gradients(*self.arguments, jnp.asarray(here), jnp.asarray(there), way, site=name)
            found[name] = np.asarray(g)
        return found

    @cached_property
    def probes(self) -> list[Probe]:
        """A linear probe at every site."""
        residual, _ = self.site("residual")
        return [
            fit_probe(residual[s.layer][:, s.tokens], self.subject.value(s), self.subject.seed)
            for s in self.subject.sites
        ]


@dataclass(frozen=True)
class Found:
    """What a method says of one subject.

    Attributes:
        scores: `[layer, head]`, `[site]` or `[edge]`, larger where it thinks that something is.
        bases: of every site, `[width, size]`, where it names a subspace.
        control: what it says of hypotheses that are false, by the same measure as its scores.
        runs, seconds: what it took.
    """

    scores: np.ndarray
    bases: list[np.ndarray] | None = None
    control: np.ndarray | None = None
    runs: float = 0.0
    seconds: float = 0.0


Ask = Callable[[Evidence], Any]


@dataclass(frozen=True)
class Method:
    """A method: what it asks of heads, of sites and of edges, each of which it may lack.

    Attributes:
        about: what a high score is taken to mean.
        heads: evidence -> scores `[layer, head]`.
        sites: evidence -> scores `[site]`, or (scores, bases), or (scores, bases, control).
        edges: evidence -> scores `[edge]`.
        causal: whether it changes something and looks what follows.
        fails: where, and why.
    """

    about: str
    heads: Ask | None = None
    sites: Ask | None = None
    causal: bool = False
    fails: str = ""
    edges: Ask | None = None

    def __call__(
        self, subject: Subject, task: str, evidence: Evidence | None = None
    ) -> Found | None:
        """What it says of "heads", "sites" or "edges"; None where it does not ask that."""
        ask = getattr(self, task)
        if ask is None or (task != "heads" and not getattr(subject, task)):
            return None
        evidence = evidence or Evidence(subject)
        evidence.runs, begun = 0.0, time.perf_counter()
        answer = ask(evidence)
        given = answer if isinstance(answer, tuple) else (answer,)
        scores, bases, control = (*given, None, None)[:3]
        seconds = time.perf_counter() - begun
        return Found(np.asarray(scores, float), bases, control, evidence.runs, seconds)
