"""Scores of an answer against the truth of a subject; they look at ranks, angles and shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from probes.bench.evidence import Found
from probes.bench.subjects import Subject

#: A part of the truth counts as missed where its score is below this share of the largest.
MISSED = 0.01
#: Scores below this are 0: what a method makes of rounding is no order.
ROUNDING = 1e-12


def average_precision(scores: Any, positive: Any) -> float:
    """Area under the precision-recall curve, ties broken at random: the mean over all their orders.

        AP = 1/P sum over positives of (positives ranked at or above it) / (all at or above it)

    In a block of equal scores that begins after `above` items, `good` of them positive, item number
    i of n is one of the p positives with probability p / n, and then (i - 1)(p - 1) / (n - 1) of
    those before it in the block are expected to be. Scores that are not finite count as lowest. NaN
    where nothing is positive.
    """
    scores = np.nan_to_num(np.asarray(scores, float).ravel(), nan=-np.inf)
    positive = np.asarray(positive, bool).ravel()
    if not positive.any():
        return float("nan")
    # relative differences at rounding are ties
    scale = max(float(np.abs(scores[np.isfinite(scores)]).max(initial=0)), 1e-300)
    scores = np.round(scores / scale, 10)
    total, above, good = 0.0, 0, 0
    for level in np.unique(scores)[::-1]:
        block = positive[scores == level]
        n, p = len(block), int(block.sum())
        for i in range(1, n + 1):
            before = (i - 1) * (p - 1) / (n - 1) if n > 1 else 0
            total += p / n * (good + before + 1) / (above + i)
        above, good = above + n, good + p
    return total / int(positive.sum())


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between the true subspace and the found one.

    1 where the found subspace, `[width, n]`, holds the true one, `[width, size]`, 0 where they are
    orthogonal; in degrees, arccos of its root.
    """
    if not found.shape[1]:
        return 0.0
    basis = np.linalg.qr(found)[0]
    return float(np.sum((basis.T @ true) ** 2)) / true.shape[1]


def truth_of(subject: Subject, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(what is to be found, what was put there to distract), as the answers of that task."""
    if task == "heads":
        return np.isin(subject.roles, ("used", "backup")), subject.distractor
    if task == "edges":
        both = [(edge.used, edge.distracts) for edge in subject.edges]
        used, planted = np.array(both, bool).reshape(-1, 2).T
        return used, planted
    used = np.array([site.used for site in subject.sites], bool)
    names = ("noise", "copy", "scratch", "shadow")
    return used, np.array([site.slot in names for site in subject.sites], bool)


def score(subject: Subject, task: str, found: Found) -> dict[str, float | None]:
    """Scores of one answer.

    Returns:
        precision: average precision.
        expected: that of chance, with as many parts, as many of them true.
        false: of as many parts as are true, the share that is not, taken from the top.
        distracted: the share that was put there to distract.
        missed: the share of what is true that scores below 1% of the largest.
        angle: degrees between found and true subspaces of the values that are used, the mean.
        runs, seconds: what it took.
    """
    positive, planted = truth_of(subject, task)
    known = subject.roles.ravel() != "nil" if task == "heads" else np.ones(len(positive), bool)
    positive, planted, scores = (a.ravel()[known] for a in (positive, planted, found.scores))
    scores = np.where(np.abs(scores) > ROUNDING, scores, 0)
    count = int(positive.sum())
    top = np.argsort(-scores, kind="stable")[:count]
    largest = float(scores.max(initial=0))
    weak = scores < MISSED * largest if largest > 0 else np.ones(len(scores), bool)
    angles = []
    if found.bases is not None:
        pairs = zip(found.bases, subject.sites, strict=True)
        angles = [overlap(u, site.basis) for u, site in pairs if site.used]
    return {
        "precision": average_precision(scores, positive),
        "expected": average_precision(np.zeros(len(scores)), positive),
        "false": float((~positive[top]).mean()) if count else None,
        "distracted": float(planted[top].mean()) if count else None,
        "missed": float((weak & positive).sum() / count) if count else None,
        "angle": float(np.degrees(np.arccos(np.sqrt(min(1.0, np.mean(angles))))))
        if angles
        else None,
        "runs": found.runs,
        "seconds": found.seconds,
    }
