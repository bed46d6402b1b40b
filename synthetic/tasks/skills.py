r"""Texts that name skills, one after the other: a state, some skills, and the state that follows.

Skill s is an affine map of the field with two elements, x -> P_s x + b_s with P_s a permutation of
the bits. With bits written as -1 and 1 that is one signed permutation M_s, and

    y  =  M_{s_k} ... M_{s_2} M_{s_1} x.

A text has `slots` words; k of them, anywhere, name skills, and the others name none. Of the N^k
tuples of skills some are shown and the others held out. Whoever knows the tuples that were shown by
heart, and guesses the others, is right in a share of

    shown + (1 - shown) / 2^dim                                               (`known_by_heart`).

After T texts that name k different skills each, chosen at random, the chance that m given skills
have all occurred is, by inclusion and exclusion,

    sum_j (-1)^j C(m, j) [C(N - j, k) / C(N, k)]^T                                     (`known`).

The texts are one side of a bipartite graph and the skills the other (Arora and Goyal 2023, arXiv
2307.15936). Who composes knows a tuple as soon as its skills have occurred, who does not needs the
tuple itself, of which there are N^m (Yu et al. 2023, arXiv 2310.17567).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from math import comb, factorial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from synthetic.guards import number
from synthetic.tasks.task import Batch, Outcome

WHICH = ("all", "shown", "held out")


@dataclass(frozen=True)
class SkillTask:
    """States, texts that name skills, and what follows; a `Task`. Hashable.

    Attributes:
        dim: bits of a state.
        skills: N, different maps; the number N stands for a word that names none.
        named: k, skills that a text names.
        slots: words of a text.
        shown: share of the N^k tuples that is shown, rounded to whole tuples.
        which: the tuples that are drawn, "all", "shown" or "held out".
        seed: of the maps, and of the tuples that are shown.

    Raises:
        ValueError: a number out of range; no tuple to draw.
    """

    dim: int = 3
    skills: int = 6
    named: int = 2
    slots: int = 4
    shown: float | int = 0.5
    which: str = "all"
    seed: int = 0

    outcome: ClassVar[Outcome] = "values"

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("skills", 2), ("named", 1), ("slots", 1), ("seed", 0)):
            number(name, getattr(self, name), whole=True, least=least)
        if self.skills > (most := 2**self.dim * factorial(self.dim) - 1):
            raise ValueError(f"skills is {self.skills}, must be at most {most} for dim={self.dim}")
        if self.named > self.slots:
            raise ValueError(f"named is {self.named}, must be at most slots={self.slots}")
        if self.skills**self.named > 2**20:
            raise ValueError(
                f"skills is {self.skills} and named {self.named}: there are "
                f"{self.skills**self.named} tuples, must be at most {2**20}"
            )
        number("shown", self.shown, least=0, most=1)
        if self.which not in WHICH:
            raise ValueError(f"which is {self.which!r}, must be one of {WHICH}")
        if self.which != "all" and not (self.is_shown == (self.which == "shown")).any():
            raise ValueError(f"shown is {self.shown}: no tuple is {self.which}")

    @property
    def maps(self) -> Float[np.ndarray, "word dim dim"]:
        """M_s, signed permutations, each with one entry of -1 or 1 a row; the last is identity."""
        return np.concatenate([_maps(self.dim, self.skills, self.seed), np.eye(self.dim)[None]])

    @property
    def is_shown(self) -> np.ndarray:
        """Whether each tuple is shown, `[N^k]` bool, by its number in base N, s_1 first."""
        order = np.random.default_rng([self.seed, 1]).permutation(self.skills**self.named)
        return order < round(float(self.shown) * len(order))

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw states, tuples and their places, uniformly.

        Returns:
            `inputs`: states `[batch, dim]` of -1 and 1, texts `[batch, slots]` int32 in 0..N;
            `target`: the states that follow, `[batch, dim]`.
        """
        state_key, tuple_key, place_key = jax.random.split(key, 3)
        state = jax.random.rademacher(state_key, (batch, self.dim), jnp.result_type(float))
        own = np.ones(self.skills**self.named, bool)
        if self.which != "all":
            own = self.is_shown == (self.which == "shown")
        numbers = jnp.asarray(np.flatnonzero(own), jnp.int32)
        drawn = numbers[jax.random.randint(tuple_key, (batch,), 0, len(numbers))]
        skills = drawn[:, None] // self._powers % self.skills
        dice = jax.random.uniform(place_key, (batch, self.slots))
        places = jnp.sort(jnp.argsort(dice)[:, : self.named], -1)
        text = jnp.full((batch, self.slots), self.skills, jnp.int32)
        text = text.at[jnp.arange(batch)[:, None], places].set(skills)
        return Batch((state, text), self.states(state, text)[:, -1])

    @property
    def _powers(self) -> Array:
        return jnp.asarray(self.skills ** np.arange(self.named)[::-1], jnp.int32)

    def states(
        self, state: Float[Array, "batch dim"], text: Int[Array, "batch word"]
    ) -> Float[Array, "batch time dim"]:
        """The state before any word and after each."""
        maps = jnp.asarray(self.maps, state.dtype)
        found = [state]
        for word in range(text.shape[1]):
            chosen = maps[text[:, word]]
            found.append(jnp.einsum("bij,bj->bi", chosen, found[-1], precision="highest"))
        return jnp.stack(found, 1)

    def loss(self, prediction: Float[Array, "batch dim"], batch: Batch) -> Float[Array, " batch"]:
        """Mean squared error over the bits, halved."""
        return ((prediction - batch.target) ** 2).mean(-1) / 2

    def accuracy(self, prediction: Float[Array, "batch dim"], batch: Batch) -> Array:
        """Whether every bit is right, `[batch]`."""
        return (jnp.sign(prediction) == batch.target).all(-1)

    @property
    def known_by_heart(self) -> float:
        """Accuracy of the tuples that are shown known by heart, and a guess at the others."""
        share = float(self.is_shown.mean())
        return share + (1 - share) / 2**self.dim

    def by_heart(
        self, state: Float[Array, "batch dim"], text: Int[Array, "batch word"]
    ) -> Float[Array, "batch dim"]:
        """What follows on tuples that are shown; for every other state and text a random table."""
        names = text < self.skills
        order = jnp.argsort(~names, axis=-1, stable=True)[:, : self.named]  # skills come first
        named = jnp.take_along_axis(text, order, -1) % self.skills
        number = (named * self._powers).sum(-1)
        seen = jnp.asarray(self.is_shown)[number] & (names.sum(-1) == self.named)
        base = (self.skills + 1) ** np.arange(text.shape[1])
        place = (text * jnp.asarray(base)).sum(-1) * 2**self.dim
        place += ((state > 0) * 2 ** np.arange(self.dim)).sum(-1)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(self.seed)))(place)
        guess = jax.vmap(lambda key: jax.random.rademacher(key, (self.dim,), state.dtype))(keys)
        return jnp.where(seen[:, None], self.states(state, text)[:, -1], guess)


def known(skills: int, named: int, texts: int, wanted: int) -> float:
    """Chance that `wanted` given skills of N all occur in texts that name `named` each."""
    total = comb(skills, named)
    chances = [
        (-1) ** j * comb(wanted, j) * (comb(skills - j, named) / total) ** texts
        for j in range(wanted + 1)
    ]
    return float(sum(chances))


@lru_cache
def _maps(dim: int, skills: int, seed: int) -> np.ndarray:
    rng, found = np.random.default_rng(seed), {np.eye(dim).tobytes(): np.eye(dim)}
    while len(found) <= skills:
        m = np.eye(dim)[rng.permutation(dim)] * rng.choice([-1.0, 1.0], dim)
        found[m.tobytes()] = m
    return np.stack(list(found.values())[1:])  # the identity is no skill
