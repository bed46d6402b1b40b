r"""How long a surprising fact stays in a linear memory that goes on learning.

A memory W is written by steps of gradient descent on 1/2 |W k - v|^2 of a stream of keys and
values, as linear attention writes W = eta sum_i v_i k_i^T. A fact planted as v k^T beside what the
stream says is not contradicted: it fades, because the stream's keys overlap with its own. With keys
drawn independently, C = E[k k^T] = sum_i lambda_i u_i u_i^T, the part of it that is still recalled
after t steps of the stream is, in the mean over streams and exactly for steps on all of it,

    recall_t  =  k^T (I - eta C)^t k / |k|^2  =  sum_i (1 - eta lambda_i)^t (u_i . k)^2 / |k|^2.

Repeated after every gap of tau steps, its key part d follows d <- (I - eta C)^tau d, then d <- d +
eta (1 - d . k) k, which says how often it must be seen. With a key for each sentence, lambda is
p(sentence), by the chart, and a fact lasts log 2 / (eta p) steps: exponentially long in its
surprise -log p. With keys that are bags of words this ends: a scrambled sentence, whose surprise is
infinite, has the key of the sentence that it was, and fades with it.

Sun et al. 2024, arXiv 2410.21750: surprising facts last, mundane and scrambled ones are forgotten
soon, and sparse updates take a fact away with little else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.measurement import Measurement
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar

_PAPER = "Sun et al. 2024, arXiv 2410.21750"
GRAMMAR = """
S -> NP V [0.6] | NP VP [0.4]
VP -> V NP [1.0]
NP -> D N [1.0]
D -> 'the' [1.0]
N -> 'dog' [0.7] | 'cat' [0.25] | 'heron' [0.05]
V -> 'saw' [0.9] | 'sang' [0.1]
"""


def language() -> tuple[Grammar, list[list[str]]]:
    """A small grammar and all of its sentences."""
    pairs = [["the", n, v] for n, v in product(("dog", "cat", "heron"), ("saw", "sang"))]
    objects = [["the", n] for n in ("dog", "cat", "heron")]
    return Grammar.from_text(GRAMMAR), pairs + [a + b for a, b in product(pairs, objects)]


def probability(grammar: Grammar, sentences: Sequence[Sequence[str]]) -> np.ndarray:
    """p(sentence) by the chart, `[sentence]`; 0 for what has no parse."""
    return np.exp(np.asarray(chart.log_z(grammar, *grammar.encode(sentences)), float))


def bags(grammar: Grammar, sentences: Sequence[Sequence[str]]) -> np.ndarray:
    """Numbers of every word, of norm 1, `[sentence, word]`."""
    counts = np.array([[s.count(word) for word in grammar.vocabulary] for s in sentences], float)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def fading(covariance: np.ndarray, key: np.ndarray, step: float, times: ArrayLike) -> np.ndarray:
    """What of a fact is recalled after these numbers of steps, `[time]`; see the module.

    Raises:
        ValueError: the step is no number in (0, 2 / largest eigenvalue), where memory diverges.
    """
    values, vectors = np.linalg.eigh(covariance)
    if not 0 < step * values[-1] < 2:
        raise ValueError(f"step is {step}, must be in (0, {2 / values[-1]:.4g})")
    parts = (vectors.T @ key) ** 2 / (key @ key)
    return np.asarray((1 - step * values) ** np.asarray(times)[..., None] @ parts)


def repeated(
    covariance: np.ndarray, key: np.ndarray, step: float, gap: int, times: int
) -> np.ndarray:
    """Recall just before each of `times` further steps on the fact, with `gap` of the stream."""
    between = np.linalg.matrix_power(np.eye(len(key)) - step * covariance, gap)
    part, found = np.zeros_like(key), []
    for _ in range(times):
        part = between @ (part + step * (1 - part @ key) * key)
        found.append(part @ key)
    return np.array(found)


def sparse(update: np.ndarray, share: float) -> np.ndarray:
    """An update with only this share of its entries, the largest."""
    least = np.quantile(np.abs(update), 1 - share)
    return np.where(np.abs(update) >= least, update, 0)


@partial(jax.jit, static_argnames=("steps", "streams"))
def streamed(
    key: Array, keys: Array, chance: Array, facts: Array, step: ArrayLike, steps: int, streams: int
) -> Array:
    """Recall of planted facts after every step of SGD on drawn keys, `[step, stream, fact]`.

    Args:
        key: of `jax.random`.
        keys, chance: keys of norm 1, `[sentence, dim]`, and how often each is drawn.
        facts: keys of norm 1, `[fact, dim]`.
        step: eta.
    """

    def one(memory: Array, drawn: Array) -> tuple[Array, Array]:
        at = keys[drawn]
        memory = memory - step * jnp.einsum("sfi,si,sj->sfj", memory, at, at)
        return memory, jnp.einsum("sfi,fi->sf", memory, facts)

    drawn = jax.random.categorical(key, jnp.log(chance), shape=(steps, streams))
    start = jnp.broadcast_to(facts, (streams, *facts.shape))
    return jax.lax.scan(one, start, drawn)[1]


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement]:
    """Fading of a likely, an unlikely and a scrambled fact; five seeds of many streams."""
    streams, step, steps = 40 if quick else 400, 0.1, 100
    grammar, sentences = language()
    chance, keys = probability(grammar, sentences), bags(grammar, sentences)
    covariance = np.einsum("s,si,sj->ij", chance, keys, keys)
    facts = [["the", "dog", "saw"], ["the", "heron", "sang"], ["saw", "dog", "the"]]
    planted = bags(grammar, facts)
    found = [
        streamed(k, *map(jnp.asarray, (keys, chance, planted)), step, steps, streams)[-1].mean(0)
        for k in jax.random.split(jax.random.key(seed), 5)
    ]
    for n, (name, fact) in enumerate(zip(("likely", "unlikely", "scrambled"), facts, strict=True)):
        values = np.asarray(found)[:, n]
        exact = float(fading(covariance, planted[n], step, steps))
        surprise = -np.log(np.maximum(probability(grammar, [fact])[0], 1e-300))
        shown = f"{surprise:.1f} nats" if surprise < 500 else "infinite"
        yield Measurement(
            f"recall of a fact, {name}",
            "A fact fades as the closed form says, which makes surprising facts last, mundane and "
            "scrambled ones be forgotten soon.", _PAPER, exact,
            float(values.mean()), float(values.std(ddof=1) / 5**0.5), tolerance=0.0,
            note=f"Published: the closed form. After {steps} steps of SGD with bags of words as "
            f"keys; surprise of the sentence {shown}.",
        )  # fmt: skip
    for share in (0.05, 0.95):
        yield Measurement(
            f"recall left of a fact, {share:.0%} of its update",
            "The largest entries of an update hold more of a fact than their share of it, so that "
            "sparse updates take one away.", _PAPER, None,
            _left(share, seed), note="Mean of 50 facts, random keys and values of 30 entries. What "
            "else an update takes away is not measured.", at_least=share,
        )  # fmt: skip


def _left(share: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    pairs = [rng.normal(size=(2, 30)) for _ in range(50)]
    kept = [v @ sparse(np.outer(v, k), share) @ k / (v @ v) / (k @ k) for v, k in pairs]
    return float(np.mean(kept))
