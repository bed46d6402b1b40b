"""Methods that ask which head is read by which head, MLP or read-out: a score for every edge."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from probes.bench.evidence import Evidence
from probes.bench.patches import applied_parts, patch_paths, receiver_gradients
from probes.bench.truth import MLP, READ_OUT


def path_patching(e: Evidence) -> np.ndarray:
    """The part of the movement towards the source, by what one receiver reads of one head."""
    edges = e.subject.edges
    e.runs += 1 + 2 * len(edges)
    return e.moved(e.prediction + patch_paths(e.arguments, edges), along=True)


def edge_attribution(e: Evidence) -> np.ndarray:
    """The first-order estimate of path patching (Syed et al. 2023, arXiv 2310.10348)."""
    subject = e.subject
    here, there = e.site("head_output")
    shapes = tuple(subject.model.config.layers())
    ends = [(n, k) for n, s in enumerate(shapes) for k in range(sum(r.heads for r in s.heads))]
    ends += [(n, MLP) for n, shape in enumerate(shapes) if shape.mlp is not None]
    ends.append((len(shapes) - 1, READ_OUT))
    given = e.site("residual")[0], here, e.way, np.array(ends)
    found = np.asarray(receiver_gradients(*e.arguments, *map(jnp.asarray, given)))
    e.runs += 1 + 4 * len(ends)
    number, apart = {end: n for n, end in enumerate(ends)}, there - here
    return np.array([
        abs(float(np.sum(found[number[x.to_layer, x.to_head]] * apart[x.layer][:, :, x.head])))
        for x in subject.edges
    ])  # fmt: skip


def composition(e: Evidence) -> np.ndarray:
    """Norms of products of weights: of what a receiver reads with and what a head writes with.

    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; the sum over queries,
    keys and values, as the weights stand.
    """
    writes: dict[tuple[int, int], Any] = {}
    reads: dict[tuple[int, int], list[Any]] = {}
    seen: dict[int, int] = {}
    for layer, part, w in applied_parts(e.subject.model):
        if part.kind == "heads":
            first = seen.get(layer, 0)
            for n in range(part.config.heads):
                writes[layer, first + n] = w["output"][n]
                names = [name for name in ("query", "key", "value") if name in w]
                reads[layer, first + n] = [w[name][n] for name in names]
            seen[layer] = first + part.config.heads
        elif part.kind == "mlp":
            reads[layer, MLP] = [w[name] for name in ("hidden", "gate") if name in w]
    read_out = [np.asarray(e.subject.read_matrix).T]
    return np.array([
        sum(
            float(np.linalg.norm(m @ writes[x.layer, x.head]))
            for m in (read_out if x.to_head == READ_OUT else reads[x.to_layer, x.to_head])
        )
        for x in e.subject.edges
    ])  # fmt: skip


def random_edges(e: Evidence) -> np.ndarray:
    """Random numbers."""
    return e.random.random(len(e.subject.edges))
