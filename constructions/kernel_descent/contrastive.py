r"""Contrastive features that are equally good by their loss, and good for nothing downstream.

Inputs x are the corners of the cube {-1, 1}^n, all 2^n of them. An augmentation keeps the first
`content` coordinates and multiplies the others, the style, by 1 or by 1/3; it may also flip
coordinates by chance. With w(a, b) the probability that a and b are two augmentations of one input,
w(a) that of a, and A = w(a, b) / sqrt(w(a) w(b)), the spectral contrastive loss of features f is

    -2 E f(a) . f(a+)  +  E (f(a) . f(b))^2  =  |A - F F^T|^2 - |A|^2,    F_a = sqrt(w(a)) f(a),

least where F spans top eigenvectors of A (HaoChen et al. 2021, arXiv 2106.04156).

Without flips the augmentations of different inputs are different points: A has the eigenvalue 1
once for each of the 2^n inputs, and any orthonormal functions of x are optimal features. So are

    f_i  =  cos(angle) x_i  +  sin(angle) x_i prod_{style} x_j,    i <= content,

at every angle, but the label sign(sum_{i <= content} x_i) is a linear function of them at 0 and is
orthogonal to them at pi / 2 (after Saunshi et al. 2022, arXiv 2202.14037; this example is ours).
A bound that knows the augmentations alone divides by 1 less the next eigenvalue, which is 0. One
that knows features to be linear has 1 less that among linear functions, (E t)^2 / E t^2 = 0.8.

With flips of probability e_j the character of a set S has the eigenvalue prod_S (1 - 2 e_j)^2, so
that those of single content coordinates come first, and the loss prefers them by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from constructions.measurement import Measurement

_PAPER = "Saunshi et al. 2022, arXiv 2202.14037"
_SCALES = np.array([1.0, 1 / 3])


@dataclass(frozen=True)
class Cube:
    """All inputs and all augmentations of them.

    Attributes:
        content: coordinates that augmentations keep, an odd number, so that the label is defined.
        style: coordinates that they scale.
        flips: probabilities that a coordinate of content, of style is flipped; 0 for augmentations
            that are disjoint.
    """

    content: int = 3
    style: int = 4
    flips: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.content < 1 or self.content % 2 == 0 or self.style < 1:
            raise ValueError(f"content is {self.content}, style {self.style}, must be odd, above 0")
        if not all(0 <= flip <= 0.5 for flip in self.flips):
            raise ValueError(f"flips is {self.flips}, must be 0 to 0.5")

    @cached_property
    def inputs(self) -> np.ndarray:
        """The corners, `[2^n, n]`."""
        return np.array(list(product([-1.0, 1.0], repeat=self.content + self.style)))

    @cached_property
    def points(self) -> np.ndarray:
        """Augmentations, `[2 * 2^n, n]`: every corner with its style as it is, then scaled."""
        scale = np.ones((2, 1, self.content + self.style))
        scale[:, 0, self.content :] = _SCALES[:, None]
        return (scale * self.inputs).reshape(-1, self.content + self.style)

    @cached_property
    def chance(self) -> np.ndarray:
        """P(point | input), `[input, point]`; each point is as probable as any other."""
        each = np.repeat(self.flips, (self.content, self.style))
        differ = self.inputs[:, None] != self.inputs
        return np.tile(np.where(differ, each, 1 - each).prod(-1), 2) / 2

    @cached_property
    def adjacency(self) -> np.ndarray:
        """A, `[point, point]`."""
        return 2 * self.chance.T @ self.chance  # all w(a) are equal, two for each input

    @property
    def features(self) -> int:
        """How many are looked for: one for each content coordinate, and the constant if it wins."""
        return self.content + (self.flips[0] > 0)

    def rotated(self, angle: float) -> np.ndarray:
        """The features of the module at an angle, `[point, content]`."""
        x = np.tile(self.inputs, (2, 1))
        style = x[:, self.content :].prod(1, keepdims=True)
        return x[:, : self.content] * (np.cos(angle) + np.sin(angle) * style)

    def loss(self, features: np.ndarray) -> float:
        """The spectral contrastive loss of `[point, feature]`, by its definition."""
        means = self.chance @ features  # of the augmentations of each input
        gram = features.T @ features / len(features)
        return float(-2 * (means**2).sum(1).mean() + (gram**2).sum())

    def accuracy(self, features: np.ndarray) -> float:
        """Share of inputs whose label least squares on the mean features tells; half for a tie."""
        means, label = self.chance @ features, np.sign(self.inputs[:, : self.content].sum(1))
        found = means @ np.linalg.lstsq(means, label, rcond=1e-9)[0]
        return float((np.sign(found.round(9)) * label).mean() / 2 + 0.5)

    def gaps(self) -> tuple[float, float]:
        """1 less the eigenvalue after those of as many features: of A, and of linear functions."""
        every = np.sort(np.linalg.eigvalsh(self.adjacency))[::-1]
        a, means = self.points, self.chance @ self.points
        within, across = a.T @ a / len(a), means.T @ means / len(means)
        root = np.linalg.inv(np.linalg.cholesky(within))
        linear = np.sort(np.linalg.eigvalsh(root @ across @ root.T))[::-1]
        return float(1 - every[self.features]), float(1 - linear[self.content])


def trained(
    cube: Cube, hidden: int | None, seeds: range, steps: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies, `[seed]`, of encoders trained on the loss over all points, by Adam.

    A ReLU layer has `hidden` units; with None the encoder is linear.
    """
    points, chance = jnp.asarray(cube.points), jnp.asarray(cube.chance)
    sizes = [points.shape[1], *([] if hidden is None else [hidden]), cube.features]
    pairs = list(zip(sizes[:-1], sizes[1:], strict=True))

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(pairs))
        draws = zip(keys, pairs, strict=True)
        return [(jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1])) for k, s in draws]

    def encode(weights: Any) -> jax.Array:
        x = points
        for w, b in weights[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ weights[-1][0] + weights[-1][1]

    def loss(weights: Any) -> jax.Array:
        f = encode(weights)
        return -2 * ((chance @ f) ** 2).sum(1).mean() + ((f.T @ f / len(f)) ** 2).sum()

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def fit(key: jax.Array) -> jax.Array:
        def step(state: tuple, _: None) -> tuple[tuple, None]:
            weights, moments = state
            change, moments = optimizer.update(jax.grad(loss)(weights), moments)
            return (optax.apply_updates(weights, change), moments), None

        first = init(key)
        (weights, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), None, length=steps)
        return encode(weights)

    keys = jax.vmap(jax.random.key)(jnp.asarray(list(seeds)))
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(fit, keys))(keys), float)
    return np.array([cube.loss(f) for f in found]), np.array([cube.accuracy(f) for f in found])


def measure(quick: bool = False, seed: int = 0, seeds: int = 5) -> Iterator[Measurement]:
    """Equal losses and unequal accuracies: by hand, then of trained encoders unless `quick`."""
    cube = Cube()
    for angle, accuracy in ((0.0, 1.0), (np.pi / 2, 0.5)):
        worst = abs(cube.loss(features := cube.rotated(angle)) + cube.content)
        yield Measurement(
            f"accuracy of optimal features, angle {angle:.2f}",
            "Features of the least contrastive loss tell the label, or nothing of it.",
            f"{_PAPER} (the loss and the augmentations alone guarantee nothing)",
            accuracy,
            cube.accuracy(features),
            tolerance=0.0,
            note=f"Loss within {worst:.0e} of the least. Bounds divide by {cube.gaps()[0]:.0e}, "
            f"of linear functions by {cube.gaps()[1]:.2g}. Published: by symmetry.",
        )
    if quick:
        return
    kinds = {"linear, disjoint": (cube, None), "MLP, disjoint": (cube, 256)}
    kinds["MLP, overlapping"] = Cube(flips=(0.05, 0.25)), 256
    for name, (one, hidden) in kinds.items():
        losses, right = trained(one, hidden, range(seed, seed + seeds))
        top = np.sort(np.linalg.eigvalsh(one.adjacency))[-one.features :]
        half = stats.sem(right) * stats.t.ppf(0.975, seeds - 1)
        wrong = name == "MLP, disjoint"
        yield Measurement(
            f"accuracy of a trained encoder, {name}",
            "At equal loss an MLP is not right, as augmentations do not overlap."
            if wrong
            else "At equal loss a linear encoder is right, an MLP is right if augmentations "
            "overlap.",
            _PAPER,
            None if wrong else 1.0,
            float(right.mean()),
            float(stats.sem(right)),
            tolerance=0.01,
            at_most=0.99 if wrong else None,
            note=f"By seed: {', '.join(f'{r:.2f}' for r in np.sort(right))}; 95 % interval +- "
            f"{half:.2f}; loss at most {(losses + (top**2).sum()).max():.0e} above the least.",
        )
