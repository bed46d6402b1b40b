"""Methods that look for mechanisms, each small: a score for every head, or for every named value.

A method sees a subject's model, its inputs and, where it looks for values, what each value is on
each input; never the program. A source input is the next example of the batch. With p the
prediction, way = p(source) - p(base), and everything in units of |way|:

    ablation                |p(edited) - p(base)|, the head's output being 0, its mean, or another
                            example's ("resample")
    activation patching     <p(patched) - p(base), way>: the part of the movement towards the source
    attribution patching    the first-order estimate of it, by the gradient on the base input
    integrated gradients    the same, with the gradient's mean on the line from base to source
    alignment search        the subspace of a value's size whose exchange moves the prediction as
                            the value's would (Geiger et al. 2023, arXiv 2303.02536), learnt; scored
                            by 1 - |p(patched) - counterfactual|^2 / |counterfactual - p(base)|^2
                            on examples that were kept back

Costs are counted in runs of the model over the batch; a backward pass counts as two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from probes.bench.patches import (
    CHUNK,
    POINTS,
    STEPS,
    Arguments,
    Probe,
    align,
    applied_parts,
    fit_probe,
    gradients,
    patch_heads,
    patch_sites,
    run_sites,
)
from probes.bench.subjects import Site, Subject


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
        scores: `[layer, head]` or `[site]`, larger where it thinks that something is there.
        bases: of every site, `[width, size]`, where it names a subspace.
        runs, seconds: what it took.
    """

    scores: np.ndarray
    bases: list[np.ndarray] | None = None
    runs: float = 0.0
    seconds: float = 0.0


Ask = Callable[[Evidence], Any]


@dataclass(frozen=True)
class Method:
    """A method: what it asks of heads and of sites, either of which it may lack.

    Attributes:
        about: what a high score is taken to mean.
        heads: evidence -> scores `[layer, head]`.
        sites: evidence -> scores `[site]`, or (scores, bases).
        causal: whether it changes something and looks what follows.
        fails: where, and why.
    """

    about: str
    heads: Ask | None = None
    sites: Ask | None = None
    causal: bool = False
    fails: str = ""

    def __call__(
        self, subject: Subject, task: str, evidence: Evidence | None = None
    ) -> Found | None:
        """What it says of "heads" or "sites"; None where it does not ask that."""
        ask = getattr(self, task)
        if ask is None or (task == "sites" and not subject.sites):
            return None
        evidence = evidence or Evidence(subject)
        evidence.runs, begun = 0.0, time.perf_counter()
        answer = ask(evidence)
        scores, bases = answer if isinstance(answer, tuple) else (answer, None)
        return Found(np.asarray(scores, float), bases, evidence.runs, time.perf_counter() - begun)


def _ablate(kind: str) -> Ask:
    def ask(e: Evidence) -> np.ndarray:
        here, there = e.site("head_output")
        mean = np.broadcast_to(here.mean(1, keepdims=True), here.shape)
        return e.with_heads({"zero": 0 * here, "mean": mean, "resample": there}[kind])

    return ask


def _patch(e: Evidence) -> np.ndarray:
    return e.with_heads(e.site("head_output")[1], along=True)


def _gradient(which: int, runs: int) -> tuple[Ask, Ask]:
    def heads(e: Evidence) -> np.ndarray:
        here, there = e.site("head_output")
        e.runs += 1 + 3 * runs * len(here)
        return np.abs(np.sum(e.gradients["head_output"][which] * (there - here), (1, 2, 4)))

    def sites(e: Evidence) -> Any:
        here, there = e.site("residual")
        e.runs += 1 + 3 * runs * len(here)
        gradient, scores = e.gradients["residual"][which], []
        for site, probe in zip(e.subject.sites, e.probes, strict=True):
            at = np.s_[site.layer, :, site.tokens]
            inside = (there[at] - here[at]) @ probe.basis @ probe.basis.T
            scores.append(abs(float(np.sum(gradient[at] * inside))))
        return np.array(scores), [p.basis for p in e.probes]

    return heads, sites


def _lens_of_heads(e: Evidence) -> np.ndarray:
    """Spread over inputs of what each head adds to the read-out directly."""
    e.runs += 1
    s, here = e.subject, e.site("head_output")[0]
    direct = here[:, :, s.read_tokens] @ np.asarray(s.read_matrix)
    return np.sqrt(np.sum(direct.std(1) ** 2, (1, 3))) / np.sqrt(np.sum(e.prediction.std(0) ** 2))


def _lens_of_sites(e: Evidence) -> Any:
    """R^2 of the value from what the read-out makes of the stream there."""
    e.runs += 1
    s, residual = e.subject, e.site("residual")[0]
    matrix = np.asarray(s.read_matrix)
    scores = [
        fit_probe(residual[x.layer][:, x.tokens] @ matrix, s.value(x), s.seed).selectivity
        for x in s.sites
    ]
    basis = np.linalg.qr(matrix)[0]
    return np.array(scores), [basis for _ in s.sites]


def _attention(e: Evidence) -> np.ndarray:
    """How sharply a head looks: the largest share of a query, above that of looking everywhere."""
    e.runs += 1
    a = np.abs(e.site("attention")[0])  # [layer, batch, head, query, key]
    total, seen = a.sum(-1), (a > 1e-12).sum(-1)
    sharp = a.max(-1) / np.where(total > 0, total, 1) - 1 / np.maximum(seen, 1) + 1e-6 * (total > 0)
    return np.where(seen > 0, sharp, 0).mean((1, 3))


def _probe_heads(e: Evidence) -> np.ndarray:
    """R^2 of the prediction from what a head adds, at the tokens that are read and on average."""
    e.runs += 1
    s, here = e.subject, e.site("head_output")[0]
    both = np.concatenate([here.mean(2), here[:, :, s.read_tokens].mean(2)], -1)
    target = e.prediction.reshape(len(e.prediction), 1, -1)
    return np.array([
        [fit_probe(both[n][:, None, h], target, s.seed).selectivity for h in range(both.shape[2])]
        for n in range(len(both))
    ])  # fmt: skip


def _probe_sites(e: Evidence) -> Any:
    e.runs += 1
    return np.array([p.selectivity for p in e.probes]), [p.basis for p in e.probes]


def _patched_probe(e: Evidence) -> Any:
    bases = [p.basis for p in e.probes]
    return e.with_sites(bases), bases


def _columns(e: Evidence) -> Any:
    """The largest squared correlation of each entry of the value with one column."""
    e.runs += 1
    scores, bases = [], []
    for site in e.subject.sites:
        x = e.site("residual")[0][site.layer][:, site.tokens]
        y = e.subject.value(site)
        x, y = (a.reshape(-1, a.shape[-1]) - a.reshape(-1, a.shape[-1]).mean(0) for a in (x, y))
        norms = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)
        square = (x.T @ y / np.where(norms > 1e-9, norms, np.inf)) ** 2
        scores.append(float(square.max(0).mean()))
        bases.append(np.eye(x.shape[1])[:, np.unique(square.argmax(0))])
    return np.array(scores), bases


def _whole_tokens(e: Evidence) -> np.ndarray:
    whole = np.eye(e.subject.stream.shape[-1])
    return e.with_sites([whole for _ in e.subject.sites])


def hypotheses(subject: Subject) -> dict[tuple[str, str], np.ndarray]:
    """(value, kind) -> the prediction, were that value the source's, by the undisguised program.

    From the first layer after which the value is used; a correlated copy is taken for what it is a
    copy of. A value that is never used has none.
    """
    first: dict[tuple[str, str], Site] = {}
    for site in subject.sites:
        if site.used:
            first.setdefault((site.slot, site.kind), site)
    found = subject.exchanged(list(first.values()))
    known = dict(zip(first, found, strict=True))
    for site in subject.sites:
        if site.twin and (site.twin, site.kind) in known:
            known[site.slot, site.kind] = known[site.twin, site.kind]
    return known


def _start(e: Evidence, site: Site, size: int) -> np.ndarray:
    """Unit vectors `[width, size]` in the span of what differs between inputs at a site."""
    here, there = e.site("residual")
    apart = (there - here)[site.layer][:, site.tokens].reshape(-1, here.shape[-1])
    found = apart.T @ e.random.normal(size=(len(apart), size))
    found += 1e-6 * e.random.normal(size=found.shape)  # it may have fewer dimensions than asked
    return found / np.linalg.norm(found, axis=0)


def _alignment(e: Evidence) -> Any:
    s = e.subject
    known = hypotheses(s)
    asked = [n for n, site in enumerate(s.sites) if (site.slot, site.kind) in known]
    here, there = map(jnp.asarray, e.site("residual"))
    width, most = here.shape[-1], max(site.basis.shape[1] for site in s.sites)
    scores, bases = np.zeros(len(s.sites)), [np.zeros((width, 0)) for _ in s.sites]
    for first in range(0, len(asked), CHUNK):
        some = [s.sites[n] for n in asked[first : first + CHUNK]]
        padded = some + some[:1] * (CHUNK - len(some))
        masks = np.zeros((CHUNK, here.shape[2]), bool)
        for n, site in enumerate(padded):
            masks[n, site.tokens] = True
        given = (
            np.array([site.layer for site in padded]), masks,
            np.array([site.basis.shape[1] for site in padded]),
            np.stack([known[site.slot, site.kind] for site in padded]),
            np.stack([_start(e, site, most) for site in padded]),
        )  # fmt: skip
        layers, masks, sizes, targets, start = map(jnp.asarray, given)
        where = layers, masks, sizes, targets, start
        found, score = align(*e.arguments, here, there, *where)
        e.runs += len(some) * (3 * STEPS + 1) / 2
        for n, site in enumerate(some):
            number = asked[first + n]
            scores[number] = max(0.0, float(score[n]))
            bases[number] = np.asarray(found[n])[:, : site.basis.shape[1]]
    return scores, bases


def _weights_of_heads(e: Evidence) -> np.ndarray:
    """|W_Q| |W_K| |W_V| |P|, Frobenius norms: as they stand, so that they depend on the basis."""
    model = e.subject.model
    rows: list[list[float]] = [[] for _ in range(model.config.depth)]
    for layer, part, w in applied_parts(model):
        if part.kind == "heads":
            rows[layer] += [
                float(
                    np.prod([np.linalg.norm(w[n][h]) for n in ("query", "key", "value", "output")])
                )
                for h in range(part.config.heads)
            ]
    return np.array([row + [0.0] * (model.config.max_heads - len(row)) for row in rows])


def _weights_of_sites(e: Evidence) -> Any:
    """How much later layers read of what the probe points at, by the norms of their matrices."""
    parts, scores = applied_parts(e.subject.model), []
    for site, probe in zip(e.subject.sites, e.probes, strict=True):
        total = float(np.linalg.norm(np.asarray(e.subject.read_matrix).T @ probe.basis))
        for layer, _, w in parts:
            if layer >= site.layer:
                for name in ("query", "key", "value", "hidden", "gate"):
                    total += float(np.linalg.norm(w[name] @ probe.basis)) if name in w else 0.0
        scores.append(total)
    return np.array(scores), [p.basis for p in e.probes]


def _truth(e: Evidence) -> Any:
    bases = [site.basis for site in e.subject.sites]
    return e.with_sites(bases), bases


def _random_heads(e: Evidence) -> np.ndarray:
    return e.random.random(e.subject.roles.shape)


def _random_sites(e: Evidence) -> Any:
    width = e.subject.stream.shape[-1]
    bases = [
        np.linalg.qr(e.random.normal(size=(width, x.basis.shape[1])))[0] for x in e.subject.sites
    ]
    return e.random.random(len(bases)), bases


METHODS: dict[str, Method] = {
    "zero ablation": Method(
        "the head's output is zero", _ablate("zero"), None, True,
        "A backup steps in as soon as the head is silent: neither moves the prediction.",
    ),
    "mean ablation": Method(
        "the head's output is its mean over inputs", _ablate("mean"), None, True,
        "A backup that is silent now moves nothing; nor does a head whose output never varies.",
    ),
    "resample ablation": Method(
        "the head's output on another input", _ablate("resample"), None, True,
        "A backup that is silent now moves nothing, whatever it is given.",
    ),
    "activation patching": Method(
        "a run with one part of another", _patch, _whole_tokens, True,
        "A backup moves nothing. A whole token is exchanged, so all values in it look used.",
    ),
    "attribution patching": Method(
        "the first-order estimate of activation patching", *_gradient(0, 1), True,
        "The slope at the base is not the way: where a softmax or a threshold is flat it is 0, in "
        "a cubic layer it is too steep. A copy leaks into the probe's direction.",
    ),
    "integrated gradients": Method(
        "the mean gradient on the line between two inputs", *_gradient(1, POINTS), True,
        "The line leaves what inputs look like; a backup has no slope; copies leak in.",
    ),
    "attention": Method(
        "the head looks sharply", _attention, None, False,
        "A shadow looks where the head looks and writes where nobody reads.",
    ),
    "logit lens": Method(
        "the read-out, applied where nobody reads out", _lens_of_heads, _lens_of_sites, False,
        "What is used by a later layer only is orthogonal to the read-out: its score is 0.",
    ),
    "linear probe": Method(
        "the value can be read off", _probe_heads, _probe_sites, False,
        "A value that nobody uses can be read as well as one that is.",
    ),
    "single columns": Method(
        "one column is the value", None, _columns, False,
        "In another basis a value is in no column. In its own, it finds what is not used.",
    ),
    "patched probe": Method(
        "what the probe reads is exchanged", None, _patched_probe, True,
        "What the probe reads is not all that the value is: beside a copy it reads a mixture.",
    ),
    "alignment search": Method(
        "a learnt subspace is exchanged", None, _alignment, True,
        "It may learn any subspace: for a copy that nobody reads it finds the original.",
    ),
    "weights": Method(
        "baseline: norms of the weights", _weights_of_heads, _weights_of_sites, False,
        "Distractors have weights too; norms depend on the bases of keys and values.",
    ),
    "chance": Method("baseline: random numbers", _random_heads, _random_sites, False, "Always."),
    "true subspace": Method(
        "ceiling: the value's own columns exchanged", None, _truth, True,
        "It cannot: it is told the answer.",
    ),
}  # fmt: skip
