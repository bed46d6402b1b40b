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

from typing import Any

import jax.numpy as jnp
import numpy as np

from probes.bench.edges import composition, edge_attribution, path_patching, random_edges
from probes.bench.evidence import Ask, Evidence, Method
from probes.bench.patches import CHUNK, POINTS, STEPS, align, applied_parts, fit_probe
from probes.bench.subjects import Site, Subject


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


def _alike(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Linear CKA and 1 - the Procrustes distance of two arrays of rows, `[..., column]`.

    With X, Y centred, C = X^T Y: |C|_F^2 / (|X^T X|_F |Y^T Y|_F) (Kornblith et al. 2019, arXiv
    1905.00414) and |C|_* / (|X|_F |Y|_F) (Ding et al. 2021, arXiv 2108.01661); 0 where one of them
    does not vary.
    """
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    one, two = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if min(one, two) <= 1e-9:
        return 0.0, 0.0
    c = np.linalg.svd(x.T @ y / (one * two), compute_uv=False)
    own = [np.linalg.norm(a.T @ a) / n**2 for a, n in ((x, one), (y, two))]
    return float(np.sum(c**2) / (own[0] * own[1])), float(c.sum())


def _similar(which: int) -> tuple[Ask, Ask]:
    def heads(e: Evidence) -> np.ndarray:
        e.runs += 1
        here = e.site("head_output")[0][:, :, e.subject.read_tokens]
        rows = [[_alike(a[:, :, h], e.prediction)[which] for h in range(a.shape[2])] for a in here]
        return np.array(rows)

    def sites(e: Evidence) -> np.ndarray:
        e.runs += 1
        found, residual = e.subject.sites, e.site("residual")[0]
        pairs = [(residual[x.layer][:, x.tokens], e.subject.value(x)) for x in found]
        return np.array([_alike(*pair)[which] for pair in pairs])

    return heads, sites


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
    control: list[float] = []
    for first in range(0, len(asked), CHUNK):
        numbers = asked[first : first + CHUNK]
        names = [(s.sites[n].slot, s.sites[n].kind) for n in numbers]
        # what is left of the last chunk is searched for hypotheses that are false
        for n in [n for n in asked if s.sites[n].used][: CHUNK - len(numbers)]:
            own = known[s.sites[n].slot, s.sites[n].kind]
            apart = {name: float(np.sum((k - own) ** 2)) for name, k in known.items()}
            other = max(apart, key=lambda name: apart[name])
            if apart[other] > 0.1 * float(np.sum((own - e.prediction) ** 2)):
                numbers, names = [*numbers, n], [*names, other]
        padding = CHUNK - len(numbers)
        some = [s.sites[n] for n in [*numbers, *numbers[:1] * padding]]
        masks = np.zeros((CHUNK, here.shape[2]), bool)
        for n, site in enumerate(some):
            masks[n, site.tokens] = True
        given = (
            np.array([site.layer for site in some]), masks,
            np.array([site.basis.shape[1] for site in some]),
            np.stack([known[name] for name in [*names, *names[:1] * padding]]),
            np.stack([_start(e, site, most) for site in some]),
        )  # fmt: skip
        found, score = align(*e.arguments, here, there, *map(jnp.asarray, given))
        e.runs += len(numbers) * (3 * STEPS + 1) / 2
        for n, number in enumerate(numbers):
            if n >= len(asked[first : first + CHUNK]):
                control.append(float(score[n]))
                continue
            scores[number] = max(0.0, float(score[n]))
            bases[number] = np.asarray(found[n])[:, : some[n].basis.shape[1]]
    return scores, bases, np.array(control)


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
    "path patching": Method(
        "one receiver reads what a head wrote on another input", causal=True, edges=path_patching,
        fails="It hardly does: paths that carry nothing, as a silent backup's, are no part of the "
        "truth; noise lets spare heads through.",
    ),
    "edge attribution": Method(
        "the first-order estimate of path patching", causal=True, edges=edge_attribution,
        fails="Its order hardly does; its numbers do where a softmax or a threshold is flat.",
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
    "CKA": Method(
        "the stream is like the value", *_similar(0), False,
        "A token that holds several values is like none; what is used by nobody is as like.",
    ),
    "Procrustes": Method(
        "a rotation of the stream is near the value", *_similar(1), False,
        "As CKA: it compares all that a token holds, and does not ask who reads it.",
    ),
    "single columns": Method(
        "one column is the value", None, _columns, False,
        "In another basis a value is in no column. In its own, it finds what is not used.",
    ),
    "patched probe": Method(
        "what the probe reads is exchanged", None, _patched_probe, True,
        "What the probe reads is not all that the value is: beside a copy, and in superposition, "
        "it reads a mixture.",
    ),
    "alignment search": Method(
        "a learnt subspace is exchanged", None, _alignment, True,
        "It may learn any subspace: for a copy that nobody reads it finds the original.",
    ),
    "weights": Method(
        "baseline: norms of the weights", _weights_of_heads, _weights_of_sites, False,
        "Distractors have weights too; norms depend on the bases of keys and values.", composition,
    ),
    "chance": Method(
        "baseline: random numbers", _random_heads, _random_sites, False, "Always.", random_edges
    ),
    "true subspace": Method(
        "ceiling: the value's own columns exchanged", None, _truth, True,
        "It is told the answer; in superposition the subspace holds parts of other values.",
    ),
}  # fmt: skip
